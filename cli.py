"""The command line: every command translates its arguments, calls one function and prints."""

from __future__ import annotations

import _thread
import dataclasses
import functools
import io
import json
import math
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ._version import __version__
from .errors import FerrotypeError, printable

if TYPE_CHECKING:
    from .bundle import Bundle, Recipe
    from .runtime.memory import Recording
    from .runtime.pipeline import Pipeline
    from .runtime.plan import Plan
    from .runtime.samplers import Step

MAX_SEED = 2**64 - 1
SAMPLERS = ("ddim", "dpmpp_2m", "dpmpp_2m_karras", "euler", "euler_a", "lcm", "tcd", "unipc")
SPACINGS = ("leading", "trailing", "linspace", "lcm")
RECIPES = (
    "base", "lcm", "lcm-lora", "tcd", "sd-turbo", "sdxl-turbo", "lightning-1", "lightning-2",
    "lightning-4", "lightning-8", "hyper-1", "hyper-unified", "hyper-2", "hyper-4", "hyper-8",
    "hyper-cfg-8", "hyper-cfg-12",
)  # fmt: skip
RNGS = ("torch", "numpy", "pcg64")
TARGETS = ("onnx", "native", "coreml", "tensorrt")
CHECKS = ("diffusers", "engine")
ACTIVATIONS = ("fp32", "fp16", "bf16", "int8")
DEPLOYMENTS = ("ios16", "ios17", "ios18", "macos13", "macos14", "macos15")
COMPUTE_UNITS = ("all", "cpu_and_ne", "cpu_and_gpu", "cpu_only")
FORCE = "Replace files; draw against a few-step model's recipe."
STRENGTH = "How much of the picture to change, 0 to 1.  [default: 0.6]"


class Size(click.ParamType):
    """`512x768` (width x height) or `512` for a square."""

    name = "size"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", value.strip().lower())
        if not match:
            self.fail(f"{value!r} is not a size: write WIDTHxHEIGHT, for example 512x512")
        return int(match[1]), int(match[2] or match[1])


class Bytes(click.ParamType):
    """`512MiB`, `1.5GB`: an amount of memory."""

    name = "memory"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        from .runtime.memory import parse_bytes

        if isinstance(value, int):
            return value
        try:
            return parse_bytes(value)
        except ValueError as error:
            self.fail(printable(str(error)))


class WithSuffix(click.ParamType):
    """`FILE`, or `FILE:` and more; a colon of the path itself (`C:`) is no separator.

    Given as (path, what follows or None).
    """

    name = "file"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[Path, Any]:
        if isinstance(value, tuple):
            return value
        file, colon, rest = value.rpartition(":")
        drive = len(file) == 1 and not Path(file).is_file()
        if not colon or drive or Path(value).is_file() or "/" in rest or "\\" in rest:
            return Path(value), None
        return Path(file), self.read(rest)

    def read(self, text: str) -> Any:
        if not text:
            self.fail("nothing follows the colon")
        return text


class Weight(WithSuffix):
    """`FILE` or `FILE:0.8`."""

    def read(self, text: str) -> float:
        try:
            weight = float(text)
        except ValueError:
            self.fail(f"weight {text!r} is not a number: write FILE:0.8")
        if not math.isfinite(weight):
            self.fail(f"weight {text} is not finite: write FILE:0.8")
        return weight


class Commands(click.Group):
    """Turns what goes wrong outside the program into one line and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except FerrotypeError as error:
            raise click.ClickException(printable(str(error))) from error
        except KeyboardInterrupt as stop:
            click.echo("Error: interrupted; what was unfinished is removed", err=True)
            ctx.exit(stop.args[0] if stop.args else 130)
        except OSError as error:
            if isinstance(error, BrokenPipeError):
                raise
            where = f"{error.filename}: " if error.filename else ""
            raise click.ClickException(printable(f"{where}{error.strerror or error}")) from error
        except MemoryError as error:
            raise click.ClickException("out of memory: try a smaller --size") from error


@contextmanager
def usage() -> Iterator[None]:
    """A ValueError about an argument is a usage error: exit code 2."""
    try:
        yield
    except ValueError as error:
        raise click.UsageError(printable(str(error))) from error


def terminate(*_: object) -> None:
    raise KeyboardInterrupt(143)  # unwinds, so that clean-up runs


def send_again(lost: Any) -> None:
    """An interrupt that falls into a destructor is dropped by Python: it comes once more."""
    if not issubclass(lost.exc_type, KeyboardInterrupt):
        return sys.__unraisablehook__(lost)
    number = signal.SIGTERM if lost.exc_value and lost.exc_value.args else signal.SIGINT
    return threading.Timer(0.05, _thread.interrupt_main, [number]).start()


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ferrotype")
def main() -> None:
    """Stable Diffusion for edge devices: checked conversion, few steps, no torch to draw.

    \b
    Example:
        ferrotype generate "a red apple on a sky blue background" -o apple.png

    FERROTYPE_ISA=avx2 (or scalar, avx512, ...) holds the native engine to an instruction set.
    """
    signal.signal(signal.SIGTERM, terminate)
    sys.unraisablehook = send_again
    warnings.showwarning = lambda message, *_: click.echo(
        f"note: {printable(str(message))}", err=True
    )
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path may hold what the encoding has not
        sys.stdout.reconfigure(errors="backslashreplace")


BUNDLE = FILE = click.Path(path_type=Path)
size_option = click.option("--size", type=Size(), help="WIDTHxHEIGHT, or one number for a square.")
memory_options = [
    click.option(
        "--memory", type=Bytes(), metavar="512MiB", help="Budget.  Default: 3/4 of what is free."
    ),
    click.option("--tiles", is_flag=True, help="If nothing else fits: the picture changes a bit."),
    click.option("--threads", type=click.IntRange(1, 64), help="Default: one per core."),
]
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
sampler_options = [
    click.option("-n", "--steps", type=click.IntRange(1, 1000), help="Default: the bundle's."),
    click.option("--sampler", type=click.Choice(SAMPLERS), help="Default: the bundle's."),
    click.option("--spacing", type=click.Choice(SPACINGS), help="Timesteps of another sampler."),
    click.option("--guidance", type=click.FloatRange(0, 50), help="0, 1: none. Default: bundle's."),
]


def isa() -> str | None:
    """The instruction set that FERROTYPE_ISA asks the native engine for; None: the best."""
    name = os.environ.get("FERROTYPE_ISA")
    if not name:
        return None
    return known_isa(name, f"FERROTYPE_ISA={printable(name)}")


def known_isa(name: str, asked: str) -> str:
    """The name, if this machine runs that instruction set; else a usage error about `asked`."""
    from . import kernels

    if kernels.available() and name not in kernels.isas():
        known = f"it runs {', '.join(kernels.isas())}"
        if name in kernels.isas(supported=False):
            raise click.UsageError(f"{asked}: this machine has it not; {known}")
        raise click.UsageError(
            f"{asked} is no instruction set that this build knows; on this machine {known}"
        )
    return name


PICTURES = (".png", ".jpg", ".jpeg", ".webp")
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction"}  # as schedulers spell them


def with_options(options: Sequence[Any]) -> Any:
    """Apply several options to a command, shown in the order given."""

    def apply(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return apply


# --- convert ------------------------------------------------------------------------------------


@main.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=BUNDLE, help="Default: the checkpoint's name with .ferro.")
@click.option("--target", type=click.Choice(TARGETS), default="onnx", show_default=True)
@click.option("--weights", metavar="FORM", help="fp16, bf16, w8, p6 ..., or a recipe's file.")
@click.option("--activations", type=click.Choice(ACTIVATIONS), help="What it computes in.")
@click.option(
    "--size", "sizes", type=Size(), multiple=True, help="Draw only this; may be repeated."
)
@click.option("--deployment", type=click.Choice(DEPLOYMENTS), help="Core ML: the oldest system.")
@click.option("--compute-units", type=click.Choice(COMPUTE_UNITS), help="Core ML.")
@click.option("--attention", type=click.Choice(["original", "split-einsum"]), help="Core ML.")
@click.option("--chunks", type=click.IntRange(1, 16), help="Core ML: pieces of the U-Net.")
@click.option("--layout", type=click.Choice(["ferrotype", "apple"]), help="Core ML: names, shapes.")
@click.option(
    "--compute-capability", metavar="8.6,8.9,...", help="TensorRT: GPUs to build engines for."
)
@click.option("--weight-streaming", is_flag=True, help="TensorRT: engines that stream weights.")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="Folder of another tokenizer.")
@click.option("--prediction", type=click.Choice(["epsilon", "v"]), help="What the U-Net predicts.")
@click.option(
    "--vae", "vaes", type=FILE, multiple=True, help="Another autoencoder's file, or TAESD's two."
)
@click.option(
    "--lora", "loras", type=Weight(), multiple=True, metavar="FILE[:WEIGHT]", help="Merge it."
)
@click.option(
    "--embedding", "embeddings", type=WithSuffix(), multiple=True, metavar="FILE[:TOKEN]",
    help="Textual inversion.",
)  # fmt: skip
@click.option("--recipe", type=click.Choice(RECIPES), help="Of a few-step model: docs/samplers.md.")
@click.option(
    "--clip-skip", type=click.IntRange(0, 31), help="Text layers to leave out: 1 is usual."
)
@click.option(
    "--original", type=click.Path(path_type=Path), help="Compare Optimum's export with it."
)
@click.option(
    "--check",
    type=click.Choice(CHECKS),
    help="Compare with.  Default: diffusers, if there.",
)
@click.option("--name", help="Name of the model.  Default: the checkpoint's own.")
@click.option("--licence", help="Licence of the model.  Default: what its model card says.")
@click.option("-f", "--force", is_flag=True, help="Replace a bundle of that name.")
@json_option
def convert(
    checkpoint, output, target, weights, activations, sizes, deployment, compute_units, attention,
    chunks, layout, compute_capability, weight_streaming, tokenizer, prediction, vaes, loras,
    embeddings, recipe, clip_skip, original, check, name, licence, force, as_json,
):  # fmt: skip
    """Convert CHECKPOINT to a bundle: a folder in the diffusers layout, or a file.

    A file is safetensors or .ckpt in the original naming, or GGUF; nothing in it is executed.
    `ferrotype inspect CHECKPOINT` tells what it is.

    Every component is compared with the original after it was written, and so is a picture; below
    the floor nothing is kept.  The native target, our own engine for CPUs, computes in bf16 if not
    told otherwise, ONNX in fp32, Core ML and TensorRT in fp16; packages and graphs for the last two
    are checked here, without the device, and `verify --on-device` checks there.  A folder that
    Optimum exported becomes an ONNX bundle of its graphs, compared only with an --original.

    A LoRA (kohya, LyCORIS, diffusers, PEFT) is merged before weights are quantized; every tensor of
    its file must apply.  An embedding's token is then a word of every prompt.

    \b
    Example:
        ferrotype convert stable-diffusion-v1-5/ -o sd15.ferro
        ferrotype convert v1-5-pruned-emaonly.safetensors --target native --weights fp16
        ferrotype convert sd-turbo.safetensors --prediction epsilon --vae taesd.safetensors
        ferrotype convert stable-diffusion-v1-5/ --target coreml --weights p6 --chunks 2
        ferrotype convert stable-diffusion-v1-5/ --target tensorrt --compute-capability 8.9
        ferrotype convert stable-diffusion-v1-5/ --lora lcm.safetensors --lora ink.safetensors:0.7
        ferrotype convert stable-diffusion-v1-5/ --embedding "cat.safetensors:<cat>"
        ferrotype convert sdxl-lightning-4step/ --target native --recipe lightning-4
    """
    from .convert import (
        CoremlOptions,
        NativeOptions,
        OptionError,
        TensorrtOptions,
        checked_with,
        stages,
    )  # fmt: skip
    from .convert import convert as convert_checkpoint
    from .convert.checkpoint import is_exported, open_checkpoint

    coreml = {
        "--deployment": deployment, "--compute-units": compute_units, "--attention": attention,
        "--chunks": chunks, "--layout": layout,
    }  # fmt: skip
    tensorrt = {
        "--compute-capability": compute_capability, "--weight-streaming": weight_streaming
    }  # fmt: skip
    check_only_for("coreml", target, coreml)
    check_only_for("tensorrt", target, tensorrt)
    options: CoremlOptions | NativeOptions | TensorrtOptions | None = None
    if target == "native":
        options = NativeOptions(isa())
    elif target == "coreml":
        options = CoremlOptions(**given(coreml))
    elif target == "tensorrt":
        chosen = given(tensorrt)
        if "compute_capability" in chosen:
            text = chosen.pop("compute_capability")
            chosen["capabilities"] = tuple(part.strip() for part in text.split(","))
        options = TensorrtOptions(**chosen)
    exported = is_exported(checkpoint)
    if exported:
        check_only_for("a checkpoint", "an export of Optimum's", {
            "--tokenizer": tokenizer, "--prediction": prediction, "--vae": vaes, "--lora": loras,
            "--embedding": embeddings, "--recipe": recipe, "--clip-skip": clip_skip,
        })  # fmt: skip
        opened, label = checkpoint, checkpoint.resolve().name
        encoders = 2 if (checkpoint / "text_encoder_2").is_dir() else 1
    else:
        opened = open_checkpoint(checkpoint, tokenizer, PREDICTIONS.get(prediction), vaes)
        label, encoders = opened.name, len(opened.tokenizers)
    output = output or Path(f"{label}.ferro")
    try:
        checked = checked_with(target, check)
    except OptionError as error:
        raise click.UsageError(printable(str(error))) from error
    total = stages(encoders, exported and original is None, checked)
    with Progress("convert", total) as progress:
        try:
            bundle = convert_checkpoint(
                opened, output, target, read_weights(weights), activations, sizes, options,
                name, licence, force, progress.stage, recipe, clip_skip or 0,
                loras=[(path, 1.0 if weight is None else weight) for path, weight in loras],
                embeddings=embeddings, original=original, check=checked, written=progress.part,
            )  # fmt: skip
        except OptionError as error:
            raise click.UsageError(printable(str(error))) from error
    if as_json:
        told = {"bundle": str(output), "peak_bytes": peak(), "parity": bundle.manifest.parity}
        click.echo(json.dumps(told))
        return
    click.echo(parity_table(bundle.manifest.parity))
    if more := columns([*weights_rows(bundle.manifest.parity), *memory_rows(bundle)]):
        click.echo(more)
    for note in bundle.manifest.parity["notes"]:
        click.echo(f"note: {printable(note)}", err=True)
    size = mib(sum(f.bytes for f in bundle.manifest.files.values()))
    most = peak()
    click.echo(f"{output}  {size}" + (f", converted within {mib(most)} of memory" if most else ""))


def peak() -> int | None:
    """The most bytes that this process, or one that it started, has had in memory."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    each = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    most = max(resource.getrusage(who).ru_maxrss for who in each)
    return most if sys.platform == "darwin" else most << 10


# --- quantize -----------------------------------------------------------------------------------


class Seeds(click.ParamType):
    """Whole numbers with commas between them."""

    name = "0,1,..."

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        parts = value if isinstance(value, tuple) else value.split(",")
        if not all(str(part).strip().isdecimal() for part in parts):
            self.fail(f"{value!r} is not seeds: whole numbers like 0,1,2", param, ctx)
        return tuple(int(part) for part in parts)


@main.command()
@click.argument("bundle", type=BUNDLE)
@click.option("-o", "--output", type=BUNDLE, required=True, help="The bundle to write.")
@click.option("--weights", metavar="FORM", help="w8, w4, or a recipe's file.")
@click.option("--size-budget", type=Bytes(), metavar="450MB", help="Best forms of that size.")
@click.option("--psnr-floor", type=float, metavar="DB", help="Smallest forms of that quality.")
@click.option(
    "--activations",
    type=click.Choice(ACTIVATIONS),
    help="What it computes in; int8: with int8 weights.  Default: the bundle's.",
)
@click.option("--no-calibration", is_flag=True, help="Round without drawing first: faster, worse.")
@click.option("--prompts", type=FILE, help="To calibrate with, one a line.  Default: eight.")
@click.option("--seeds", type=Seeds(), default="0", show_default=True, help="To calibrate with.")
@click.option("-n", "--steps", type=click.IntRange(1, 1000), help="Default: the bundle's.")
@size_option
@click.option("--recipe-out", type=FILE, help="Also write what was chosen, to use it again.")
@click.option("-f", "--force", is_flag=True, help="Replace what is there.")
@json_option
def quantize(
    bundle, output, weights, size_budget, psnr_floor, activations, no_calibration, prompts, seeds,
    steps, size, recipe_out, force, as_json,
):  # fmt: skip
    """Make BUNDLE smaller: a native one whose weights are fp32, bf16 or fp16.

    It draws a few pictures to see what every layer reads, rounds so that errors make up for each
    other, compares the result with the original that the bundle carries, and draws other prompts
    with both: their figures and a sheet, check/quantized.png, are kept in the new bundle.  What is
    measured with has sides up to 256 and 2 or 4 steps, unless --size and --steps say more.  With
    --size-budget or --psnr-floor every layer is tried in every form first, and check/frontier.png
    plots what other sizes would give.

    \b
    Example:
        ferrotype convert stable-diffusion-v1-5/ --target native --weights fp32 -o sd15.ferro
        ferrotype quantize sd15.ferro --weights w8 --activations int8 -o sd15-w8.ferro
        ferrotype quantize sd15.ferro --size-budget 600MB -o sd15-mixed.ferro
    """
    from .bundle import staging
    from .quantize import mixed, report
    from .quantize.apply import check_quantizable, quantize_bundle
    from .quantize.calibrate import PROMPTS, SIDE, Statistics, calibrate
    from .runtime import pictures

    if sum(given is not None for given in (weights, size_budget, psnr_floor)) != 1:
        raise click.UsageError("give one of --weights, --size-budget and --psnr-floor")
    if (bundle / "model_index.json").is_file() and not (bundle / "manifest.json").exists():
        raise click.UsageError(
            f"{bundle} is a checkpoint: convert it first, ferrotype convert {bundle} "
            "--target native --weights fp32 --activations fp32"
        )
    source, told = open_bundle(bundle), read_prompts(prompts) if prompts else list(PROMPTS)
    if recipe_out:
        pictures.check_free(recipe_out, force)
    activations = activations or source.manifest.precision.activations
    recipe = form_or_recipe(weights) if weights else None
    check_quantizable(source, recipe or form_or_recipe("w8"), activations)
    with staging(output, force):  # refused now, not after the pictures
        pass
    statistics: Statistics = {}
    frontier: dict[str, Any] = {}
    if not no_calibration:
        with Progress("calibrate", len(told)) as progress:
            statistics = calibrate(source, told, seeds, size, steps, progress.stage)
    if recipe is None:
        few = told[: 1 if max(source.manifest.sizes.default) > SIDE else 2]
        measured = functools.partial(
            mixed.measure, source, statistics, activations, few, seeds[:1], size, steps
        )
        recipe, frontier = mixed_recipe(measured, source, size_budget, psnr_floor)
    drawn: list[report.Drawn] = []

    def evaluate(made: Bundle) -> dict[str, Any]:
        drawn[:] = report.draw(source, made, steps=steps, size=size, progress=progress.stage)
        report.sheet(drawn).save(made.folder / "check" / "quantized.png")
        told = {"bytes": weight_bytes(made), "bytes_before": weight_bytes(source), **frontier}
        if frontier:
            plot = report.frontier(frontier["frontier"], frontier["uniform"], told["bytes"])
            plot.save(made.folder / "check" / "frontier.png")
        return {**report.figures(drawn), **told}

    total = 2 * len(source.manifest.components) + 1 + len(report.PROMPTS)
    with Progress("quantize", total) as progress:
        made = quantize_bundle(
            source, output, recipe, activations, statistics, force, progress.stage, evaluate
        )
    if recipe_out:
        with pictures.new_file(recipe_out, force) as stream:
            stream.write(recipe.dump().encode())
    if as_json:
        click.echo(json.dumps({"bundle": str(output), "parity": made.manifest.parity}))
        return
    click.echo(parity_table(made.manifest.parity))
    click.echo(
        columns([*weights_rows(made.manifest.parity), *quantized_rows(made.manifest.parity)])
    )
    before, after = (weight_bytes(b) for b in (source, made))
    click.echo(f"{output}  weights {mib(after)}, were {mib(before)}")


def form_or_recipe(text: str) -> Any:
    """A recipe: one form for all, or what a file says."""
    from .quantize.recipe import Recipe

    found = read_weights(text)
    with usage():
        return Recipe.uniform(found) if isinstance(found, str) else found


def mixed_recipe(
    measured: Callable, source: Bundle, size_budget: int | None, psnr_floor: float | None
) -> tuple[Any, dict[str, Any]]:
    """Every matrix in every form, and the best of them; also what other sizes would give."""
    from .quantize import mixed

    total = sum(map(len, matrix_names(source).values()))
    with Progress("try every layer", total) as progress:
        table = measured(progress=lambda done, of: progress.advance(1))
    if size_budget is not None:
        forms = mixed.within(table, size_budget)
    else:
        assert psnr_floor is not None
        forms = mixed.at_least(table, psnr_floor)
    told = {"frontier": mixed.frontier(table), "uniform": mixed.uniform_points(table)}
    return mixed.recipe_of(table, forms), told


def matrix_names(bundle: Bundle) -> dict[str, list[str]]:
    """The matrices of every component of a native bundle."""
    from .runtime import models

    return {
        name: [r.name for r in models.weights(name, s.config, s.outputs) if r.is_matrix]
        for name, s in bundle.manifest.components.items()
    }


def read_prompts(path: Path) -> list[str]:
    """The lines of a file that are not empty, of which there must be some."""
    text = path.read_text(encoding="utf-8", errors="replace")
    found = [line.strip() for line in text.splitlines() if line.strip()]
    if not found:
        raise click.UsageError(f"{path} has no prompts: write one a line")
    return found


def weight_bytes(bundle: Bundle) -> int:
    return sum(f.bytes for n, f in bundle.manifest.files.items() if n.endswith("/weights.bin"))


def quantized_rows(parity: dict[str, Any]) -> list[tuple[str, ...]]:
    """What fewer bits did to pictures, where that was measured."""
    try:
        found = parity["quantized"]
        count = len(found["pictures"])
        mean = f"PSNR {found['mean_psnr']:.1f} dB, SSIM {found['mean_ssim']:.3f}"
        worst = f"at worst {found['worst_psnr']:.1f} dB, {found['worst_ssim']:.3f}"
        return [("pictures", f"{count} before and after: {mean}; {worst}", "")]
    except (KeyError, TypeError, ValueError):  # it is free-form to the format
        return []


def check_only_for(owner: str, target: str, options: dict[str, Any]) -> None:
    """An option of another target would be ignored, so it is a usage error."""
    for name, value in options.items():
        if value and target != owner:
            raise click.UsageError(f"{name} is an option of --target {owner}, not of {target}")


def given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given, as the keywords that they are."""
    return {k.removeprefix("--").replace("-", "_"): v for k, v in options.items() if v}


def read_weights(text: str | None) -> Any:
    """A form's name as it is, a recipe's file as what it says."""
    if text is None or not text.endswith(".json"):
        return text
    from .quantize.recipe import Recipe

    return Recipe.load(text)


# --- generate -----------------------------------------------------------------------------------


@main.command()
@click.argument("prompts", metavar="PROMPT...", nargs=-1, required=True)
@click.option("-b", "--bundle", type=BUNDLE, help="Default: the embedded emoji model.")
@click.option("-o", "--output", type=FILE, help="PNG to write.  Default: named after the prompt.")
@with_options(sampler_options)
@click.option("--negative", default="", metavar="PROMPT", help="What to keep away from.")
@click.option("--seed", type=click.IntRange(0, MAX_SEED), default=0, show_default=True)
@click.option("--rng", type=click.Choice(RNGS), default="torch", show_default=True)
@size_option
@click.option("--image", type=FILE, help="Picture to start from.")
@click.option("--strength", type=click.FloatRange(0, 1, min_open=True), help=STRENGTH)
@click.option("--count", type=click.IntRange(1, 1000), default=1, help="Pictures; seeds count up.")
@click.option("--preview", type=click.IntRange(1), metavar="N", help="Also write every Nth step.")
@click.option("--preview-decoder", is_flag=True, help="Previews by the decoder: slower, exact.")
@click.option("--grid", type=FILE, help="Also write all pictures on one sheet.")
@with_options(memory_options)
@click.option("--trace", type=FILE, help="Record memory while drawing: JSON for plan --trace.")
@click.option("-f", "--force", is_flag=True, help=FORCE)
@json_option
def generate(
    prompts, bundle, output, steps, sampler, spacing, guidance, negative, seed, rng, size, image,
    strength, count, preview, preview_decoder, grid, memory, tiles, threads, trace, force, as_json,
):  # fmt: skip
    """Draw PROMPT with a bundle; several prompts and --count make several pictures.

    What it takes is planned before anything is loaded, and refused if it is more than --memory,
    which is counted above what the interpreter takes: `ferrotype plan` shows it.  The budget
    changes time, never the picture.

    In a prompt (word:1.3) weighs more, (word) 1.1 times, [word] less, \\( is a parenthesis, and
    BREAK begins a new chunk; what is longer than the text encoder reads goes on in chunks.

    \b
    Example:
        ferrotype generate "a penguin on a pink background" -o penguin.png --seed 7
        ferrotype generate "a (red:1.3) apple, [leaves]" -b sd15.ferro --negative blurry
        ferrotype generate "a lighthouse" -b sd15.ferro --memory 256MiB
    """
    from .runtime import pictures, samplers
    from .runtime.pipeline import Pipeline

    guard_files()
    if strength is not None and image is None:
        raise click.UsageError("--strength needs --image")
    if preview_decoder and not preview:
        raise click.UsageError("--preview-decoder needs --preview")
    if seed + count - 1 > MAX_SEED:
        raise click.UsageError(f"--seed {seed} and {count - 1} more go past {MAX_SEED}")
    chosen = {
        "steps": steps, "sampler": sampler, "spacing": spacing, "guidance": guidance,
        "negative": negative, "rng": rng, "size": size, "strength": strength or 0.6,
        "image": image and pictures.open_picture(image), "force": force,
    }  # fmt: skip
    jobs = [(prompt, seed + i) for prompt in prompts for i in range(count)]
    paths = output_paths(output, jobs)
    tracer = start_trace(trace, memory)
    with usage():
        pipe = Pipeline.load(
            bundle, threads, isa=isa(), memory=budget(memory), tiles=tiles,
            watch=tracer.mark if tracer else lambda component: None,
        )  # fmt: skip
        # Arguments are checked here; nothing is loaded before the first step is asked for.
        runs = [pipe.steps(prompt, seed=one, **chosen) for prompt, one in jobs]
        recipe = asked_recipe(pipe, steps, sampler, guidance, spacing, force)
        total = len(samplers.table(recipe, chosen["strength"] if image else None).rows)
    shown_at = range(preview, total + 1, preview) if preview else ()
    shown = [step_path(path, index, total) for path in paths for index in shown_at]
    files = [*paths, *shown, *([grid] if grid else []), *([trace] if trace else [])]
    for path, times in Counter(files).items():
        if times > 1:
            raise click.UsageError(f"{path} would be written twice: choose another name")
        pictures.check_free(path, force)
    latents = []
    with tracer or nullcontext(), Progress("text encoder", 1) as progress:
        for prompt in dict.fromkeys(prompts):
            if not prompt.strip():
                click.echo("note: the prompt is empty: the model draws what it likes", err=True)
            pipe.encode(prompt, pipe.chunks(prompt, negative))
        for run, path in zip(runs, paths, strict=True):
            for step in progress.steps(run, path.name):
                if step.index in shown_at:
                    guess = pipe.preview(step, preview_decoder)
                    pictures.save_png(guess, step_path(path, step.index, total), {}, force)
            latents.append(step.latents)
        drawn = []
        for latent, path, (prompt, one) in zip(latents, paths, jobs, strict=True):
            drawn.append(pipe.decode(latent))
            text = run_settings(pipe, prompt, one, chosen)
            pictures.save_png(drawn[-1], path, text, force)
            click.echo(json.dumps({"path": str(path), **text}) if as_json else str(path))
    if grid:
        across = count if count > 1 else pictures.landscape(len(drawn))
        rows = [drawn[i : i + across] for i in range(0, len(drawn), across)]
        pictures.save_png(pictures.contact_sheet(rows), grid, {}, force)
        click.echo(json.dumps({"path": str(grid)}) if as_json else str(grid))
    if tracer:
        with pictures.new_file(trace, force) as stream:
            stream.write(tracer.recording.to_json().encode())
        click.echo(json.dumps({"path": str(trace)}) if as_json else str(trace))


def asked_recipe(
    pipe: Pipeline,
    steps: int | None,
    sampler: str | None,
    guidance: float | None,
    spacing: str | None,
    force: bool,
) -> Recipe:
    """The recipe of a run, with a note where `force` takes it against the bundle's own."""
    from .runtime import recipes

    recipe = pipe.recipe(steps, sampler, guidance, spacing, force=force)
    try:
        recipes.check(recipe, pipe.manifest.recipe)
    except recipes.RecipeRefusal as refusal:
        reason = str(refusal).rpartition(": use ")[0]
        click.echo(f"note: forced, {printable(reason)}", err=True)
    return recipe


def budget(asked: int | None) -> int | None:
    """Bytes that a run may take: those asked for, or what leaves the machine usable."""
    from .runtime import memory

    free = memory.available()
    if asked and free and asked > free:
        click.echo(
            f"note: --memory {memory.format_bytes(asked)} is more than the "
            f"{memory.format_bytes(free)} that are free here",
            err=True,
        )
    return asked or memory.default_budget()


def guard_files() -> None:
    """A weights file that is cut short while it is read is an error, not the end of the process."""
    from . import kernels

    kernels.guard()


def start_trace(path: Path | None, asked: int | None) -> Any:
    """What records memory, if it is wanted."""
    if path is None:
        return None
    from .runtime.memory import Trace

    return Trace(budget=asked)


def output_paths(output: Path | None, jobs: Sequence[tuple[str, int]]) -> list[Path]:
    """A file per picture: `output`, numbered if there are several, or the prompt and the seed."""
    if output is None:
        names = [f"{slug(prompt)}-{seed}" for prompt, seed in jobs]
        numbered = [f"{n}-{i}" if names.count(n) > 1 else n for i, n in enumerate(names, 1)]
        return [Path(f"{name}.png") for name in numbered]
    if output.suffix.lower() != ".png":
        raise click.UsageError(f"-o {output}: pictures are PNG, name it {output.stem}.png")
    if len(jobs) == 1:
        return [output]
    digits = len(str(len(jobs)))
    return [output.with_stem(f"{output.stem}-{i:0{digits}}") for i in range(1, len(jobs) + 1)]


def slug(prompt: str) -> str:
    """A file name from a prompt: ASCII words of it, at most 40 characters."""
    return "-".join(re.findall(r"[a-z0-9]+", prompt.lower()))[:40].strip("-") or "picture"


def step_path(path: Path, index: int, total: int) -> Path:
    return path.with_stem(f"{path.stem}-step{index:0{len(str(total))}}")


def run_settings(pipe: Pipeline, prompt: str, seed: int, chosen: dict[str, Any]) -> dict[str, str]:
    """What the PNG says about its making: enough to make it again."""
    options = {key: chosen[key] for key in ("steps", "sampler", "guidance", "spacing")}
    recipe = pipe.recipe(**options, force=True)
    width, height = chosen["size"] or pipe.manifest.sizes.default
    text = {
        "prompt": prompt,
        "negative": chosen["negative"],
        "seed": str(seed),
        "rng": chosen["rng"],
        "sampler": recipe.sampler,
        "steps": str(recipe.steps),
        "guidance": f"{recipe.guidance:g}",
        "size": f"{width}x{height}",
        "strength": f"{chosen['strength']:g}" if chosen["image"] else "",
        "bundle": pipe.manifest.model,
        "bundle_sha256": pipe.bundle.sha256,
        "software": f"ferrotype {__version__}",
    }
    return {key: value for key, value in text.items() if value or key == "prompt"}


# --- inspect, verify, plan ----------------------------------------------------------------------


@main.command()
@click.argument("path", type=BUNDLE, required=False)
@json_option
def inspect(path: Path | None, as_json: bool) -> None:
    """Show what a bundle or a checkpoint holds, or with what a PNG was drawn.

    Default: the embedded bundle.

    \b
    Example:
        ferrotype inspect apple.png
        ferrotype inspect v1-5-pruned-emaonly.safetensors
    """
    if path is not None and is_checkpoint(path):
        from .convert.checkpoint import open_checkpoint, summary

        seen = summary(open_checkpoint(path))
        click.echo(json.dumps(seen, indent=1) if as_json else checkpoint_text(seen))
        return
    if path is not None and path.is_file() and path.name != "manifest.json":
        from .runtime.pictures import read_text

        settings = read_text(path)
        if not settings and not as_json:
            raise FerrotypeError(f"{path} says nothing of how it was drawn")
        click.echo(json.dumps(settings) if as_json else columns(settings.items()))
        return
    bundle = open_bundle(path)
    click.echo(bundle_json(bundle) if as_json else describe(bundle))


@main.command()
@click.argument("bundle", type=BUNDLE, required=False)
@click.option("--on-device", is_flag=True, help="Also run it here, against the original's runs.")
@json_option
def verify(bundle: Path | None, on_device: bool, as_json: bool) -> None:
    """Hash every file of BUNDLE and compare with its manifest.  Default: the embedded bundle.

    With --on-device, this machine runs every component on the inputs that the bundle carries and
    draws its picture: both are compared with what the original returned, by the same floors.

    \b
    Example:
        ferrotype verify sd15.ferro --on-device
    """
    from .bundle import verify as hash_all

    opened = open_bundle(bundle)
    total = sum(file.bytes for file in opened.manifest.files.values())
    with Progress("verify", total) as progress:
        problems = hash_all(opened, progress.advance)
    report = None
    if on_device and not problems:
        from .runtime import check
        from .runtime.engines import open_engine

        opener = functools.partial(open_engine, isa=isa())
        with Progress("on the device", len(opened.manifest.components) + 1) as progress:
            report = check.compare(opened, opener, progress.stage)
        problems = list(check.problems(report))
    if as_json:
        found = {"sha256": opened.sha256, "problems": problems}
        click.echo(json.dumps(found | ({"on_device": report} if report else {})))
    elif report:
        click.echo(parity_table(report))
    for problem in problems:
        click.echo(f"Error: {problem}", err=True)
    if problems:
        sys.exit(1)
    if not as_json:
        count = len(opened.manifest.files)
        click.echo(f"{opened.folder}: {count} files, {mib(total)}, all as the manifest says")


@main.command()
@click.argument("bundle", type=BUNDLE, required=False)
@with_options(sampler_options)
@size_option
@click.option("--strength", type=click.FloatRange(0, 1, min_open=True), help=STRENGTH)
@click.option("--prompt", default="", metavar="TEXT", help="Of this prompt: long ones take more.")
@with_options(memory_options)
@click.option("--plot", type=FILE, help="Draw memory over time: a PNG.")
@click.option("--trace", type=FILE, help="With --plot: what `generate --trace` measured, upon it.")
@click.option("--sampler-table", is_flag=True, help="Print the coefficients of every step.")
@click.option("-o", "--output", type=FILE, help="Save the plan, or the sampler table, as JSON.")
@click.option("-f", "--force", is_flag=True, help=FORCE)
@json_option
def plan(
    bundle, steps, sampler, spacing, guidance, size, strength, prompt, memory, tiles, threads, plot,
    trace, sampler_table, output, force, as_json,
):  # fmt: skip
    """Show what drawing with BUNDLE will take, before it is done.  Default: the embedded bundle.

    Every stage with its bytes above what the interpreter takes, and roughly its time; exit code 1
    and the smallest budget that would do if it does not fit.  With --strength, of a run that starts
    from a picture.

    \b
    Example:
        ferrotype plan sd15.ferro --memory 1GiB --size 512x512 --steps 4 --plot plan.png
        ferrotype plan --sampler-table --steps 8 -o lcm8.json
    """
    from .runtime import pictures, samplers
    from .runtime.pipeline import Pipeline

    if trace and not plot:
        raise click.UsageError("--trace needs --plot")
    with usage():
        pipe = Pipeline(open_bundle(bundle), threads, isa=isa(), budget=budget(memory), tiles=tiles)
        recipe = asked_recipe(pipe, steps, sampler, guidance, spacing, force)
        table = samplers.table(recipe, strength)
        if size:
            pipe.manifest.sizes.check(size)
        chunks = pipe.chunks(prompt)
        measured = read_trace(trace) if trace else None
    if sampler_table:
        text = samplers.to_json(table)
        shown = text if as_json else samplers.format_table(table)
    else:
        flops = speed(pipe.bundle, threads)
        made = pipe.plan(table, recipe.guidance, size, flops, chunks)
        text = plan_json(pipe.bundle, made)
        shown = text if as_json else plan_text(pipe, made, memory is not None)
        if plot:
            draw_plan(plot, made, pipe.manifest.model, measured, force)
            shown = str(plot)
    if output:
        with pictures.new_file(output, force) as stream:
            stream.write(text.encode())
        shown = str(output)
    click.echo(shown.rstrip("\n"))


@main.command("compile")
@click.argument("bundle", type=BUNDLE, required=False)
@click.option("-o", "--output", type=FILE, help="Default: the bundle's name with .ferroc.")
@click.option("--size", "sizes", type=Size(), multiple=True, help="Repeat for more sizes.")
@click.option("--chunks", type=click.IntRange(1, 32), default=1, help="Most of a prompt.")
@click.option(
    "--sampler", "samplers", type=click.Choice(SAMPLERS), multiple=True, help="Repeat for more."
)
@click.option(
    "-n", "--steps", type=click.IntRange(1, 1000), multiple=True, help="Default: all it allows."
)
@click.option("-f", "--force", is_flag=True, help="Replace what is there.")
@json_option
def compile_(bundle, output, sizes, chunks, samplers, steps, force, as_json):
    """Write what an app without Python needs to draw with BUNDLE, a native one: docs/embed-c.md.

    One file with every way to run it, fastest first, for any budget, number of threads and
    processor, beside the bundle, whose weights it does not repeat.

    \b
    Example:
        ferrotype compile sd15.ferro --size 512x512 --steps 4 -o sd15.ferroc
    """
    from .runtime import pictures
    from .runtime.compiled import compile_programs

    with usage():
        opened = open_bundle(bundle)
        output = output or Path(opened.folder.name).with_suffix(".ferroc")
        pictures.check_free(output, force)
        data = compile_programs(opened, sizes, chunks, samplers, steps)
    with pictures.new_file(output, force) as stream:
        stream.write(data)
    found = {"path": str(output), "bytes": len(data)}
    click.echo(json.dumps(found) if as_json else f"{output}: {mib(len(data))}")


def speed(bundle: Bundle, threads: int | None) -> float:
    """FLOP/s of this machine's multiply-accumulates, measured for a moment."""
    from . import kernels
    from .runtime import plan as plans
    from .runtime.engines.native import usable_threads
    from .runtime.program import activation_type

    kind = activation_type(bundle.manifest.precision.activations)
    if bundle.manifest.target != "native" or kind is None or not kernels.available():
        return plans.FLOPS
    name = isa() or kernels.isas()[0]
    return kernels.ceiling(name, kind, threads or usable_threads(), 0.05) or plans.FLOPS


def plan_text(pipe: Pipeline, made: Plan, scaled: bool) -> str:
    """A plan for a person: what is done, its bytes as bars, and what they are counted from.

    `scaled`: bars are parts of the budget, else of the peak.
    """
    from .runtime import memory, plot

    width, height = made.size
    head = f"{pipe.manifest.model}, {width}x{height}, {made.steps} steps, {made.threads} threads"
    rows = [
        (s.component, f"{s.mode}, run {s.runs} x", mib(s.weights - s.apart), mib(s.arena),
         mib(s.host), mib(made.during(s)), s.note)
        for s in made.stages
    ]  # fmt: skip
    titles = ("stage", "weights are", "weights", "activations", "other", "at once", "")
    now = memory.read()
    resident = now.resident if now else None
    own = f", {memory.format_bytes(made.peak + resident)} with it" if resident else ""
    limit = f"; the budget is {memory.format_bytes(made.budget)}" if made.budget else ""
    peak = f"peak {memory.format_bytes(made.peak, up=True)} above the interpreter{own}{limit}"
    bars = "\n".join(plot.timeline(plot.spans_of(made), made.budget if scaled else None))
    device = "" if made.target in ("native", "onnx") else columns(memory_rows(pipe.bundle))
    return "\n\n".join(filter(None, [head, columns([titles, *rows]), bars, peak, device]))


def plan_json(bundle: Bundle, made: Plan) -> str:
    """A plan as JSON, and what each component takes on the devices that the bundle is made for."""
    device = {} if made.target in ("native", "onnx") else {
        name: {key: memory.total for key, memory in part.memory.items()}
        for name, part in bundle.manifest.components.items()
    }  # fmt: skip
    return json.dumps({**made.to_dict(), "device_bytes": device}, indent=1) + "\n"


def read_trace(path: Path) -> Recording:
    """What `generate --trace` wrote; ValueError for anything else."""
    from .runtime.memory import Recording

    return Recording.from_json(path.read_text(encoding="utf-8", errors="replace"))


def draw_plan(path: Path, made: Plan, model: str, measured: Recording | None, force: bool) -> None:
    """Memory over time as a PNG, with what was measured."""
    from .runtime import pictures, plot

    pictures.check_free(path, force)
    width, height = made.size
    title = f"{model}, {width}x{height}, {made.steps} steps"
    with usage():
        spans = plot.spans_of(made, measured)
        plot.draw(path, spans, made.budget, measured, title, force=force)


@main.command()
@click.argument("bundle", type=BUNDLE, required=False)
@click.option("--device", metavar="NAME", help="For example iphone-15-pro, pixel-9, jetson-orin.")
@click.option("--list", "listed", is_flag=True, help="Show the devices: memory, what an app gets.")
@size_option
@click.option("-n", "--steps", type=click.IntRange(1, 1000), help="Default: the bundle's.")
@json_option
def doctor(bundle, device, listed, size, steps, as_json):
    """Say whether BUNDLE fits a device, and what to convert if not.

    Exit code 0: it fits, perhaps only staged, streamed or in chunks; 1: it does not fit, or the
    device has no engine for it.  Default: the embedded bundle.  docs/doctor.md has the figures'
    sources.

    \b
    Example:
        ferrotype doctor sd15.ferro --device iphone-15-pro
    """
    from .runtime import doctor as doctors

    data = doctors.devices()
    if listed:
        entries = [dataclasses.asdict(found) for found in data.devices.values()]
        click.echo(json.dumps(entries) if as_json else columns(doctors.table(data)))
        return
    if not device:
        raise click.UsageError("give --device NAME, or --list to see the names")
    with usage():
        chosen, opened = data.find(device), open_bundle(bundle)
        run = doctors.new_run(opened, size, steps)
    found = doctors.examine(opened, chosen, run)
    click.echo(json.dumps(found.as_json()) if as_json else columns(doctors.rows(found)))
    if not found.fits:
        sys.exit(1)


# --- bench --------------------------------------------------------------------------------------


class Default(Commands):
    """A group whose first command is meant where none is named."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        named = bool(args) and (args[0] in self.commands or args[0] in ctx.help_option_names)
        return super().parse_args(ctx, args if named else [next(iter(self.commands)), *args])


class Percent(click.ParamType):
    """`2` or `2%`."""

    name = "percent"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"([0-9]{1,3}(?:\.[0-9]{1,6})?) *%?", value.strip())
        if not match or not 0 < float(match[1]) <= 100:
            self.fail(f"{printable(value)!r} is not a percentage: write 2 or 2%")
        return float(match[1]) / 100


RESULT = click.argument("results", metavar="[RESULT]...", nargs=-1)
STORE = "File of results.  Default: in the user's data folder."
store_option = click.option("--store", type=FILE, help=STORE)


@main.group(cls=Default)
def bench() -> None:
    """Measure bundles on this device: `ferrotype bench BUNDLE...` is `bench run BUNDLE...`.

    Results are kept in a file of this user's; a RESULT is a JSON file, or the first digits of the
    id of one that is kept.  docs/bench.md says how it is measured and what the figures mean.

    \b
    Example:
        ferrotype bench sd15.ferro --vary threads=1,2 size=256,512
        ferrotype bench report -o latency.html
    """


@bench.command(name="run")
@click.argument("bundles", metavar="[BUNDLE]...", nargs=-1)
@click.option("--vary", multiple=True, metavar="KEY=A,B", help="Cross settings; more may follow.")
@click.option("--seconds", type=click.FloatRange(1, 86400), default=60.0, show_default=True,
              help="Stop after so long, even if intervals are wider.")  # fmt: skip
@click.option("--interval", type=Percent(), default="2%", show_default=True,
              help="Stop when every 95 % interval is within so much of its median.")  # fmt: skip
@click.option("--rounds", type=click.IntRange(1, 100000), default=1000, help="At most.")
@click.option("--warmup", type=click.IntRange(0, 1000), default=1, show_default=True,
              help="Pictures that are not timed, of every fresh process.")  # fmt: skip
@click.option("--restart", type=click.IntRange(1, 100000), default=5, show_default=True,
              help="Rounds after which fresh processes go on.")  # fmt: skip
@size_option
@click.option("-n", "--steps", type=click.IntRange(1, 1000), help="Default: the bundle's.")
@click.option("--threads", type=click.IntRange(1, 64), help="Default: one per core.")
@click.option("--memory", type=Bytes(), metavar="512MiB", help="Budget.  Default: none.")
@click.option("--resident", is_flag=True, help="Load once, not for every picture.")
@click.option("--machine", metavar="NAME", help="What to call this device.  Default: its CPU.")
@click.option("--profile", type=FILE, help="Also time every op, and write a trace for Perfetto.")
@click.option("-o", "--output", type=FILE, help="Also write the result, as JSON.")
@store_option
@click.option("--no-store", is_flag=True, help="Keep it nowhere else.")
@click.option("-f", "--force", is_flag=True, help="Replace files.")
@json_option
def bench_run(
    bundles, vary, seconds, interval, rounds, warmup, restart, size, steps, threads, memory,
    resident, machine, profile, output, store, no_store, force, as_json,
):  # fmt: skip
    """Measure BUNDLEs: every picture's stages, memory and energy, each in turn, until it is known.

    Several bundles or settings take turns in rounds, so that heat and neighbours fall on all alike;
    the verdict says faster or slower only where the whole interval does.  Default: the embedded
    bundle.  An interrupt keeps what was measured.

    \b
    Example:
        ferrotype bench sd15-bf16.ferro sd15-w8.ferro --seconds 300
        ferrotype bench sd15.ferro --vary threads=1,2 size=256,512 precision=own,w8
        ferrotype bench sd15.ferro --profile trace.json
    """
    from .runtime import pictures
    from .runtime.bench import run as runs
    from .runtime.bench import trace, verdict
    from .runtime.bench.protocol import Limits
    from .runtime.bench.results import dumps
    from .runtime.engines.native import usable_threads

    kept = None if no_store else open_store(store)
    for path in filter(None, (output, profile)):
        pictures.check_free(path, force)
    if kept:
        kept.check()
    limits = Limits(rounds, seconds, interval, warmup=warmup, restart=restart)
    with ExitStack() as stack:
        with usage():
            chosen = bench_settings(
                stack, bundles, vary, size, steps, threads or usable_threads(), memory, resident
            )
        if profile:
            runs.check_native(chosen)
        watch = stack.enter_context(BenchProgress(seconds, kept))
        result, found = bench_measure(chosen, limits, watch, machine, bool(profile))
    shown = dumps(result) if as_json else bench_text(result)
    click.echo(shown.rstrip("\n"))
    for note in verdict.warnings(result):
        click.echo(f"note: {printable(note)}", err=True)
    if found:
        write_text(profile, trace.dumps(list(found.values())), force)
    if output:
        write_text(output, dumps(result), force)
    if watch.failed:
        raise watch.failed
    if kept:
        click.echo(f"kept as {result.id[:8]} in {kept.path}", err=True)
    if result.protocol.stopped == "interrupted":
        sys.exit(130)
    if any(variant.error for variant in result.variants):
        sys.exit(1)


def bench_measure(
    chosen: dict[str, Any], limits: Any, watch: BenchProgress, machine: str | None, profile: bool
) -> tuple[Any, dict[str, Any]]:
    """The result, and the ops of every variant if they are wanted; kept as soon as it is there."""
    from .runtime.bench import run as runs
    from .runtime.bench.protocol import RunnerError

    found: dict[str, Any] = {}
    try:
        result = runs.run(chosen, limits, watch.told, watch.stage, machine, command_line())
        watch.keep(result)
        if profile and result.protocol.stopped != "interrupted":
            watch.stage("ops")
            found = {v.name: runs.profile(v.name, chosen[v.name]) for v in result.measured}
            result = runs.with_ops(result, found)
            watch.keep(result)
    except RunnerError as error:
        if error.usage:
            raise click.UsageError(printable(str(error))) from error
        raise
    return result, found


def bench_settings(
    stack: ExitStack, bundles: Sequence[str], vary: Sequence[str], size: tuple[int, int] | None,
    steps: int | None, threads: int, memory: int | None, resident: bool,
) -> dict[str, Any]:  # fmt: skip
    """What takes turns, by name; other precisions are made in a folder that the stack removes.

    Arguments such as size=256,512 vary too, as they follow --vary.
    """
    from .bundle import load
    from .runtime.bench import subjects
    from .runtime.bench.worker import Settings
    from .runtime.pipeline import embedded

    settings = [text for text in bundles if "=" in text and not Path(text).exists()]
    paths = [Path(text) for text in bundles if text not in settings] or [embedded()]
    crossed = subjects.parse_vary([*vary, *settings])
    forms = crossed.pop("precision", {})
    opened = [load(path) for path in paths]
    names: dict[str, Any] = {}
    for bundle in opened:
        names[subjects.unique(bundle.folder.name.removesuffix(".ferro"), names)] = bundle
    if forms:
        names = in_precisions(stack, names, list(forms))
    base = Settings(Path(), threads, size or (0, 0), steps, isa(), memory, resident)
    for name in crossed.get("isa", {}):
        known_isa(name, f"isa={printable(name)}")
    return subjects.cross(list(names.items()), crossed, base)


def in_precisions(
    stack: ExitStack, bundles: dict[str, Any], forms: Sequence[str]
) -> dict[str, Any]:
    """Every bundle in every form: own as it is, w8 and the like rounded anew, for their speed."""
    import tempfile

    from .quantize.apply import check_quantizable, quantize_bundle

    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ferrotype-bench-")))
    found: dict[str, Any] = {}
    for name, bundle in bundles.items():
        for form in forms:
            label = f"precision={form}" if len(bundles) == 1 else f"{name} precision={form}"
            if form == "own":
                found[label] = bundle
                continue
            weights, _, activations = form.partition("+")
            activations = activations or bundle.manifest.precision.activations
            recipe = form_or_recipe(weights)
            check_quantizable(bundle, recipe, activations)
            click.echo(f"note: {label} is rounded without calibration: for its speed", err=True)
            target = folder / f"{len(found)}.ferro"
            found[label] = quantize_bundle(bundle, target, recipe, activations, {})
    return found


def bench_text(result: Any) -> str:
    """A result for a person: the machine, the table, the verdicts."""
    from .runtime.bench import run as runs
    from .runtime.bench import tables

    summary = grid(tables.summary(result), terminal_width())
    parts = [runs.machine_text(result.machine), tables.how(result), summary]
    memory = tables.memory(result)
    parts += [grid(memory)] if memory.rows else []
    for variant in result.variants:
        if variant.profile:
            parts.append(f"ops of {variant.name}\n{grid(tables.profile(variant.profile))}")
    return "\n\n".join([*parts, "\n".join(tables.sentences(result))])


def grid(table: Any, room: int | None = None) -> str:
    """A table as text, figures aligned right; turned if it is wider than `room` and narrower so."""
    text = _grid(table)
    if room is not None and _width(text) > room:
        turned = _grid(table.turned)
        text = min(text, turned, key=_width)
    return text


def _grid(table: Any) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for i, title in enumerate(table.head):
        side = "left" if i < table.texts else "right"
        made.add_column(title, justify=side, no_wrap=True)  # type: ignore[arg-type]
    for row in table.rows:
        made.add_row(*map(printable, row))
    stream = io.StringIO()
    color = sys.stdout.isatty()
    console = Console(file=stream, width=400, force_terminal=color, markup=False, highlight=False)
    console.print(made)
    return "\n".join(line.rstrip() for line in stream.getvalue().rstrip("\n").split("\n"))


def _width(text: str) -> int:
    """Columns of the widest line, without what colours it."""
    return max(len(line) for line in click.unstyle(text).split("\n"))


def terminal_width() -> int | None:
    """Columns of the terminal that stdout is; None if it is none."""
    return os.get_terminal_size(sys.stdout.fileno()).columns if sys.stdout.isatty() else None


def open_store(path: Path | None) -> Any:
    """The user's file of results, or another."""
    from .runtime.bench.store import Store

    return Store(path or data_folder() / "bench.sqlite")


def data_folder() -> Path:
    """Where this user's programs keep their data."""
    if sys.platform == "win32":
        place = os.environ.get("LOCALAPPDATA")
        return Path(place) / "ferrotype" if place else Path.home() / "AppData/Local/ferrotype"
    if sys.platform == "darwin":
        return Path.home() / "Library/Application Support/ferrotype"
    place = os.environ.get("XDG_DATA_HOME")
    return (Path(place) if place else Path.home() / ".local/share") / "ferrotype"


def command_line() -> str:
    """The command as a reader would type it: places of this machine are only their last names."""
    import shlex

    words = [Path(w).name if Path(w).is_absolute() else w for w in sys.argv[1:]]
    return printable(shlex.join(["ferrotype", *words]))[:4000]


def write_text(path: Path, text: str, force: bool) -> None:
    from .runtime import pictures

    with pictures.new_file(path, force) as stream:
        stream.write(text.encode())
    click.echo(str(path), err=True)


def read_results(names: Sequence[str], store: Path | None) -> list[Any]:
    """JSON files, or results that are kept by their ids; without any, the last that was kept."""
    from .runtime.bench import results

    if not names:
        return [open_store(store).last()]
    return [
        results.load(Path(name)) if Path(name).is_file() else open_store(store).find(name)
        for name in names
    ]


@bench.command(name="report")
@RESULT
@click.option("-o", "--output", type=FILE, default="bench.html", show_default=True,
              help="A page (.html), a table (.md), or a picture of one plot (.svg).")  # fmt: skip
@click.option("--all", "everything", is_flag=True, help="Of all results that are kept.")
@click.option("--plot", help="For .svg: which plot; a wrong name lists them.")
@store_option
@click.option("-f", "--force", is_flag=True, help="Replace what is there.")
def bench_report(results, output, everything, plot, store, force):
    """Write RESULTs as one page that needs nothing else, as Markdown or as a picture.

    Default: of the last run.

    \b
    Example:
        ferrotype bench report laptop.json phone.json -o devices.html
        ferrotype bench report --plot stages -o stages.svg
    """
    from .runtime.bench import report, tables

    if results and everything:
        raise click.UsageError("name results, or give --all")
    found = open_store(store).all() if everything else read_results(results, store)
    if not found:
        raise FerrotypeError("there are no results: measure with `ferrotype bench BUNDLE`")
    match output.suffix.lower():
        case ".html" | ".htm":
            text = report.page(found)
        case ".md":
            text = tables.markdown(found)
        case ".svg":
            with usage():
                text = report.picture(found, plot)
        case _:
            raise click.UsageError(f"-o {output}: name it .html, .md or .svg")
    from .runtime import pictures

    with pictures.new_file(output, force) as stream:
        stream.write(text.encode())
    click.echo(str(output))


@bench.command(name="compare")
@click.argument("base")
@click.argument("other")
@click.option("--max-slower", type=Percent(), metavar="5%", help="Exit with 1 if it is, by more.")
@store_option
@json_option
def bench_compare(base, other, max_slower, store, as_json):
    """Compare OTHER with BASE, results of other times or other machines.

    What did the same work is compared: by name, else by model and settings.  They did not take
    turns, so a difference must be 2 % larger to be called one; `bench run` with both is surer.

    \b
    Example:
        ferrotype bench compare before.json after.json --max-slower 5%
    """
    from .runtime.bench import tables, verdict

    first, second = read_results([base, other], store)
    found = verdict.compare(first, second)
    if not found:
        raise FerrotypeError(
            f"{base} and {other} have no work in common: neither names nor models and settings"
        )
    if as_json:
        told = [{"base": v.base, "other": v.other, "verdict": v.word, "ratio": finite(v.ratio),
                 "notes": v.notes} for v in found]  # fmt: skip
        click.echo(json.dumps(told))
    else:
        click.echo(grid(tables.comparison(found)) + "\n")
        for one in found:
            click.echo(printable(one.text))
    for note in dict.fromkeys(note for v in found for note in v.notes):
        click.echo(f"note: {printable(note)}", err=True)
    slower = [
        v for v in found if max_slower and v.word == "slower" and v.ratio.low > 1 + max_slower
    ]
    for one in slower:
        click.echo(f"Error: {printable(one.text)}, more than {max_slower:.0%}", err=True)
    if slower:
        sys.exit(1)


def finite(interval: Any) -> list[float | None]:
    """An interval for JSON, which has no infinity."""
    values = (interval.middle, interval.low, interval.high)
    return [value if math.isfinite(value) else None for value in values]


@bench.command(name="export")
@RESULT
@click.option("-o", "--output", type=FILE, required=True, help="A .csv, .parquet or .json file.")
@click.option("--all", "everything", is_flag=True, help="Of all results that are kept.")
@store_option
@click.option("-f", "--force", is_flag=True, help="Replace what is there.")
def bench_export(results, output, everything, store, force):
    """Write RESULTs for other programs: a row per picture and stage.  Default: the last run.

    JSON is of one result, as `bench import` reads it.  Parquet needs pyarrow.

    \b
    Example:
        ferrotype bench export --all -o latency.csv
    """
    from .runtime.bench import export

    found = open_store(store).all() if everything else read_results(results, store)
    with usage():
        data = export.encode(found, output.suffix.lower())
    from .runtime import pictures

    with pictures.new_file(output, force) as stream:
        stream.write(data)
    click.echo(str(output))


@bench.command(name="import")
@click.argument("files", metavar="FILE...", type=FILE, nargs=-1, required=True)
@store_option
def bench_import(files, store):
    """Keep results from other devices: JSON that this, or an app, wrote.

    \b
    Example:
        ferrotype bench import phone.json tablet.json
    """
    from .runtime.bench import results

    found = [results.load(path) for path in files]  # all are read before any is kept
    kept = open_store(store)
    for path, result in zip(files, found, strict=True):
        word = "kept as" if kept.add(result) else "is there already, as"
        click.echo(f"{path}: {word} {result.id[:8]}")


@bench.command(name="list")
@store_option
@json_option
def bench_list(store, as_json):
    """Show the results that are kept."""
    from .runtime.bench import tables

    kept = open_store(store)
    found = kept.all()
    if as_json:
        told = [{"id": r.id, "created": r.created, "machine": r.machine.name,
                 "variants": [v.name for v in r.variants]} for r in found]  # fmt: skip
        click.echo(json.dumps(told))
        return
    if not found:
        click.echo(f"note: nothing is kept in {kept.path}", err=True)
        return
    click.echo(grid(tables.listing(found)))


class BenchProgress:
    """What is known so far, on stderr if a person is watching; kept once in a while.

    What cannot be kept ends no measurement: `failed` is the reason, for when it is over.
    """

    EVERY = 5.0  # seconds

    def __init__(self, seconds: float, store: Any) -> None:
        from rich.console import Console
        from rich.live import Live

        console = Console(stderr=True)
        self._live = Live(console=console, transient=True, auto_refresh=False)
        self._shown, self._store, self._seconds = console.is_terminal, store, seconds
        self._kept = time.monotonic()
        self.failed: FerrotypeError | None = None

    def keep(self, result: Any) -> None:
        """Put what is known into the store."""
        if self._store:
            try:
                self._store.put(result)
                self.failed = None
            except FerrotypeError as error:
                self.failed = error

    def __enter__(self) -> BenchProgress:
        if self._shown:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            self._live.stop()

    def stage(self, text: str) -> None:
        """What is done before or after the rounds."""
        if self._shown:
            self._live.update(f"{printable(text)} ...", refresh=True)

    def told(self, result: Any) -> None:
        """A round is over."""
        if time.monotonic() - self._kept > self.EVERY:
            self._kept = time.monotonic()
            self.keep(result)
        if self._shown:
            self._live.update(self._text(result), refresh=True)

    def _text(self, result: Any) -> Any:
        from rich.text import Text

        from .runtime.bench import tables

        p = result.protocol
        head = f"round {p.rounds}, {p.elapsed:.0f} of at most {self._seconds:.0f} s"
        if p.target:
            head += f"; until intervals are within {p.target:.0%}"
        shown = grid(tables.summary(result), self._live.console.width)
        return Text.from_ansi(f"{head}\n{shown}")


# --- demo ---------------------------------------------------------------------------------------


@main.command()
@click.argument("bundle", type=BUNDLE, required=False)
@click.option("--port", type=click.IntRange(0, 65535), default=8777, show_default=True)
@click.option("--no-browser", is_flag=True, help="Only serve; print the address.")
@click.option("-o", "--output", type=FILE, help="Write the page as a folder for any web server.")
def demo(bundle, port, no_browser, output):
    """Open a page that draws in the browser, with the embedded model or an ONNX BUNDLE.

    It is served from this machine to this machine, 127.0.0.1, until interrupted; drawing needs
    no network.  With -o nothing is served: the folder holds the page, onnxruntime and the bundle.

    \b
    Example:
        ferrotype demo
        ferrotype demo sd15.ferro -o site
    """
    from .bundle import load
    from .runtime import demo as page
    from .runtime.pipeline import EMBEDDED_ONNX

    opened = load(bundle or EMBEDDED_ONNX)
    if output:
        size = page.export(opened, output)
        click.echo(f"{output}  {mib(size)}")
        return
    try:
        server = page.server(opened, port)
    except OSError as error:
        raise click.ClickException(
            f"port {port}: {error.strerror or error}; --port 0 takes one that is free"
        ) from error
    address = f"http://127.0.0.1:{server.server_port}/"
    click.echo(address)
    click.echo("Ctrl+C ends it", err=True)
    if not no_browser:
        click.launch(address)
    with server:
        try:
            server.serve_forever()
        except KeyboardInterrupt as stop:
            if stop.args:  # SIGTERM; Ctrl+C is how it is meant to end
                raise


def open_bundle(path: Path | None) -> Bundle:
    from .bundle import load
    from .runtime.pipeline import embedded

    return load(path or embedded())


class Progress:
    """A bar on stderr, if a person is watching; results on stdout are never mixed with it."""

    def __init__(self, label: str, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        console = Console(stderr=True)
        told = TextColumn("{task.description} {task.fields[bytes]}")
        parts = (told, BarColumn(), TimeElapsedColumn())
        self._bar = Progress(
            *parts, console=console, transient=True, disable=not console.is_terminal
        )
        self._task = self._bar.add_task(label, total=total, bytes="")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def stage(self, label: str) -> None:
        """The next of `total` stages begins."""
        self._bar.update(self._task, description=label, advance=1, bytes="")

    def advance(self, count: int) -> None:
        self._bar.update(self._task, advance=count)

    def part(self, done: int, total: int) -> None:
        """So many bytes of the stage that is under way are done."""
        self._bar.update(self._task, bytes=f"{done / 1e6:,.0f} of {total / 1e6:,.0f} MB")

    def steps(self, run: Iterable[Step], label: str) -> Iterator[Step]:
        """Pass on the steps of a run, showing how many of them are done."""
        self._bar.update(self._task, description=label, completed=0)
        for step in run:
            self._bar.update(self._task, total=step.total, completed=step.index)
            yield step


# --- printing -----------------------------------------------------------------------------------


def describe(bundle: Bundle) -> str:
    """A bundle for a person: what it is, its parts, its recipe and its parity."""
    from .runtime.recipes import limits

    m = bundle.manifest
    parts = [
        (name, mib(bundle.bytes_of(part.path)), shapes(part.inputs), "->", shapes(part.outputs))
        for name, part in m.components.items()
    ]
    recipe = m.recipe
    head = [
        ("model", f"{m.model} ({m.family}), licence {m.licence}"),
        ("target", f"{m.target}, {m.precision.weights} weights, {m.precision.activations} inside"),
        *([("made for", ", ".join(f"{k} {v}" for k, v in m.options.items()))] if m.options else []),
        ("sizes", sizes_text(m.sizes)),
        ("recipe", f"{recipe.sampler}, {recipe.steps} steps, guidance {recipe.guidance:g}, "
                   f"{recipe.prediction_type}, {recipe.spacing} timesteps"),
        *([("distilled", f"{recipe.name}: {limits(recipe)}")] if limits(recipe) else []),
        ("source", f"{m.source.name}, sha256 {m.source.sha256}"),
        *[("merged", line) for line in merged_lines(m.parity)],
        ("made by", m.tool),
        ("sha256", bundle.sha256),
    ]  # fmt: skip
    more = columns([*weights_rows(m.parity), *memory_rows(bundle)])
    pictures = columns(quantized_rows(m.parity))
    tables = [columns(head), columns(parts), parity_table(m.parity), pictures, more]
    return "\n\n".join(filter(None, tables))


def is_checkpoint(path: Path) -> bool:
    """Whether a path is no bundle and no picture, but can be a model's."""
    if path.is_dir():
        bundle = (path / "manifest.json").is_file() or (path / "vae_decoder").is_dir()
        return (path / "model_index.json").is_file() and not bundle
    if not path.is_file() or path.name == "manifest.json":
        return False
    with path.open("rb") as file:
        return not file.read(8).startswith(b"\x89PNG") and path.suffix.lower() not in PICTURES


def checkpoint_text(seen: dict[str, Any]) -> str:
    """A checkpoint for a person: what it is, its parts, and what was assumed."""
    parts = [
        (name, f"{part['tensors']:,} tensors", f"{part['parameters']:,} parameters",
         ", ".join(part["types"]), mib(part["bytes"]), part["shape"])
        for name, part in seen["components"].items()
    ]  # fmt: skip
    head = [(key, str(value)) for key, value in seen.items() if key not in ("components", "notes")]
    notes = "\n".join(f"note: {note}" for note in seen["notes"])
    return "\n\n".join(filter(None, [columns(head), columns(parts), notes]))


def bundle_json(bundle: Bundle) -> str:
    from .bundle import dumps

    return json.dumps({"sha256": bundle.sha256, **json.loads(dumps(bundle.manifest))}, indent=1)


def parity_table(parity: dict[str, Any]) -> str:
    """The report of a conversion as a table."""
    try:
        return columns(parity_rows(parity))
    except (KeyError, TypeError, ValueError, AttributeError):  # it is free-form to the format
        return "the parity report is of a form unknown to this ferrotype; --json prints it"


def parity_rows(parity: dict[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        ("compared with the original", "PSNR dB", "floor", "cosine", "max error", "headroom")
    ]
    floors = parity.get("floors", {})
    for name, outputs in parity.get("components", {}).items():
        for output, r in outputs.items():
            if "psnr" not in r:  # of a folder of graphs, without the original
                rows.append((f"{name} {output}", "", "", "", "", f"{r['fp16_headroom']:.0f} x"))
                continue
            rows.append((
                f"{name} {output}", f"{r['psnr']:.1f}", f"{floors['component']:.0f}",
                f"{r['cosine']:.7f}", f"{r['max_error']:.2g}", f"{r['fp16_headroom']:.0f} x",
            ))  # fmt: skip
    picture = parity.get("picture")
    if picture:
        name = f"picture: {picture['sampler']}, {picture['steps']} steps, seed {picture['seed']}"
        if "psnr" not in picture:
            return [("not compared, only run", *rows[0][1:]), *rows[1:], (name,)]
        psnr, error = f"{picture['psnr']:.1f}", f"{picture['max_error']:.2g}"
        rows.append((name, psnr, f"{floors['picture']:.0f}", "", error, ""))
    return rows


def weights_rows(parity: dict[str, Any]) -> list[tuple[str, ...]]:
    """What became of the weights, where any were compressed, and why the others were not."""
    try:
        kept = {k: reasons for k, reasons in parity.get("not_compressed", {}).items() if reasons}
        rows: list[tuple[str, ...]] = []
        for name, forms in parity.get("weights", {}).items():
            if set(forms) - {"fp16", "fp32", "bf16"}:
                counts = ", ".join(f"{count} as {form}" for form, count in forms.items())
                why = "; ".join(f"{count}: {text}" for text, count in kept.get(name, {}).items())
                rows.append((f"{name} weights", counts, why and f"not compressed: {why}"))
        return rows
    except (TypeError, AttributeError):  # it is free-form to the format
        return []


def merged_lines(parity: dict[str, Any]) -> list[str]:
    """The LoRA and embeddings that are in the weights."""
    lines = parity.get("merged")  # free-form to the format
    return [line for line in lines if isinstance(line, str)] if isinstance(lines, list) else []


def memory_rows(bundle: Bundle) -> list[tuple[str, ...]]:
    """What a device needs to run each component, where a target's compiler said it."""
    rows: list[tuple[str, ...]] = []
    for name, part in bundle.manifest.components.items():
        for device, m in part.memory.items():
            inside = [
                ("weights", m.weights),
                ("activations", m.activations),
                ("scratch", m.scratch),
            ]
            text = ", ".join(f"{what} {mib(count)}" for what, count in inside)
            rows.append((f"{name} on {device}", mib(m.total), text))
    return rows


def sizes_text(sizes: Any) -> str:
    if sizes.allowed is not None:
        return ", ".join(f"{w}x{h}" for w, h in sizes.allowed)
    width, height = sizes.default
    bounds = f"multiples of {sizes.multiple} from {sizes.minimum} to {sizes.maximum}"
    return f"{width}x{height} by default, {bounds}"


def shapes(tensors: dict[str, Any]) -> str:
    texts = (f"{n}({', '.join(map(str, t.shape))})" for n, t in tensors.items())
    return " ".join(texts)


def mib(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"


def columns(rows: Iterable[Sequence[str]]) -> str:
    """Rows as aligned text; numbers and sizes are not told apart, all is left-aligned."""
    lines = [list(map(printable, row)) for row in rows]
    count = max(map(len, lines), default=0)
    widths = [max((len(r[i]) for r in lines if i < len(r)), default=0) for i in range(count)]
    padded = ("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
    return "\n".join(padded)

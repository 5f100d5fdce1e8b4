"""How well the checkpoint draws what it is asked for, measured with diffusers in fp32.

    python models/emoji/evaluate.py WORK [--report benchmarks/results/emoji.md]
    python models/emoji/evaluate.py WORK --bundle models/emoji.ferro    # only how often it is right

For every third thing: "NAME", and "NAME on a COLOUR background" on a colour it was shown on and on
one that was withheld from it, drawn in 4 steps; the first also in 1, 2 and 8, and by the thing's
second name.  A picture is *right* if, of all things of the data set on the colour asked for, the
one asked for is nearest to it in the VAE's latent space.  Its *background* is right if the colour
asked for is the nearest of all to its border.  The same is measured on pictures of the data set,
placed anew: what a perfect model would reach.

Writes WORK/evaluation.json, and into the checkpoint its sheets and model card; exits with 1 if a
bar is missed.
"""

from __future__ import annotations

import json
import string
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusionPipeline

from ferrotype.benchmarks import measure
from ferrotype.models.emoji.config import Recipe, arguments, begin
from ferrotype.models.emoji.data import (
    COLOUR_NAMES,
    COLOURS,
    Data,
    Placement,
    composite,
    on_colour,
    shown,
    with_article,
)
from ferrotype.models.emoji.export import MEGABYTE, weights_size
from ferrotype.models.emoji.networks import encode
from ferrotype.models.emoji.training import Progress, save_sheet
from ferrotype.models.emoji.vae import psnr
from ferrotype.runtime.pipeline import Pipeline

EVERY = 3  # things; of about 1,300
BATCH = 16
STEPS = 4
OTHER_STEPS = (1, 2, 8)
SHEET = 100  # prompts
BORDER = 3  # pixels
MIN_APART = 1 / 255  # mean difference of two seeds' pictures
SECOND = "SECOND NAME, where it has one"
STAGES = ("vae", "diffusion", "distillation", "tiny_vae")


@dataclass(frozen=True)
class Bar:
    """What a figure must reach: at least `limit`, or at most with `most`."""

    figure: str
    limit: float
    unit: str = "%"
    most: bool = False

    def met(self, figures: dict[str, float]) -> bool:
        value = figures[self.figure]
        return value <= self.limit if self.most else value >= self.limit


BARS = (
    Bar("right", 80.0),
    Bar("background", 95.0),
    Bar("vae", 32.0, "dB"),
    Bar("seeds differ", 100.0),
    Bar("not finite", 0.0, "pictures", most=True),
    Bar("size", 30.0, "MB", most=True),
)


@dataclass(frozen=True)
class Asked:
    """Prompts for things on colours: indices, one of each per prompt."""

    things: list[int]
    colours: list[int]
    prompts: list[str]


def ask(
    data: Data, things: Sequence[int], colour_of: Callable[[int], int | None], name: int = 0
) -> Asked:
    """A prompt for each thing, by the name of that index; the colour None is white, unsaid."""
    colours = [colour_of(thing) for thing in things]
    prompts = [
        with_article(name) if c is None else on_colour(with_article(name), COLOUR_NAMES[c])
        for name, c in zip((data.names[t][name] for t in things), colours, strict=True)
    ]
    return Asked(list(things), [c or 0 for c in colours], prompts)


def ask_second(data: Data, things: Sequence[int]) -> Asked:
    """A prompt without a colour for each thing that has a second name, by that."""
    return ask(data, [t for t in things if len(data.names[t]) > 1], lambda thing: None, name=1)


def one_colour(seen: bool) -> Callable[[int], int]:
    """A colour, not white, that the thing was or was not shown on; another for each thing."""

    def choose(thing: int) -> int:
        possible = [c for c in range(1, len(COLOUR_NAMES)) if shown(thing, c) == seen]
        return possible[thing // 5 % len(possible)]

    return choose


def draw(
    pipe: StableDiffusionPipeline, prompts: Sequence[str], size: int, seed: int, steps: int = STEPS
) -> torch.Tensor:
    """(n, 3, size, size) in [-1, 1]; prompt i is drawn with seed + i."""
    parts = []
    for i in range(0, len(prompts), BATCH):
        some = list(prompts[i : i + BATCH])
        made = pipe(
            some,
            num_inference_steps=steps,
            guidance_scale=1.0,
            height=size,
            width=size,
            generator=[torch.Generator().manual_seed(seed + i + j) for j in range(len(some))],
            output_type="pt",
        )
        parts.append(made.images * 2 - 1)
    return torch.cat(parts)


class Judge:
    """The data set in latent space, by colour, to compare pictures with."""

    def __init__(self, vae: AutoencoderKL, data: Data, size: int):
        self.vae, self.data, self.size = vae, data, size
        self.by_colour: dict[int, torch.Tensor] = {}

    def candidates(self, colour: int) -> torch.Tensor:
        """The latents of every thing on the colour, in the middle: (things, 4 h w)."""
        if colour not in self.by_colour:
            at = Placement.centred(torch.full((len(self.data),), colour))
            pictures = composite(self.data.rgba, at, self.size)
            self.by_colour[colour] = encode(self.vae, pictures).flatten(1)
        return self.by_colour[colour]

    @torch.no_grad()
    def right(self, pictures: torch.Tensor, asked: Asked) -> list[bool]:
        latents = encode(self.vae, pictures).flatten(1)
        return [
            int(torch.cdist(z[None], self.candidates(colour)).argmin()) == thing
            for z, thing, colour in zip(latents, asked.things, asked.colours, strict=True)
        ]


def background(pictures: torch.Tensor) -> list[int]:
    """The colour name nearest to the median of each picture's border."""
    ring = torch.ones(pictures.shape[2:], dtype=torch.bool)
    ring[BORDER:-BORDER, BORDER:-BORDER] = False
    medians = pictures[:, :, ring].median(dim=2).values
    palette = torch.tensor(list(COLOURS.values())) / 127.5 - 1
    return torch.cdist(medians, palette).argmin(1).tolist()


def percent(found: Sequence[bool]) -> float:
    return 100 * sum(found) / len(found)


def judged(judge: Judge, pictures: torch.Tensor, asked: Asked) -> dict[str, float]:
    colours = [c == d for c, d in zip(background(pictures), asked.colours, strict=True)]
    return {"right": percent(judge.right(pictures, asked)), "background": percent(colours)}


@torch.no_grad()
def evaluate(work: Path, recipe: Recipe) -> dict[str, dict[str, float]]:
    """Rows of figures; writes the sheets on the way."""
    data, checkpoint = Data.load(work), work / "emoji-sd"
    pipe = StableDiffusionPipeline.from_pretrained(checkpoint).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    judge = Judge(pipe.vae, data, recipe.size)
    things = range(0, len(data), EVERY)
    rows: dict[str, dict[str, float]] = {}
    sets = {
        "NAME": ask(data, things, lambda thing: None),
        "NAME on a COLOUR it was shown on": ask(data, things, one_colour(True)),
        "NAME on a COLOUR withheld from it": ask(data, things, one_colour(False)),
    }
    drawn = {name: draw(pipe, asked.prompts, recipe.size, 0) for name, asked in sets.items()}
    for name, asked in sets.items():
        rows[name] = judged(judge, drawn[name], asked)
        print(name, rows[name], flush=True)
    plain = sets["NAME"]
    for steps in OTHER_STEPS:
        pictures = draw(pipe, plain.prompts, recipe.size, 0, steps)
        rows[f"NAME, steps: {steps}"] = judged(judge, pictures, plain)
    if (second := ask_second(data, things)).prompts:
        rows[SECOND] = judged(judge, draw(pipe, second.prompts, recipe.size, 0), second)
    withheld = sets["NAME on a COLOUR withheld from it"]
    placed = Placement.drawn(torch.tensor(withheld.colours), torch.Generator().manual_seed(0))
    real = composite(data.rgba[withheld.things], placed, recipe.size)
    rows["the data set itself, placed anew"] = judged(judge, real, withheld)
    everything = torch.cat(list(drawn.values()))
    again = draw(pipe, plain.prompts, recipe.size, 1_000_000)
    apart = (again - drawn["NAME"]).abs().mean((1, 2, 3)) > MIN_APART
    rows["all"] = {
        "right": sum(rows[name]["right"] for name in sets) / len(sets),
        "background": sum(rows[name]["background"] for name in sets) / len(sets),
        "vae": decoded_psnr(pipe.vae, real),
        "tiny vae": tiny_psnr(work, pipe.vae, real),
        "seeds differ": percent(apart.tolist()),
        "not finite": float((~everything.isfinite().flatten(1).all(1)).sum()),
        "size": weights_size(checkpoint) / MEGABYTE,
        "pictures": float(len(everything)),
    }
    write_sheets(checkpoint / "samples", pipe, data, recipe, drawn)
    return rows


@torch.no_grad()
def evaluate_bundle(work: Path, recipe: Recipe, folder: Path) -> dict[str, dict[str, float]]:
    """Rows of how often the pictures of a bundle are right, without a colour in the prompt."""
    data, pipe = Data.load(work), Pipeline.load(folder)
    things, side = range(0, len(data), EVERY), (recipe.size, recipe.size)
    vae = AutoencoderKL.from_pretrained(work / "emoji-sd" / "vae").float()
    judge = Judge(vae, data, recipe.size)
    rows: dict[str, dict[str, float]] = {}
    for name, asked in {
        "NAME": ask(data, things, lambda thing: None),
        SECOND: ask_second(data, things),
    }.items():
        drawn = [pipe.generate(p, seed=i, size=side) for i, p in enumerate(asked.prompts)]
        if drawn:
            pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in drawn]))
            rows[name] = judged(judge, pixels.permute(0, 3, 1, 2) / 127.5 - 1, asked)
    return rows


def decoded_psnr(vae: AutoencoderKL, pictures: torch.Tensor) -> float:
    """dB of what the VAE makes of pictures, mean over them."""
    decoded = torch.cat([vae.decode(z).sample for z in encode(vae, pictures).split(BATCH)])
    return float(psnr(decoded, pictures).mean())


def tiny_psnr(work: Path, vae: AutoencoderKL, pictures: torch.Tensor) -> float:
    """dB of the tiny decoder's pictures of the VAE's latents to the pictures themselves."""
    tiny = AutoencoderTiny.from_pretrained(work / "emoji-sd-tiny")
    latents = encode(vae, pictures) * vae.config.scaling_factor
    return float(
        psnr(torch.cat([tiny.decode(z).sample for z in latents.split(BATCH)]), pictures).mean()
    )


def write_sheets(folder, pipe, data: Data, recipe: Recipe, drawn: dict[str, torch.Tensor]) -> None:
    """A hundred prompts, things on withheld colours, and what the VAE keeps."""
    folder.mkdir(exist_ok=True)
    things = [i * len(data) // SHEET for i in range(min(SHEET, len(data)))]
    asked = ask(
        data, things, lambda thing: None if thing % 3 == 0 else one_colour(thing % 3 == 1)(thing)
    )
    save_sheet(draw(pipe, asked.prompts, recipe.size, 7), folder / "prompts.png", columns=10)
    (folder / "prompts.txt").write_text("\n".join([*asked.prompts, ""]))
    save_sheet(
        drawn["NAME on a COLOUR withheld from it"][::4][:SHEET], folder / "withheld.png", columns=10
    )
    picked = torch.tensor(things[:24])
    at = Placement.drawn(picked % len(COLOUR_NAMES), torch.Generator().manual_seed(1))
    real = composite(data.rgba[picked], at, recipe.size)
    decoded = pipe.vae.decode(encode(pipe.vae, real)).sample
    rows = [half for pair in zip(real.split(12), decoded.split(12), strict=True) for half in pair]
    save_sheet(torch.cat(rows), folder / "reconstruction.png")


def result_tables(rows: dict[str, dict[str, float]], work: Path, recipe: Recipe) -> str:
    """The figures as Markdown."""
    lines = ["| pictures of | right | background right |", "|---|---:|---:|"]
    for name, row in rows.items():
        lines.append(f"| {name} | {row['right']:.1f} % | {row['background']:.1f} % |")
    lines += ["", "| figure | measured | bar | |", "|---|---:|---:|---|"]
    for bar in BARS:
        sign, met = ("<=" if bar.most else ">="), ("met" if bar.met(rows["all"]) else "missed")
        value = rows["all"][bar.figure]
        lines.append(f"| {bar.figure} | {value:.1f} {bar.unit} | {sign} {bar.limit:g} | {met} |")
    lines.append(f"| tiny vae | {rows['all']['tiny vae']:.1f} dB | | |")
    lines += [
        "",
        "| stage | steps | batch | core hours | last figures |",
        "|---|---:|---:|---:|---|",
    ]
    for name in STAGES:
        done, batch = Progress.of(work, name), getattr(recipe, name).batch
        told = ", ".join(f"{key} {value:.4g}" for key, value in done.means.items())
        hours = done.core_seconds / 3600
        lines.append(f"| {name} | {done.steps:,} | {batch} | {hours:.2f} | {told} |")
    return "\n".join(lines)


def write_card(work: Path, data: Data, tables: str) -> None:
    """The checkpoint's README.md from card.md, and the names it knows."""
    card = string.Template(Path(__file__).with_name("card.md").read_text())
    vae = json.loads((work / "emoji-sd" / "vae" / "config.json").read_text())
    scale = vae["scaling_factor"]
    text = card.substitute(things=f"{len(data):,}", scale=scale, tables=tables)
    (work / "emoji-sd" / "README.md").write_text(text)
    names = "".join("; ".join(names) + "\n" for names in data.names)
    (work / "emoji-sd" / "names.txt").write_text(names)


def write_report(path: Path, tables: str) -> None:
    machine = measure.describe("torch", "diffusers", "transformers")
    head = f"# The embedded model\n\n`python models/emoji/evaluate.py WORK` on {machine}.\n"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(f"{head}\n{(__doc__ or '').split(chr(10) * 2)[2]}\n\n{tables}\n")
    temporary.rename(path)


def main() -> None:
    parser = arguments()
    parser.add_argument("--report", type=Path, help="Markdown file to write as well")
    parser.add_argument("--bundle", type=Path, help="judge this one instead of the checkpoint")
    given = parser.parse_args()
    recipe = begin(given.work, given.smoke)
    if given.bundle:
        for name, row in evaluate_bundle(given.work, recipe, given.bundle).items():
            print(f"{name}: right {row['right']:.1f} %, background {row['background']:.1f} %")
        return
    rows = evaluate(given.work, recipe)
    (given.work / "evaluation.json").write_text(json.dumps(rows, indent=1))
    tables = result_tables(rows, given.work, recipe)
    print(tables)
    write_card(given.work, Data.load(given.work), tables)
    if given.report:
        write_report(given.report, tables)
    missed = [bar.figure for bar in BARS if not bar.met(rows["all"])]
    if missed and not given.smoke:
        sys.exit(f"missed: {', '.join(missed)}")


if __name__ == "__main__":
    main()

"""The engines that are compared, each in a process of its own that is asked in lines of JSON.

    {"load": "unet", "size": [512, 512]}    {"seconds": 5.1, "compile_seconds": 5.0}
    {"run": 2, "component": "unet"}         [2318.2, 2317.8] (milliseconds)
    {"facts": "unet"}                       {"precision": "bf16", "kernels": {...}}
    {"drop": "unet"}                        null
    {"open": {"size": ..., "steps": 4}}     all components: {"seconds": 5.3}
    {"picture": 1}                          {"seconds": 16.1, "stages": {"unet": [2.3, ...], ...}}
    {"memory": true}                        MiB: {"peak": 4541.0, "before": 180.2}

A worker imports its engine, numpy and what that needs, so that its memory is the engine's.  All of
them compute the checkpoint in the same folder, Stable Diffusion 1.5, without guidance.
stable-diffusion.cpp draws pictures only.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ferrotype.benchmarks import measure
from ferrotype.runtime.bench.protocol import RunnerError
from ferrotype.runtime.bench.subjects import Process

COMPONENTS = ("text_encoder", "unet", "vae_decoder")
CHECKPOINT = "sd15"  # in the folder, as all that follows
NATIVE = {  # by precision: weights and activations
    "bf16": ("bf16", "bf16"),
    "w8": ("w8", "bf16"),
    "w8, int8": ("w8", "int8"),
    "w4": ("w4", "bf16"),
    "fp32": ("fp16", "fp32"),  # fp16 in the file, fp32 in arithmetic
}
INTERFACE = "interface.json"  # of a graph for onnxruntime: what it takes and returns
OPENVINO = "openvino==2026.4.1"
NNCF = "nncf==3.4.0"  # OpenVINO's quantizer
CPP = "stable-diffusion-cpp-python==0.4.7"  # built by pip: some ten minutes
W8A8 = "w8a8"  # the precision of a graph that it made
Size = tuple[int, int]  # width, height


@dataclass(frozen=True)
class Peer:
    """An engine and how it is asked to compute."""

    kind: str  # of LOADERS
    precision: str
    environment: dict[str, str] = field(default_factory=dict)
    kernels: str = ""  # what the name of each of its matrix kernels must match
    streams: bool = False  # by its nature it holds one component at a time


PEERS = {
    "native-bf16": Peer("native", "bf16", streams=True),
    "native-fp32": Peer("native", "fp32", streams=True),
    "openvino-bf16": Peer("openvino", "bf16", kernels=".*bf16"),
    "openvino-fp32": Peer("openvino", "f32", kernels=".*f32"),
    "openvino-w8a8": Peer("openvino", W8A8, kernels="(?i).*([iu]8|bf16).*"),
    "openvino-fp32-avx2": Peer("openvino", "f32", {"ONEDNN_MAX_CPU_ISA": "AVX2"}, ".*avx2.*f32"),
    "torch-bf16": Peer("torch", "bf16"),
    "torch-fp32": Peer("torch", "fp32"),
    "onnxruntime-fp32": Peer("onnxruntime", "fp32"),
    "stable-diffusion.cpp-f16": Peer("cpp", "f16"),
    "native-w8": Peer("native", "w8", streams=True),
    "native-w8-int8": Peer("native", "w8, int8", streams=True),
    "native-w4": Peer("native", "w4", streams=True),
    "onnx-fp32": Peer("onnx", "fp32"),
    "onnx-fp16": Peer("onnx", "fp16"),
    "onnx-w8": Peer("onnx", "w8"),
    "onnx-w4": Peer("onnx", "w4"),
}


class PeerError(RunnerError):
    """A worker failed, or does not compute as it was told to."""


class Worker(Process):
    """A peer in a process of its own; as a context it ends with it.  Raises RunnerError."""

    def __init__(
        self, peer: Peer, folder: Path, threads: int, patience: float | None = None
    ) -> None:
        self.peer = peer
        argv = [str(interpreter(peer, folder)), __file__, "serve", peer.kind, peer.precision]
        super().__init__([*argv, str(folder), str(threads)], QUIET | peer.environment, patience)

    def load(self, component: str, size: Size) -> dict[str, float]:
        """Load a component: seconds in all, and compile_seconds of them."""
        return self.ask(load=component, size=size)

    def run(self, component: str, times: int = 1) -> list[float]:
        """Run a loaded component: milliseconds of each time."""
        return self.ask(run=times, component=component)

    def check_kernels(self, component: str) -> dict[str, Any]:
        """What the engine says it computes with; PeerError if that is not what was asked for."""
        facts = self.ask(facts=component)
        for kernel in facts.get("kernels", {}):
            if not re.fullmatch(self.peer.kernels, kernel):
                raise PeerError(f"{component} uses {kernel}, not {self.peer.kernels}")
        return facts

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


QUIET = {"HF_HUB_OFFLINE": "1", "DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error"}


# --- what the peers load ------------------------------------------------------------------------


Configs = Mapping[str, dict[str, Any]]


def prepare(
    peer: Peer,
    folder: Path,
    size: Size,
    components: Sequence[str] = COMPONENTS,
    configs: Configs | None = None,
) -> None:
    """Make what the peer loads, unless the folder has it from an earlier run.

    `configs` are of the checkpoint, Stable Diffusion 1.5 if none.  Raises PeerError.
    """
    from ferrotype.benchmarks import checkpoints

    configs = configs or checkpoints.SD15
    if peer.kind == "native":
        native_bundle(folder, peer.precision, size, configs)
        return
    _whole(folder / CHECKPOINT, lambda part: checkpoints.write_checkpoint(part, dict(configs)))
    try:
        if peer.kind == "openvino":
            for component in components:
                _prepare_graph(folder, component, size, peer.precision)
        elif peer.kind in ("onnx", "onnxruntime"):
            absent = [
                component
                for component in components
                if not (onnx_graph(folder, component, peer.precision) / INTERFACE).exists()
            ]
            if absent:  # in one process: importing torch takes its time
                _make("export", ",".join(absent), folder, peer.precision)
        elif peer.kind == "cpp":
            interpreter(peer, folder)
            single = folder / f"{CHECKPOINT}.safetensors"
            _whole(single, lambda part: checkpoints.write_single(part, dict(configs)))
    except subprocess.CalledProcessError as error:
        words = str(error.stderr or error).strip().splitlines()
        raise PeerError(f"what it loads was not made: {words[-1]}") from None


def _whole(target: Path, write: Callable[[Path], object]) -> None:
    """Have something written to another name first, so that what is there is whole."""
    if target.exists():
        return
    part = target.with_name(f"part-{target.name}")
    if part.is_dir():
        shutil.rmtree(part)
    write(part)
    part.rename(target)


def native_bundle(folder: Path, precision: str, size: Size, configs: Configs | None = None) -> Path:
    """A random bundle of a precision of NATIVE, made unless the folder has it."""
    from ferrotype.benchmarks import checkpoints, random_bundles

    out = bundle(folder, precision)
    if not out.exists():
        weights, activations = NATIVE[precision]
        random_bundles.write(out, configs or checkpoints.SD15, weights, activations, size)
    return out


def _prepare_graph(folder: Path, component: str, size: Size, precision: str) -> None:
    width, height = map(str, size)
    steps = [("convert", "environment", "")]
    if precision == W8A8:
        steps.append(("quantize", "nncf", W8A8))
    for verb, place, precision in steps:
        if not graph(folder, component, size, precision).exists():
            python = environment(folder, place, ENVIRONMENTS[place])
            _make(verb, component, folder, width, height, python=python)


def _make(
    verb: str, component: str, folder: Path, *more: str, python: Path = Path(sys.executable)
) -> None:
    measure.run(str(python), __file__, verb, component, str(folder), *more)


ENVIRONMENTS = {  # by folder: what pip installs there
    "environment": (OPENVINO,),
    "nncf": (OPENVINO, NNCF),
    "sdcpp": (CPP,),
}
OWN = {"openvino": "environment", "cpp": "sdcpp"}  # by kind: the environment it runs in


def interpreter(peer: Peer, folder: Path) -> Path:
    """The Python that a peer runs on; its environment is made."""
    place = OWN.get(peer.kind)
    return environment(folder, place, ENVIRONMENTS[place]) if place else Path(sys.executable)


def environment(
    folder: Path, name: str = "environment", packages: Sequence[str] = (OPENVINO,)
) -> Path:
    """The Python of a virtual environment with packages, which also sees this one's.

    Raises PeerError if they cannot be installed.
    """
    place = folder / name
    python = place / "bin" / "python"
    ready = place / "ready"
    if not ready.exists():
        try:
            measure.run(sys.executable, "-m", "venv", "--clear", str(place))
            measure.run(str(python), "-m", "pip", "install", "-qq", *packages)
        except subprocess.CalledProcessError as error:
            words = error.stderr.strip().splitlines() or ["no reason was given"]
            raise PeerError(f"pip could not install {' '.join(packages)}: {words[-1]}") from None
        query = "import sysconfig; print(sysconfig.get_path('purelib'))"
        own = measure.run(str(python), "-c", query).stdout.strip()
        shared = [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
        lines = [f"import site; site.addsitedir({p!r})" for p in shared]  # also editable installs
        Path(own, "shared.pth").write_text("\n".join(lines))
        ready.touch()
    return python


def bundle(folder: Path, precision: str) -> Path:
    """Where the native bundle of a precision is."""
    weights, activations = NATIVE[precision]
    return folder / f"{CHECKPOINT}-{weights}-{activations}.ferro"


def onnx_graph(folder: Path, component: str, form: str) -> Path:
    """Where a graph for onnxruntime is, with weights in that form."""
    return folder / f"onnx-{form}" / component


def export(component: str, folder: Path, form: str) -> None:
    """Write the graph of a component of the checkpoint, and what it takes and returns."""
    from ferrotype.convert import modules, onnx
    from ferrotype.convert.checkpoint import open_checkpoint
    from ferrotype.convert.garbage import uncollected
    from ferrotype.quantize.recipe import Recipe

    checkpoint = open_checkpoint(folder / CHECKPOINT)
    weights = form if form in ("fp32", "fp16") else Recipe.uniform(form)
    place = onnx_graph(folder, component, form)
    loaders = {
        "text_encoder": modules.text_encoder, "unet": modules.unet, "vae_decoder": modules.vae,
    }  # fmt: skip
    with modules.quiet(), uncollected():
        module = loaders[component](checkpoint)
        config = checkpoint.configs["vae" if component == "vae_decoder" else component]
        made = onnx.export(component, module, config, place, None, weights)
    said = {name: made[name] for name in ("inputs", "outputs")}
    (place / INTERFACE).write_text(json.dumps(said))


def onnx_bundle(folder: Path, component: str, form: str) -> Any:
    """A bundle that has that graph; the rest of its manifest is the embedded one's."""
    import dataclasses

    from ferrotype import bundle as bundles
    from ferrotype.runtime.pipeline import EMBEDDED_ONNX

    place = onnx_graph(folder, component, form)
    said = json.loads((place / INTERFACE).read_text())
    taken, returned = (
        {name: bundles.Tensor(t["dtype"], tuple(t["shape"])) for name, t in said[side].items()}
        for side in ("inputs", "outputs")
    )
    manifest = dataclasses.replace(
        bundles.load(EMBEDDED_ONNX).manifest,
        precision=bundles.Precision(form, "fp32"),
        components={component: bundles.Component(component, {}, taken, returned)},
    )
    return bundles.Bundle(place.parent, manifest)


def graph(folder: Path, component: str, size: Size, precision: str = "") -> Path:
    """Where the OpenVINO IR of a component is; all precisions but one share it."""
    name = "{}-{}x{}".format(component, *size) + (f"-{W8A8}" if precision == W8A8 else "")
    return folder / "openvino" / f"{name}.xml"


def convert(component: str, folder: Path, size: Size) -> None:
    """Write a component's IR as optimum-intel does: traced, attention one op, weights in fp16."""
    import openvino  # type: ignore[import-not-found,unused-ignore]
    import torch

    feed = inputs(component, size, **dimensions(folder))
    examples = tuple(torch.from_numpy(array) for array in feed.values())
    shapes = [tuple(example.shape) for example in examples]
    with torch.inference_mode():
        module = torch_module(component, folder)
        model = openvino.convert_model(module, example_input=examples, input=shapes)
    _save(model, graph(folder, component, size))


def quantize(component: str, folder: Path, size: Size) -> None:
    """Write a component's IR with int8 weights and activations, calibrated on one random input."""
    import nncf
    import openvino

    model = openvino.Core().read_model(graph(folder, component, size))
    data = nncf.Dataset([list(inputs(component, size, **dimensions(folder)).values())])
    made = nncf.quantize(model, data, subset_size=1, model_type=nncf.ModelType.TRANSFORMER)
    _save(made, graph(folder, component, size, W8A8))


def _save(model: Any, target: Path) -> None:
    """Both files; the one by which it is known comes last."""
    import openvino

    target.parent.mkdir(exist_ok=True)
    part = target.with_name(f"part-{target.name}")
    openvino.save_model(model, part, compress_to_fp16=True)
    for suffix in (".bin", ".xml"):
        part.with_suffix(suffix).rename(target.with_suffix(suffix))


def torch_module(component: str, folder: Path) -> Any:
    """The component with the inputs of `inputs`, in float32."""
    import torch

    from ferrotype.convert import modules
    from ferrotype.convert.checkpoint import open_checkpoint

    class TextEncoder(torch.nn.Module):
        def forward(self, input_ids):
            return self.module(input_ids, return_dict=False)[0]

    class UNet(torch.nn.Module):
        def forward(self, sample, timestep, encoder_hidden_states):
            return self.module(sample, timestep, encoder_hidden_states, return_dict=False)[0]

    class VaeDecoder(torch.nn.Module):
        def forward(self, latent_sample):
            return self.module.decode(latent_sample, return_dict=False)[0]

    kinds: dict[str, tuple[Any, Any]] = {
        "text_encoder": (modules.text_encoder, TextEncoder),
        "unet": (modules.unet, UNet),
        "vae_decoder": (modules.vae, VaeDecoder),
    }
    load, kind = kinds[component]
    wrapper = kind()
    wrapper.module = load(open_checkpoint(folder / CHECKPOINT))
    if component == "vae_decoder":
        wrapper.module.encoder = wrapper.module.quant_conv = None
    return wrapper.eval()


def inputs(
    component: str, size: Size, vocabulary: int = 49408, context: int = 768
) -> dict[str, np.ndarray]:
    """Random inputs for a picture of that size, by the names that a bundle has for them.

    `vocabulary` and `context`, the width of the text's states, are Stable Diffusion 1.5's.
    """
    width, height = size
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((1, 4, height // 8, width // 8), dtype=np.float32)
    match component:
        case "text_encoder":
            return {"input_ids": rng.integers(0, vocabulary, (1, 77))}
        case "unet":
            states = rng.standard_normal((1, 77, context), dtype=np.float32)
            timestep = np.array(999, np.float32)
            return {"sample": latents, "timestep": timestep, "encoder_hidden_states": states}
        case _:
            return {"latent_sample": latents}


def dimensions(folder: Path) -> dict[str, int]:
    """What `inputs` is to know of the checkpoint, if the folder has one."""
    text, unet = (folder / CHECKPOINT / part / "config.json" for part in ("text_encoder", "unet"))
    if not text.exists():  # only bundles were needed
        return {}
    return {
        "vocabulary": json.loads(text.read_text())["vocab_size"],
        "context": json.loads(unet.read_text())["cross_attention_dim"],
    }


# --- the worker's side --------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What a worker was started for."""

    precision: str
    folder: Path
    threads: int

    def inputs(self, component: str, size: Size) -> dict[str, np.ndarray]:
        return inputs(component, size, **dimensions(self.folder))


@dataclass
class Loaded:
    """A component that is ready to run."""

    run: Callable[[], object]
    compile_seconds: float = 0.0
    facts: Callable[[], dict[str, Any]] = dict


def load_native(job: Job, component: str, size: Size) -> Loaded:
    """Ours, with its plan for the size made: all that it does before its first kernel."""
    from ferrotype.bundle import load
    from ferrotype.runtime.engines.native import NativeEngine

    place, isa = bundle(job.folder, job.precision), os.environ.get("FERROTYPE_ISA")
    engine = NativeEngine(load(place), component, job.threads, isa)
    feed = job.inputs(component, size)
    engine.program({name: array.shape for name, array in feed.items()})
    return Loaded(lambda: engine(feed))


def load_openvino(job: Job, component: str, size: Size) -> Loaded:
    import openvino

    core = openvino.Core()
    model = core.read_model(graph(job.folder, component, size, job.precision))
    options = {  # of W8A8, what is not int8
        "INFERENCE_PRECISION_HINT": "bf16" if job.precision == W8A8 else job.precision,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": job.threads,
    }
    start = time.perf_counter()
    compiled = core.compile_model(model, "CPU", options)
    seconds = time.perf_counter() - start
    request, feed = compiled.create_infer_request(), list(job.inputs(component, size).values())
    return Loaded(lambda: request.infer(feed), seconds, lambda: openvino_facts(compiled))


def openvino_facts(compiled: Any) -> dict[str, Any]:
    """The precision it says it has, and the kernels of its convolutions and matrix products."""
    kernels: Counter[str] = Counter()
    for op in compiled.get_runtime_model().get_ops():
        info = op.get_rt_info()
        if info["layerType"].astype(str) in ("Convolution", "FullyConnected"):
            kernels[info["primitiveType"].astype(str)] += 1
    precision = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    return {"precision": precision, "kernels": kernels}


def load_torch(job: Job, component: str, size: Size) -> Loaded:
    import torch

    torch.set_num_threads(job.threads)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[job.precision]
    module = torch_module(component, job.folder)
    module = module.to(dtype, memory_format=torch.channels_last)
    feed = [torch.from_numpy(array) for array in job.inputs(component, size).values()]
    feed = [x.to(dtype) if x.is_floating_point() else x for x in feed]
    feed = [x.to(memory_format=torch.channels_last) if x.ndim == 4 else x for x in feed]

    def run() -> None:
        with torch.inference_mode():
            module(*feed)

    return Loaded(run)


def load_onnxruntime(job: Job, component: str, size: Size) -> Loaded:
    """Our graph, whose attention is its own operator, with its default options."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job.threads
    options.log_severity_level = 3
    # its idle threads would take the next peer's time
    options.add_session_config_entry("session.force_spinning_stop", "1")
    path = onnx_graph(job.folder, component, job.precision) / "model.onnx"
    start = time.perf_counter()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    seconds = time.perf_counter() - start
    feed = job.inputs(component, size)
    return Loaded(lambda: session.run(None, feed), seconds)


def load_onnx(job: Job, component: str, size: Size) -> Loaded:
    """The same graph as our runtime opens it."""
    from ferrotype.runtime.engines.onnx import OnnxEngine

    bundle = onnx_bundle(job.folder, component, job.precision)
    engine = OnnxEngine(bundle, component, job.threads)
    feed = job.inputs(component, size)
    return Loaded(lambda: engine(feed))


class Components:
    """Pictures of an engine that runs components: text encoder, U-Net steps, VAE decoder."""

    def __init__(self, job: Job, load: Any, size: Size, steps: int) -> None:
        self._steps = {name: steps if name == "unet" else 1 for name in COMPONENTS}
        self._loaded = {name: load(job, name, size) for name in COMPONENTS}

    def picture(self, seed: int) -> dict[str, list[float]]:
        """Seconds of every run, by stage; the inputs are the same for every seed."""
        return {
            name: [milliseconds(self._loaded[name].run) / 1000 for _ in range(times)]
            for name, times in self._steps.items()
        }


class Cpp:
    """Pictures of stable-diffusion.cpp, in one call; stages as its log and callbacks tell."""

    def __init__(self, job: Job, _: Any, size: Size, steps: int) -> None:
        from stable_diffusion_cpp import StableDiffusion  # type: ignore[import-not-found,unused-ignore]

        self._size, self._steps = size, steps
        self._engine = StableDiffusion(
            model_path=str(job.folder / f"{CHECKPOINT}.safetensors"),
            n_threads=job.threads,
            wtype=job.precision,
            keep_clip_on_cpu=False,
            vae_decode_only=True,
            verbose=False,
        )

    def picture(self, seed: int) -> dict[str, list[float]]:
        """Text encoder and VAE decoder are what comes before the first step and after the last."""
        began = time.perf_counter()
        times: list[float] = []  # of the first step's beginning and of every step's end

        def told(step: int, steps: int, _: float) -> None:
            if steps == self._steps:
                times.append(time.perf_counter())

        width, height = self._size
        self._engine.generate_image(
            prompt="a red apple", width=width, height=height, sample_steps=self._steps,
            sample_method="lcm", cfg_scale=1.0, seed=seed, progress_callback=told,
        )  # fmt: skip
        ended = time.perf_counter()
        if len(times) != self._steps + 1:
            raise PeerError(f"it told of {len(times) - 1} steps, not of {self._steps}")
        return {
            "text_encoder": [times[0] - began],
            "unet": [end - start for start, end in pairwise(times)],
            "vae_decoder": [ended - times[-1]],
        }


LOADERS = {
    "onnx": load_onnx,
    "cpp": None,
    "native": load_native,
    "openvino": load_openvino,
    "torch": load_torch,
    "onnxruntime": load_onnxruntime,
}
IMPORTS = {  # before any clock starts
    "onnx": ("ferrotype.runtime.engines.onnx", "onnxruntime"),
    "cpp": ("stable_diffusion_cpp",),
    "native": ("ferrotype.runtime.engines.native",),
    "openvino": ("openvino",),
    "torch": ("torch", "diffusers", "transformers", "ferrotype.convert.modules"),
    "onnxruntime": ("onnxruntime",),
}


def serve(kind: str, job: Job) -> None:
    """Answer the requests of standard input; what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is the other process's to stop
    served: Served | None = None
    for line in sys.stdin:
        try:
            served = served or Served(kind, job)
            found = served.answer(json.loads(line))
        except MemoryError:
            found = {"error": "out of memory"}
        except Exception as error:  # whatever an engine raises
            words = str(error).strip().splitlines() or [type(error).__name__]
            found = {"error": words[0][:300]}
        with suppress(BrokenPipeError):
            answers.write(json.dumps(found) + "\n")
            answers.flush()


class Served:
    """What a worker has loaded."""

    def __init__(self, kind: str, job: Job) -> None:
        for name in IMPORTS[kind]:
            __import__(name)
        self._kind, self._job = kind, job
        self._before = measure.status()["VmRSS"]
        self._loaded: dict[str, Loaded] = {}
        self._whole: Components | Cpp | None = None

    def answer(self, request: dict[str, Any]) -> Any:
        """Do what one line asks for."""
        job, loaded, load = self._job, self._loaded, LOADERS[self._kind]
        start = time.perf_counter()
        match request:
            case {"load": component, "size": size}:
                loaded[component] = load(job, component, tuple(size))  # type: ignore[misc]
                seconds = time.perf_counter() - start
                return {"seconds": seconds, "compile_seconds": loaded[component].compile_seconds}
            case {"run": times, "component": component}:
                return [milliseconds(loaded[component].run) for _ in range(times)]
            case {"facts": component}:
                return loaded[component].facts()
            case {"drop": component}:
                return loaded.pop(component) and None
            case {"open": {"size": size, "steps": steps}}:
                kind = Cpp if load is None else Components
                self._whole = kind(job, load, tuple(size), steps)
                return {"seconds": time.perf_counter() - start}
            case {"picture": seed} if self._whole:
                stages = self._whole.picture(seed)
                return {"seconds": time.perf_counter() - start, "stages": stages}
            case {"memory": _}:
                return {"peak": measure.status()["VmHWM"], "before": self._before}
        raise PeerError(f"no such request: {request}")


def milliseconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def main(verb: str, *arguments: str) -> None:
    match verb, arguments:
        case "serve", (kind, precision, folder, threads):
            serve(kind, Job(precision, Path(folder), int(threads)))
        case "convert", (component, folder, width, height):
            convert(component, Path(folder), (int(width), int(height)))
        case "export", (components, folder, form):
            for component in components.split(","):
                export(component, Path(folder), form)
        case "quantize", (component, folder, width, height):
            quantize(component, Path(folder), (int(width), int(height)))


if __name__ == "__main__":
    main(*sys.argv[1:])

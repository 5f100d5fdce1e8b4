"""The engines that native.py compares, each in a process of its own that is asked in lines of JSON.

    {"load": "unet", "size": [512, 512]}    {"seconds": 5.1, "compile_seconds": 5.0}
    {"run": 2, "component": "unet"}         [2318.2, 2317.8] (milliseconds)
    {"facts": "unet"}                       {"precision": "bf16", "kernels": {...}}
    {"drop": "unet"}                        null
    {"peak": true}                          4541.0 (MiB)
    {"quit": true}

A worker imports its engine, numpy and what that needs, so that its memory is the engine's.  All of
them compute Stable Diffusion 1.5 from the checkpoint in the same folder, without guidance.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ferrotype.benchmarks import measure

COMPONENTS = ("text_encoder", "unet", "vae_decoder")
CHECKPOINT = "sd15"  # in the folder, as all that follows
BUNDLES = {  # kind, precision -> the options of convert for the bundle that it loads
    ("native", "bf16"): ("--target", "native", "--weights", "bf16", "--activations", "bf16"),
    ("native", "fp32"): ("--target", "native", "--weights", "fp16", "--activations", "fp32"),
    ("onnxruntime", "fp32"): ("--target", "onnx", "--weights", "fp32", "--activations", "fp32"),
}
OPENVINO = "openvino==2026.4.1"
NNCF = "nncf==3.4.0"  # OpenVINO's quantizer
W8A8 = "w8a8"  # the precision of a graph that it made
Size = tuple[int, int]  # width, height


@dataclass(frozen=True)
class Peer:
    """An engine and how it is asked to compute."""

    kind: str  # native | openvino | torch | onnxruntime
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
    "onnxruntime-fp32": Peer("onnxruntime", "fp32"),
}


class PeerError(Exception):
    """A worker failed, or does not compute as it was told to."""


class Worker:
    """A peer in a process of its own; as a context it ends with it."""

    def __init__(self, peer: Peer, folder: Path, threads: int) -> None:
        python = environment(folder) if peer.kind == "openvino" else Path(sys.executable)
        command = [str(python), __file__, "serve", peer.kind, peer.precision]
        self.peer = peer
        self._process = process = subprocess.Popen(
            [*command, str(folder), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **QUIET, **peer.environment},
            text=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        self._requests, self._answers = process.stdin, process.stdout

    def ask(self, **request: Any) -> Any:
        """Send a request and wait for its answer."""
        try:
            self._requests.write(json.dumps(request) + "\n")
            self._requests.flush()
            answer = self._answers.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            code = self._process.wait()
            raise PeerError(f"the {self.peer.kind} worker ended with {code} when asked {request}")
        return json.loads(answer)

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

    def close(self) -> None:
        self.ask(quit=True)
        self._requests.close()
        self._answers.close()
        self._process.wait()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self.close()
        else:
            self._process.kill()
            self._process.wait()


QUIET = {"HF_HUB_OFFLINE": "1", "DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error"}


# --- what the peers load ------------------------------------------------------------------------


def prepare(peer: Peer, folder: Path, size: Size, components: Sequence[str] = COMPONENTS) -> None:
    """Make what the peer loads, unless the folder has it from an earlier run."""
    if not (folder / CHECKPOINT).exists():
        from ferrotype.benchmarks.checkpoints import SD15, write_checkpoint

        write_checkpoint(folder / CHECKPOINT, SD15)
    if peer.kind == "openvino":
        for component in components:
            _prepare_graph(folder, component, size, peer.precision)
    target = bundle(folder, peer.kind, peer.precision)
    options = BUNDLES.get((peer.kind, peer.precision))
    if options and not target.exists():
        command = ("convert", str(folder / CHECKPOINT), "-o", str(target), *options)
        try:
            measure.run(*measure.ferrotype(*command))
        except subprocess.CalledProcessError as error:
            raise PeerError(f"{target.name} was not made: {error.stderr.strip()}") from None


def _prepare_graph(folder: Path, component: str, size: Size, precision: str) -> None:
    width, height = map(str, size)
    steps = [("convert", environment(folder), "")]
    if precision == W8A8:
        steps.append(("quantize", environment(folder, "nncf", (NNCF,)), W8A8))
    for verb, python, precision in steps:
        if not graph(folder, component, size, precision).with_suffix(".bin").exists():
            measure.run(str(python), __file__, verb, component, str(folder), width, height)


def environment(folder: Path, name: str = "environment", more: tuple[str, ...] = ()) -> Path:
    """The Python of a virtual environment with OpenVINO, which also sees this one's packages."""
    place = folder / name
    python = place / "bin" / "python"
    ready = place / "ready"
    if not ready.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", place], check=True)
        subprocess.run([python, "-m", "pip", "install", "-qq", OPENVINO, *more], check=True)
        query = "import sysconfig; print(sysconfig.get_path('purelib'))"
        own = measure.run(str(python), "-c", query).stdout.strip()
        shared = [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
        lines = [f"import site; site.addsitedir({p!r})" for p in shared]  # also editable installs
        Path(own, "shared.pth").write_text("\n".join(lines))
        ready.touch()
    return python


def bundle(folder: Path, kind: str, precision: str) -> Path:
    """Where the bundle is that a peer of this kind loads."""
    return folder / f"{kind}-{precision}.ferro"


def graph(folder: Path, component: str, size: Size, precision: str = "") -> Path:
    """Where the OpenVINO IR of a component is; all precisions but one share it."""
    name = "{}-{}x{}".format(component, *size) + (f"-{W8A8}" if precision == W8A8 else "")
    return folder / "openvino" / f"{name}.xml"


def convert(component: str, folder: Path, size: Size) -> None:
    """Write a component's IR as optimum-intel does: traced, attention one op, weights in fp16."""
    import openvino  # type: ignore[import-not-found,unused-ignore]
    import torch

    examples = tuple(torch.from_numpy(array) for array in inputs(component, size).values())
    shapes = [tuple(example.shape) for example in examples]
    with torch.inference_mode():
        module = torch_module(component, folder)
        model = openvino.convert_model(module, example_input=examples, input=shapes)
    graph(folder, component, size).parent.mkdir(exist_ok=True)
    openvino.save_model(model, graph(folder, component, size), compress_to_fp16=True)


def quantize(component: str, folder: Path, size: Size) -> None:
    """Write a component's IR with int8 weights and activations, calibrated on one random input."""
    import nncf
    import openvino

    model = openvino.Core().read_model(graph(folder, component, size))
    data = nncf.Dataset([list(inputs(component, size).values())])
    made = nncf.quantize(model, data, subset_size=1, model_type=nncf.ModelType.TRANSFORMER)
    openvino.save_model(made, graph(folder, component, size, W8A8), compress_to_fp16=True)


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


def inputs(component: str, size: Size) -> dict[str, np.ndarray]:
    """Random inputs for a picture of that size, by the names that a bundle has for them."""
    width, height = size
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((1, 4, height // 8, width // 8), dtype=np.float32)
    match component:
        case "text_encoder":
            return {"input_ids": rng.integers(0, 49408, (1, 77))}
        case "unet":
            states = rng.standard_normal((1, 77, 768), dtype=np.float32)
            timestep = np.array(999, np.float32)
            return {"sample": latents, "timestep": timestep, "encoder_hidden_states": states}
        case _:
            return {"latent_sample": latents}


# --- the worker's side --------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What a worker was started for."""

    precision: str
    folder: Path
    threads: int


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

    place, isa = bundle(job.folder, "native", job.precision), os.environ.get("FERROTYPE_ISA")
    engine = NativeEngine(load(place), component, job.threads, isa)
    feed = inputs(component, size)
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
    request, feed = compiled.create_infer_request(), list(inputs(component, size).values())
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
    module = torch_module(component, job.folder)
    module = module.to(torch.bfloat16, memory_format=torch.channels_last)
    feed = [torch.from_numpy(array) for array in inputs(component, size).values()]
    feed = [x.bfloat16() if x.is_floating_point() else x for x in feed]
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
    path = bundle(job.folder, "onnxruntime", job.precision) / component / "model.onnx"
    start = time.perf_counter()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    seconds = time.perf_counter() - start
    feed = inputs(component, size)
    return Loaded(lambda: session.run(None, feed), seconds)


LOADERS = {
    "native": load_native,
    "openvino": load_openvino,
    "torch": load_torch,
    "onnxruntime": load_onnxruntime,
}
IMPORTS = {  # before any clock starts
    "native": ("ferrotype.runtime.engines.native",),
    "openvino": ("openvino",),
    "torch": ("torch", "diffusers", "transformers", "ferrotype.convert.modules"),
    "onnxruntime": ("onnxruntime",),
}


def serve(kind: str, job: Job) -> None:
    """Answer the requests of standard input; what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in IMPORTS[kind]:
        __import__(name)
    loaded: dict[str, Loaded] = {}
    for line in sys.stdin:
        request = json.loads(line)
        answers.write(json.dumps(answer(request, LOADERS[kind], job, loaded)) + "\n")
        answers.flush()
        if "quit" in request:
            return


def answer(request: dict[str, Any], load: Any, job: Job, loaded: dict[str, Loaded]) -> Any:
    """Do what one line asks for."""
    match request:
        case {"load": component, "size": size}:
            start = time.perf_counter()
            loaded[component] = load(job, component, tuple(size))
            seconds = time.perf_counter() - start
            return {"seconds": seconds, "compile_seconds": loaded[component].compile_seconds}
        case {"run": times, "component": component}:
            return [milliseconds(loaded[component].run) for _ in range(times)]
        case {"facts": component}:
            return loaded[component].facts()
        case {"drop": component}:
            return loaded.pop(component) and None
        case {"peak": _}:
            return measure.status()["VmHWM"]
        case {"quit": _}:
            return None
        case _:
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
        case "quantize", (component, folder, width, height):
            quantize(component, Path(folder), (int(width), int(height)))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The tensorrt target on an NVIDIA GPU, through the vendor's own packages, imported when needed."""

from __future__ import annotations

import math
import mmap
import os
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ...bundle import Bundle, BundleError
from . import Arrays, check_shapes
from .tensorrt_builder import (
    CAPABILITIES,
    MAX_REASON,
    Sizes,
    compile_engine,
    engine_name,
    vendor_logger,
    vendor_module,
    vendor_version,
)

MODEL = "model.onnx"
VENDORS = ("tensorrt_rtx", "tensorrt")  # the first reads engines of a bundle, the second makes own
INSTALL = "pip install tensorrt-rtx cuda-python on a machine with an NVIDIA GPU"


class TensorrtEngine:
    """One component on the GPU; all its memory is taken at once and given back with the engine.

    Raises BundleError without a GPU, or when the engine is refused or does not match the manifest.
    """

    def __init__(
        self,
        bundle: Bundle,
        component: str,
        threads: int | None = None,
        device: Device | None = None,
    ) -> None:
        self._spec = bundle.component(component)
        try:
            device = device or open_device()
        except BundleError as error:
            have = ", ".join(capabilities(bundle, component)) or "none"
            raise BundleError(
                f"{error}; this bundle has engines for compute capability {have}: "
                "convert with --target onnx to draw here"
            ) from None
        trt, self._path = _plan(bundle, component, device)
        self._device = device
        self._memory = _Memory(device)
        self._free = weakref.finalize(self, self._memory.free)
        try:
            self._load(trt)
        except BaseException:
            self._free()
            raise

    def __call__(self, inputs: Arrays) -> Arrays:
        """Run the engine; inputs are cast to its dtypes, outputs come as float32."""
        if inputs.keys() != self._spec.inputs.keys():
            raise BundleError(
                f"{self._path} takes {', '.join(self._spec.inputs)}; given {', '.join(inputs)}"
            )
        feed = {n: np.asarray(a, self._dtypes[n], order="C") for n, a in inputs.items()}
        sizes: dict[str, int] = {}
        check_shapes(str(self._path), self._spec.inputs, feed, sizes)
        self._set_shapes({name: array.shape for name, array in feed.items()})
        memory, device = self._memory, self._device
        for name, array in feed.items():
            device.copy_in(memory.pointers[name], array, memory.stream)
        self._execute()
        found = {
            n: np.empty(tuple(self._context.get_tensor_shape(n)), self._dtypes[n])
            for n in self._spec.outputs
        }
        for name, array in found.items():
            device.copy_out(array, memory.pointers[name], memory.stream)
        device.synchronise(memory.stream)
        check_shapes(str(self._path), self._spec.outputs, found, sizes)
        return {name: array.astype(np.float32) for name, array in found.items()}

    # --- loading --------------------------------------------------------------------------------

    def _load(self, trt: Any) -> None:
        self._log = vendor_logger(trt)
        self._runtime = trt.Runtime(self._log)
        with self._path.open("rb") as file, _mapped(file) as plan:
            self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise self._refused(f"cannot read {self._path}", trt)
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        inputs = [n for n in names if self._engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        self._same_names("takes", inputs, self._spec.inputs)
        self._same_names("returns", set(names) - set(inputs), self._spec.outputs)
        self._dtypes = {n: np.dtype(trt.nptype(self._engine.get_tensor_dtype(n))) for n in names}
        if getattr(self._engine, "streamable_weights_size", 0):
            budget = self._engine.get_weight_streaming_automatic_budget()
            self._engine.weight_streaming_budget_v2 = budget
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise self._refused(f"cannot run {self._path}", trt)
        self._take_memory(inputs, names)
        shapes = [self._engine.get_tensor_shape(n) for n in names]
        self._fixed = all(size >= 0 for shape in shapes for size in shape)
        self._runs = 0

    def _same_names(self, verb: str, found: Any, manifest: dict) -> None:
        if set(found) != manifest.keys():
            raise BundleError(
                f"{self._path} {verb} {', '.join(sorted(found))[:MAX_REASON]}; "
                f"the manifest says {', '.join(manifest)}"
            )

    def _refused(self, what: str, trt: Any) -> BundleError:
        return BundleError(
            f"{vendor_version(trt)} {what}: {self._log.reason()}; convert again with this version"
        )

    def _take_memory(self, inputs: list[str], names: list[str]) -> None:
        """Room for the largest shapes that the engine takes, known to it by address."""
        self._shapes: dict[str, tuple[int, ...]] = {}
        largest = {n: tuple(self._engine.get_tensor_profile_shape(n, 0)[2]) for n in inputs}
        self._set_shapes(largest)
        self._memory.stream = self._device.stream()
        for name in names:
            shape = tuple(self._context.get_tensor_shape(name))
            if min(shape, default=1) < 0:
                raise BundleError(f"{self._path}: {name} has a shape that depends on its data")
            size = math.prod(shape) * self._dtypes[name].itemsize
            self._memory.pointers[name] = self._device.allocate(size)
            self._context.set_tensor_address(name, self._memory.pointers[name])

    # --- running --------------------------------------------------------------------------------

    def _set_shapes(self, shapes: dict[str, tuple[int, ...]]) -> None:
        for name, shape in shapes.items():
            if self._shapes.get(name) == shape:
                continue
            if not self._context.set_input_shape(name, shape):
                raise BundleError(
                    f"{self._path}: {name} of shape {shape} is outside the engine's range: "
                    f"{self._log.reason()}"
                )
            self._shapes[name] = shape

    def _execute(self) -> None:
        """From the second run on as one recorded graph, where shapes are fixed and it can be."""
        memory = self._memory
        if self._runs == 1 and self._recordable():  # TensorRT prepares itself in the first run
            memory.graph = self._device.capture(memory.stream, self._enqueue)
        self._runs += 1
        if memory.graph is not None:
            self._device.launch(memory.graph, memory.stream)
        elif not self._enqueue():
            raise BundleError(f"{self._path} failed on the GPU: {self._log.reason()}")

    def _recordable(self) -> bool:
        ask = getattr(self._context, "is_stream_capturable", None)  # tensorrt has no such question
        return self._fixed and (ask is None or ask(self._memory.stream))

    def _enqueue(self) -> bool:
        return self._context.execute_async_v3(self._memory.stream)


class _Memory:
    """What is held on the device.  `free` gives all of it back, also after a fault."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.pointers: dict[str, int] = {}
        self.stream: Any = None
        self.graph: Any = None

    def free(self) -> None:
        if self.graph is not None:
            self.device.release("cudaGraphExecDestroy", self.graph)
        for pointer in self.pointers.values():
            self.device.release("cudaFree", pointer)
        if self.stream is not None:
            self.device.release("cudaStreamDestroy", self.stream)


def _mapped(file: Any) -> mmap.mmap:
    try:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:
        raise BundleError(f"{file.name} is empty: copy or convert the bundle again") from None


# --- the device ---------------------------------------------------------------------------------


class Device:
    """The first GPU: the few calls of the CUDA runtime that are needed, each checked.

    `vendors` are the modules of VENDORS that there are, by name; `cudart` is cuda-python's runtime.
    """

    def __init__(self, vendors: dict[str, Any], cudart: Any) -> None:
        self.vendors, self._cudart = vendors, cudart
        try:
            found = self._call("cudaGetDeviceCount")
        except BundleError as error:
            raise BundleError(f"no NVIDIA GPU found ({error})") from None
        if not found:
            raise BundleError("no NVIDIA GPU found")
        kinds = cudart.cudaDeviceAttr
        major, minor = (
            self._call("cudaDeviceGetAttribute", kind, 0)
            for kind in (
                kinds.cudaDevAttrComputeCapabilityMajor,
                kinds.cudaDevAttrComputeCapabilityMinor,
            )
        )
        self.capability = f"{major}.{minor}"
        name = self._call("cudaGetDeviceProperties", 0).name
        self.name = name.decode(errors="replace") if isinstance(name, bytes) else str(name)

    def allocate(self, size: int) -> int:
        return int(self._call("cudaMalloc", size))

    def stream(self) -> int:
        return int(self._call("cudaStreamCreate"))

    def copy_in(self, pointer: int, array: np.ndarray, stream: int) -> None:
        kind = self._cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", pointer, array.ctypes.data, array.nbytes, kind, stream)

    def copy_out(self, array: np.ndarray, pointer: int, stream: int) -> None:
        kind = self._cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", array.ctypes.data, pointer, array.nbytes, kind, stream)

    def synchronise(self, stream: int) -> None:
        self._call("cudaStreamSynchronize", stream)

    def capture(self, stream: int, run: Callable[[], bool]) -> Any:
        """What `run` puts on the stream as a graph to launch, or None if that cannot be recorded.

        Nothing is computed meanwhile.
        """
        mode = self._cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        try:
            self._call("cudaStreamBeginCapture", stream, mode)
            recorded = run()
            graph = self._call("cudaStreamEndCapture", stream)
        except BundleError:  # the run is then put on the stream as ever
            return None
        try:
            return self._call("cudaGraphInstantiate", graph, 0) if recorded else None
        except BundleError:
            return None
        finally:
            self.release("cudaGraphDestroy", graph)

    def launch(self, graph: Any, stream: int) -> None:
        self._call("cudaGraphLaunch", graph, stream)

    def release(self, name: str, what: Any) -> None:
        """Free or destroy; a fault is not reported, for nothing can be done about it."""
        getattr(self._cudart, name)(what)

    def _call(self, name: str, *arguments: Any) -> Any:
        status, *values = getattr(self._cudart, name)(*arguments)
        if int(status):
            text = self._cudart.cudaGetErrorString(status)[1]
            text = text.decode() if isinstance(text, bytes) else text
            raise BundleError(f"{name}: cuda error {int(status)}: {text}")
        return values[0] if values else None


def open_device() -> Device:
    """The first GPU with the vendor's packages; BundleError says what is missing."""
    vendors = {name: module for name in VENDORS if (module := vendor_module(name))}
    if not vendors:
        raise BundleError(f"needs tensorrt-rtx: {INSTALL}")
    cudart = vendor_module("cuda.bindings.runtime")
    if cudart is None:
        raise BundleError(f"needs cuda-python: {INSTALL}")
    return Device(vendors, cudart)


# --- which engine -------------------------------------------------------------------------------


def capabilities(bundle: Bundle, component: str) -> list[str]:
    """The compute capabilities that the bundle has an engine of the component for."""
    path = bundle.component(component).path
    return [c for c in CAPABILITIES if f"{path}/{engine_name(c)}" in bundle.manifest.files]


def cache_path(bundle: Bundle, component: str, device: Device, trt: Any) -> Path:
    """Where the engine that was built on this device is kept, by all that it depends on."""
    what = f"{device.name} {vendor_version(trt)} {bundle.sha256[:16]}"
    folder = re.sub(r"[^A-Za-z0-9.]+", "-", what)
    return Path.home() / ".cache" / "ferrotype" / folder / f"{component}.engine"


def ranges(bundle: Bundle, component: str) -> Sizes:
    """The sizes that the component's open dimensions have over all that the bundle draws."""
    manifest = bundle.manifest
    config = manifest.components["vae_decoder"].config
    scale = 2 ** (len(config["block_out_channels"]) - 1)
    unit = 1 if component == "vae_encoder" else scale  # pixels, or latents
    low, high = manifest.sizes.minimum // unit, manifest.sizes.maximum // unit
    width, height = (side // unit for side in manifest.sizes.default)
    tokens = next(iter(manifest.tokenizers.values())).max_length
    return {
        "batch": (1, 1, 1),
        "sequence": (tokens, tokens, tokens),
        "width": (low, width, high),
        "height": (low, height, high),
    }


def _plan(bundle: Bundle, component: str, device: Device) -> tuple[Any, Path]:
    """The engine file for this device and the module that reads it."""
    have, path = capabilities(bundle, component), bundle.component(component).path
    if "tensorrt_rtx" in device.vendors and device.capability in have:
        engine = bundle.path(f"{path}/{engine_name(device.capability)}")
        return device.vendors["tensorrt_rtx"], engine
    if trt := device.vendors.get("tensorrt"):
        return trt, _built_here(bundle, component, device, trt)
    move = "install tensorrt, which builds it on the device"
    if device.capability in CAPABILITIES:
        move = f"convert it again for {device.capability}, or {move}"
    raise BundleError(
        f"{bundle.folder} has engines of {component} for compute capability "
        f"{', '.join(have) or 'none'}, this {device.name} has {device.capability}: {move}"
    )


def _built_here(bundle: Bundle, component: str, device: Device, trt: Any) -> Path:
    """The engine in the cache, built from the bundle's graph if this is its first use."""
    target = cache_path(bundle, component, device, trt)
    if target.is_file():
        return target
    model = bundle.path(f"{bundle.component(component).path}/{MODEL}")
    staged = target.with_name(f"{component}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        compile_engine(model, staged, None, ranges(bundle, component), vendor="tensorrt")
        os.replace(staged, target)
    except BundleError as error:
        raise BundleError(f"{component} of {bundle.folder}: {error}") from None
    except OSError as error:
        raise BundleError(f"{target} cannot be written: {error.strerror or error}") from None
    finally:
        staged.unlink(missing_ok=True)
    return target

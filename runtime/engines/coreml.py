"""The coreml target: packages that run one after the other, on a Mac through coremltools.

What runs a package is a callable, so that the reader that checks a conversion takes the same way.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ...bundle import Bundle, BundleError
from . import Arrays, check_shapes

Part = Callable[[Arrays], Arrays]  # takes at least what the package does, returns its outputs
OpenPart = Callable[[Path, "str | None"], Part]  # of a package and of one of its functions
# By component, the names that Apple's Swift runtime has for ours (ml-stable-diffusion).
APPLE: dict[str, dict[str, str]] = {
    "text_encoder": {"pooler_output": "pooled_outputs", "hidden_states": "hidden_embeds"},
    "text_encoder_2": {"text_embeds": "pooled_outputs", "hidden_states": "hidden_embeds"},
    "unet": {"out_sample": "noise_pred"},
    "vae_decoder": {"latent_sample": "z", "sample": "image"},
    "vae_encoder": {"sample": "x", "latent_parameters": "latent"},
}


def package_name(component: str, name: str, layout: str) -> str:
    """The name that an input or output has in a package: a plain one, or Apple's."""
    if layout == "apple":
        return APPLE[component].get(name.split(".")[0], name)
    return re.sub(r"\W", "_", name)


def function_name(width: int, height: int) -> str:
    """The function of a package that takes inputs of that size."""
    return f"size_{width}x{height}"


class CoremlEngine:
    """One component; `open_part` opens a package, by default on this Mac.

    Raises BundleError where Core ML is not, or refuses a package.
    """

    def __init__(self, bundle: Bundle, component: str, open_part: OpenPart | None = None) -> None:
        self._name, self._spec = component, bundle.component(component)
        self._folder = bundle.path(self._spec.path)
        self._layout = bundle.manifest.options.get("layout", "ferrotype")
        self._batch = _whole(bundle, "batch") if component == "unet" else 1
        self._open = open_part or _on_this_mac(bundle, component)
        shapes = [tensor.shape for tensor in self._spec.inputs.values()]
        self._several = any(isinstance(n, str) for shape in shapes for n in shape)
        self._functions: dict[str | None, list[Part]] = {}
        if not self._spec.parts:
            raise BundleError(f"{self._folder}: the manifest names no packages of {component}")
        if not self._several:
            self._parts(None)  # what cannot be loaded is told now

    def __call__(self, inputs: Arrays) -> Arrays:
        """Run every part in order; inputs and float32 outputs by the names of the manifest."""
        sizes: dict[str, int] = {}
        where = str(self._folder)
        check_shapes(where, self._spec.inputs, inputs, sizes)
        values = {self._package_name(n): self._feed(n, value) for n, value in inputs.items()}
        for part in self._parts(self._function(inputs)):
            values = values | part(values)
        found = {}
        for name in self._spec.outputs:
            if self._package_name(name) not in values:
                raise BundleError(f"{where}: its packages return no {self._package_name(name)}")
            found[name] = np.asarray(values[self._package_name(name)][:1], np.float32)
        check_shapes(where, self._spec.outputs, found, sizes)
        return found

    def _package_name(self, name: str) -> str:
        return package_name(self._name, name, self._layout)

    def _feed(self, name: str, value: np.ndarray) -> np.ndarray:
        """An input as the packages take it: Apple's differ in layout, batch and type."""
        value = np.asarray(value)
        if name == "timestep":
            value = value.reshape(1)
        if self._layout == "apple" and name == "encoder_hidden_states":
            value = value.transpose(0, 2, 1)[:, :, None]
        if name == "input_ids":
            return value.astype(np.float32 if self._layout == "apple" else np.int32)
        return np.repeat(np.asarray(value, np.float32), self._batch, axis=0)

    def _function(self, inputs: Arrays) -> str | None:
        if not self._several:
            return None
        shape = next(v.shape for v in inputs.values() if np.ndim(v) == 4)
        return function_name(shape[3], shape[2])

    def _parts(self, function: str | None) -> list[Part]:
        if function not in self._functions:
            packages = [self._folder / part for part in self._spec.parts]
            self._functions[function] = [self._open(package, function) for package in packages]
        return self._functions[function]


def _whole(bundle: Bundle, option: str) -> int:
    text = bundle.manifest.options.get(option, "1")
    if not re.fullmatch("[1-9]", text):
        raise BundleError(f"{bundle.folder}: the option {option} is {text!r}, not 1 to 9")
    return int(text)


# --- on a Mac -----------------------------------------------------------------------------------


def _on_this_mac(bundle: Bundle, component: str) -> OpenPart:
    """Open packages with Core ML itself; compiled ones are kept for the next time."""
    if sys.platform != "darwin":
        raise BundleError(
            f"{bundle.folder} is for Core ML, which runs on macOS and iOS, not on {sys.platform}; "
            "convert with --target onnx to draw here"
        )
    try:
        import coremltools as ct
    except ModuleNotFoundError:
        raise BundleError("a Core ML bundle needs coremltools: pip install coremltools") from None
    units = bundle.manifest.options.get("compute_units", "all")
    cache = cache_folder(bundle) / component

    def open_part(package: Path, function: str | None) -> Part:
        try:
            compiled = _compiled(ct, package, cache)
            unit = ct.ComputeUnit[units.upper()]
            model = ct.models.CompiledMLModel(str(compiled), unit, function_name=function)
            names = _input_names(ct.utils.load_spec(str(package)), function)
        except Exception as error:  # Core ML's own errors share no base class
            raise BundleError(f"Core ML cannot load {package}: {_first_line(error)}") from None

        def run(values: Arrays) -> Arrays:
            try:
                return model.predict({name: values[name] for name in names})
            except Exception as error:
                raise BundleError(f"Core ML cannot run {package}: {_first_line(error)}") from None

        return run

    return open_part


def cache_folder(bundle: Bundle) -> Path:
    """Where compiled packages are kept: by the bundle's hash, so never those of another."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / "Library" / "Caches"
    return Path(root) / "ferrotype" / bundle.sha256[:32]


def _compiled(ct: Any, package: Path, cache: Path) -> Path:
    """The compiled form of a package, compiled to a temporary name the first time."""
    target = cache / f"{package.stem}.mlmodelc"
    if not target.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        made = Path(ct.models.utils.compile_model(str(package)))
        temporary = cache / f".{package.stem}.{os.getpid()}.mlmodelc"
        shutil.move(made, temporary)
        temporary.rename(target)
    return target


def _input_names(spec: Any, function: str | None) -> list[str]:
    description = spec.description
    if function is not None:
        description = next(f for f in description.functions if f.name == function)
    return [entry.name for entry in description.input]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]

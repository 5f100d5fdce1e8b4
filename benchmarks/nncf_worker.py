"""What OpenVINO's quantizer (NNCF) makes of our graphs, in an environment of its own.

    python nncf_worker.py BUNDLE WAY OUT.npz < asked.json

Draws all prompts with all seeds into OUT.npz, and prints the bytes of the weights; quantization.py
asks for it.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino as ov

from ferrotype import bundle as bundles
from ferrotype.runtime.pipeline import Pipeline

COMPONENTS = ("text_encoder", "unet", "vae_decoder")
Arrays = dict[str, np.ndarray]


class Session:
    """A component on OpenVINO in fp32; with `runs`, it keeps what it is given."""

    def __init__(self, model: ov.Model, runs: list[Arrays] | None = None) -> None:
        self._compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        self._runs = runs

    def __call__(self, inputs: Arrays) -> Arrays:
        feeds = {
            port.get_any_name(): np.asarray(
                inputs[port.get_any_name()], port.get_element_type().to_dtype()
            )
            for port in self._compiled.inputs
        }
        if self._runs is not None:
            self._runs.append(feeds)
        found = self._compiled(feeds)
        return {port.get_any_name(): np.array(found[port]) for port in self._compiled.outputs}


def main() -> None:
    folder, way, out = sys.argv[1:]
    asked = json.load(sys.stdin)
    bundle = bundles.load(folder)
    core = ov.Core()
    models = {n: core.read_model(bundle.path(n) / "model.onnx") for n in COMPONENTS}
    runs: dict[str, list[Arrays]] = {name: [] for name in COMPONENTS}
    if way == "w8a8":
        watched = {name: Session(model, runs[name]) for name, model in models.items()}
        draw(bundle, watched, asked["calibration"], [0])
    made = {name: quantized(way, model, runs[name]) for name, model in models.items()}
    size = sum(map(weight_bytes, made.values()))
    sessions = {name: Session(model) for name, model in made.items()}
    np.savez(out, *draw(bundle, sessions, asked["prompts"], asked["seeds"]))
    print(json.dumps({"bytes": size, "nncf": nncf.__version__, "openvino": ov.__version__}))


def quantized(way: str, model: ov.Model, runs: list[Arrays]) -> ov.Model:
    if way == "w8":
        return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
    if way == "w4":
        mode = nncf.CompressWeightsMode.INT4_SYM
        return nncf.compress_weights(model, mode=mode, group_size=32, ratio=1.0)
    return nncf.quantize(model, nncf.Dataset(runs), subset_size=len(runs))


def draw(bundle: Any, sessions: Any, prompts: list[str], seeds: list[int]) -> list[np.ndarray]:
    pipe = Pipeline(bundle, resident=True, opener=lambda _, name: sessions[name])
    pictures = []
    for prompt in prompts:
        for seed in seeds:
            *_, last = pipe.steps(prompt, seed=seed)
            pictures.append(pipe.decode_array(last.latents))
    return pictures


def weight_bytes(model: ov.Model) -> int:
    with tempfile.TemporaryDirectory() as folder:
        ov.save_model(model, Path(folder) / "m.xml", compress_to_fp16=False)
        return (Path(folder) / "m.bin").stat().st_size


if __name__ == "__main__":
    main()

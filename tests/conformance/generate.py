"""Write the conformance vectors: `python -m ferrotype.tests.conformance.generate`.

What they are and how a host runs them: README.md beside this file.  tests/test_conformance.py fails
where the files are not what this writes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ferrotype import bundle
from ferrotype.bundle import Recipe
from ferrotype.runtime import samplers, seeds
from ferrotype.runtime.pipeline import EMBEDDED, EMBEDDED_ONNX, Pipeline
from ferrotype.runtime.tokenizer import Tokenizer
from ferrotype.tests.conformance import unicode

HERE = Path(__file__).parent
# dB, of latents and pictures.  Engines that compute in int8 round some values the other way,
# which guidance doubles: of sixteen such pictures scalar and AVX2 were 45 to 49 dB apart.
FLOORS = {EMBEDDED_ONNX.name: 45.0, EMBEDDED.name: 40.0}
CHUNKS = 3

PROMPTS = [
    "a red apple on a sky blue background",
    "",
    "   A  PENGUIN\tin\na\u3000hat ",
    "it's we'll I'd they've o'clock 'S ''s",
    "1234 3.14 x2 ٣٤ ½ Ⅷ",
    "naïve café cafe\u0301 A\u030angstro\u0308m \u212b \u1112\u1161\u11ab 한",
    "ΟΔΥΣΣΕΥΣ İstanbul ǅ STRASSE ß ẞ",
    "🍎🏽 👩‍👩‍👧 ❤️ \U0001f9ff",
    "日本語 中文 हिन्दी ไทย עברית العربية",
    "!!! ... -- ?!'s #$%& <a> {b} ~^_`",
    "a<|endoftext|>b <|startoftext|> c <|ENDOFTEXT|>",
    "\x00\x01\x1f\x7f\x85\xa0\u200b\u2028\ufeff\ufffd",
    "half a pair \ud83c and \udf4e",
    "a (red:1.3) apple, [leaves], ((green)), (x:-0.5), (y:.5), (z:2.)",
    r"\(literal\) \[brackets\] \\ \a (open and (nested:1.2",
    "closed) too ] often :1.2) (a:b) (1:2:3)",
    "one BREAK two BREAKS BREAK three BREAKBREAK xBREAK",
    "(weight (inside:1.5) BREAK the break:0.8) after",
    "BREAK",
    "word " * 40,
    "a" * 100 + " " + "é" * 60,
    "\U0001d7db\U0001d7dc (\u0967:\u0661.\u0665)",
]
SEEDS = {
    "torch": [0, 1, 42, 2**32 - 1, 2**32, 2**64 - 1],
    "numpy": [0, 42, 2**32 - 1],
    "pcg64": [0, 42, 2**64 - 1],
}
DRAWS = [1000, 3, 16, 1, 17, 1024]  # one after the other from one stream
PICTURES: list[dict[str, Any]] = [
    {"name": "apple", "prompt": PROMPTS[0], "seed": 3},
    {
        "name": "guided",
        "prompt": "a (penguin:1.2) on a black background",
        "negative": "a rocket",
        "seed": 2**32 + 7,
        "steps": 3,
        "sampler": "euler_a",
        "guidance": 1.5,
        "size": [64, 96],
    },
]


def tokens() -> list[dict[str, Any]]:
    """Ids and weights of prompts, in at most CHUNKS chunks of the embedded model's 32 tokens."""
    tokenizer = Tokenizer(bundle.load(EMBEDDED_ONNX))
    found = []
    for prompt in PROMPTS:
        chunks = tokenizer.chunks(prompt, CHUNKS)
        # Doubles from floats: what a host compares after rounding to float32.
        weights = [[float(str(w)) for w in row] for row in chunks.weights]
        found.append({"prompt": prompt, "ids": chunks.ids.tolist(), "weights": weights})
    return found


def noise() -> tuple[list[dict[str, Any]], bytes]:
    """Streams of draws, one after the other in one file of little-endian floats."""
    listed, values = [], []
    for rng, numbers in SEEDS.items():
        for seed in numbers:
            stream = seeds.SEEDS[rng](seed)
            offset = sum(v.size for v in values)
            listed.append({"rng": rng, "seed": str(seed), "draws": DRAWS, "offset": offset})
            values += [stream((count,)) for count in DRAWS]
    return listed, np.concatenate(values).astype("<f4").tobytes()


def recipes() -> Iterator[tuple[Recipe, float | None]]:
    """Every sampler with every spacing, prediction and a few numbers of steps."""
    options: list[dict[str, Any]] = [
        {"steps": 1, "prediction_type": "epsilon", "set_alpha_to_one": True},
        {"steps": 4, "prediction_type": "v_prediction", "zero_terminal_snr": True, "eta": 0.3},
        {"steps": 7, "prediction_type": "sample", "beta_schedule": "linear", "eta": 1.0},
        {"steps": 25, "prediction_type": "epsilon", "eta": 0.5, "steps_offset": 0},
    ]
    for sampler, spacing in itertools.product(samplers.SAMPLERS, bundle.SPACINGS):
        for some, strength in zip(options, (None, None, 0.7, 0.6), strict=True):
            yield Recipe(sampler, guidance=1.0, spacing=spacing, **some), strength
    yield Recipe("lcm", 1, 1.0, spacing="lcm", timesteps=(800.0,)), None
    yield Recipe("ddim", 3, 1.0, timesteps=(999.0, 500.0, 20.0)), None


def tables() -> list[dict[str, Any]]:
    """Recipes and their tables; null where there is none, and a host must say so."""
    found = []
    for recipe, strength in recipes():
        try:
            table = json.loads(samplers.to_json(samplers.table(recipe, strength)))
        except ValueError:
            table = None
        found.append({"recipe": dataclasses.asdict(recipe), "strength": strength, "table": table})
    return found


def pictures(folder: Path, isa: str | None = None) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Runs of a bundle: latents after each step, then the picture's RGB bytes, in one file."""
    made = bundle.load(folder)
    for case in PICTURES:
        pipe = Pipeline(made, isa=isa)
        asked = {key: value for key, value in case.items() if key not in ("name", "prompt")}
        size = tuple(asked.pop("size", made.manifest.sizes.default))
        steps = list(pipe.steps(case["prompt"], size=size, **asked))
        latents = b"".join(step.latents.astype("<f4").tobytes() for step in steps)
        pixels = np.asarray(pipe.decode(steps[-1])).tobytes()
        yield (
            {
                **case,
                "seed": str(case["seed"]),
                "size": list(size),
                "bundle": folder.name,
                "identity": made.sha256,
                "latents": [len(steps), *steps[-1].latents.shape[1:]],
                "sha256": hashlib.sha256(pixels).hexdigest(),
                "file": f"{case['name']}.{made.manifest.target}.bin",
            },
            latents + pixels,
        )


def vectors() -> dict[str, bytes]:
    """Every file by its name."""
    listed, values = noise()
    drawn = [*pictures(EMBEDDED_ONNX), *pictures(EMBEDDED, "scalar")]
    return {
        "tokens.json": lines({"chunks": CHUNKS}, "tokens", tokens()),
        "seeds.json": lines({"file": "seeds.bin"}, "seeds", listed),
        "seeds.bin": values,
        "tables.json": lines({}, "tables", tables()),
        "pictures.json": lines({"floors": FLOORS}, "pictures", [case for case, _ in drawn]),
        **{case["file"]: data for case, data in drawn},
    }


def lines(head: dict[str, Any], name: str, entries: list[dict[str, Any]]) -> bytes:
    """JSON of a line per entry, ASCII."""
    start = "".join(f" {json.dumps(key)}: {json.dumps(value)},\n" for key, value in head.items())
    body = ",\n".join("  " + json.dumps(entry) for entry in entries)
    return f'{{\n{start} "{name}": [\n{body}\n ]\n}}\n'.encode()


if __name__ == "__main__":
    unicode.write(unicode.tables())
    for name, data in vectors().items():
        (HERE / name).write_bytes(data)

"""The conformance vectors are what the Python runtime computes; other hosts read the same files."""

import json

import numpy as np
import pytest

from ferrotype import bundle, kernels, parity
from ferrotype.runtime import samplers, seeds
from ferrotype.runtime.pipeline import EMBEDDED, EMBEDDED_ONNX, Pipeline
from ferrotype.runtime.tokenizer import Tokenizer
from ferrotype.tests.conformance import generate, unicode

HERE = generate.HERE


def read(name):
    return json.loads((HERE / name).read_text("ascii"))


def test_tokens():
    """Read as any host reads them: the chunks of every prompt."""
    given, tokenizer = read("tokens.json"), Tokenizer(bundle.load(EMBEDDED_ONNX))
    for case in given["tokens"]:
        found = tokenizer.chunks(case["prompt"], given["chunks"])
        assert found.ids.tolist() == case["ids"], case["prompt"]
        assert (found.weights == np.array(case["weights"], np.float32)).all(), case["prompt"]
    assert generate.lines({"chunks": generate.CHUNKS}, "tokens", generate.tokens()) == (
        (HERE / "tokens.json").read_bytes()
    )


def test_seeds():
    values = np.fromfile(HERE / "seeds.bin", "<f4")
    for case in read("seeds.json")["seeds"]:
        noise, at = seeds.SEEDS[case["rng"]](int(case["seed"])), case["offset"]
        for count in case["draws"]:
            assert (noise((count,)) == values[at : at + count]).all(), case
            at += count
    assert generate.noise()[1] == values.tobytes()


def test_the_seeds_of_torch_are_torchs():
    torch = pytest.importorskip("torch")
    values = np.fromfile(HERE / "seeds.bin", "<f4")
    for case in read("seeds.json")["seeds"]:
        if case["rng"] == "torch":
            seed = int(case["seed"])
            signed = seed - 2**64 if seed >= 2**63 else seed
            drawn = torch.randn(1000, generator=torch.Generator("cpu").manual_seed(signed))
            assert (drawn.numpy() == values[case["offset"] :][:1000]).all(), case


def test_tables():
    for case in read("tables.json")["tables"]:
        numbers = {**case["recipe"], "timesteps": tuple(case["recipe"]["timesteps"])}
        recipe = bundle.Recipe(**numbers)
        if case["table"] is None:
            with pytest.raises(ValueError):
                samplers.table(recipe, case["strength"])
            continue
        found = samplers.table(recipe, case["strength"])
        assert found == samplers.from_json(json.dumps(case["table"])), case
    assert generate.lines({}, "tables", generate.tables()) == (HERE / "tables.json").read_bytes()


@pytest.mark.parametrize("case", read("pictures.json")["pictures"], ids=lambda c: c["file"])
def test_pictures(case):
    """The CPU engine's bytes with its scalar code; within the floor with any other."""
    floor = read("pictures.json")["floors"][case["bundle"]]
    folder = {path.name: path for path in (EMBEDDED, EMBEDDED_ONNX)}[case["bundle"]]
    made = bundle.load(folder)
    assert made.sha256 == case["identity"], "the bundle is another: generate the vectors again"
    native = made.manifest.target == "native"
    if native and not kernels.available():
        pytest.skip("the native engine is not built")
    for isa in ("scalar", None) if native else (None,):
        pipe = Pipeline(made, isa=isa)
        asked = {k: case[k] for k in ("negative", "steps", "sampler", "guidance") if k in case}
        size, seed = tuple(case["size"]), int(case["seed"])
        steps = list(pipe.steps(case["prompt"], size=size, seed=seed, **asked))
        pixels = np.asarray(pipe.decode(steps[-1]))
        data = (HERE / case["file"]).read_bytes()
        shape = tuple(case["latents"])
        latents = np.frombuffer(data, "<f4", np.prod(shape)).reshape(shape)
        picture = np.frombuffer(data, np.uint8, offset=latents.nbytes)
        if isa == "scalar":
            assert (np.concatenate([step.latents for step in steps]) == latents).all()
            assert (pixels.ravel() == picture).all()
        for step, expected in zip(steps, latents, strict=True):
            assert parity.psnr(expected, step.latents[0]) > floor, (isa, step.index)
        floats = (picture.astype(np.float64), pixels.ravel().astype(np.float64))
        assert parity.psnr(*floats, peak=255.0) > floor, isa


def test_the_unicode_tables_are_the_tokenizers():
    found = unicode.tables()
    assert unicode.TABLES.read_text("utf-8") == unicode.to_json(found)
    assert unicode.TYPESCRIPT.read_text("utf-8") == unicode.to_typescript(found)
    letters = {first for first, _ in found["letters"]}
    assert {ord("A"), ord("a"), 0x4E00} <= letters

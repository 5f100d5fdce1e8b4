"""The JavaScript library against the Python runtime: same ids, noise, tables; and its own tests."""

import dataclasses
import gzip
import itertools
import json
import random
import shutil
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tokenizers import normalizers

import ferrotype
from ferrotype import bundle, parity
from ferrotype.bundle import BundleError, Recipe
from ferrotype.runtime import demo, pictures, prompts, samplers, seeds
from ferrotype.runtime.pipeline import EMBEDDED, EMBEDDED_ONNX, Pipeline
from ferrotype.runtime.tokenizer import Tokenizer
from ferrotype.tests.node import EMBED, run

HOST = EMBED / "build" / "test" / "host.mjs"
CHUNKS = 32


@pytest.fixture(scope="module")
def compiled(npm):
    """The compiled tests."""
    run("node", "test/run.mjs", "--only-build")


@pytest.fixture(scope="module")
def ask(compiled, tmp_path_factory):
    """Questions to the library, as test/host.ts reads them."""

    def answers(**questions):
        folder = tmp_path_factory.mktemp("host")
        (folder / "asked.json").write_text(json.dumps(questions), "ascii")
        run("node", HOST, folder / "asked.json", folder / "answered.json")
        return json.loads((folder / "answered.json").read_text("utf-8"))

    return answers


def hexed(values):
    return np.asarray(values, "<f4").tobytes().hex()


def test_its_own_tests(compiled):
    said = run("node", "--enable-source-maps", "--test", *map(str, HOST.parent.glob("*.test.mjs")))
    assert "# fail 0" in said
    assert int(said.split("# pass ")[1].split()[0]) > 15


def test_types_and_format(npm):
    run("npm", "run", "check")


# --- the same as Python -------------------------------------------------------------------------

SOME = [
    *map(chr, range(0x20, 0x250)),
    *"'s't're've'm'll'dSTß ΣςİıǅK\u0301\u0308\u1100\u1161\u11a8가힣\u0915\u093c\u2126\ufb01",
    *"\t\n\u3000\u200b\ufeff\x85\x1c\u2028()[]\\:",
    "<|endoftext|>", "<|startoftext|>", "<|EndOfText|>", "BREAK", " BREAK ", ":1.2)", ":-.5)",
    ":٣)",
    "apple", "'S", "'LL", "123", "½", "🍎", "👩‍👩‍👧", "🏽", "\U0001d7d8", "\\(", ":1e3)", ": 2. )",
    "\ud83c",
]  # fmt: skip


NFC = normalizers.NFC()


def is_known(character):
    """Whether this Python's Unicode and the tokenizers' have it, as versions differ."""
    if unicodedata.category(character) in ("Cn", "Cs"):
        return False
    marked = character + "\u0334"  # of the lowest class: goes before any mark that is known as one
    return NFC.normalize_str(marked) == unicodedata.normalize("NFC", marked)


def any_text(rng):
    """Text of any kind; of characters that all know."""
    parts = []
    for _ in range(rng.randrange(40)):
        if rng.random() < 0.75:
            parts.append(rng.choice(SOME))
            continue
        code = rng.choice([rng.randrange(0x3000), rng.randrange(0xD800), rng.randrange(0x30000)])
        if is_known(chr(code)):
            parts.append(chr(code))
    return "".join(parts)


def chunked(tokenizer, prompt):
    try:
        tokens = tokenizer.chunks(prompt, CHUNKS)
    except ValueError:
        return "OptionError"
    return tokens.ids.tolist(), hexed(tokens.weights)


def answered(found):
    if isinstance(found, str):
        return found.partition(":")[0]
    return found["ids"], hexed(found["weights"])


def test_tokens_of_any_text(ask):
    rng = random.Random()
    made = bundle.load(EMBEDDED_ONNX)
    tokenizer, texts = Tokenizer(made), [any_text(rng) for _ in range(3000)]
    assigned = (c for c in range(0x32000) if not 0xD800 <= c < 0xE000)
    every = [chr(code) for code in rng.sample(list(assigned), 30_000)]
    rows = (every[at : at + 64] for at in range(0, len(every), 64))
    texts += [prompts.escape("a".join(row)) for row in rows]
    path = str(made.path("tokenizer/tokenizer.json"))
    question = {"tokenizer": path, "length": 32, "pad": "<|endoftext|>", "most": CHUNKS}
    found = ask(tokens=[{**question, "prompts": texts}])["tokens"][0]
    for text, theirs in zip(texts, found, strict=True):
        assert answered(theirs) == chunked(tokenizer, text), ascii(text)


def test_added_tokens(ask, tmp_path):
    """What a textual inversion adds is matched in normal form, the longest of several first."""
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Reference

    reference = Reference.from_file(str(EMBEDDED_ONNX / "tokenizer" / "tokenizer.json"))
    reference.add_tokens([AddedToken(t, normalized=True) for t in ("<cat>", "<cat>_1", "Ünïcat")])
    folder = shutil.copytree(EMBEDDED_ONNX, tmp_path / "b.ferro")
    path = folder / "tokenizer" / "tokenizer.json"
    reference.save(str(path))
    spec = bundle.load(EMBEDDED_ONNX).manifest
    tokenizer = Tokenizer(bundle.Bundle(folder, spec))
    texts = ["a <cat> on a <CAT>_1 mat", "<cat><cat>x", "ünïcatünïcat ÜNÏCAT", "u\u0308nïcat <cat"]
    question = {"tokenizer": str(path), "length": 32, "pad": "<|endoftext|>", "most": CHUNKS}
    found = ask(tokens=[{**question, "prompts": texts}])["tokens"][0]
    assert [answered(f) for f in found] == [chunked(tokenizer, text) for text in texts]
    assert any(i >= 2048 for i in found[0]["ids"][0])


def test_prompts_are_parsed_alike(ask):
    rng = random.Random()
    marks = ["(", ")", "[", "]", ":1.3)", ":", "\\", " BREAK ", "word ", "1", ".5", "-", " ", "é"]
    texts = ["".join(rng.choices(marks, k=rng.randrange(25))) for _ in range(2000)]
    for text, theirs in zip(texts, ask(parsed=texts)["parsed"], strict=True):
        try:
            ours = [[span._asdict() for span in section] for section in prompts.parse(text)]
        except ValueError:
            ours = "OptionError"
        assert (theirs.partition(":")[0] if isinstance(theirs, str) else theirs) == ours, text


def test_noise_of_any_seed(ask):
    rng = random.Random()
    asked, expected = [], []
    for name, bits in (("torch", 64), ("numpy", 32)):
        for _ in range(12):
            seed, counts = rng.randrange(2**bits), rng.choices((1, 3, 15, 16, 17, 100, 4096), k=6)
            asked.append({"rng": name, "seed": str(seed), "counts": counts})
            noise = seeds.SEEDS[name](seed)
            expected.append([hexed(noise((count,))) for count in counts])
    assert ask(noise=asked)["noise"] == expected


def table_of(recipe, strength):
    try:
        table = samplers.table(recipe, strength)
    except ValueError:
        return "OptionError"
    return hexed([table.start_image, table.start_noise, *itertools.chain(*table.rows)])


def test_tables_of_any_recipe(ask):
    """Bit for bit on Stable Diffusion's schedules; the cosine's may differ in the last place."""
    rng = random.Random()
    asked = []
    choices = itertools.product(samplers.SAMPLERS, bundle.SPACINGS, bundle.PREDICTION_TYPES)
    for sampler, spacing, prediction in choices:
        for schedule in bundle.BETA_SCHEDULES:
            for steps in (*rng.sample(range(1, 51), 6), rng.randrange(51, 1001)):
                recipe = Recipe(
                    sampler, steps, 1.0, prediction, spacing, beta_schedule=schedule,
                    zero_terminal_snr=rng.random() < 0.3, set_alpha_to_one=rng.random() < 0.5,
                    eta=rng.choice([0.0, 0.3, 1.0, rng.random()]), steps_offset=rng.randrange(2),
                )  # fmt: skip
                asked.append((recipe, rng.choice([None, None, 1.0, round(rng.random(), 3) or 1.0])))
    found = ask(tables=[(dataclasses.asdict(recipe), strength) for recipe, strength in asked])
    drawn = 0
    for (recipe, strength), theirs in zip(asked, found["tables"], strict=True):
        ours, where = table_of(recipe, strength), (recipe, strength)
        if "Error" in ours or "Error" in theirs:
            assert theirs.partition(":")[0] == ours, where
        elif recipe.beta_schedule == "squaredcos_cap_v2":
            both = [np.frombuffer(bytes.fromhex(text), np.float32) for text in (ours, theirs)]
            np.testing.assert_allclose(*both, rtol=1e-4, atol=1e-6, err_msg=str(where))
        else:
            assert theirs == ours, where
        drawn += "Error" not in ours
    assert drawn > 1000


def test_manifests_that_are_refused(ask):
    """What Python refuses the library refuses: one field changed at a time."""
    text = (EMBEDDED_ONNX / "manifest.json").read_text("utf-8")
    changed = [text, "", "{}", "[]", text[:-5], text.replace('"format": 1', '"format": 2', 1)]
    changed.append(text.replace('"model":', '"model": "x", "model":', 1))
    for path in places(json.loads(text)):
        if path[0] == "parity":
            continue
        for value in (None, -1, "", "../x", [], {}, 1e30, True, "a\\b"):
            raw = json.loads(text)
            inner = raw
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = value
            changed.append(json.dumps(raw))
        del inner[path[-1]]
        changed.append(json.dumps(raw))
    sample = changed[:8] + random.Random().sample(changed, 1200)
    refused = 0
    for given, theirs in zip(sample, ask(manifests=sample)["manifests"], strict=True):
        try:
            bundle.loads(given)
            ours = ""
        except BundleError:
            ours = "BundleError"
        refused += bool(ours)
        if ours:
            assert theirs.startswith(ours), (given[:300], theirs)
        elif "which lists no file" not in theirs:  # `load` says that in Python
            assert theirs == "", (given[:300], theirs)
    assert refused > 500


def places(value, path=()):
    """The path of every value inside, in at most 40 files and no networks' own configurations."""
    if path:
        yield path
    if path[-1:] == ("config",):
        return
    if isinstance(value, dict):
        for key in list(value)[:40]:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from places(inner, (*path, index))


# --- the package and the example ----------------------------------------------------------------


def test_the_package(npm, tmp_path):
    """`npm pack` holds what is built from src and nothing else, and needs one peer."""
    said = json.loads(run("npm", "pack", "--json", "--pack-destination", str(tmp_path)))
    (packed,) = said if isinstance(said, list) else said.values()
    names = {entry["path"] for entry in packed["files"]}
    modules = {path.stem for path in (EMBED / "src").glob("*.ts")}
    built = {f"dist/{name}{suffix}" for name in modules for suffix in (".js", ".d.ts")}
    assert names == {"package.json", "README.md", *built}
    with tarfile.open(tmp_path / packed["filename"]) as archive:
        package = json.load(archive.extractfile("package/package.json"))
    assert set(package["peerDependencies"]) == {"onnxruntime-common"}
    assert not package.get("dependencies")
    assert package["version"] == ferrotype.__version__


def test_the_example_draws_what_python_draws(npm, tmp_path):
    run("npm", "run", "build")
    out = tmp_path / "apple.png"
    prompt = "a red apple on a sky blue background"
    run("node", "examples/draw.mjs", str(EMBEDDED_ONNX), prompt, "7", str(out))
    text = pictures.read_text(out)
    made = bundle.load(EMBEDDED_ONNX)
    assert (text["prompt"], text["seed"], text["bundle_sha256"]) == (prompt, "7", made.sha256)
    theirs = np.asarray(Image.open(out).convert("RGB"), np.float64)
    ours = np.asarray(Pipeline(made).generate(prompt, seed=7), np.float64)
    assert parity.psnr(ours, theirs, peak=255.0) > 45


# --- the page's files ---------------------------------------------------------------------------


def test_the_page_is_built_from_its_sources(npm, tmp_path):
    """`npm run demo` writes what is committed; compressed files are compared unpacked."""
    run("node", "demo/build.mjs", str(tmp_path / "page"))
    assert unpacked(tmp_path / "page") == unpacked(demo.PAGE)


def unpacked(folder):
    read = {".gz": lambda path: gzip.decompress(path.read_bytes())}
    return {p.name: read.get(p.suffix, Path.read_bytes)(p) for p in folder.iterdir()}


def test_a_folder_for_any_server(tmp_path):
    size = demo.export(bundle.load(EMBEDDED_ONNX), tmp_path / "site")
    found = {p for p in (tmp_path / "site").rglob("*") if p.is_file()}
    assert size == sum(path.stat().st_size for path in found) > 30 << 20
    assert (tmp_path / "site" / "ort-wasm-simd-threaded.wasm").read_bytes()[:4] == b"\0asm"
    assert bundle.verify(bundle.load(tmp_path / "site" / "bundle")) == []
    assert list(tmp_path.iterdir()) == [tmp_path / "site"]
    with pytest.raises(pictures.PictureError, match="exists"):
        demo.export(bundle.load(EMBEDDED_ONNX), tmp_path / "site")
    with pytest.raises(BundleError, match="is for native, a browser runs onnx"):
        demo.export(bundle.load(EMBEDDED), tmp_path / "other")
    assert not (tmp_path / "other").exists()

"""The C runtime gives Python's bytes within its plan; whatever is wrong is an error code."""

import hashlib
import json
import os
import random
import runpy
import shutil
import struct
import subprocess
import sys
import tarfile
import threading
import unicodedata
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ferrotype import bundle as bundles
from ferrotype import cli, kernels, parity
from ferrotype.benchmarks import random_bundles
from ferrotype.benchmarks.checkpoints import TINY, TINY_XL
from ferrotype.bundle import Recipe
from ferrotype.runtime import compiled, seeds
from ferrotype.runtime.compiled import CompileError, compile_programs
from ferrotype.runtime.engines.native import WEIGHTS
from ferrotype.runtime.pipeline import EMBEDDED, EMBEDDED_ONNX, Pipeline
from ferrotype.runtime.tokenizer import Tokenizer
from ferrotype.tests import embed_host, embed_programs
from ferrotype.tests.embed_host import (
    ARGUMENT,
    BUDGET,
    CALLBACK,
    CANCELLED,
    FILE,
    FORMAT,
    NUMBERS,
    PROMPT,
    SOURCE,
    Host,
    HostError,
    noise,
)
from ferrotype.tests.kernels_builds import BUILDS, KERNELS, call
from ferrotype.tests.random_networks import few

pytestmark = [
    pytest.mark.skipif(not kernels.available(), reason="the native engine is not built"),
    pytest.mark.skipif(sys.platform == "win32", reason="embed/c is for POSIX systems"),
]

RNG = random.Random()
BANDED = (256, 192)  # large enough that its decoder runs in bands in a small budget
CHUNKS = 3
TAESD = {
    "_class_name": "AutoencoderTiny", "decoder_block_out_channels": [16] * 3,
    "encoder_block_out_channels": [16] * 3, "num_decoder_blocks": [1, 1, 1],
    "num_encoder_blocks": [1, 1, 1],
}  # fmt: skip
LCM_UNET = TINY_XL["unet"] | {"time_cond_proj_dim": 20}
# name -> configs, weights, activations, recipe
OTHERS = {
    "xl": (TINY_XL, "bf16", "bf16", Recipe("euler_a", 2, 1.0, zero_negative=True)),
    "xl, guidance embedded": (TINY_XL | {"unet": LCM_UNET}, "fp32", "fp32",
                              Recipe("lcm", 2, 8.0, spacing="lcm")),
    "taesd, fp16": (TINY | {"vae": TAESD}, "fp16", "fp16", Recipe("dpmpp_2m", 3, 1.0)),
    "unipc": (TINY, "bf16", "fp32", Recipe("unipc", 4, 3.0)),
}  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return embed_host.build(tmp_path_factory.mktemp("host"))


@pytest.fixture(scope="module")
def library(built):
    return built[0]


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """The embedded bundle's."""
    path = tmp_path_factory.mktemp("programs") / "emoji.ferroc"
    sizes = [(128, 128), (64, 96), BANDED]
    data = compile_programs(bundles.load(EMBEDDED), sizes, CHUNKS, ["lcm", "euler_a"])
    path.write_bytes(data)
    return path


@pytest.fixture(scope="module")
def host(library, programs):
    return Host(library, EMBEDDED, programs, threads=2, verify=1)


def refused(status, part, call_it):
    with pytest.raises(HostError, match=part) as caught:
        call_it()
    assert caught.value.status == status
    assert "\n" not in str(caught.value)


# --- the same bytes -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", [
    {"prompt": "a red apple on a sky blue background"},
    {"prompt": "", "size": (64, 96), "steps": 1},
    {"prompt": "a (penguin:1.3), [snow]", "steps": 2, "size": (64, 96)},
    {"prompt": "a (rocket)", "negative": "a (slow:0.4) car", "guidance": 2.5, "steps": 3},
    {"prompt": "apple " * 40 + "BREAK (x:-.5)", "guidance": 1.5, "steps": 2, "size": (64, 96)},
    {"prompt": "a heart", "sampler": "euler_a", "steps": 3, "size": (64, 96)},
], ids=lambda case: ",".join(case))  # fmt: skip
def test_it_draws_pythons_bytes(host, case):
    seed = RNG.getrandbits(64)
    arguments = dict(case)
    prompt = arguments.pop("prompt")
    expected = np.asarray(Pipeline.load(EMBEDDED).generate(prompt, seed=seed, **arguments))
    assert (host.generate(prompt, seed=seed, **arguments) == expected).all(), f"seed {seed}"


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures_draw_pythons_bytes(library, tmp_path, name):
    configs, weights, activations, recipe = OTHERS[name]
    made = random_bundles.write(
        tmp_path / "r.ferro", configs, weights, activations, (64, 128), recipe
    )
    path = tmp_path / "r.ferroc"
    path.write_bytes(compile_programs(made, chunks=2))
    drawn = Host(library, made.folder, path, threads=1, verify=1)
    guided = {"guidance": 4.0} if recipe.guidance == 1 else {}
    for more in ({}, guided, {"prompt": "a " * 90}):
        prompt, seed = more.pop("prompt", "a (red:1.2) apple"), RNG.getrandbits(32)
        expected = np.asarray(Pipeline(made).generate(prompt, seed=seed, **more))
        assert expected.std() > 0
        assert (drawn.generate(prompt, seed=seed, **more) == expected).all(), (more, seed)


@pytest.mark.parametrize("isa", ["scalar", None])
def test_the_instruction_set_can_be_chosen(library, programs, isa):
    one = Host(library, EMBEDDED, programs, threads=1, isa=isa)
    expected = Pipeline.load(EMBEDDED, isa=isa).generate("a cup", steps=1, size=(64, 96))
    assert (one.generate("a cup", steps=1, size=(64, 96)) == np.asarray(expected)).all()


def test_the_example_writes_the_picture(built, programs, tmp_path):
    assert len((SOURCE / "example.c").read_text().splitlines()) < 120
    out = tmp_path / "out.png"
    call(built[1], EMBEDDED, programs, "a red apple", out, 5, 10)
    expected = Pipeline.load(EMBEDDED).generate("a red apple", seed=5)
    assert (np.asarray(Image.open(out)) == np.asarray(expected)).all()
    done = subprocess.run(
        [built[1], EMBEDDED, programs, "x", out, "0", "1"], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "needs at least" in done.stderr


# --- parts, against Python's --------------------------------------------------------------------

MARKS = [
    "'s", "'ll", "BREAK", " ", "(", "[", ")", "]", ":1.2)", ":.5)", ": -3 )", "\\", ":٣.५)",
    "<|endoftext|>", "<|startoftext|>", "<|ENDOFTEXT|>", "e\u0301", "\u1100\u1161\u11a8", "İ", "Σ",
    "\u0345\u0316\u0334", "\x1c", "\x85", "\u3000", "½", "_", "apple", "!!", ":1e3)", ":+01.50)",
]  # fmt: skip
TEXTS = st.lists(
    st.sampled_from(MARKS)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=4),
    max_size=12,
).map("".join)


@few(max_examples=300)
@given(text=TEXTS, most=st.sampled_from([1, 2, 32]))
def test_tokens_are_pythons(host, text, most):
    try:
        expected = Tokenizer(bundles.load(EMBEDDED)).chunks(text, most)
    except ValueError:
        return refused(PROMPT, "weight", lambda: host.tokenize(text, most))
    ids, weights, dropped = host.tokenize(text, most)
    assert ids.tolist() == expected.ids.tolist()
    assert weights.tobytes() == expected.weights.tobytes()
    assert dropped or not expected.dropped
    return None


def test_every_character_is_read_as_python_reads_it(host):
    """Beside letters and a mark, so that its class, order and case tell; a part at each run."""
    tokenizer, part = Tokenizer(bundles.load(EMBEDDED)), RNG.randrange(40)
    for code in range(1 + part, 0x110000, 40):
        if not 0xD800 <= code < 0xE000:
            c = chr(code)
            text = f"a{c}b\u0316{c} {c}1"
            expected = tokenizer.chunks(text, 4).ids
            assert host.tokenize(text, 4)[0].tolist() == expected.tolist(), hex(code)


def test_the_tables_of_characters_are_fresh():
    if unicodedata.unidata_version != "14.0.0":
        pytest.skip("Python has other tables than unicode.inc was made with")
    made = runpy.run_path(str(SOURCE / "unicode_tables.py"))
    assert made["tables"]() == (SOURCE / "unicode.inc").read_text()


def test_noise_is_pythons_and_torchs(library):
    for seed in (0, 42, 2**32, 2**64 - 1, RNG.getrandbits(64)):
        for count in (16, 17, 31, 1000, 16384):
            expected = seeds.TorchNoise(seed)((count,))
            assert noise(library, seed, count).tobytes() == expected.tobytes(), (seed, count)
    with pytest.raises(HostError):
        noise(library, 0, 15)


def test_noise_of_a_million_values_is_pythons(library):
    seed = RNG.getrandbits(64)
    expected = seeds.TorchNoise(seed)((1 << 20,))
    assert noise(library, seed, 1 << 20).tobytes() == expected.tobytes()


def test_the_conformance_vectors(host, library):
    """Those that every host runs; what C does not have (other generators, NUL) is left out."""
    folder = Path(__file__).parent / "conformance"
    if not (folder / "tokens.json").is_file():
        pytest.skip("the vectors are not here")
    given_tokens = json.loads((folder / "tokens.json").read_text("ascii"))
    for case in given_tokens["tokens"]:
        text = case["prompt"].encode("utf-8", "replace")
        if b"\0" not in text:
            ids, weights, _ = host.tokenize(text, given_tokens["chunks"])
            assert ids.tolist() == case["ids"], case["prompt"]
            assert (weights == np.array(case["weights"], np.float32)).all(), case["prompt"]
    values = np.fromfile(folder / "seeds.bin", "<f4")
    for case in json.loads((folder / "seeds.json").read_text("ascii"))["seeds"]:
        if case["rng"] == "torch":
            first = values[case["offset"] :][: case["draws"][0]]
            assert (noise(library, int(case["seed"]), len(first)) == first).all(), case
    for case in json.loads((folder / "pictures.json").read_text("ascii"))["pictures"]:
        if case["bundle"] == EMBEDDED.name:
            more = {k: case[k] for k in ("negative", "steps", "sampler", "guidance") if k in case}
            size = {"size": case["size"]}
            picture = host.generate(case["prompt"], seed=int(case["seed"]), **size, **more)
            expected = Pipeline.load(EMBEDDED).generate(
                case["prompt"], seed=int(case["seed"]), size=tuple(case["size"]), **more
            )
            assert (picture == np.asarray(expected)).all()


def test_progress_says_every_stage_and_previews_are_pythons(host):
    seen = []

    @CALLBACK
    def progress(user, progress):
        at = progress.contents
        seen.append((at.stage, at.step, at.steps, host.preview(progress) if at.step else None))
        return 0

    host.generate("a red apple", seed=1, steps=2, progress=progress)
    assert [entry[:3] for entry in seen] == [(0, 0, 0), (2, 1, 2), (2, 2, 2), (3, 0, 0)]
    pipe = Pipeline.load(EMBEDDED)
    weights = np.array(pipe.manifest.preview)
    for step, (*_, found) in zip(
        pipe.steps("a red apple", seed=1, steps=2), seen[1:], strict=False
    ):
        rgb = np.tensordot(step.denoised[0].transpose(1, 2, 0), weights[:-1], 1) + weights[-1]
        expected = (rgb / 2 + 0.5).clip(0, 1) * 255
        assert np.abs(found - expected).max() <= 0.51


# --- the budget ---------------------------------------------------------------------------------


def test_every_budget_gives_the_same_bytes_down_to_the_smallest(library, programs, host):
    draw = {"prompt": "a lighthouse", "seed": 7, "steps": 1, "size": BANDED}
    expected = host.generate(**draw)
    free = host.plan(**draw)
    budget, ways = free.peak, set()
    while budget >= free.smallest:
        tight = Host(library, EMBEDDED, programs, threads=2, budget=budget)
        made = tight.plan(**draw)
        assert made.peak <= budget
        assert made.smallest == free.smallest
        ways.add((made.stages[3].rows, made.stages[3].streamed))
        assert (tight.generate(**draw) == expected).all(), budget
        budget = made.peak - 1
    assert {streamed for _, streamed in ways} == {0, 1}
    assert {rows > 0 for rows, _ in ways} == {False, True}
    refusing = Host(library, EMBEDDED, programs, threads=2, budget=free.smallest - 1)
    refused(BUDGET, "vae_decoder needs at least", lambda: refusing.generate(**draw))
    assert refusing.plan(check=False, **draw).smallest == free.smallest


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says the exact peak")
@pytest.mark.parametrize("threads", [1, 4])
def test_what_is_measured_is_within_the_plan(built, programs, tmp_path, threads):
    objects = [built[1].parent / f"{name}.o" for name in embed_host.PARTS]
    program = tmp_path / "memory"
    call("gcc", "-Wall", "-Wextra", f"-I{SOURCE}", "-c", Path(__file__).with_name("embed_memory.c"),
         "-o", tmp_path / "memory.o")  # fmt: skip
    engine = kernels._path()
    call(
        "g++", tmp_path / "memory.o", *objects, engine, f"-Wl,-rpath,{engine.parent}", "-o", program
    )
    for size, budget in ((128, 0), (256, 0)) if threads == 1 else ((128, 0),):
        path = tmp_path / f"{size}.ferroc"
        path.write_bytes(compile_programs(bundles.load(EMBEDDED), [(size, size)]))
        found = call(program, EMBEDDED, path, size, threads, budget)
        rows = [tuple(map(int, line.split())) for line in found.splitlines()]
        for i, (_, measured) in enumerate(rows):  # the kernel's peak is of all stages so far
            assert measured <= max(planned for planned, _ in rows[: i + 1]), rows


# --- cancelling and threads ---------------------------------------------------------------------


def test_cancelling_ends_the_run_and_the_handle_draws_again(host):
    seen = []

    @CALLBACK
    def stop(user, progress):
        seen.append(progress.contents.step)
        return progress.contents.step == 1

    refused(CANCELLED, "cancelled", lambda: host.generate("x", progress=stop))
    assert seen[-1] == 1

    @CALLBACK
    def cancel(user, progress):
        host.cancel()
        return 0

    refused(CANCELLED, "cancelled", lambda: host.generate("x", progress=cancel))
    assert host.generate("x", steps=1, size=(64, 96)).std() > 0


def test_threads_share_a_handle_and_handles_are_apart(library, programs, host):
    draw = {"prompt": "a moon", "steps": 1, "size": (64, 96)}
    expected = [host.generate(seed=seed, **draw) for seed in range(4)]
    other = Host(library, EMBEDDED, programs, threads=1)
    found = {}

    def work(one, seed):
        found[seed] = one.generate(seed=seed, **draw)

    handles = (host, host, other, other)
    threads = [threading.Thread(target=work, args=(h, i)) for i, h in enumerate(handles)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all((found[seed] == expected[seed]).all() for seed in range(4))


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(("status", "part", "fields"), [
    (ARGUMENT, "128x64 was not compiled", {"size": (128, 64)}),
    (ARGUMENT, "no table of 999 steps of lcm", {"steps": 999}),
    (ARGUMENT, "no table of 4 steps of tcd", {"sampler": "tcd"}),
    (ARGUMENT, "guidance is 51", {"guidance": 51.0}),
    (ARGUMENT, "guidance is nan", {"guidance": float("nan")}),
    (ARGUMENT, "a negative prompt has no effect", {"negative": "x"}),
    (ARGUMENT, "there is room for", {"room": 1}),
    (PROMPT, "not UTF-8 at byte 2", {"prompt": b"ab\xff"}),
    (PROMPT, "not UTF-8", {"prompt": b"\xed\xa0\x80"}),
    (PROMPT, "not UTF-8", {"prompt": b"\xc0\xaf"}),
    (PROMPT, "not UTF-8", {"prompt": b"\xf0\x9f\x8d"}),
    (PROMPT, "weight 101", {"prompt": "(a:101)"}),
    (PROMPT, "takes 5 chunks: shorten it, or compile with --chunks 5", {"prompt": "a " * 130}),
])  # fmt: skip
def test_a_request_that_cannot_be_met(host, status, part, fields):
    refused(status, part, lambda: host.generate(**fields))
    assert host.generate("x", steps=1, size=(64, 96)).shape == (96, 64, 3)  # it still draws


def test_options_that_cannot_be_met(library, programs):
    refused(ARGUMENT, "threads is 65", lambda: Host(library, EMBEDDED, programs, threads=65))
    refused(ARGUMENT, "does not run z80", lambda: Host(library, EMBEDDED, programs, isa="z80"))


def test_an_older_caller_with_smaller_structures(host, library):
    asked = host.request("x", steps=1, size=(64, 96))
    asked.bytes = embed_host.Request.sampler.offset  # it had nothing from there on
    asked.guidance = 1e9
    rgb = np.zeros((96, 64, 3), np.uint8)
    at = embed_host._at(rgb)
    size = embed_host.ctypes.c_size_t(rgb.nbytes)
    reference = embed_host.ctypes.byref(asked)
    assert library.ferro_generate(host._handle, reference, at, size) == embed_host.OK
    asked.bytes = 0
    assert library.ferro_generate(host._handle, reference, at, size) == ARGUMENT


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(EMBEDDED, tmp_path / "copy.ferro")


def test_a_folder_that_is_another_bundle(library, programs, copy, tmp_path):
    opened = partial(Host, library, copy, programs)
    opened()
    manifest, weights = copy / "manifest.json", copy / "unet" / WEIGHTS
    whole = manifest.read_bytes()
    manifest.write_bytes(whole.replace(b'"emoji"', b'"other"'))
    refused(FORMAT, "is of another bundle", opened)
    for hostile in (b"{", b"[" * 100_000, bytes(17 << 20)):
        manifest.write_bytes(hostile)
        refused(FORMAT, "is of another bundle", opened)
    manifest.unlink()
    refused(FILE, "manifest.json", opened)
    os.mkfifo(manifest)
    refused(FILE, "manifest.json", opened)
    manifest.unlink()
    manifest.write_bytes(whole)
    data = weights.read_bytes()
    weights.write_bytes(data[:-1])
    refused(FORMAT, "should have", opened)
    weights.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    refused(FORMAT, "sha256", partial(opened, verify=1))
    weights.unlink()
    refused(FILE, "missing", opened)
    (tmp_path / "outside").write_bytes(data)
    weights.symlink_to(tmp_path / "outside")
    refused(FORMAT, "leaves the bundle", opened)
    refused(FILE, "none/manifest.json", lambda: Host(library, tmp_path / "none", programs))
    refused(FILE, "none: No such file", lambda: Host(library, EMBEDDED, tmp_path / "none"))


def test_weights_that_change_while_it_is_open(library, programs, copy):
    opened = Host(library, copy, programs)
    with (copy / "vae_decoder" / WEIGHTS).open("r+b") as file:
        file.truncate(4096)
    refused(FORMAT, "bytes, the bundle's has", lambda: opened.generate(steps=1))


def test_weights_of_nan_are_no_picture(library, tmp_path):
    made = random_bundles.write(tmp_path / "r.ferro", TINY, "fp32", "fp32", (64, 64))
    path = tmp_path / "r.ferroc"
    path.write_bytes(compile_programs(made, steps=[1]))
    weights = made.folder / "unet" / WEIGHTS
    opened = Host(library, made.folder, path, threads=1)
    weights.write_bytes(b"\xff" * weights.stat().st_size)
    refused(NUMBERS, "the unet returned NaN", lambda: opened.generate(steps=1))


# --- a file of programs, whatever it holds ------------------------------------------------------


@pytest.fixture
def small(tmp_path):
    """A folder, and how to open it with a changed file of programs, which is sealed again."""
    folder = tmp_path / "small"
    (folder / "text_encoder").mkdir(parents=True)
    (folder / "manifest.json").write_bytes(b"{}")
    identity = hashlib.sha256(b"{}").digest()
    data = bytearray(embed_programs.smallest())
    data[64:96] = identity
    for i in range(int.from_bytes(data[96 + 16 * 7 + 8 : 96 + 16 * 8], "little")):
        at = int.from_bytes(data[96 + 16 * 7 : 96 + 16 * 7 + 8], "little") + 56 * i
        text = int.from_bytes(data[96:104], "little") + int.from_bytes(
            data[at + 4 : at + 8], "little"
        )
        length, size = struct.unpack_from("<I4xQ", data, at + 8)
        path = folder / data[text : text + length].decode()
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(size))
    return folder, bytes(data)


def open_small(library, folder, data):
    """The budget keeps a hostile file from taking all memory."""
    path = folder / "programs"
    path.write_bytes(data)
    return Host(library, folder, path, threads=1, budget=64 << 20)


def test_the_smallest_file_draws(library, small):
    folder, data = small
    drawn = open_small(library, folder, embed_programs.sealed(data))
    assert drawn.generate("ab abc apple").shape == (64, 64, 3)
    assert drawn.tokenize("ab bc apple <|endoftext|>", 1)[0][0].tolist() == [
        514, 512, ord("b"), 256 + ord("c"), 516, 515, 515, 515,
    ]  # fmt: skip


def test_a_damaged_file_is_refused(library, small):
    folder, data = small
    whole = embed_programs.sealed(data)
    for at in RNG.sample(range(len(whole)), 40):
        changed = bytes([*whole[:at], whole[at] ^ 1 << RNG.randrange(8), *whole[at + 1 :]])
        refused(
            FORMAT,
            "damaged or of another version",
            lambda c=changed: open_small(library, folder, c),
        )
    for size in (1, 8, 95, len(whole) - 1):
        refused(FORMAT, "damaged or of another version",
                lambda n=size: open_small(library, folder, whole[:n]))  # fmt: skip
    refused(FILE, "empty", lambda: open_small(library, folder, b""))


HOSTILE = {ARGUMENT, FILE, FORMAT, BUDGET, embed_host.MEMORY, PROMPT, NUMBERS}


def test_what_the_fuzzer_found_interesting(library, small):
    """embed_corpus.tar.xz is the corpus of embed/c/fuzz.cpp, made small by -merge=1."""
    folder, data = small
    codes = []
    with tarfile.open(Path(__file__).with_name("embed_corpus.tar.xz")) as corpus:
        for member in corpus:
            file = corpus.extractfile(member)
            changed = bytearray(file.read() if file else b"")
            if len(changed) >= 96:
                changed[64:96] = data[64:96]  # of this folder
                try:
                    open_small(library, folder, embed_programs.sealed(changed)).generate("a b")
                except HostError as error:
                    codes.append(error.status)
    assert set(codes) <= HOSTILE
    assert len(codes) > 100


def test_a_hostile_file_is_refused_or_draws(library, small):
    """Numbers of all sizes at any place, under a hash that is right: never a crash."""
    folder, data = small
    drew, codes = 0, set()
    for _ in range(300):
        changed = bytearray(data)
        for _ in range(RNG.randrange(1, 3)):
            at = RNG.randrange(40, len(data) - 8)
            value = RNG.choice([0, 1, 0xFF, 0xFFFF, 0xFFFFFFFF, 1 << 31, RNG.getrandbits(32)])
            changed[at : at + 4] = struct.pack("<I", value)
        try:
            open_small(library, folder, embed_programs.sealed(bytes(changed))).generate("a b")
            drew += 1
        except HostError as error:
            codes.add(error.status)
    assert 0 < drew < 300
    assert codes <= HOSTILE


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../x", "a\\b", ".hidden", "a//b"])
def test_a_path_that_leaves_the_bundle_is_refused(library, small, path):
    folder, data = small
    changed = data.replace(b"text_encoder/weights.bin", path.encode().ljust(24, b"a"))
    assert changed != data
    refused(FORMAT, "leaves the bundle",
            lambda: open_small(library, folder, embed_programs.sealed(changed)))  # fmt: skip


# --- compiling ----------------------------------------------------------------------------------


def test_equal_bundles_give_equal_files(programs):
    again = compile_programs(
        bundles.load(EMBEDDED), [(128, 128), (64, 96), BANDED], CHUNKS, ["lcm", "euler_a"]
    )
    assert again == programs.read_bytes()


def test_what_cannot_be_compiled(copy):
    with pytest.raises(CompileError, match="is for onnx"):
        compile_programs(bundles.load(EMBEDDED_ONNX))
    opened = bundles.load(EMBEDDED)
    with pytest.raises(ValueError, match="no multiple"):
        compile_programs(opened, [(100, 100)])
    tokenizer, changed = (
        copy / "tokenizer" / "tokenizer.json",
        bundles.Bundle(copy, opened.manifest),
    )
    raw = json.loads(tokenizer.read_text())
    vectors = [
        raw["added_tokens"][0] | {"id": i, "content": c} for i, c in ((9, "<x>"), (8, "<x>_1"))
    ]
    tokenizer.write_text(json.dumps(raw | {"added_tokens": [*raw["added_tokens"], *vectors]}))
    with pytest.raises(CompileError, match="a token of several vectors"):
        compile_programs(changed)
    raw["normalizer"]["normalizers"].pop()
    tokenizer.write_text(json.dumps(raw))
    with pytest.raises(CompileError, match="no CLIP tokenizer"):
        compile_programs(changed)
    manifest = copy / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text())))
    with pytest.raises(CompileError, match="edited by hand"):
        compile_programs(changed)


def test_the_command(tmp_path, monkeypatch, library):
    monkeypatch.chdir(tmp_path)
    invoke = partial(CliRunner().invoke, cli.main, prog_name="ferrotype")
    done = invoke(["compile", str(EMBEDDED), "--size", "64", "-n", "1", "--json"])
    assert done.exit_code == 0, done.output
    path = tmp_path / "emoji.ferroc"
    assert json.loads(done.stdout) == {"path": "emoji.ferroc", "bytes": path.stat().st_size}
    assert Host(library, EMBEDDED, path).generate(steps=1, size=(64, 64)).shape == (64, 64, 3)
    again = invoke(["compile", str(EMBEDDED), "--size", "64"])
    assert again.exit_code == 1
    assert "emoji.ferroc exists" in again.stderr
    assert invoke(["compile", str(EMBEDDED_ONNX), "-o", "x.ferroc"]).exit_code == 1
    assert invoke(["compile", str(EMBEDDED), "--size", "65", "-f"]).exit_code == 2


# --- for phones ---------------------------------------------------------------------------------


def test_the_arm64_build_draws_the_picture(tmp_path):
    """With dot products and without, in a small budget."""
    build = BUILDS["arm64"]
    if why := build.missing():
        pytest.skip(why)
    compiler, objects = build.compilers[0], []
    for source in sorted(KERNELS.glob("*.cpp")):
        objects.append(tmp_path / f"k_{source.stem}.o")
        call(compiler, "-std=c++17", "-O1", f"-I{KERNELS}", "-c", source, "-o", objects[-1])
    objects += embed_host.compile_objects(tmp_path, compiler, ("-fno-pic",))
    call("aarch64-linux-gnu-gcc", f"-I{SOURCE}", "-c", SOURCE / "example.c", "-o", tmp_path / "e.o")
    call(compiler, "-static", "-pthread", tmp_path / "e.o", *objects, "-o", tmp_path / "example")
    # At the size it was trained at: scalar and AVX2 were 47 to 52 dB apart in ten pictures there,
    # 40 to 53 at 64x64; this one 51.
    size, programs = (128, 128), tmp_path / "p.ferroc"
    programs.write_bytes(compile_programs(bundles.load(EMBEDDED), [size], steps=[2]))
    pipe = Pipeline.load(EMBEDDED)
    expected = np.asarray(pipe.generate("a red apple", seed=3, size=size, steps=2))
    for cpu in ("max", "cortex-a53"):
        out = tmp_path / f"{cpu}.png"
        call("qemu-aarch64", "-cpu", cpu, tmp_path / "example", EMBEDDED, programs, "a red apple",
             out, 3, 8)  # fmt: skip
        found = np.asarray(Image.open(out))
        assert parity.psnr(expected / 255, found / 255, peak=1.0) >= 45, cpu


def test_every_source_is_built_by_cmake():
    listed = (
        (SOURCE / "CMakeLists.txt").read_text().split("add_library(ferro STATIC")[1].split("$")[0]
    )
    sources = {path.name for path in SOURCE.glob("*.cpp")} - {"fuzz.cpp"}
    assert set(listed.split()) == sources == {f"{name}.cpp" for name in embed_host.PARTS}


def test_records_have_the_size_that_c_reads():
    """programs.cpp asserts the same numbers."""
    sizes = {name: struct.calcsize(f"<{form}") for name, form in compiled.SECTIONS.items()}
    text = (SOURCE / "programs.cpp").read_text()
    kinds = {"model": "Model", "encoders": "Encoder", "files": "WeightFile", "programs": "Program",
             "offers": "Offer", "ports": "Port", "tables": "Table", "rows": "Row"}  # fmt: skip
    for section, name in kinds.items():
        assert f"sizeof({name}) == {sizes[section]}" in text

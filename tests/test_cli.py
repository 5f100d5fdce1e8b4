"""Every command does what its help says, and says in one line why it does not."""

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from ferrotype import bundle, cli
from ferrotype.runtime import pipeline
from ferrotype.runtime.pictures import open_picture, read_text
from ferrotype.runtime.pipeline import EMBEDDED

COMMAND = (sys.executable, "-c", "from ferrotype.cli import main; main(prog_name='ferrotype')")
PROMPT = "a red apple on a sky blue background"
HASH = bundle.load(EMBEDDED).sha256
SMALL = ("--size", "64", "-n", "1")


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    """Every test runs in an empty folder, and gets the process back as it was."""
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    with warnings.catch_warnings():
        work = tmp_path / "work"
        work.mkdir()
        monkeypatch.chdir(work)
        yield
    signal.signal(signal.SIGTERM, handler)


def invoke(*args):
    return CliRunner().invoke(cli.main, [str(a) for a in args], prog_name="ferrotype")


def run(*args, notes=False):
    """What a command that works prints; without notes, on stdout alone."""
    done = invoke(*args)
    assert done.exit_code == 0, done.output
    assert notes or done.stderr == ""
    return done.stdout


def fails(code, *args):
    """The one line that a command ends with; it has written nothing."""
    before = sorted(Path().rglob("*"))
    done = invoke(*args)
    assert isinstance(done.exception, SystemExit), repr(done.exception)
    assert done.exit_code == code, done.output
    assert done.stdout == ""
    assert sorted(Path().rglob("*")) == before
    *head, line = done.stderr.splitlines()
    assert line.startswith("Error: "), done.stderr
    assert line.isprintable()
    assert len(line) < 1000
    if code == 2:
        assert not head or head[0].startswith("Usage: ferrotype"), done.stderr
        assert len(head) <= 3
    else:
        assert head == []
    return line


def start(*args, **options):
    return subprocess.Popen(
        [*COMMAND, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )


def names():
    return sorted(path.name for path in Path().iterdir())


# --- generate -----------------------------------------------------------------------------------


def test_a_prompt_becomes_a_picture_named_after_it():
    assert run("generate", PROMPT) == "a-red-apple-on-a-sky-blue-background-0.png\n"
    assert names() == ["a-red-apple-on-a-sky-blue-background-0.png"]
    assert open_picture(Path(names()[0])).size == (128, 128)


def test_the_png_says_how_it_was_drawn_and_inspect_shows_it():
    run(
        "generate",
        PROMPT,
        "-o",
        "a.png",
        "--seed",
        7,
        "-n",
        2,
        "--sampler",
        "ddim",
        "--size",
        "64x96",
    )
    text = read_text(Path("a.png"))
    wanted = {"prompt": PROMPT, "seed": "7", "sampler": "ddim", "steps": "2", "size": "64x96"}
    assert wanted.items() <= text.items()
    assert text["bundle_sha256"] == HASH
    assert open_picture(Path("a.png")).size == (64, 96)
    shown = run("inspect", "a.png")
    assert all(value in shown for value in text.values())
    assert json.loads(run("inspect", "a.png", "--json")) == text


def test_what_the_png_says_draws_it_again():
    first = run(
        "generate", "a fox", "--seed", 3, "--guidance", 2, "--negative", "snow", *SMALL
    ).strip()
    t = read_text(Path(first))
    again = ["--seed", t["seed"], "--guidance", t["guidance"], "--negative", t["negative"]]
    again += ["-n", t["steps"], "--size", t["size"], "--sampler", t["sampler"], "--rng", t["rng"]]
    run("generate", t["prompt"], "-o", "b.png", *again)
    assert Path("b.png").read_bytes() == Path(first).read_bytes()


def test_several_prompts_and_seeds_make_several_pictures():
    out = run("generate", "a", "b", "--count", 2, "-o", "x.png", *SMALL, "--seed", 5)
    assert out.split() == names() == [f"x-{i}.png" for i in range(1, 5)]
    found = [(t["prompt"], t["seed"]) for t in map(read_text, sorted(Path().iterdir()))]
    assert found == [("a", "5"), ("a", "6"), ("b", "5"), ("b", "6")]


def test_prompts_of_one_name_do_not_collide():
    out = run("generate", "A!", "a?", "🦊", *SMALL)
    assert sorted(out.split()) == names() == ["a-0-1.png", "a-0-2.png", "picture-0.png"]


def test_previews_and_a_sheet_are_written_beside_the_picture():
    run("generate", "a", "-o", "a.png", "--size", "64", "-n", 4, "--preview", 2, "--grid", "g.png")
    assert names() == ["a-step2.png", "a-step4.png", "a.png", "g.png"]
    assert {open_picture(Path(name)).size for name in names()[:3]} == {(64, 64)}
    assert open_picture(Path("g.png")).size == (72, 72)


def test_an_exact_preview_of_the_last_step_is_the_picture():
    run("generate", "a", "-o", "a.png", *SMALL, "--preview", 1, "--preview-decoder")
    assert open_picture(Path("a-step1.png")).tobytes() == open_picture(Path("a.png")).tobytes()


def test_json_is_one_object_per_line_and_nothing_else():
    out = run("generate", "a", "b", *SMALL, "--json", "--grid", "g.png")
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["path"] for line in lines] == ["a-0.png", "b-0.png", "g.png"]
    assert lines[0]["bundle_sha256"] == HASH


@pytest.mark.filterwarnings("default::ferrotype.runtime.pipeline.PromptWarning")
@pytest.mark.parametrize(
    ("prompt", "note"),
    [
        ("", "note: the prompt is empty"),
        (" \n ", "note: the prompt is empty"),
        ("word " * 2000, "note: the text encoder reads 1024 tokens"),
        ("\n" + "a\x1b[2J\n" * 400, "note: the text encoder reads"),
        ("🦊", ""),
        ("a\nb\tc", ""),
        ("a\udcffb", ""),
        ("a\0b", ""),
        ("--count", ""),
    ],
)
def test_every_prompt_draws_and_notes_go_to_stderr(prompt, note):
    done = invoke("generate", "-o", "a.png", *SMALL, "--", prompt)
    assert (done.exit_code, done.stdout) == (0, "a.png\n"), done.output
    assert done.stderr.startswith(note)
    assert len(done.stderr.splitlines()) == bool(note)
    assert read_text(Path("a.png"))["prompt"] == prompt.replace("\udcff", "?")
    assert len(run("inspect", "a.png").splitlines()) == 10  # whatever the prompt holds


def test_an_image_to_start_from_changes_the_picture():
    Image.new("RGBA", (300, 20), (0, 0, 255, 128)).save("in.png")
    run("generate", "a", "-o", "a.png", "--image", "in.png", "--strength", 0.5, "--size", "64")
    run("generate", "a", "-o", "b.png", "--size", "64")
    assert read_text(Path("a.png"))["strength"] == "0.5"
    assert Path("a.png").read_bytes() != Path("b.png").read_bytes()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "I;16", "CMYK"])
def test_pictures_of_every_mode_and_a_single_pixel_are_started_from(mode):
    Image.new(mode, (1, 1)).save("in.tiff")
    run("generate", "a", "-o", "a.png", "--image", "in.tiff", "--size", "64")


@pytest.mark.parametrize(
    "args",
    [
        (),
        ("--steps", "0", "a"),
        ("--steps", "1001", "a"),
        ("--steps", "-1", "a"),
        ("--steps", "x", "a"),
        ("--steps", "99999999999999999999999", "a"),
        ("--size", "0x0", "a"),
        ("--size", "0", "a"),
        ("--size", "127", "a"),
        ("--size", "128x127", "a"),
        ("--size", "128x8", "a"),
        ("--size", "99999x99999", "a"),
        ("--size", "999999999", "a"),
        ("--size", "-128", "a"),
        ("--size", "axb", "a"),
        ("--size", "128x", "a"),
        ("--size", "128x128x128", "a"),
        ("--size", "1e3", "a"),
        ("--size", "", "a"),
        ("--size", "²", "a"),
        ("--seed", "-1", "a"),
        ("--seed", str(2**64), "a"),
        ("--seed", "x", "a"),
        ("--seed", str(2**64 - 1), "--count", "2", "a"),
        ("--count", "0", "a"),
        ("--count", "1001", "a"),
        ("--guidance", "-1", "a"),
        ("--guidance", "51", "a"),
        ("--guidance", "nan", "a"),
        ("--guidance", "inf", "a"),
        ("--strength", "0.5", "a"),
        ("--strength", "0", "--image", "in.png", "a"),
        ("--strength", "1.5", "--image", "in.png", "a"),
        ("--strength", "nan", "--image", "in.png", "a"),
        ("--strength", "0.01", "-n", "1", "--sampler", "ddim", "--image", "in.png", "a"),
        ("--negative", "snow", "a"),
        ("--sampler", "heun", "a"),
        ("--spacing", "even", "a"),
        ("--rng", "mt", "a"),
        ("--threads", "0", "a"),
        ("--threads", "65", "a"),
        ("--preview", "0", "a"),
        ("--preview-decoder", "a"),
        ("--colour", "a"),
        ("-o", "a.jpg", "a"),
        ("-o", "a", "a"),
        ("-o", "", "a"),
        ("-o", "a.png", "--grid", "a.png", "a"),
        ("-o", "a.png", "--grid", "a-step1.png", "--preview", "1", "a"),
        ("--sampler", "lcm", "-n", "51", "a"),
    ],
    ids=" ".join,
)
def test_a_wrong_argument_of_generate_is_a_usage_error(args):
    Image.new("RGB", (8, 8)).save("in.png")
    fails(2, "generate", *args)


@pytest.mark.parametrize("value", ["127", "0x0", "99999x99999"])
def test_a_wrong_size_is_told_what_would_work(value):
    line = fails(2, "generate", "a", "--size", value)
    assert "try 128" in line or "outside 64..2048" in line


def test_the_negative_prompt_is_told_what_it_needs():
    line = fails(2, "generate", "a", "--negative", "snow")
    assert "no effect at guidance 1" in line
    assert "set guidance above 1" in line


@pytest.mark.parametrize(
    "args",
    [
        ("-o", "no/a.png"),
        ("-o", "file.txt/a.png"),
        ("-o", f"{'x' * 300}.png"),
        ("-o", "/proc/a.png"),
        ("-o", "new\nline/a.png"),
        ("-o", "folder.png"),
        ("-o", "old.png"),
        ("-o", "b.png", "--grid", "old.png"),
        ("-o", "o.png", "--preview", "1"),
        ("-b", "missing.ferro"),
        ("-b", "file.txt"),
        ("-b", "folder.png"),
        ("--image", "missing.png"),
        ("--image", "folder.png"),
        ("--image", "file.txt"),
        ("--image", "half.png"),
        ("--image", "pipe"),
        ("--image", "bomb.png"),
    ],
    ids=" ".join,
)
def test_what_cannot_be_read_or_written_is_refused_before_drawing(args, monkeypatch):
    Path("file.txt").write_text("garbage")
    Path("folder.png").mkdir()
    Path("old.png").write_text("mine")
    Path("o-step1.png").write_text("mine")
    os.mkfifo("pipe")
    Image.effect_noise((64, 64), 9).save("whole.png")
    Path("half.png").write_bytes(Path("whole.png").read_bytes()[:600])
    Image.new("1", (9000, 9000)).save("bomb.png")

    def drawn(*_):
        raise AssertionError("a network was loaded")

    monkeypatch.setattr(pipeline, "open_engine", drawn)
    fails(1, "generate", "a", *args)
    assert Path("old.png").read_text() == Path("o-step1.png").read_text() == "mine"


def test_force_replaces_files():
    Path("a.png").write_text("mine")
    Path("g.png").write_text("mine")
    run("generate", "a", "-o", "a.png", "--grid", "g.png", "--force", *SMALL)
    assert open_picture(Path("a.png")).size == (64, 64)


def test_a_read_only_disk_is_found_before_drawing(monkeypatch):
    def read_only(**_):
        raise OSError(errno.EROFS, "Read-only file system", "/x")

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    assert fails(1, "generate", "a").endswith("a-0.png cannot be written: Read-only file system")


def test_running_out_of_memory_is_one_line(monkeypatch):
    def full(*_):
        raise MemoryError

    monkeypatch.setattr(pipeline, "open_engine", full)
    assert "try a smaller --size" in fails(1, "generate", "a")


# --- bundles that are wrong ---------------------------------------------------------------------


def break_bundle(folder, kind):
    """Damage a bundle; the word that the error has to name."""
    manifest = folder / "manifest.json"
    match kind:
        case "missing file":
            (folder / "unet" / "model.onnx").unlink()
            return "unet/model.onnx"
        case "truncated file":
            os.truncate(folder / "unet" / "model.onnx.data", 1000)
            return "should have 17,113,088 bytes, found 1,000"
        case "missing manifest":
            manifest.unlink()
            return "it has no manifest.json"
        case "truncated manifest":
            os.truncate(manifest, 1000)
            return "is not a valid manifest"
        case "newer format":
            manifest.write_text('{"format": 2}')
            return "it is format 2, this ferrotype reads 1; update ferrotype"
        case "unknown field":
            manifest.write_text(manifest.read_text().replace('"eta"', '"\\u001b[2J\\n"'))
            return "is not a valid manifest"
        case "pipe":
            (folder / "unet" / "config.json").unlink()
            os.mkfifo(folder / "unet" / "config.json")
            return "is not a file"


@pytest.mark.parametrize(
    "kind",
    [
        "missing file",
        "truncated file",
        "missing manifest",
        "truncated manifest",
        "newer format",
        "unknown field",
        "pipe",
    ],
)
def test_a_damaged_bundle_is_one_line_in_every_command(emoji, kind):
    words = break_bundle(emoji, kind)
    for command in (
        ["generate", "a", "-b"],
        ["inspect"],
        ["verify"],
        ["plan"],
        ["verify", "--json"],
    ):
        assert words in fails(1, *command, emoji)


def test_verify_finds_one_changed_byte_and_names_the_file(emoji):
    path = emoji / "unet" / "model.onnx.data"
    with path.open("r+b") as stream:
        stream.seek(1_000_000)
        byte = stream.read(1)
        stream.seek(1_000_000)
        stream.write(bytes([byte[0] ^ 1]))
    line = fails(1, "verify", emoji)
    assert line.startswith("Error: unet/model.onnx.data: its sha256 is ")
    done = invoke("verify", emoji, "--json")
    assert done.exit_code == 1
    assert len(json.loads(done.stdout)["problems"]) == 1


def test_a_report_of_another_form_does_not_stop_inspect(emoji):
    path = emoji / "manifest.json"
    raw = json.loads(path.read_text())
    for parity in ('{"components": 1}', '{"components": {"unet": {"x": {}}}}', '{"picture": [1]}'):
        path.write_text(json.dumps({**raw, "parity": json.loads(parity)}))
        assert "of a form unknown" in run("inspect", emoji)


def test_a_bundle_cannot_write_to_the_terminal(emoji):
    path = emoji / "manifest.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({**raw, "model": "a\x1b[2J\nb\ud800", "licence": "\u202e"}))
    assert "a\\x1b[2J\\nb\\ud800" in run("inspect", emoji)
    run("generate", "a", "-b", emoji, *SMALL)


# --- inspect, verify, plan ----------------------------------------------------------------------


def test_inspect_shows_the_embedded_bundle():
    shown = run("inspect")
    assert HASH in shown
    assert "128x128 by default" in shown
    raw = json.loads(run("inspect", "--json"))
    assert raw["sha256"] == HASH
    assert raw["components"].keys() == bundle.load(EMBEDDED).manifest.components.keys()


def test_inspect_refuses_what_says_nothing():
    Image.new("RGB", (8, 8)).save("a.png")
    assert "says nothing of how it was drawn" in fails(1, "inspect", "a.png")
    assert run("inspect", "a.png", "--json") == "{}\n"
    Path("b.png").write_text("garbage")
    assert "no picture of a known kind" in fails(1, "inspect", "b.png")
    assert "is not there" in fails(1, "inspect", "missing")


def test_verify_vouches_for_the_embedded_bundle():
    files = bundle.load(EMBEDDED).manifest.files.values()
    size = sum(file.bytes for file in files) / 2**20
    assert run("verify").endswith(f"{len(files)} files, {size:.1f} MiB, all as the manifest says\n")
    assert json.loads(run("verify", "--json")) == {"sha256": HASH, "problems": []}


def test_plan_shows_stages_and_tables():
    assert "unet" in run("plan")
    stages = json.loads(run("plan", "--json"))["stages"]
    assert [stage["runs"] for stage in stages] == [1, 4, 1]
    assert run("plan", "--sampler-table").startswith("lcm: x = 1*noise")
    table = run("plan", "--sampler-table", "--json", "-n", 8)
    assert len(json.loads(table)["rows"]) == 8
    assert run("plan", "--sampler-table", "-o", "t.json", "-n", 8) == "t.json\n"
    assert Path("t.json").read_text() == table
    assert "exists: choose another name or pass --force" in fails(1, "plan", "-o", "t.json")
    run("plan", "-o", "t.json", "--force")


@pytest.mark.parametrize(
    "args", ["-n 0", "-n 51", "--sampler x", "--strength 0", "a b", "--json=1"]
)
def test_a_wrong_argument_of_plan_is_a_usage_error(args):
    fails(2, "plan", *args.split())


@pytest.mark.parametrize("args", [[], ["-h"], ["--version"], ["generate", "-h"], ["convert", "-h"]])
def test_help_needs_no_torch_and_no_engine(args):
    code = "import sys; from ferrotype.cli import main; main(sys.argv[1:], standalone_mode=False);"
    code += "sys.exit(bool({'torch', 'onnxruntime', 'numpy'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, check=False)
    assert done.returncode == 0 if args else done.returncode != 1 or b"Usage" in done.stderr


def test_an_unknown_command_is_a_usage_error():
    fails(2, "draw")
    fails(2, "--colour")


# --- convert ------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint():
    checkpoints = pytest.importorskip("ferrotype.benchmarks.checkpoints")
    return checkpoints.write_checkpoint(Path("tiny"), checkpoints.TINY)


def test_convert_passes_its_arguments_on_and_prints_the_report(checkpoint, monkeypatch):
    from ferrotype import convert
    from ferrotype.convert.checkpoint import open_checkpoint

    seen = []

    def converted(*args, **merged):
        assert merged.pop("written")(1, 2) is None
        assert merged == {
            "loras": [], "embeddings": (), "original": None, "check": "diffusers"
        }  # fmt: skip
        *most, progress, recipe, clip_skip = args
        assert (recipe, clip_skip) == (None, 0)
        seen.extend(most)
        progress("hash")
        return bundle.load(EMBEDDED)

    monkeypatch.setattr(convert, "convert", converted)
    args = ("--size", "64x128", "--weights", "fp32", "--name", "n", "--licence", "l", "-f")
    out = run("convert", "tiny", *args)
    opened = open_checkpoint(Path("tiny"))
    expected = [opened, Path("tiny.ferro"), "onnx", "fp32", None, ((64, 128),), None, "n", "l"]
    assert seen == [*expected, True]
    manifest = bundle.load(EMBEDDED).manifest
    psnr = manifest.parity["components"]["unet"]["out_sample"]["psnr"]
    assert re.search(rf"^unet out_sample +{psnr:.1f} ", out, re.MULTILINE)
    size = sum(file.bytes for file in manifest.files.values()) / 2**20
    last = out.splitlines()[-1]
    assert re.fullmatch(rf"tiny.ferro  {size:.1f} MiB, converted within .* of memory", last)
    seen.clear()
    parsed = json.loads(run("convert", "tiny", "--json", "--prediction", "v"))
    assert parsed["bundle"] == "tiny.ferro"
    assert seen[0].scheduler == opened.scheduler | {"prediction_type": "v_prediction"}
    assert parsed["parity"]["floors"] == manifest.parity["floors"]


def test_a_folder_that_is_no_checkpoint_is_told_what_it_holds():
    pytest.importorskip("torch")
    Path("empty").mkdir()
    Path("file").write_text("x")
    assert "has no model_index.json (it holds nothing)" in fails(1, "convert", "empty")
    assert "is neither safetensors nor GGUF" in fails(1, "convert", "file")
    assert "is not there; give a folder" in fails(1, "convert", "missing")
    Path("empty/model_index.json").write_text("{")
    assert "is not JSON" in fails(1, "convert", "empty")
    Path("empty/model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    assert "FluxPipeline is not supported; supported are" in fails(1, "convert", "empty")


def test_a_damaged_checkpoint_is_one_line(checkpoint):
    (weights,) = (checkpoint / "text_encoder").glob("*.safetensors")
    data = weights.read_bytes()
    for broken in (data[:100], data[:-100], b"\xff" * 100, b""):
        weights.write_bytes(broken)
        assert weights.name in fails(1, "convert", checkpoint)


@pytest.mark.parametrize(
    "option", ["--target x", "--activations w3", "--size 8x", "--colour", "a b"]
)
def test_a_wrong_argument_of_convert_is_a_usage_error(option):
    fails(2, "convert", "sd", *option.split())


@pytest.mark.parametrize("out", ["/proc/a.ferro", "no/a.ferro", "taken", f"{'x' * 300}"])
def test_a_place_that_cannot_take_the_bundle_is_refused_before_converting(checkpoint, out):
    Path("taken").mkdir()
    for force in ([], ["--force"]):
        fails(1, "convert", checkpoint, "-o", out, *force)


def test_converting_stopped_in_the_middle_leaves_nothing(checkpoint):
    """By Ctrl-C, by a service manager, and by a full disk: at once, as torch takes long to load."""
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))}
    runs = {
        signal.SIGINT: (130, b"interrupted", start("convert", "tiny", "-o", "int.ferro")),
        signal.SIGTERM: (143, b"interrupted", start("convert", "tiny", "-o", "term.ferro")),
        None: (1, b"full.ferro cannot be", start("convert", "tiny", "-o", "full.ferro", **limit)),
    }
    for number, (_, _, process) in runs.items():
        stem = process.args[-1]
        while number and process.poll() is None:
            if any(Path().glob(f".{stem}.*/text_encoder")):
                process.send_signal(number)
                break
            time.sleep(0.05)
    for code, words, process in runs.values():
        out, err = process.communicate(timeout=200)
        assert (process.returncode, out) == (code, b""), err
        assert err.startswith(b"Error: " + words)
        assert err.count(b"\n") == 1, err
    assert names() == ["tiny"]


# --- the process --------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_stopped_leaves_whole_pictures_or_none(number, code):
    process = start("generate", "a", "--count", "1000", *SMALL, "-o", "a.png")
    time.sleep(2.5)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert err == b"Error: interrupted; what was unfinished is removed\n"
    assert names() == out.decode().split()
    for name in names():
        open_picture(Path(name))


def test_an_interrupt_lost_in_a_destructor_comes_again(monkeypatch):
    class Dying:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    def lose_it():
        Dying()
        for _ in range(200):
            time.sleep(0.05)

    signal.signal(signal.SIGTERM, cli.terminate)
    monkeypatch.setattr(sys, "unraisablehook", cli.send_again)
    with pytest.raises(KeyboardInterrupt):
        lose_it()


def test_a_full_disk_leaves_no_half_picture():
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))}
    process = start("generate", "a", "-o", "a.png", **limit)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, b"")
    assert err == b"Error: a.png cannot be written: File too large\n"
    assert names() == []


def test_broken_utf8_in_arguments_draws():
    env = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    process = start(b"generate", b"a \xff fox", b"-o", b"\xfe.png", *SMALL, env=env)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, b"")
    assert out == b"\\udcfe.png\n"
    assert read_text(Path(os.fsdecode(b"\xfe.png")))["prompt"] == "a ? fox"


def test_a_terminal_of_few_characters_is_no_fault():
    env = {**os.environ, "PYTHONIOENCODING": "ascii:strict"}
    process = start("generate", "a", "-o", "🦊.png", *SMALL, env=env)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, b"")
    assert out.strip().endswith(b".png")


@pytest.mark.parametrize(
    ("command", "code", "lines"),
    [
        ("inspect | head -1", "0", 0),
        ("inspect --json | true", "1", 0),
        ("generate a b c -n 1 --size 64 | head -1", "1", 0),
        ("inspect > /dev/full", "1", 1),
        ("verify --json > /dev/full", "1", 1),
        ("inspect >&-", "0", 0),
        ("inspect < /dev/null", "0", 0),
    ],
)
def test_an_output_that_is_gone_or_full_gives_no_traceback(command, code, lines):
    ours = " ".join(f'"{part}"' for part in COMMAND)
    script = f'{ours} {command}; echo "code ${{PIPESTATUS[0]}}" >&2'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    *found, last = done.stderr.splitlines()
    assert len(found) == lines, done.stderr
    assert all(line.startswith("Error: ") for line in found)
    assert last == f"code {code}" or ("|" in command and last in ("code 0", "code 1"))


def test_the_embedded_bundle_draws_from_another_place(tmp_path):
    moved = shutil.copytree(EMBEDDED, tmp_path / "moved to.ferro")
    run("generate", PROMPT, "-o", "a.png", "-b", moved)
    run("generate", PROMPT, "-o", "b.png")
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()

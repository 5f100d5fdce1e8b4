"""The budget on the command line: what is shown, what is refused, what a broken file does."""

import json
import resource
import shutil
import subprocess
import sys

import pytest
from click.testing import CliRunner
from PIL import Image

from ferrotype import cli, kernels
from ferrotype.runtime import memory
from ferrotype.runtime.engines import native
from ferrotype.runtime.pipeline import EMBEDDED, EMBEDDED_ONNX

pytestmark = pytest.mark.skipif(not kernels.available(), reason="the native engine is not built")

COMMAND = (sys.executable, "-c", "from ferrotype.cli import main; main(prog_name='ferrotype')")


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def invoke(*args):
    return CliRunner().invoke(cli.main, [str(a) for a in args], prog_name="ferrotype")


def line_of(code, *args):
    """The one line that a command ends with."""
    done = invoke(*args)
    assert done.exit_code == code, done.output
    line = done.stderr.splitlines()[-1]
    assert line.startswith("Error: ")
    return line


def smallest():
    """The embedded model's, in KiB: what a refusal names."""
    refused = line_of(1, "plan", "--memory", "1MiB")
    return int(1024 * float(refused.split("--memory ")[1].split("MiB")[0])) + 1


# --- shown --------------------------------------------------------------------------------------


def test_a_plan_is_shown_in_words_as_bars_and_as_data(tmp_path):
    shown = invoke("plan", "--memory", "100MiB").stdout
    for word in ("text_encoder", "unet", "vae_decoder", "staged", "budget is 100 MiB", "█"):
        assert word in shown
    data = json.loads(invoke("plan", "--json", "--memory", "100MiB").stdout)
    assert data["budget"] == 100 << 20
    assert data["peak"] <= data["budget"]
    assert [s["component"] for s in data["stages"]] == ["text_encoder", "unet", "vae_decoder"]
    assert [s["runs"] for s in data["stages"]] == [1, 4, 1]
    assert invoke("plan", "-o", "plan.json", "--memory", "100MiB").stdout == "plan.json\n"
    saved = json.loads((tmp_path / "plan.json").read_text())
    for one in (saved, data, *saved["stages"], *data["stages"]):
        one.pop("seconds")  # of a machine that is measured anew
    assert saved == data


def test_size_steps_guidance_and_a_picture_are_inputs():
    def stages(*options):
        return json.loads(invoke("plan", "--json", *options).stdout)["stages"]

    assert [s["runs"] for s in stages("-n", "7")] == [1, 7, 1]
    assert [s["runs"] for s in stages("--guidance", "3")] == [2, 8, 1]
    assert [s["component"] for s in stages("--strength", "0.5")][1] == "vae_encoder"
    assert stages("--size", "512")[2]["arena"] > 4 * stages("--size", "128")[2]["arena"]
    assert "no multiple" in line_of(2, "plan", "--size", "100")


def test_what_is_drawn_in_a_budget_is_what_is_drawn_without():
    assert invoke("generate", "a penguin", "-o", "free.png").exit_code == 0
    budget = f"{smallest()}KiB"
    assert invoke("generate", "a penguin", "-o", "tight.png", "--memory", budget).exit_code == 0
    assert Image.open("free.png").tobytes() == Image.open("tight.png").tobytes()


def test_a_trace_is_drawn_upon_the_plan(tmp_path):
    done = invoke("generate", "a penguin", "-o", "a.png", "--trace", "t.json", "--memory", "64MiB")
    assert done.stdout == "a.png\nt.json\n"
    trace = memory.Recording.from_json((tmp_path / "t.json").read_text())
    assert [s.label for s in trace.marked] == ["text_encoder", *["unet"] * 4, "vae_decoder"]
    assert invoke("plan", "--plot", "p.png", "--trace", "t.json").stdout == "p.png\n"
    with Image.open("p.png") as picture:
        assert picture.size == (1280, 960)
    assert "--force" in line_of(1, "plan", "--plot", "p.png")


# --- refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("2 gigs", 2, "write a number and KiB, MiB"),
        ("0", 2, "no unit"),
        ("0MiB", 2, "0"),
        ("-1GiB", 2, "no amount"),
        ("512", 2, "512MiB"),
        ("1MiB", 1, "needs at least"),
    ],
)
@pytest.mark.parametrize("command", [["plan"], ["generate", "a", "-o", "a.png"]], ids="-".join)
def test_a_budget_that_is_none_or_too_small(command, text, code, words, tmp_path):
    assert words in line_of(code, *command, "--memory", text)
    assert not list(tmp_path.iterdir())


def test_a_refusal_names_stage_bytes_and_the_budget_that_works(monkeypatch):
    monkeypatch.setenv("FERROTYPE_ISA", "scalar")  # with AMX another stage needs the most
    line = line_of(1, "plan", "--memory", "1MiB")
    assert line.startswith("Error: vae_decoder needs at least 1")
    assert "128x128" in line
    assert "the budget is 1 MiB" in line
    assert invoke("plan", "--memory", f"{smallest()}KiB").exit_code == 0


def test_a_budget_beyond_the_machine_is_told():
    done = invoke("plan", "--memory", "900GiB")
    assert done.exit_code == 0
    assert "note: --memory 900 GiB is more than" in done.stderr


def test_the_onnx_twin_has_a_floor_of_its_own():
    assert "needs at least" in line_of(1, "plan", EMBEDDED_ONNX, "--memory", "10MiB")
    assert invoke("plan", EMBEDDED_ONNX, "--memory", "200MiB").exit_code == 0


def test_a_trace_that_is_none_or_of_another_run(tmp_path):
    (tmp_path / "t.json").write_text('{"format": "something else"}')
    assert "not a memory trace" in line_of(2, "plan", "--plot", "p.png", "--trace", "t.json")
    assert "needs --plot" in line_of(2, "plan", "--trace", "t.json")
    picture = ("-o", "a.png", "--trace", "image.json")
    Image.new("RGB", (128, 128)).save("in.png")
    assert invoke("generate", "a", "--image", "in.png", *picture).exit_code == 0
    line = line_of(2, "plan", "--plot", "p.png", "--trace", "image.json")
    assert "of another run: it has vae_encoder" in line
    assert not (tmp_path / "p.png").exists()


# --- broken -------------------------------------------------------------------------------------


def test_a_full_disk_leaves_no_half_plan(tmp_path):
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))}
    for option, name in (("-o", "p.json"), ("--plot", "p.png")):
        done = subprocess.run(
            [*COMMAND, "plan", option, name], capture_output=True, text=True, check=False, **limit
        )
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == f"Error: {name} cannot be written: File too large\n"
        assert not list(tmp_path.iterdir())


def test_weights_on_a_file_system_that_maps_nothing(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise OSError(19, "No such device")

    monkeypatch.setattr(native.mmap, "mmap", refuse)
    line = line_of(1, "generate", "a", "-o", "a.png")
    assert "weights.bin cannot be mapped into memory (No such device)" in line
    assert "local disk" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("budget", ["64MiB", "smallest"])
def test_weights_that_are_cut_short_in_the_middle_of_a_run(budget, tmp_path):
    """One line and exit code 1, where the system would end the process."""
    broken = shutil.copytree(EMBEDDED, tmp_path / "emoji.ferro")
    budget = f"{smallest()}KiB" if budget == "smallest" else budget
    program = f"""
import os
from ferrotype import cli
from ferrotype.runtime.pipeline import Pipeline

def watched(self, component, inputs, stage=None, run=Pipeline._run, count=[0]):
    count[0] += component == "unet"
    if count[0] == 2:
        os.truncate({str(broken / "unet" / "weights.bin")!r}, 100_000)
    return run(self, component, inputs, stage)

Pipeline._run = watched
cli.main(["generate", "a", "-b", {str(broken)!r}, "-o", "a.png", "--memory", {budget!r}])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "unet/weights.bin changed while it was read" in done.stderr
    assert not (tmp_path / "a.png").exists()

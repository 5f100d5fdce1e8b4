"""The devices are well sourced, and a diagnosis says what the planner says, in one line each."""

import copy
import dataclasses
import importlib.util
import json
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
from click.testing import CliRunner

import ferrotype
from ferrotype import bundle as bundles
from ferrotype import cli
from ferrotype.bundle import Bundle, File, Memory
from ferrotype.errors import FerrotypeError
from ferrotype.runtime import doctor
from ferrotype.runtime.engines.tensorrt_builder import CAPABILITIES
from ferrotype.runtime.pipeline import EMBEDDED, EMBEDDED_ONNX

ROOT = Path(ferrotype.__file__).parent
PAGE = ROOT / "docs" / "doctor.md"
RAW = json.loads(doctor.PATH.read_text("utf-8"))
DEVICES = doctor.devices().devices
ASKED = ("iphone-15-pro", "pixel-9", "jetson-orin", "rtx-4060-laptop")
MIB, GB = 2**20, 10**9
PLANS = importlib.util.find_spec("ferrotype.runtime.plan") and hasattr(
    importlib.import_module("ferrotype.runtime.plan"), "make"
)
needs_plan = pytest.mark.skipif(not PLANS, reason="there is no planner yet")

# --- a planner to try the doctor with -----------------------------------------------------------


class Refusal(FerrotypeError):
    """As the planner's."""

    def __init__(self, stage, needed, smallest):
        super().__init__(f"{stage} needs {needed}")
        self.stage, self.needed, self.smallest = stage, needed, smallest


@dataclass(frozen=True)
class Run:
    size: tuple
    steps: int
    passes: int = 1
    image: bool = False
    repeats: bool = False
    streams: bool | None = None


def needs(bundle, name, run):
    """Weights and the rest of a component; the rest grows with the picture."""
    part = bundle.component(name)
    memory = max(part.memory.values(), key=lambda m: m.total) if part.memory else None
    weights = memory.weights if memory else bundle.bytes_of(part.path)
    area = run.size[0] * run.size[1] / (512 * 512)
    return weights, int(area * (memory.activations + memory.scratch)) if memory else 0


def make(bundle, run, budget, threads, isa=None, tiles=False):
    """All at once, one after the other, or weights through a window of a MiB, as far as it fits."""
    assert 1 <= threads <= 64
    assert budget is None or budget >= 1
    parts = {name: needs(bundle, name, run) for name in bundle.manifest.components}
    rest = max(arena for _, arena in parts.values()) // (2 if tiles else 1)
    streams = bundle.manifest.target == "native" and run.streams is not False
    plans = {
        **({"resident": sum(w for w, _ in parts.values()) + rest} if run.repeats else {}),
        "staged": max(map(sum, parts.values())),
        **({"streamed": MIB + rest} if streams else {}),
    }
    for residency, peak in plans.items():
        if budget is None or peak <= budget:
            stages = [
                SimpleNamespace(
                    component=n, mode=residency, weights=w, arena=a, peak=w + a, runs=1, note=""
                )
                for n, (w, a) in parts.items()
            ]
            return SimpleNamespace(budget=budget, peak=peak, stages=stages, residency=residency)
    worst = max(parts, key=lambda name: sum(parts[name]))
    raise Refusal(worst, sum(parts[worst]), min(plans.values()))


PLANNER = SimpleNamespace(make=make, Run=Run, Refusal=Refusal)
RUN = Run((512, 512), 4, repeats=True)


def made(target="coreml", weights="fp16", sizes=None, options=None, parts=(), memory=None, **more):
    """A bundle of these bytes; nothing of it is on disk, which only its manifest is asked for."""
    sizes = sizes or {"text_encoder": 240 * MIB, "unet": 1640 * MIB, "vae_decoder": 95 * MIB}
    real = bundles.load(EMBEDDED_ONNX).manifest
    files, components = {}, {}
    for name, size in sizes.items():
        pieces = parts if name == "unet" else ()
        names = [f"{name}/{piece}/w.bin" for piece in pieces] or [f"{name}/model.onnx.data"]
        files |= {path: File(size // len(names), "0" * 64) for path in names}
        components[name] = dataclasses.replace(
            real.components[name],
            parts=tuple(pieces),
            memory=(memory or {}).get(name, {}),
            activations="fp32" if name in more.get("kept", ()) else "",
        )
    manifest = dataclasses.replace(
        real,
        target=target,
        precision=bundles.Precision(weights, more.get("activations", "fp16")),
        sizes=more.get("limits", bundles.Sizes((512, 512), allowed=((512, 512),))),
        options=options or {},
        components=components,
        parity=more.get("parity", {}),
        files=files,
    )
    return Bundle(Path("/nowhere.ferro"), manifest)


IOS = {"deployment": "ios17", "compute_units": "cpu_and_ne", "attention": "split-einsum"}


def examine(bundle, device, run=RUN):
    found = doctor.examine(bundle, doctor.devices().find(device), run, PLANNER)
    texts = [*found.notes, *(cell for row in doctor.rows(found) for cell in row)]
    texts += [part.source for part in found.off]
    for text in texts:
        assert text.isprintable()
        assert len(text) < 400
    for other in found.instead:
        parse(other.command)
    return found


def parse(command):
    """The options of a suggested command, as the command line reads them."""
    words = shlex.split(command)
    assert words[:3] == ["ferrotype", "convert", "CHECKPOINT"]
    parent = click.Context(cli.main, **cli.main.context_settings)
    with cli.main.commands["convert"].make_context("convert", words[2:], parent) as context:
        return {k: v for k, v in context.params.items() if v}


def reasons(found):
    return {part.component: part.reason for part in found.off}


# --- the file -----------------------------------------------------------------------------------


def test_there_are_the_devices_that_were_asked_for():
    assert len(DEVICES) >= 30
    for name in ASKED:
        assert doctor.devices().find(name)
    assert len({device.name for device in DEVICES.values()}) == len(DEVICES)
    for kind in ("phone", "tablet", "laptop", "board", "handheld"):
        assert any(device.kind == kind for device in DEVICES.values())


def figures(value):
    """Everything in the file that looks like a figure."""
    if isinstance(value, dict):
        if "value" in value:
            yield value
        else:
            yield from (figure for inner in value.values() for figure in figures(inner))
    elif isinstance(value, list):
        yield from (figure for inner in value for figure in figures(inner))


def test_every_figure_has_a_source_and_every_source_a_figure():
    found = list(figures([RAW["facts"], RAW["devices"]]))
    assert len(found) > 250
    assert {figure["source"] for figure in found} == set(RAW["sources"])
    assert {figure["confidence"] for figure in found} <= set(RAW["confidence"])
    for device in RAW["devices"]:  # no number stands outside of a figure
        bare = {k: v for k, v in device.items() if not isinstance(v, (dict, str))}
        assert set(bare) <= {"aliases", "targets", "notes"}, device["id"]


def test_what_is_estimated_says_from_what():
    for text in RAW["sources"].values():
        assert len(text) > 20
        assert text.isprintable()
    for device in DEVICES.values():
        for figure in (device.limit, device.entitled, device.gpu_limit):
            if figure and figure.confidence == "estimated":
                assert figure.note, device.id


def test_the_compute_capabilities_are_those_that_engines_are_built_for():
    assert tuple(doctor.devices().facts["rtx_capabilities"].value) == CAPABILITIES


def broken(change):
    raw = copy.deepcopy(RAW)
    change(raw)
    return json.dumps(raw)


def first(raw):
    return raw["devices"][0]


BREAKS = {
    "format": lambda raw: raw.update(format=2),
    "unknown field": lambda raw: raw.update(more=1),
    "no devices": lambda raw: raw.pop("devices"),
    "facts is no object": lambda raw: raw.update(facts=[]),
    "is no list": lambda raw: raw.update(devices={}),
    "no list of dict": lambda raw: raw["devices"].append(1),
    "has no baseline_app": lambda raw: raw["facts"].pop("baseline_app"),
    "has no memory": lambda raw: first(raw).pop("memory"),
    "unknown field 'colour'": lambda raw: first(raw).update(colour="red"),
    "is not a": lambda raw: first(raw)["memory"].update(value="4"),
    "not a int": lambda raw: first(raw)["memory"].update(value=True),
    "above 0": lambda raw: first(raw)["limit"].update(value=0),
    "is no source": lambda raw: first(raw)["memory"].update(source="hearsay"),
    "has no source": lambda raw: first(raw)["memory"].pop("source"),
    "confidence is not": lambda raw: first(raw)["memory"].update(confidence="sure"),
    "between its limit": lambda raw: first(raw)["limit"].update(value=2**40),
    "entitled is not": lambda raw: first(raw)["entitled"].update(value=1),
    "is there twice": lambda raw: raw["devices"].append(first(raw)),
    "is no name": lambda raw: first(raw).update(id="An iPhone"),
    "name is no text": lambda raw: first(raw).update(name=1),
    "kind 'watch'": lambda raw: first(raw).update(kind="watch"),
    "targets are not": lambda raw: first(raw).update(targets=["qnn"]),
    "aliases is no list": lambda raw: first(raw).update(aliases="x"),
    "without oldest": lambda raw: first(raw).pop("newest"),
    "no system's number": lambda raw: first(raw)["newest"].update(value="26.1"),
    "unhashable": lambda raw: first(raw)["memory"].update(source=[]),
}


@pytest.mark.parametrize("text", BREAKS)
def test_a_broken_file_is_refused_in_one_line(text):
    if text in ("is not a", "not a int"):
        text, change = "not a int above 0", BREAKS[text]
    else:
        change = BREAKS[text]
    with pytest.raises(doctor.DeviceError, match=re.escape(text)) as caught:
        doctor.loads(broken(change), "devices.json")
    line = str(caught.value)
    assert line.isprintable()
    assert line.startswith("devices.json is not valid: ")
    assert len(line) < 300


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": NaN}', "[" * 100_000])
def test_what_is_no_such_file_is_refused(text):
    with pytest.raises(doctor.DeviceError) as caught:
        doctor.loads(text, "x")
    assert str(caught.value).isprintable()


def test_a_gpu_s_limit_is_within_its_memory():
    def change(raw):
        gpu = next(d for d in raw["devices"] if "gpu_limit" in d)
        gpu["gpu_limit"]["value"] = 2**50

    with pytest.raises(doctor.DeviceError, match="gpu_limit is more"):
        doctor.loads(broken(change), "x")


def test_names_are_found_as_people_write_them():
    data = doctor.devices()
    assert data.find("iPhone 15 Pro") is data.find("iphone-15-pro") is DEVICES["iphone-15-pro"]
    assert data.find("jetson_orin").id == "jetson-orin-nano"
    with pytest.raises(ValueError, match=r"no device 'iphone15pro': perhaps iphone-15-pro"):
        data.find("iphone15pro")
    with pytest.raises(ValueError, match=r"no device 'zzzz': --list shows all"):
        data.find("zzzz")


# --- verdicts -----------------------------------------------------------------------------------


def test_what_fits_whole():
    found = examine(made(weights="p6", sizes={"unet": 700 * MIB}, options=IOS), "iphone-15-pro")
    assert found.verdict == doctor.FITS
    assert found.fits
    assert found.off == found.instead == ()
    assert found.limit.value == 3376 * MIB
    assert found.budget == found.limit.value - found.baseline > found.peak
    assert [stage.component for stage in found.stages] == ["unet"]


def test_what_fits_only_staged():
    big = {"text_encoder": GB, "unet": 2 * GB, "vae_decoder": GB}
    found = examine(made(weights="p6", sizes=big, options=IOS), "iphone-15-pro")
    assert found.verdict == doctor.STAGED
    assert found.fits
    assert any("increased-memory-limit (5.59 GiB, reported) it fits" in n for n in found.notes)


def test_what_fits_only_streamed():
    memory = {"unet": {"1 thread": Memory(5 * GB, 300 * MIB, 10 * MIB)}}
    big = made("native", "bf16", {"unet": 5 * GB}, memory=memory)
    found = examine(big, "raspberry-pi-4")
    assert found.verdict == doctor.STREAMED
    assert found.fits
    assert found.off == ()


def test_what_fits_only_in_chunks():
    pieces = ("UnetChunk1.mlpackage", "UnetChunk2.mlpackage")
    cut = made(sizes={"unet": int(3.8 * GB)}, options=IOS, parts=pieces)
    found = examine(cut, "iphone-15-pro")
    assert found.verdict == doctor.CHUNKED
    assert found.fits
    assert "the app must hold one piece of the U-Net at a time" in found.notes
    assert found.peak == int(3.8 * GB) // 2
    text = "1.77 GiB in one piece, a phone's Neural Engine takes 954 MiB"
    assert reasons(found)["unet"] == text


def test_pieces_that_are_too_large_do_not_fit_either():
    pieces = ("UnetChunk1.mlpackage", "UnetChunk2.mlpackage")
    found = examine(made(sizes={"unet": 9 * GB}, options=IOS, parts=pieces), "iphone-15-pro")
    assert found.verdict == doctor.TOO_LARGE
    assert found.smallest == 9 * GB // 2


def test_what_does_not_fit_says_what_would():
    found = examine(made(sizes={"unet": 5 * GB}, options=IOS), "iphone-13")
    assert (found.verdict, found.fits) == (doctor.TOO_LARGE, False)
    assert (found.refused, found.smallest, found.peak) == ("unet", 5 * GB, None)
    (other,) = found.instead
    options = parse(other.command)
    assert (options["target"], options["weights"]) == ("coreml", "p6")
    assert other.verdict == doctor.FITS
    assert "by this bundle's own weights it fits" in other.why


def test_the_most_bits_that_fit_whole_are_advised():
    parts = {"text_encoder": 240 * MIB, "unet": 1640 * MIB, "vae_decoder": 95 * MIB}
    found = examine(made(sizes=parts, options=IOS), "iphone-se-3")
    assert found.verdict == doctor.STAGED  # and the U-Net is too large a piece
    (other,) = found.instead
    assert (parse(other.command)["weights"], other.verdict) == ("p8", doctor.FITS)


def test_pieces_are_advised_where_few_bits_are_not_enough():
    found = examine(made(sizes={"unet": 16 * GB}, options=IOS), "iphone-13")
    assert found.verdict == doctor.TOO_LARGE
    (other,) = found.instead
    options = parse(other.command)
    assert (options["weights"], options["chunks"]) == ("p6", 4)
    assert other.verdict == doctor.CHUNKED
    (other,) = examine(made(sizes={"unet": 60 * GB}, options=IOS), "iphone-13").instead
    assert parse(other.command)["weights"] == "p4"
    assert "4 bits are seen in pictures" in other.why


def test_where_nothing_fits_nothing_is_advised():
    found = examine(made(sizes={"unet": 900 * GB}, options=IOS), "iphone-13")
    assert found.verdict == doctor.TOO_LARGE
    assert found.instead == ()


def test_a_smaller_picture_is_named_where_the_bundle_draws_it():
    memory = {"unet": {"1 thread": Memory(10 * MIB, 400 * MIB, 0)}}
    free = bundles.Sizes((512, 512), 64, 64, 1024)
    bundle = made("native", "bf16", {"unet": 10 * MIB}, memory=memory, limits=free)
    found = examine(bundle, "raspberry-pi-zero-2-w")
    assert found.verdict == doctor.TOO_LARGE
    assert "at 256x256 it fits" in found.notes
    assert not any("--tiles" in note for note in found.notes)
    fixed = made("native", "bf16", {"unet": 10 * MIB}, memory=memory)
    assert not any("256x256" in n for n in examine(fixed, "raspberry-pi-zero-2-w").notes)


def test_tiles_are_named_where_they_help():
    memory = {"vae_decoder": {"1 thread": Memory(10 * MIB, 300 * MIB, 0)}}
    bundle = made("native", "bf16", {"vae_decoder": 10 * MIB}, memory=memory)
    found = examine(bundle, "raspberry-pi-zero-2-w")
    assert found.verdict == doctor.TOO_LARGE
    text = "with --tiles, which change the picture a little, it fits"
    assert any(note.startswith(text) for note in found.notes)


@pytest.mark.parametrize("device", DEVICES)
def test_every_device_takes_a_small_bundle_of_each_of_its_targets(device):
    for target in doctor.TARGETS:
        found = examine(made(target, sizes={"unet": 20 * MIB}, options=IOS), device)
        assert found.fits == (target in DEVICES[device].targets)
        if not found.fits:
            assert found.verdict == doctor.NO_ENGINE
            assert any(f"not {target}" in note for note in found.notes)
            assert found.instead


def test_a_target_that_does_not_run_there_is_replaced():
    found = examine(made("coreml", options=IOS), "pixel-9")
    assert found.verdict == doctor.NO_ENGINE
    assert found.stages == found.off == ()
    assert [parse(other.command) for other in found.instead] == [
        {"checkpoint": Path("CHECKPOINT"), "target": "native"}
    ]


def test_a_bundle_for_a_later_system_does_not_run():
    found = examine(made(options=IOS | {"deployment": "ios40"}), "iphone-15")
    assert found.verdict == doctor.NO_ENGINE
    assert "the bundle is for iOS 40 and later, it ends at 26" in found.notes


# --- the accelerator ----------------------------------------------------------------------------

SMALL = {"text_encoder": 40 * MIB, "unet": 60 * MIB, "vae_decoder": 30 * MIB}


@pytest.mark.parametrize(
    "options, more, component, text",
    [
        ({"attention": "original"}, {}, "all", "attention is laid out for the GPU"),
        ({"compute_units": "cpu_only"}, {}, "all", "asks for the CPU alone"),
        ({}, {"activations": "fp32"}, "unet", "computes in fp32, the Neural Engine in fp16"),
        ({}, {"weights": "p4g16"}, "all", "p4g16 needs iOS 18"),
        ({}, {"kept": {"vae_decoder"}}, "vae_decoder", "computes in fp32"),
    ],
)  # fmt: skip
def test_what_would_leave_the_neural_engine(options, more, component, text):
    found = examine(made(sizes=SMALL, options=IOS | options, **more), "iphone-15-pro")
    assert text in reasons(found)[component]
    assert all(part.source for part in found.off)


def test_one_large_piece_is_too_much_above_six_bits_and_on_phones():
    whole = {"unet": 1640 * MIB}
    assert "unet" in reasons(examine(made(sizes=whole, options=IOS), "iphone-15-pro"))
    assert examine(made(sizes=whole, weights="p6", options=IOS), "iphone-15-pro").off == ()
    mac = {**IOS, "deployment": "macos14"}
    assert examine(made(sizes=whole, options=mac), "mac-m1-16gb").off == ()
    (other,) = examine(made(sizes=whole, options=IOS), "iphone-15-pro").instead
    assert parse(other.command)["chunks"] == 2


def test_what_is_made_for_the_gpu_is_left_to_it():
    gpu = IOS | {"compute_units": "cpu_and_gpu", "attention": "original"}
    assert examine(made(sizes=SMALL, options=gpu), "mac-m1-8gb").off == ()


def test_what_no_conversion_mends_is_not_converted_again():
    found = examine(made(sizes=SMALL, options=IOS, kept={"vae_decoder"}), "iphone-15-pro")
    assert [part.by_converting for part in found.off] == [False]
    assert found.instead == ()
    found = examine(made(sizes=SMALL, options=IOS, activations="fp32"), "iphone-15-pro")
    assert found.instead


@pytest.mark.parametrize("notes", [None, 1, [1, {}], ["no component: is kept in fp32"]])
def test_the_parity_report_is_free_form(notes):
    found = examine(made(sizes=SMALL, options=IOS, parity={"notes": notes}), "iphone-15-pro")
    assert found.off == ()


def test_a_system_to_update_to_is_named_on_either_kind_of_device():
    new = IOS | {"deployment": "ios18"}
    assert any("update to iOS 18" in n for n in examine(made(options=new), "iphone-15").notes)
    assert any("update to macOS 15" in n for n in examine(made(options=new), "mac-m1-8gb").notes)
    assert not any("update" in n for n in examine(made(options=new), "mac-m4-16gb").notes)


def test_weights_that_are_expanded_when_loaded_are_planned_so():
    old = IOS | {"deployment": "ios16"}
    small = {"unet": 900 * MIB}  # 2400 MiB in fp16
    found = examine(made(weights="p6", sizes=small, options=old), "iphone-13")
    assert found.verdict == doctor.FITS
    note = "before iOS 17 weights may be expanded when loaded: then it does not fit"
    assert note in found.notes
    on_17 = examine(made(weights="p6", sizes=small, options=old), "iphone-15")
    assert not any("expanded" in note for note in on_17.notes)
    on_mac = examine(made(weights="p6", sizes=small, options=old), "mac-m1-8gb")
    assert any("before macOS 14 weights may be expanded" in note for note in on_mac.notes)


def test_a_cpu_bundle_on_a_device_with_an_accelerator():
    found = examine(made("native", "bf16", SMALL), "iphone-15-pro")
    assert reasons(found) == {"all": "the target native computes on the CPU"}
    assert parse(found.instead[0].command)["target"] == "coreml"
    found = examine(made("onnx", "fp16", SMALL), "rtx-4060-laptop")
    assert parse(found.instead[0].command)["compute_capability"] == "8.9"
    found = examine(made("onnx", "fp16", SMALL), "galaxy-s24")
    assert "no engine for this device's accelerator" in reasons(found)["all"]


def rtx(weights="fp16", engines=("8.6", "8.9"), memory=True, size=900 * MIB):
    held = {c: Memory(size, 50 * MIB, 10 * MIB) for c in engines} if memory else {}
    bundle = made("tensorrt", weights, {"unet": size}, memory={"unet": held})
    files = {f"unet/sm{c.replace('.', '')}.engine": File(size, "0" * 64) for c in engines}
    manifest = dataclasses.replace(bundle.manifest, files=bundle.manifest.files | files)
    return Bundle(bundle.folder, manifest)


def test_engines_are_those_of_the_gpu():
    found = examine(rtx(), "rtx-4060-laptop")
    assert (found.verdict, found.off, found.notes) == (doctor.FITS, (), ())
    assert found.limit.value == int(0.85 * 8 * 2**30)
    assert found.peak == 960 * MIB
    found = examine(rtx(engines=("12.0",)), "rtx-4060-laptop")
    assert reasons(found)["unet"] == "no engine for 8.9 in the bundle, only 12.0"
    assert parse(found.instead[0].command)["compute_capability"] == "8.9"
    assert "the bundle has no figures for 8.9: its largest are taken" in found.notes


def test_an_orin_builds_its_own_engines():
    found = examine(rtx(), "jetson-orin")
    assert found.off == ()
    assert any("builds the engines for 8.7 at first use" in note for note in found.notes)
    large = examine(rtx(size=7 * GB), "jetson-orin")
    assert large.verdict == doctor.TOO_LARGE
    options = parse(large.instead[0].command)
    assert options["weights"] == "w8"
    assert "compute_capability" not in options


def test_integers_on_turing_are_spread():
    found = examine(rtx("w8", ("7.5",)), "gtx-1660")
    assert "multiplies no integer weights" in reasons(found)["all"]
    assert parse(found.instead[0].command)["weights"] == "fp16"
    assert examine(rtx("w8"), "rtx-4060-laptop").off == ()


def test_what_is_not_counted_is_said():
    silent = examine(rtx(memory=False), "rtx-4060-laptop")
    assert "activations of unet are the runtime's own and not counted" in silent.notes
    apple = examine(made(options=IOS, sizes=SMALL), "iphone-15-pro")
    assert any("are the runtime's own and not counted" in note for note in apple.notes)


def test_a_mixture_of_forms_is_not_guessed():
    found = examine(made(weights="mixed", sizes={"unet": 5 * GB}, options=IOS), "iphone-13")
    (other,) = found.instead
    assert (parse(other.command)["weights"], other.verdict) == ("p6", "")


def test_another_size_is_in_the_command():
    wide = Run((768, 512), 4)
    found = examine(made(sizes={"unet": 5 * GB}, options=IOS), "iphone-13", wide)
    assert parse(found.instead[0].command)["sizes"] == ((768, 512),)


def test_a_diagnosis_is_json_and_back():
    for bundle in (made(options=IOS), made(sizes={"unet": 9 * GB}, options=IOS), rtx()):
        found = examine(bundle, "iphone-13").as_json()
        again = json.loads(json.dumps(found, allow_nan=False))
        assert again == json.loads(json.dumps(again))
        assert again["limit"]["source"].startswith("https://")
        assert again["fits"] == (again["verdict"] not in (doctor.TOO_LARGE, doctor.NO_ENGINE))
        assert set(again) == {"fits", *(f.name for f in dataclasses.fields(doctor.Diagnosis))}


# --- the command --------------------------------------------------------------------------------


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(doctor, "_planner", lambda: PLANNER)


def invoke(*args):
    return CliRunner().invoke(cli.main, ["doctor", *map(str, args)], prog_name="ferrotype")


@pytest.mark.parametrize("bundle", [EMBEDDED, EMBEDDED_ONNX], ids=lambda path: path.name)
def test_the_command_says_whether_the_embedded_bundles_fit(stand_in, bundle):
    done = invoke(bundle, "--device", "raspberry-pi-4")
    assert (done.exit_code, done.stderr) == (0, "")
    assert re.search(r"^verdict +fits$", done.stdout, re.M)
    found = json.loads(invoke(bundle, "--device", "pixel-9", "--json", "-n", 8).stdout)
    assert (found["device"], found["steps"], found["fits"]) == ("pixel-9", 8, True)


def test_steps_that_the_model_was_not_distilled_for_are_refused(stand_in, tmp_path):
    folder = tmp_path / "few.ferro"
    shutil.copytree(EMBEDDED, folder)
    raw = json.loads((folder / "manifest.json").read_text())
    raw["recipe"] |= {"name": "lightning-4", "allowed_steps": [4], "steps": 4}
    (folder / "manifest.json").write_text(json.dumps(raw))
    assert invoke(folder, "--device", "pixel-9").exit_code == 0
    assert invoke(folder, "--device", "pixel-9", "-n", 4).exit_code == 0
    done = invoke(folder, "--device", "pixel-9", "-n", 20)
    assert (done.exit_code, done.stdout) == (2, "")
    said = "steps 20: this model was distilled for 4 steps of lcm"
    assert said in done.stderr
    assert done.stderr.endswith("(lightning-4): use --steps 4\n")


def test_the_command_ends_with_1_where_it_does_not_fit(stand_in, tmp_path):
    done = invoke(EMBEDDED, "--device", "pixel-9", "--size", 64)
    assert done.exit_code == 0
    folder = tmp_path / "phone.ferro"
    copy_bundle(EMBEDDED, folder, target="coreml")
    done = invoke(folder, "--device", "pixel-9")
    assert done.exit_code == 1
    assert "does not run" in done.stdout
    assert json.loads(invoke(folder, "--device", "pixel-9", "--json").stdout)["fits"] is False


def copy_bundle(source, folder, **changes):
    """A bundle beside its original, with another manifest."""
    shutil.copytree(source, folder)
    manifest = dataclasses.replace(bundles.load(source).manifest, **changes)
    (folder / "manifest.json").write_text(bundles.dumps(manifest))


def test_the_list_shows_every_device():
    lines = invoke("--list").stdout.splitlines()
    assert len(lines) == len(DEVICES) + 1
    assert any("3.3 GiB (5.59 GiB entitled)" in line for line in lines)
    listed = json.loads(invoke("--list", "--json").stdout)
    assert [entry["id"] for entry in listed] == list(DEVICES)


@pytest.mark.parametrize(
    "args, text",
    [
        (("--device", "iphone15pro"), "perhaps iphone-15-pro"),
        ((), "give --device NAME, or --list"),
        (("--device", "pixel-9", "--size", "65x64"), "is no multiple of 32"),
    ],
)
def test_wrong_arguments_are_usage_errors(stand_in, args, text):
    done = invoke(*args)
    assert done.exit_code == 2
    assert text in done.stderr.splitlines()[-1]
    assert done.stderr.splitlines()[-1].isprintable()


def test_a_folder_that_is_no_bundle_is_one_line(stand_in, tmp_path):
    done = invoke(tmp_path, "--device", "pixel-9")
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: ")
    assert len(done.stderr.splitlines()) == 1


# --- with the planner ---------------------------------------------------------------------------


@needs_plan
@pytest.mark.parametrize("device", ["iphone-15-pro", "pixel-9", "jetson-orin", "laptop-8gb"])
@pytest.mark.parametrize("folder", [EMBEDDED, EMBEDDED_ONNX], ids=lambda path: path.name)
def test_the_embedded_bundles_fit_everywhere_by_the_planner(folder, device):
    bundle = bundles.load(folder)
    found = doctor.examine(bundle, doctor.devices().find(device), doctor.new_run(bundle, None, 4))
    assert found.verdict == doctor.FITS
    assert 0 < found.peak < found.budget
    assert {stage.component for stage in found.stages} >= {"text_encoder", "unet", "vae_decoder"}


@needs_plan
def test_a_device_made_ever_smaller_staged_then_streamed_then_not_at_all():
    bundle = bundles.load(EMBEDDED)
    run, pi = doctor.new_run(bundle, None, 4), DEVICES["raspberry-pi-4"]
    seen = []
    for megabytes in range(80, 36, -1):
        limit = dataclasses.replace(pi.limit, value=megabytes * MIB)
        device = dataclasses.replace(pi, limit=limit)
        verdict = doctor.examine(bundle, device, run).verdict
        if verdict not in seen:
            seen.append(verdict)
    assert seen == [doctor.FITS, doctor.STAGED, doctor.STREAMED, doctor.TOO_LARGE]


@needs_plan
def test_windows_does_not_stream():
    bundle, laptop = bundles.load(EMBEDDED), DEVICES["laptop-8gb"]
    run = doctor.new_run(bundle, None, 4)
    small = dataclasses.replace(laptop, limit=dataclasses.replace(laptop.limit, value=56 * MIB))
    assert doctor.examine(bundle, dataclasses.replace(small, os="linux"), run).fits
    found = doctor.examine(bundle, small, run)
    assert (found.verdict, found.refused) == (doctor.TOO_LARGE, "unet")
    assert found.smallest > found.budget
    assert "weights cannot be streamed on Windows" in found.notes


@needs_plan
def test_other_targets_are_judged_by_the_planner():
    from ferrotype.runtime.plan import Run as RealRun

    run, find = RealRun(size=(512, 512), steps=4, repeats=True), doctor.devices().find
    big = made(sizes={"text_encoder": GB, "unet": 2 * GB, "vae_decoder": GB}, options=IOS)
    assert doctor.examine(big, find("iphone-15-pro"), run).verdict == doctor.STAGED
    few = {"text_encoder": 240 * MIB, "vae_decoder": 95 * MIB}
    found = doctor.examine(made(sizes={**few, "unet": 5 * GB}, options=IOS), find("iphone-13"), run)
    assert found.verdict == doctor.TOO_LARGE
    assert found.smallest > found.budget
    assert found.instead[0].verdict == doctor.FITS
    pieces = tuple(f"UnetChunk{i}.mlpackage" for i in (1, 2))
    cut = made(sizes={**few, "unet": int(3.8 * GB)}, options=IOS, parts=pieces)
    assert doctor.examine(cut, find("iphone-15-pro"), run).verdict == doctor.CHUNKED
    names = ("text_encoder", "unet", "vae_decoder")
    for size, verdict in (
        (2 * GB, doctor.FITS),
        (4 * GB, doctor.STAGED),
        (8 * GB, doctor.TOO_LARGE),
    ):
        held = {name: {"8.9": Memory(size, 50 * MIB, 10 * MIB)} for name in names}
        engines = made("tensorrt", memory=held)
        assert doctor.examine(engines, find("rtx-4060-laptop"), run).verdict == verdict


# --- the page -----------------------------------------------------------------------------------


def page_table():
    """The devices as the page lists them."""
    head, *lines = doctor.table(doctor.devices())
    rule = ["---"] * len(head)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *lines)) + "\n"


def test_the_page_lists_the_devices_and_the_known_limits():
    page = PAGE.read_text("utf-8")
    assert page_table() in page
    for device in DEVICES.values():
        if device.limit_kind == "kill" and device.limit.confidence == "reported":
            address = device.limit.source.split()[0]
            assert address in page, device.id


if __name__ == "__main__":
    text = PAGE.read_text("utf-8")
    start, end = "<!-- devices -->\n", "<!-- end -->"
    head, rest = text.split(start)
    PAGE.write_text(head + start + page_table() + end + rest.split(end)[1], "utf-8")

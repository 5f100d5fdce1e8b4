"""The format byte for byte, saving whole or not at all, and one clear line for every attack."""

import copy
import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferrotype import bundle
from ferrotype.bundle import BundleError, load, loads, save, staging, verify
from ferrotype.runtime.engines import open_engine
from ferrotype.runtime.pipeline import EMBEDDED, Pipeline

PAGE = (EMBEDDED.parent.parent / "docs" / "bundle.md").read_text("utf-8")
EXAMPLE = PAGE.split("```json\n")[1].split("```")[0]
REAL = (EMBEDDED / "manifest.json").read_text("utf-8")
FILES = {
    "text_encoder/model.onnx": b"a graph",
    "text_encoder/weights/0.bin": b"some weights",
    "tokenizer/tokenizer.json": b"{}\n",
}


def small_manifest() -> bundle.Manifest:
    """The manifest of docs/bundle.md, before its files are listed."""
    states = bundle.Tensor("float32", ("batch", 77, 768))
    return bundle.Manifest(
        format=1,
        tool="ferrotype 0.1.0",
        model="example",
        family="sd1",
        target="onnx",
        licence="openrail",
        source=bundle.Source("example", "0" * 64),
        precision=bundle.Precision("fp16", "fp32"),
        sizes=bundle.Sizes((512, 512), 64, 256, 1024),
        recipe=bundle.Recipe("lcm", 4, 1.5),
        preview=(),
        tokenizers={"tokenizer": bundle.Tokenizer("tokenizer", 77, "<|endoftext|>")},
        components={
            "text_encoder": bundle.Component(
                "text_encoder",
                {"hidden_size": 768},
                {"input_ids": bundle.Tensor("int64", ("batch", 77))},
                {"last_hidden_state": states},
            )
        },
        parity={"floors": {"component": 50.0}},
    )


def write_files(folder, files=FILES):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def build(out, files=FILES, make=lambda manifest: manifest, force=False):
    with staging(out, force) as staged:
        write_files(staged, files)
        return save(staged, out, make(small_manifest()), force)


@pytest.fixture
def small(tmp_path):
    """A small bundle; its networks are none, so it opens and verifies but does not draw."""
    out = tmp_path / "small.ferro"
    with bundle.staging(out) as staged:
        write_files(staged)
        return bundle.save(staged, out, small_manifest())


def refused(call, *args):
    """The one line that a call is refused with."""
    with pytest.raises(BundleError) as caught:
        call(*args)
    line = str(caught.value)
    assert line.isprintable(), line
    assert 0 < len(line) < 1000, line[:1000]
    return line


def loads_or_is_refused(text):
    """A manifest that loads means the same when it is written again."""
    try:
        manifest = loads(text)
    except BundleError:
        refused(loads, text)
    else:
        assert loads(bundle.dumps(manifest)) == manifest


def edited(text=EXAMPLE, **changes):
    """A manifest with some fields changed; `a__b` is b in a."""
    raw = json.loads(text)
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = raw
        for name in parents:
            place = place[name]
        place[last] = value
    return json.dumps(raw)


def rewrite(folder, **changes):
    """Change fields of a bundle's manifest on disk."""
    path = folder / "manifest.json"
    path.write_text(edited(path.read_text(), **changes))


def relist(folder):
    """Make a bundle's manifest vouch for the files as they are now, as an attacker would."""
    files = {n: dataclasses.asdict(f) for n, f in bundle.list_files(folder).items()}
    rewrite(folder, files=files)


# --- the format ---------------------------------------------------------------------------------


def test_the_manifest_is_the_page_s_example_byte_for_byte(small):
    assert (small.folder / "manifest.json").read_bytes() == EXAMPLE.encode("ascii")


def test_what_is_saved_loads_the_same(small):
    opened = load(small.folder)
    assert opened == small
    assert verify(opened) == []
    assert loads(bundle.dumps(opened.manifest)) == opened.manifest


def test_the_identity_is_the_hash_of_the_manifest_file(small):
    assert small.sha256 == hashlib.sha256(EXAMPLE.encode()).hexdigest()
    assert load(EMBEDDED).sha256 == hashlib.sha256(REAL.encode()).hexdigest()


def test_the_identity_does_not_depend_on_how_the_manifest_is_spaced(small):
    path = small.folder / "manifest.json"
    path.write_text(json.dumps(json.loads(EXAMPLE), indent=4).replace("\n", "\r\n"))
    assert load(small.folder).sha256 == small.sha256


def test_fields_with_a_default_may_be_left_out():
    raw = json.loads(EXAMPLE)
    for name in ("eta", "timesteps", "spacing"):
        del raw["recipe"][name]
    assert loads(json.dumps(raw)).recipe.spacing == "leading"


def test_every_field_is_on_the_page():
    prose = PAGE.split("## Example")[0]
    kinds = [bundle.Manifest, bundle.Component, bundle.Tensor, bundle.Sizes, bundle.Recipe]
    kinds += [bundle.Tokenizer, bundle.File, bundle.Source, bundle.Precision, bundle.Memory]
    for name in (field.name for kind in kinds for field in dataclasses.fields(kind)):
        assert f"`{name}`" in prose, name


def test_a_component_may_be_a_nested_folder_or_one_file(small):
    manifest = load(small.folder).manifest
    assert small.bytes_of("text_encoder") == len(b"a graph") + len(b"some weights")
    assert small.bytes_of("text_encoder/weights/0.bin") == len(b"some weights")
    rewrite(small.folder, components__text_encoder__path="text_encoder/weights/0.bin")
    opened = load(small.folder)
    assert opened.component("text_encoder") != manifest.components["text_encoder"]
    assert refused(opened.component, "unet").endswith(
        "small.ferro has no unet: it holds text_encoder"
    )


@pytest.mark.parametrize(
    ("size", "fault"),
    [
        ((512, 512), None),
        ((256, 1024), None),
        ((512, 520), "520 is no multiple of 64, try 512"),
        ((0, 0), "0 is outside 256..1024"),
        ((192, 512), "192 is outside"),
        ((512, 1088), "1088 is outside"),
        ((-512, 512), "-512 is outside"),
    ],
)
def test_sizes_are_checked_with_a_way_out(size, fault):
    sizes = small_manifest().sizes
    if fault is None:
        assert sizes.check(size) == size
    else:
        with pytest.raises(ValueError, match=re.escape(fault)):
            sizes.check(size)


# --- saving -------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_nothing_is_left_when_the_building_stops(tmp_path, error):
    def stop(manifest):
        raise error

    with pytest.raises(error):
        build(tmp_path / "a.ferro", make=stop)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("when", ["dumps", "load", "hash_file", "_publish"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.ENOSPC, "No space left")])
def test_a_save_that_stops_leaves_the_old_bundle_as_it_was(small, monkeypatch, when, error):
    def stop(*_):
        raise error

    monkeypatch.setattr(bundle, when, stop)
    kind = KeyboardInterrupt if error is KeyboardInterrupt else BundleError
    with pytest.raises(kind):
        build(small.folder, {**FILES, "new.txt": b"new"}, force=True)
    monkeypatch.undo()
    assert load(small.folder) == small
    assert [p.name for p in small.folder.parent.iterdir()] == ["small.ferro"]


@pytest.mark.parametrize("failing", [1, 2])
def test_the_old_bundle_comes_back_when_a_rename_fails(small, monkeypatch, failing):
    calls = []
    rename = type(small.folder).rename

    def second_stops(self, target):
        calls.append(target)
        if len(calls) == failing:
            raise KeyboardInterrupt
        return rename(self, target)

    if failing == 1:  # it was not renamed at all, so there is nothing to put back
        monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    monkeypatch.setattr(type(small.folder), "rename", second_stops)
    staged = small.folder.parent / "staged"
    write_files(staged)
    with pytest.raises(KeyboardInterrupt):
        save(staged, small.folder, small.manifest, force=True)
    monkeypatch.undo()
    assert load(small.folder) == small


def test_the_final_name_appears_only_when_all_is_written(tmp_path):
    out = tmp_path / "a.ferro"
    with staging(out) as staged:
        write_files(staged)
        assert not out.exists()
        assert staged.parent == out.parent  # else the rename would be a copy
        assert not (staged / "manifest.json").exists()
        save(staged, out, small_manifest())
        assert out.is_dir()
    assert [p.name for p in tmp_path.iterdir()] == ["a.ferro"]
    assert out.stat().st_mode & 0o077 == 0o077 & ~bundle._umask()


def occupy(path, kind):
    if kind == "file":
        path.write_text("mine")
    elif kind == "dangling link":
        path.symlink_to("nowhere")
    else:
        path.mkdir()
    if kind == "other manifest":
        (path / "manifest.json").write_text('{"manifest_version": 3, "name": "an extension"}')
    if kind == "folder":
        (path / "mine.txt").write_text("mine")


@pytest.mark.parametrize("kind", ["file", "folder", "empty", "dangling link", "other manifest"])
def test_only_a_bundle_is_replaced_and_only_with_force(tmp_path, kind):
    out = tmp_path / "a.ferro"
    occupy(out, kind)
    before = sorted(tmp_path.rglob("*"))
    for force, words in [(False, "exists: choose another name or pass --force"), (True, "not a b")]:
        assert words in refused(staging(out, force).__enter__)
    assert sorted(tmp_path.rglob("*")) == before


def test_force_replaces_a_bundle_whole(small):
    build(small.folder, {**FILES, "new.txt": b"new"}, force=True)
    assert "new.txt" in load(small.folder).manifest.files
    assert [p.name for p in small.folder.parent.iterdir()] == ["small.ferro"]


def test_a_link_to_a_bundle_is_not_replaced(small, tmp_path):
    link = tmp_path / "link.ferro"
    link.symlink_to(small.folder)
    assert "is not a bundle, so it is not replaced" in refused(staging(link, True).__enter__)


@pytest.mark.parametrize("out", ["no/folder/a.ferro", "/proc/a.ferro", f"{'x' * 300}.ferro"])
def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path, out):
    refused(staging(tmp_path / out).__enter__)
    assert list(tmp_path.iterdir()) == []


def test_a_place_taken_while_building_is_not_overwritten(tmp_path):
    out = tmp_path / "a.ferro"
    with staging(out) as staged:
        write_files(staged)
        out.mkdir()
        assert "exists" in refused(save, staged, out, small_manifest())


@pytest.mark.parametrize("kind", ["link", "folder link", "pipe", "name", "twins"])
def test_what_could_not_be_loaded_elsewhere_is_never_saved(tmp_path, kind):
    out = tmp_path / "a.ferro"
    with staging(out) as staged:
        write_files(staged)
        match kind:
            case "link":
                (staged / "b.bin").symlink_to("text_encoder/model.onnx")
            case "folder link":
                (staged / "b").symlink_to("text_encoder")
            case "pipe":
                os.mkfifo(staged / "b")
            case "name":
                (staged / "a:b").write_text("")
            case "twins":
                write_files(staged, {"b": b"", "B": b""})
        refused(save, staged, out, small_manifest())
    assert list(tmp_path.iterdir()) == []


def test_a_report_that_json_cannot_hold_is_refused(tmp_path):
    manifest = dataclasses.replace(small_manifest(), parity={"psnr": float("nan")})
    with staging(tmp_path / "a.ferro") as staged:
        write_files(staged)
        refused(save, staged, tmp_path / "a.ferro", manifest)
    assert list(tmp_path.iterdir()) == []


# --- manifests that are wrong -------------------------------------------------------------------


def test_every_shortened_manifest_is_refused():
    for end in range(len(EXAMPLE.rstrip())):
        refused(loads, EXAMPLE[:end])
    for end in range(0, len(REAL.rstrip()), 37):
        refused(loads, REAL[:end])


VALUES = [
    "null", "true", "-1", "0", "1", "0.5", "1e999", "-1e999", "1e308", "NaN", "Infinity", '""',
    "[]", "{}", "[[]]",
    "[null]", '{"a": 1}', '{"": {}}', '"../x"', '"\\ud800"', '"a\\nb\\u001b[2J"',
    f'"{"x" * 100_000}"', "9" * 400, "9" * 5000, "9223372036854775808", f'{{"{"x" * 100_000}": 1}}',
    "[" * 40 + "]" * 40, "[" * 5000 + "]" * 5000,
]  # fmt: skip


def places(value, path=()):
    yield path
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from places(inner, (*path, key))


def replaced(raw, path, value):
    """The manifest with the value at `path` replaced by raw JSON text."""
    raw = copy.deepcopy(raw)
    if not path:
        return value
    place = raw
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = "@@"
    return json.dumps(raw).replace('"@@"', value)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(bundle.Manifest)])
def test_every_value_in_every_place_loads_or_is_refused(name):
    raw = json.loads(EXAMPLE)
    for path in places(raw[name], (name,)):
        for value in VALUES:
            loads_or_is_refused(replaced(raw, path, value))


@pytest.mark.parametrize("value", VALUES)
def test_no_value_is_a_manifest_by_itself(value):
    refused(loads, value)


def test_every_required_field_missed_is_named_and_so_is_every_unknown_one():
    raw = json.loads(EXAMPLE)
    for path in places(raw):
        place = copy.deepcopy(raw)
        inner = place
        for key in path[:-1]:
            inner = inner[key]
        if path and isinstance(inner, dict) and path[-1] in SCHEMA:
            del inner[path[-1]]
            line = refused(loads, json.dumps(place))
            assert f"{path[-1]}: missing" in line
            inner["colour"] = 1
            inner[path[-1]] = None
            assert "colour: not a field of format 1" in refused(loads, json.dumps(place))


SCHEMA = {"tool", "recipe", "guidance", "path", "sha256", "bytes", "dtype", "shape", "files"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"format": 1, "format": 1}', 'names the key "format" twice'),
        ('{"format": 2, "brightness": []}', "it is format 2, this ferrotype reads 1; update"),
        (f'{{"format": "{"x" * 10**6}"}}', "it is format"),
        ("{}", "format: missing"),
        ("\ufeff{}", "BOM"),
        ("[" * 200_000, "nests too deeply"),
        (edited(parity={"a": json.loads("[" * 40 + "]" * 40)}), "nests deeper than 32"),
        (edited(sizes__default=[512, 500]), "sizes: size 512x500: 500 is no multiple of 64"),
        (edited(sizes__multiple=0), "multiple is 0"),
        (edited(sizes__maximum=1 << 20), "not in order within 1..65536"),
        (edited(sizes__minimum=2048), "not in order"),
        (edited(recipe__steps=0), "recipe: steps is 0, not in 1..1000"),
        (edited(recipe__steps=True), "recipe.steps: int expected, found true"),
        (edited(recipe__guidance=-1), "guidance is -1"),
        (edited(recipe__spacing="even"), "spacing 'even' is not one of leading"),
        (edited(tokenizers__tokenizer__max_length=2), "max_length is 2, not in 3..65536"),
        (edited(components__text_encoder__outputs={}), "no last_hidden_state of 3 dimensions"),
        (edited(recipe__zero_negative=1), "recipe.zero_negative: bool expected, found 1"),
        (edited(preview=[[1, 2]]), "preview[0]: 3 values expected, found 2"),
        (edited(files={"a": {"bytes": 1.0, "sha256": "0" * 64}}), "files.a.bytes: int expected"),
        (edited(files={"a": {"bytes": -1, "sha256": "0" * 64}}), "it cannot be negative"),
        (edited(files={"a": {"bytes": 1, "sha256": "0" * 63}}), "is not 64 hex digits"),
        (edited(files={"a": {"bytes": 1, "sha256": "A" * 64}}), "is not 64 hex digits"),
        (edited(REAL, preview=[]), "preview has 0 rows, 4 latent channels and bias expected"),
        (edited(REAL, components__vae_decoder__config={}), "latent_channels: int expected, found"),
        (edited(REAL, components__vae_decoder__config__latent_channels=10**9), "not in 1..64"),
        (edited(REAL, components__vae_decoder__config__block_out_channels=[]), "has 0, not 1 to 8"),
        (edited(REAL, components__vae_decoder__config__scaling_factor=0), "must be above 0"),
        (
            edited(
                REAL,
                components__unet__inputs__timestep_cond={"dtype": "float32", "shape": [1, 256]},
            ),
            "time_cond_proj_dim: int expected, found null",
        ),
    ],
)
def test_what_is_wrong_is_named(text, words):
    assert words in refused(loads, text)


NAMES = [
    "..", "../x", "a/../x", "a/..", ".", "./a", "/etc/passwd", "//host/share", "a//b", "a/", "",
    "a\\b", "..\\x", "\\\\host\\x", "C:", "C:\\x", "c:x", "a\0b", "a\nb", "a\tb", "a\x1b[2Jb",
    "\ud800", "é", "e\u0301", "\u202egnp.exe", "\u2025/x", "\uff0e\uff0e/x", "a.", "a ", " a", " ",
    "a./b", "a /b", ".hidden", "a/.hidden/b", "...", "con", "CON.json", "a/nul.txt", "com1", "a:b",
    "a*", "a?", 'a"', "a<b", "a|b", "x" * 201, "a/" * 150 + "a", "manifest.json", "Manifest.JSON",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_path_that_is_not_plain_everywhere_is_refused(small, name):
    files = {**json.loads(EXAMPLE)["files"], name: {"bytes": 0, "sha256": "0" * 64}}
    refused(loads, edited(files=files))
    if "anifest" not in name.lower():
        refused(loads, edited(components__text_encoder__path=name))
        refused(loads, edited(tokenizers__tokenizer__path=name))
        with pytest.raises(ValueError):
            small.path(name)


@pytest.mark.parametrize(
    "name", ["a", "a b", "a-b_c.d", "a/b/c.d/e", "~a", "a+b@c", "console", "x" * 200]
)
def test_a_plain_path_is_accepted(name):
    loads(edited(files={name: {"bytes": 0, "sha256": "0" * 64}}))


def test_paths_that_differ_only_in_case_are_refused():
    file = {"bytes": 0, "sha256": "0" * 64}
    line = refused(loads, edited(files={"a/B.bin": file, "a/b.bin": file}))
    assert "differ only in case" in line


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


@given(st.text() | json_values.map(json.dumps))
@settings(max_examples=100, deadline=None)
def test_any_text_loads_or_is_refused(text):
    refused(loads, text)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_change_of_a_manifest_loads_or_is_refused(data):
    raw = json.loads(EXAMPLE)
    path = data.draw(st.sampled_from(list(places(raw))))
    loads_or_is_refused(replaced(raw, path, json.dumps(data.draw(json_values))))


@given(st.integers(0, len(EXAMPLE) - 1), st.characters(codec="utf-8"))
@settings(max_examples=200, deadline=None)
def test_any_edited_character_loads_or_is_refused(place, character):
    loads_or_is_refused(EXAMPLE[:place] + character + EXAMPLE[place + 1 :])


# --- folders that are wrong ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["missing", "file", "empty", "loop", "long", "nul"])
def test_what_is_no_bundle_is_refused(tmp_path, kind):
    folder = tmp_path / "a.ferro"
    match kind:
        case "file":
            folder.write_text("{}")
        case "empty":
            folder.mkdir()
        case "loop":
            folder.symlink_to(folder)
        case "long":
            folder = tmp_path / ("x" * 500)
        case "nul":
            folder = tmp_path / "a\0b"
    with pytest.raises(BundleError):
        load(folder)


@pytest.mark.parametrize(
    "kind", ["missing", "folder", "pipe", "device", "loop", "outside", "sparse", "latin1", "utf16"]
)
def test_a_manifest_that_is_no_readable_file_is_refused(small, tmp_path, kind):
    path = small.folder / "manifest.json"
    path.rename(tmp_path / "outside.json")
    match kind:
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "loop":
            path.symlink_to("manifest.json")
        case "outside":
            path.symlink_to("../outside.json")
        case "sparse":
            with path.open("wb") as stream:
                stream.truncate(1 << 40)
        case "latin1":
            path.write_bytes(EXAMPLE.replace("example", "ex\xe9mple").encode("latin-1"))
        case "utf16":
            path.write_bytes(EXAMPLE.encode("utf-16"))
    refused(load, small.folder)


@pytest.mark.parametrize(
    "kind",
    [
        "missing",
        "short",
        "long",
        "folder",
        "pipe",
        "device",
        "loop",
        "link",
        "folder link",
        "parent",
    ],
)
def test_a_file_that_is_not_as_listed_is_named(small, tmp_path, kind):
    path = small.folder / "text_encoder" / "weights" / "0.bin"
    data = path.read_bytes()
    path.unlink()
    (tmp_path / "secret").write_bytes(data)
    match kind:
        case "short":
            path.write_bytes(data[:-1])
        case "long":
            path.write_bytes(data + b"\0")
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "loop":
            path.symlink_to("0.bin")
        case "link":
            path.symlink_to(tmp_path / "secret")
        case "folder link":
            path.parent.rmdir()
            (tmp_path / "0.bin").write_bytes(data)
            path.parent.symlink_to(tmp_path)
        case "parent":
            path.parent.rmdir()
            path.parent.write_bytes(b"")
    assert "text_encoder/weights/0.bin" in refused(load, small.folder)


def test_a_link_that_stays_in_the_bundle_is_followed(small):
    path = small.folder / "text_encoder" / "weights"
    path.rename(small.folder / "shared")
    path.symlink_to("../shared")
    assert load(small.folder).manifest == small.manifest


def test_a_bundle_may_itself_be_reached_through_a_link(small, tmp_path):
    (tmp_path / "link").symlink_to(small.folder)
    assert verify(load(tmp_path / "link")) == []


def test_a_component_without_files_is_refused(small):
    rewrite(small.folder, components__text_encoder__path="vae")
    assert "text_encoder is at 'vae', which lists no file" in refused(load, small.folder)


@pytest.mark.parametrize("kind", ["file", "link", "folder link", "pipe"])
def test_what_is_beside_a_component_and_not_listed_is_refused(small, tmp_path, kind):
    path = small.folder / "text_encoder" / "extra.bin"
    match kind:
        case "file":
            path.write_bytes(b"")
        case "link":
            path.symlink_to("/etc/passwd")
        case "folder link":
            path.symlink_to(tmp_path)
        case "pipe":
            os.mkfifo(path)
    line = refused(load, small.folder)
    assert "text_encoder/extra.bin: not in the manifest, so nothing vouches for it; remove" in line


def test_what_a_file_manager_leaves_behind_does_not_matter(small):
    (small.folder / ".DS_Store").write_text("x")
    (small.folder / "text_encoder" / "._model.onnx").write_text("x")
    assert verify(load(small.folder)) == []


# --- verify -------------------------------------------------------------------------------------


def test_verify_finds_every_changed_byte(small):
    for name, data in FILES.items():
        for place in range(len(data)):
            changed = bytes([*data[:place], data[place] ^ 1, *data[place + 1 :]])
            (small.folder / name).write_bytes(changed)
            (problem,) = verify(load(small.folder))
            assert problem.startswith(f"{name}: its sha256 is ")
        (small.folder / name).write_bytes(data)
    assert verify(load(small.folder)) == []


def test_verify_names_what_is_not_listed(small):
    (small.folder / "readme.txt").write_text("hello")
    (small.folder / "out").symlink_to("/etc")
    os.mkfifo(small.folder / "pipe\n")
    problems = verify(load(small.folder))
    assert [p.split(":")[0] for p in problems] == ["out", "pipe?", "readme.txt"]


def test_verify_goes_on_after_a_file_that_is_gone(small):
    (small.folder / "text_encoder" / "model.onnx").unlink()
    (small.folder / "tokenizer" / "tokenizer.json").write_text("{ \n")
    problems = verify(small)
    assert [p.split(":")[0] for p in problems] == [
        "text_encoder/model.onnx",
        "tokenizer/tokenizer.json",
    ]


def test_verify_tells_how_many_bytes_it_read(small):
    counts: list[int] = []
    verify(small, counts.append)
    assert sum(counts) == sum(map(len, FILES.values()))


# --- graphs that are wrong ----------------------------------------------------------------------


def adder(location="ok.bin", length=16, offset=0, output="last_hidden_state", shape=(1, 1, 4)):
    """A graph that adds external weights to its input."""
    weights = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[4])
    weights.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": location, "length": length, "offset": offset}.items():
        weights.external_data.add(key=key, value=str(value))
    float32 = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Add", ["x", "w"], [output])],
        "adder",
        [onnx.helper.make_tensor_value_info("x", float32, shape)],
        [onnx.helper.make_tensor_value_info(output, float32, shape)],
        [weights],
    )
    opset = onnx.helper.make_opsetid("", 18)
    return onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10).SerializeToString()


@pytest.fixture
def adding(small):
    """The small bundle with a text encoder that runs."""
    folder = small.folder / "text_encoder"
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "ok.bin").write_bytes(np.arange(4, dtype=np.float32).tobytes())
    tensor = {"dtype": "float32", "shape": [1, 1, 4]}
    part = "components__text_encoder"
    rewrite(small.folder, **{f"{part}__inputs": {"x": tensor}})
    rewrite(small.folder, **{f"{part}__outputs": {"last_hidden_state": tensor}})
    return small.folder


def run(folder, model):
    (folder / "text_encoder" / "model.onnx").write_bytes(model)
    relist(folder)
    return open_engine(load(folder), "text_encoder")({"x": np.ones((1, 1, 4))})


def test_a_graph_reads_the_weights_beside_it(adding):
    found = run(adding, adder())["last_hidden_state"]
    np.testing.assert_array_equal(found, [[[1, 2, 3, 4]]])


@pytest.mark.parametrize(
    "location",
    [
        "../../secret.bin", "../secret.bin", "a/../../../secret.bin", "SECRET", "/dev/zero", "",
        "missing.bin", "file:///etc/passwd", "*/_ORT_MEM_ADDR_/*", "..", ".",
    ],
)  # fmt: skip
def test_a_graph_cannot_read_outside_its_folder(adding, tmp_path, location):
    data = np.arange(4, dtype=np.float32).tobytes()
    (tmp_path / "secret.bin").write_bytes(data)
    (adding / "secret.bin").write_bytes(data)
    location = location.replace("SECRET", str(tmp_path / "secret.bin"))
    assert "onnxruntime cannot load" in refused(run, adding, adder(location))


@pytest.mark.parametrize("listed", [True, False])
def test_a_graph_cannot_read_through_a_link(adding, tmp_path, listed):
    data = np.arange(4, dtype=np.float32).tobytes()
    (tmp_path / "secret.bin").write_bytes(data)
    (adding / "text_encoder" / "model.onnx").write_bytes(adder("link.bin"))
    (adding / "text_encoder" / "link.bin").write_bytes(data)
    relist(adding)
    (adding / "text_encoder" / "link.bin").unlink()
    if not listed:
        relist(adding)
    (adding / "text_encoder" / "link.bin").symlink_to(tmp_path / "secret.bin")
    assert "link.bin" in refused(load, adding)
    # A bundle that was changed after it was loaded: the engine's own check is the second wall.
    opened = bundle.Bundle(adding, loads((adding / "manifest.json").read_text()))
    assert "onnxruntime cannot load" in refused(open_engine, opened, "text_encoder")


@pytest.mark.parametrize(
    "change",
    [{"length": 1 << 62}, {"length": -1}, {"offset": 1 << 62}, {"offset": -16}, {"offset": 8}],
)
def test_a_graph_cannot_read_past_its_weights(adding, change):
    assert "onnxruntime cannot load" in refused(run, adding, adder(**change))


@pytest.mark.parametrize(
    "model", [b"", b"\0" * 100, b"garbage" * 1000, adder()[:-20], adder()[:40]]
)
def test_a_graph_that_is_garbage_is_refused(adding, model):
    refused(run, adding, model)


def test_truncated_weights_are_refused_even_when_the_manifest_agrees(adding):
    path = adding / "text_encoder" / "ok.bin"
    path.write_bytes(path.read_bytes()[:-1])
    assert "onnxruntime cannot load" in refused(run, adding, adder())


def test_a_graph_that_is_not_as_the_manifest_says_is_refused(adding):
    assert "returns y; the manifest says last_hidden_state" in refused(
        run, adding, adder(output="y")
    )
    assert "cannot run" in refused(run, adding, adder(shape=(1, 2, 4)))
    rewrite(adding, components__text_encoder__outputs__last_hidden_state__shape=[1, 2, 4])
    line = refused(run, adding, adder())
    assert "last_hidden_state has the shape (1, 1, 4), the manifest says (1, 2, 4)" in line
    rewrite(adding, components__text_encoder__inputs={})
    assert "takes x; the manifest says" in refused(run, adding, adder())


def test_dimensions_of_one_name_are_of_one_size(adding):
    for side in ("inputs__x", "outputs__last_hidden_state"):
        rewrite(adding, **{f"components__text_encoder__{side}__shape": ["n", "n", 4]})
    assert run(adding, adder())["last_hidden_state"].shape == (1, 1, 4)
    rewrite(adding, components__text_encoder__inputs__x__shape=["n", 1, "n"])
    assert "x has the shape (1, 1, 4), the manifest says (1, 1, 1)" in refused(run, adding, adder())


@pytest.mark.parametrize("target", ["", "coreML", "onnx "])
def test_an_unknown_target_is_refused_when_it_is_opened(small, target):
    rewrite(small.folder, target=target)
    assert "no engine for target" in refused(open_engine, load(small.folder), "text_encoder")


@pytest.mark.parametrize("name", ["text_encoder", "unet", "vae_decoder"])
@pytest.mark.parametrize("cut", [0, 1000, -1])
def test_a_broken_network_of_a_real_bundle_is_one_line(emoji, name, cut):
    for file in ("model.onnx", "model.onnx.data"):
        path = emoji / name / file
        data = path.read_bytes()
        path.write_bytes(data[:cut])
        assert f"{name}/{file}" in refused(load, emoji)
        relist(emoji)
        assert "cannot load" in refused(Pipeline.load(emoji).generate, "an apple")
        path.write_bytes(data)
        relist(emoji)


@pytest.mark.parametrize("text", ["", "{}", "[]", "\xff", '{"model": null}', "{" * 1000])
def test_a_broken_tokenizer_is_one_line(emoji, text):
    (emoji / "tokenizer" / "tokenizer.json").write_text(text)
    relist(emoji)
    assert "is not a tokenizer" in refused(Pipeline.load(emoji).generate, "an apple")


@pytest.mark.filterwarnings("ignore:the text encoder reads 3 tokens")
@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizers__tokenizer__pad_token": "\n"},
        {"tokenizers__tokenizer__max_length": 3},
        {"tokenizers": {}},
        {"components__vae_decoder__config__latent_channels": 3, "preview": [[0, 0, 0]] * 4},
        {"components__unet__outputs__out_sample__shape": ["batch", "height", "width", 4]},
    ],
)
def test_a_manifest_that_belongs_to_other_networks_is_one_line(emoji, changes):
    rewrite(emoji, **changes)
    refused(Pipeline.load(emoji).generate, "an apple")

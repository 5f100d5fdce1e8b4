"""Folders of graphs as Optimum exports them become bundles; what is damaged or hostile does not.

The folder is made from the embedded ONNX bundle, whose files have the same layout.
"""

import dataclasses
import json
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest

pytest.importorskip("transformers")

from onnx import TensorProto, helper, numpy_helper

from ferrotype import bundle, parity
from ferrotype.bundle import BundleError, Precision
from ferrotype.convert import ConvertError, OptionError, convert, optimum
from ferrotype.convert.checkpoint import CheckpointError, is_exported, open_exported
from ferrotype.runtime.engines.onnx import OnnxEngine
from ferrotype.runtime.pipeline import EMBEDDED_ONNX, Pipeline

PARTS = ("text_encoder", "unet", "vae_decoder", "vae_encoder")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """As an older export: weights within the graphs, a list of one timestep, outputs to spare."""
    folder = tmp_path_factory.mktemp("exported") / "emoji"
    shutil.copytree(EMBEDDED_ONNX, folder)
    (folder / "manifest.json").unlink()
    shutil.rmtree(folder / "check")
    for name in PARTS:
        proto = onnx.load(folder / name / "model.onnx")
        (folder / name / "model.onnx.data").unlink()
        if name == "unet":
            make_list(proto.graph)
        if name == "text_encoder":
            proto.graph.output.append(
                helper.make_tensor_value_info("spare", TensorProto.FLOAT, ["batch", "n"])
            )
            state = proto.graph.output[1].name
            proto.graph.node.append(helper.make_node("Identity", [state], ["spare"]))
        onnx.save(proto, folder / name / "model.onnx")
    return folder


def make_list(graph):
    value = next(v for v in graph.input if v.name == "timestep")
    value.type.tensor_type.shape.dim.add().dim_param = "steps"
    graph.initializer.append(numpy_helper.from_array(np.array([], np.int64), "none"))
    graph.node.insert(0, helper.make_node("Reshape", ["timestep", "none"], ["one_timestep"]))
    for node in graph.node[1:]:
        node.input[:] = ["one_timestep" if n == "timestep" else n for n in node.input]


@pytest.fixture(scope="module")
def made(exported, tmp_path_factory):
    """Converted where there is no torch."""
    out = tmp_path_factory.mktemp("made") / "emoji.ferro"
    code = (
        "import sys\nsys.modules['torch'] = None\nfrom ferrotype.convert import convert\n"
        f"convert({str(exported)!r}, {str(out)!r})\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    return bundle.load(out)


@pytest.fixture
def folder(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "copy")


def test_it_draws_what_the_graphs_draw(made):
    options = {"seed": 5, "size": (128, 64), "steps": 2}
    expected = list(Pipeline.load(EMBEDDED_ONNX).steps("a pizza", **options))
    found = list(Pipeline(made).steps("a pizza", **options))
    assert parity.psnr(expected[-1].latents, found[-1].latents) > 100


def test_the_bundle_is_complete_and_says_that_nothing_was_compared(made):
    manifest = made.manifest
    source = bundle.load(EMBEDDED_ONNX).manifest
    assert bundle.verify(made) == []
    assert dataclasses.replace(manifest.recipe, name=source.recipe.name) == source.recipe
    assert manifest.precision == Precision("fp16", "fp32")
    assert np.allclose(manifest.preview, source.preview, atol=0.25)
    assert manifest.parity["notes"][0].startswith("nothing was compared")
    for name in PARTS:
        part = manifest.components[name]
        assert part.inputs == source.components[name].inputs
        assert part.outputs == source.components[name].outputs
        assert part.memory
        weights = made.bytes_of(f"{name}/model.onnx.data")
        assert weights > 5 * made.bytes_of(f"{name}/model.onnx")
        for output in manifest.parity["components"][name].values():
            assert "psnr" not in output
            assert output["max_abs"] > 0


def test_sizes_are_those_that_their_unet_halves_evenly(exported, made):
    """Theirs doubles what it halved: odd halves would not fit what is joined to them."""
    unet = made.component("unet").config
    assert made.manifest.sizes.multiple == 8 * 2 ** (len(unet["block_out_channels"]) - 1)
    with pytest.raises(ConvertError, match="72 is no multiple of 32"):
        convert(exported, made.folder.parent / "odd.ferro", sizes=[(72, 64)])


def edited(folder, name, edit):
    path = folder / name / "model.onnx"
    proto = onnx.load(path)
    edit(proto.graph)
    onnx.save(proto, path)


def outside(location="weights.bin", **more):
    """An edit that moves one weight to a file."""

    def edit(graph):
        tensor = max(graph.initializer, key=lambda t: len(t.raw_data))
        fields = {"location": location, "offset": "0", "length": str(len(tensor.raw_data)), **more}
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in fields.items():
            entry = tensor.external_data.add()
            entry.key, entry.value = key, value

    return edit


def constant_outside(graph):
    node = helper.make_node("Constant", [], ["c"], value=TensorProto(name="c", data_type=1))
    node.attribute[0].t.data_location = TensorProto.EXTERNAL
    graph.node.append(node)


def rename(old, new):
    def edit(graph):
        for value in (*graph.input, *graph.output):
            value.name = new if value.name == old else value.name

    return edit


def fix(**sizes):
    def edit(graph):
        for dim in (d for v in graph.input for d in v.type.tensor_type.shape.dim):
            if dim.dim_param in sizes:
                dim.dim_value = sizes[dim.dim_param]

    return edit


def in_bytes(graph):
    for tensor in graph.initializer:
        if tensor.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16):
            values = np.zeros(list(tensor.dims), np.int8)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


HOSTILE = {  # component, edit, what is said
    "another folder": ("unet", outside("../vae_decoder/model.onnx"), "outside its own folder"),
    "a whole path": ("unet", outside("/etc/passwd"), "outside its own folder"),
    "the folder above": ("unet", outside(".."), "outside its own folder"),
    "no file": ("unet", outside("missing.bin"), "which is not there"),
    "beyond the file": ("unet", outside(offset="4"), "the file"),
    "too long": ("unet", outside(length="999999999999"), "the file"),
    "no number": ("unet", outside(offset="-4"), "at offset '-4'"),
    "a constant": ("unet", constant_outside, "of a node lies outside"),
    "an input's name": ("unet", rename("sample", "latents"), "takes latents"),
    "an output's name": ("unet", rename("out_sample", "noise"), "returns noise"),
    "a batch of 2": ("unet", fix(batch=2), "--batch_size 1"),
    "one side": ("vae_decoder", fix(height=16), "fixes one side"),
    "other channels": ("unet", lambda g: fix_channels(g), "sample is of (any, 9"),
    "a loop": ("unet", lambda g: g.node.append(helper.make_node("Loop", [], [])), "may never end"),
    "quantized": ("unet", in_bytes, "weights of int8"),
}


def fix_channels(graph):
    graph.input[0].type.tensor_type.shape.dim[1].dim_value = 9


def refused(folder, kind=CheckpointError):
    with pytest.raises(kind) as caught:
        optimum.inspect(open_exported(folder))
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 600
    return line


@pytest.mark.parametrize("case", HOSTILE)
def test_what_is_hostile_or_does_not_fit_is_one_line(folder, case, monkeypatch):
    name, edit, said = HOSTILE[case]
    # the checker would refuse some of these in its own words
    monkeypatch.setattr(onnx.checker, "check_model", lambda *_: None)
    path = folder / name / "model.onnx"
    proto = onnx.load(path)
    largest = max(len(t.raw_data) for t in proto.graph.initializer)
    edit(proto.graph)
    path.write_bytes(proto.SerializeToString())
    (path.parent / "weights.bin").write_bytes(bytes(largest))
    assert said in refused(folder)


def test_weights_behind_a_link_are_refused(folder, tmp_path):
    (tmp_path / "secret").write_bytes(bytes(1 << 24))
    proto = onnx.load(folder / "unet" / "model.onnx")
    outside("link.bin")(proto.graph)
    (folder / "unet" / "model.onnx").write_bytes(proto.SerializeToString())
    (folder / "unet" / "link.bin").symlink_to(tmp_path / "secret")
    assert "through a link" in refused(folder)


@pytest.mark.parametrize("data", [b"", b"not a graph", None], ids=["empty", "text", "truncated"])
def test_damaged_graphs_are_named(folder, data):
    path = folder / "vae_decoder" / "model.onnx"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if data is None else data)
    assert "vae_decoder/model.onnx is no sound ONNX graph" in refused(folder)


def test_a_missing_part_is_named_and_nothing_is_left(folder, tmp_path):
    (folder / "vae_encoder" / "model.onnx").unlink()
    with pytest.raises(CheckpointError, match=r"vae_encoder/model.onnx is missing"):
        convert(folder, tmp_path / "out.ferro")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_a_fixed_size_is_the_only_one(folder):
    edited(folder, "unet", fix(height=8, width=16))
    exported = open_exported(folder)
    graphs = optimum.inspect(exported)
    assert graphs["unet"].inputs["sample"].shape == ("batch", 4, 8, 16)
    assert graphs["unet"].outputs["out_sample"].shape == ("batch", 4, 8, 16)
    assert optimum.fixed_sizes(exported, graphs, ()) == ((128, 64),)
    with pytest.raises(ConvertError, match="pictures of 128x64 alone"):
        optimum.fixed_sizes(exported, graphs, ((64, 64),))
    edited(folder, "vae_decoder", fix(height=8, width=8))
    with pytest.raises(CheckpointError, match="graphs of several sizes"):
        optimum.fixed_sizes(exported, optimum.inspect(exported), ())


def test_graphs_are_taken_as_they_are(exported, tmp_path):
    for options in ({"target": "native"}, {"weights": "w8"}, {"activations": "fp16"}):
        with pytest.raises(OptionError, match="for another target or precision"):
            convert(exported, tmp_path / "out.ferro", **options)
    given = (
        {"recipe": "lcm"},
        {"clip_skip": 1},
        {"loras": [("a", 1.0)]},
        {"embeddings": [("a", None)]},
    )
    for options in given:
        with pytest.raises(OptionError, match="are for checkpoints"):
            convert(exported, tmp_path / "out.ferro", **options)


def test_a_checkpoint_that_also_holds_graphs_is_a_checkpoint(folder):
    assert is_exported(folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").touch()
    assert not is_exported(folder)


@pytest.mark.parametrize(("value", "said"), [(np.nan, "returns"), (0, "one flat colour")])
def test_a_picture_that_is_none_is_refused(folder, tmp_path, value, said):
    def spoil(graph):
        for tensor in graph.initializer:
            if tensor.name.startswith(("decoder.conv_out", "conv_out")):
                kind = helper.tensor_dtype_to_np_dtype(tensor.data_type)
                values = np.full(list(tensor.dims), value, kind)
                tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    edited(folder, "vae_decoder", spoil)
    with pytest.raises(ConvertError, match=said):
        convert(folder, tmp_path / "out.ferro")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_an_original_is_only_for_graphs(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({}))
    with pytest.raises(OptionError, match="an original is for folders that Optimum exported"):
        convert(tmp_path, tmp_path / "out.ferro", original=tmp_path)


def test_whole_timesteps_are_not_cut(made, monkeypatch):
    engine = OnnxEngine(made, "unet")
    engine._dtypes["timestep"] = np.dtype("int64")
    feed = {name: np.zeros(1, np.float32) for name in made.component("unet").inputs}
    with pytest.raises(BundleError, match=r"timestep is 501.25, and it takes whole numbers"):
        engine({**feed, "timestep": np.array(501.25, np.float32)})

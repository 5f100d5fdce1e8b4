"""ONNX weights in int8 and int4: the quantizer's numbers, less on disk and in memory."""

import dataclasses
import gc
import json
import math
import shutil
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from ferrotype import bundle, cli
from ferrotype.benchmarks.checkpoints import TINY, write_checkpoint
from ferrotype.bundle import Bundle, Component, Memory, Precision
from ferrotype.parity import floors, psnr
from ferrotype.quantize.recipe import Recipe, RecipeError, Rule, parse
from ferrotype.quantize.weights import quantize
from ferrotype.runtime.engines import onnx_memory
from ferrotype.runtime.engines.onnx import OnnxEngine, _session
from ferrotype.runtime.engines.onnx_weights import externals
from ferrotype.runtime.pipeline import EMBEDDED_ONNX

torch = pytest.importorskip("torch")

from ferrotype.convert import convert, modules  # noqa: E402
from ferrotype.convert import onnx as onnx_export  # noqa: E402
from ferrotype.convert.checkpoint import ConvertError, open_checkpoint  # noqa: E402
from ferrotype.convert.targets import OnnxTarget, tensors  # noqa: E402

MIB = 1 << 20
SIZE = (8, 8)  # of the latents
FORMS = ("w8", "w4", "w8t", "w8b16", "w4c", "w4b16")
INT8, INT4 = onnx.TensorProto.INT8, onnx.TensorProto.INT4
linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc tells a process's memory")


@pytest.fixture(autouse=True)
def own_process(monkeypatch):
    """The command line sets warnings and hooks for its process, which is ours here."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    with warnings.catch_warnings():
        yield


def invoke(*args):
    return CliRunner().invoke(cli.main, [str(a) for a in args], prog_name="ferrotype")


def fails(*args):
    """The one line on stderr that a command ends with."""
    done = invoke(*args)
    assert done.exit_code == 1, done.output
    line = done.stderr.splitlines()[-1]
    assert line.startswith("Error: ")
    assert line.isprintable()
    return line


# --- the numbers --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("quantized") / "tiny", TINY)


def in_form(source, folder, component, recipe):
    """A component in float32, written anew with weights of the recipe; what `_store` returned."""
    model = ir.load(source / "model.onnx")
    said = onnx_export._store(model, component, recipe, "fp32", {})
    folder.mkdir(parents=True, exist_ok=True)
    onnx_export.write(model, folder)
    onnx.checker.check_model(str(folder / "model.onnx"))
    return said


class Stored:
    """A tiny component as it was written, in one form for all that fits it."""

    def __init__(self, component, module, source, folder, form):
        self.module, self.folder, self.form = module, folder, parse(form)
        recipe = Recipe(self.form, minimum=64)
        self.quantized, self.kept = in_form(source, folder, component, recipe)
        self.graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
        self.tensors = {i.name: i for i in self.graph.initializer}
        self.readers = {name: node for node in self.graph.node for name in node.input}

    def reader(self, name):
        """What takes the weight once it was dequantized and has its shape."""
        node = self.readers[self.readers[name].output[0]]
        return self.readers[node.output[0]] if node.op_type == "Reshape" else node

    def bytes(self, name):
        """What the file has for a weight."""
        tensor = self.tensors[name]
        if not tensor.external_data:
            return tensor.raw_data
        where = {entry.key: entry.value for entry in tensor.external_data}
        data = (self.folder / where["location"]).read_bytes()
        return data[int(where["offset"]) : int(where["offset"]) + int(where["length"])]

    def original(self, name):
        return self.module.state_dict()[name].numpy()

    def feeds(self):
        kinds = {onnx.TensorProto.FLOAT: np.float32, onnx.TensorProto.INT64: np.int64}
        feeds = {}
        for value in self.graph.input:
            kind = value.type.tensor_type
            shape = [d.dim_value or 1 for d in kind.shape.dim]
            feeds[value.name] = np.ones(shape, kinds[kind.elem_type])
        if "sample" in feeds:
            rng = np.random.default_rng(0)
            feeds["sample"] = rng.standard_normal(feeds["sample"].shape, np.float32)
        return feeds

    def outputs(self, names):
        """What nodes of the graph return, by onnxruntime, which changes nothing before."""
        model = onnx.load(self.folder / "model.onnx")
        del model.graph.output[:]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = ort.InferenceSession(model.SerializeToString(), options)
        return dict(zip(names, session.run(None, self.feeds()), strict=True))


@pytest.fixture(scope="module")
def stored(checkpoint, tmp_path_factory):
    """Components by form, made of one export in float32 when first asked for."""
    made, sources = {}, {}
    opened = open_checkpoint(checkpoint)

    def get(component, form):
        if component not in sources:
            module, folder = getattr(modules, component)(opened), tmp_path_factory.mktemp("fp32")
            size = None if component == "text_encoder" else SIZE
            onnx_export.export(component, module, {}, folder, size)
            sources[component] = module, folder
        if (component, form) not in made:
            folder = tmp_path_factory.mktemp(component)
            made[component, form] = Stored(component, *sources[component], folder, form)
        return made[component, form]

    gc.disable()
    yield get
    gc.enable()


def nibbles(values):
    """Two values to a byte, the first in the low half."""
    low, high = values.reshape(-1, 2).T
    return bytes((int(a) & 15) | (int(b) & 15) << 4 for a, b in zip(low, high, strict=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("component", ["text_encoder", "unet"])
def test_the_bytes_are_the_quantizers(stored, component, form):
    one = stored(component, form)
    ops = set()
    for name, said in one.quantized.items():
        assert said == form
        made = quantize(one.original(name), one.form)
        op, reader, values = one.readers[name].op_type, one.reader(name).op_type, made.values
        if op == "DequantizeLinear" and reader == "MatMul":
            values = values.T
        elif op == "DequantizeLinear" and made.block and (made.bits == 8 or values.ndim > 2):
            values = values.reshape(made.scale.size, -1)
        packed = one.form.bits == 4
        assert one.bytes(name) == (nibbles(values) if packed else values.tobytes())
        assert one.tensors[name].data_type == (INT4 if packed else INT8)
        assert list(one.tensors[name].dims) == list(values.shape)
        ops.add(reader)
    assert ("FusedMatMul" in ops, "MatMul" in ops) == (one.form.bits == 8, one.form.bits == 4)
    assert ("Conv" in ops) == (component == "unet")
    assert len(one.quantized) > 5


@pytest.mark.parametrize("form", FORMS)
def test_what_the_graph_makes_of_them_is_what_the_quantizer_meant(stored, form):
    one = stored("unet", form)
    found = {}
    for name in one.quantized:
        node = one.readers[name]
        following = one.readers[node.output[0]]
        output = (following if following.op_type == "Reshape" else node).output[0]
        found[output] = name, one.reader(name).op_type == "MatMul"
    for output, value in one.outputs(list(found)).items():
        name, turned = found[output]
        expected = quantize(one.original(name), one.form).dequantize()
        assert np.array_equal(value.T if turned else value, expected), name


@pytest.mark.parametrize("form", FORMS)
def test_of_a_vocabulary_only_the_rows_looked_up_are_dequantized(stored, form):
    one = stored("text_encoder", form)
    (name,) = (n for n in one.quantized if n.endswith("token_embedding.weight"))
    nodes = [n for n in one.graph.node if n.name.startswith(name.removesuffix("weight")[:-1] + "/")]
    expected = {
        "w4": ["GatherBlockQuantized"],
        "w4b16": ["GatherBlockQuantized"],
        "w4c": ["Gather"],  # no block that the operator takes
    }.get(form, ["Gather", "Gather", "DequantizeLinear"])
    assert [n.op_type for n in nodes] == expected
    found = one.outputs([nodes[-1].output[0]])[nodes[-1].output[0]]
    rows = quantize(one.original(name), one.form).dequantize()
    assert np.array_equal(found[0, 0], rows[1])


def test_int8_agrees_with_torch_and_int4_nearly(stored):
    for form, floor in (("w8", 40), ("w8b16", 40), ("w4b16", 20)):
        one = stored("unet", form)
        feeds = one.feeds()
        with torch.no_grad():
            expected = one.module(**{k: torch.from_numpy(v) for k, v in feeds.items()}).sample
        output = one.graph.output[0].name
        assert psnr(expected.numpy(), one.outputs([output])[output]) > floor


# --- a bundle -----------------------------------------------------------------------------------


def few_bits(form):
    """That form for what a random model bears; the tiny one has no larger weights."""
    return Recipe(parse(form), (Rule("vae_*", parse("w8")),), minimum=256)


@pytest.fixture(scope="module", params=["w8", "w4"])
def converted(request, checkpoint):
    out = checkpoint.parent / f"{request.param}.ferro"
    return request.param, convert(
        checkpoint, out, "onnx", few_bits(request.param), sizes=[(64, 64)]
    )


def test_a_bundle_draws_and_says_what_it_holds(converted, checkpoint, tmp_path):
    form, made = converted
    opened = bundle.load(made.folder)
    bundle.verify(opened)
    report = opened.manifest.parity
    assert report["floors"] == floors(f"{form[1]}-bit", "fp32")
    assert report["picture"]["psnr"] >= report["floors"]["picture"]
    assert report["weights"]["unet"][form] > 10
    assert report["weights"]["vae_decoder"]["w8"] > 10
    for component, reasons in report["not_compressed"].items():
        forms = report["weights"][component]
        assert sum(reasons.values()) == forms.get("fp16", 0) + forms.get("fp32", 0)
    assert any("convolution" in reason for reason in report["not_compressed"]["unet"])
    assert form in invoke("inspect", made.folder).stdout
    line = invoke("generate", "a boat", "-b", made.folder, "-n", 1, "-o", tmp_path / "out.png")
    assert line.exit_code == 0, line.output
    assert (tmp_path / "out.png").stat().st_size > 1000


def test_it_takes_less_of_the_disk(converted):
    """The values, their scales and what was left in fp16, and nothing of the originals."""
    form, made = converted
    for component in made.manifest.components:
        weights = externals(made.path(component) / "model.onnx")
        small = [w for w in weights if w.dtype.itemsize == 1]
        count = sum(math.prod(w.shape) for w in small)
        assert sum(w.bytes for w in small) == sum(
            math.prod(w.shape) // (2 if w.packed else 1) for w in small
        )
        assert count > 0.5 * sum(math.prod(w.shape) for w in weights)
        assert any(w.packed for w in small) == (form == "w4" and "vae" not in component)
        assert not [w for w in weights if w.dtype.itemsize == 4 and w.bytes > 8192]


def test_it_is_planned_and_there_is_one_way_to_run_it(converted):
    _, made = converted
    shown = invoke("plan", made.folder, "--size", "64x64")
    assert shown.exit_code == 0, shown.output
    assert "expanded" not in shown.output
    told = json.loads(invoke("plan", made.folder, "--size", "64x64", "--json").stdout)
    assert {stage["component"] for stage in told["stages"]} >= {"unet", "vae_decoder"}
    for part in made.manifest.components.values():
        assert not [name for name in part.memory if "frugal" in name], "there is only one way"


def test_every_weight_is_lent_and_none_is_folded(converted):
    _, made = converted
    engine = OnnxEngine(made, "unet", 1)
    weights = externals(made.path("unet") / "model.onnx")
    graph = onnx.load(made.path("unet/model.onnx"), load_external_data=False).graph
    assert {w.name for w in weights} == {i.name for i in graph.initializer if i.external_data}
    assert len(engine._borrowed) == len(weights)


@pytest.mark.parametrize("shape", [(64, 128), (3, 5)], ids=str)
def test_int4_that_ends_with_its_file_is_lent(tmp_path, shape):
    """The first is a page, so that whoever read a byte to a value would leave the mapping."""
    rng, count = np.random.default_rng(0), math.prod(shape)
    values, scale = rng.integers(-8, 8, shape), rng.random(shape[0], np.float32)
    data = nibbles(np.append(values, [0] * (count % 2)))
    (tmp_path / "model.onnx.data").write_bytes(data)
    weight = onnx.TensorProto(data_type=INT4, dims=shape, name="w", data_location=1)
    where = {"location": "model.onnx.data", "offset": "0", "length": str(len(data))}
    for key, value in where.items():
        weight.external_data.add(key=key, value=value)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("DequantizeLinear", ["w", "s"], ["y"], axis=0)],
        "g",
        [],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, shape)],
        [weight, onnx.numpy_helper.from_array(scale, "s")],
    )
    opset = onnx.helper.make_opsetid("", 21)
    path = tmp_path / "model.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10), path)
    assert [w.packed for w in externals(path)] == [True]
    borrowed = []
    session = _session(path, 1, borrowed, folding=False)
    assert len(borrowed) == 1
    assert np.array_equal(session.run(None, {})[0], values.astype(np.float32) * scale[:, None])
    where["length"] = str(count)  # a byte to a value
    for entry in weight.external_data:
        entry.value = where[entry.key]
    graph.initializer[0].CopyFrom(weight)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10), path)
    assert externals(path) == []


# --- memory -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large_unet():
    """With enough weights to be seen in the memory of a process."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    with modules.quiet():
        module = UNet2DConditionModel(
            block_out_channels=(128, 256),
            layers_per_block=1,
            cross_attention_dim=128,
            attention_head_dim=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )
    return module.eval().requires_grad_(False)


def as_bundle(folder, said, weights):
    """A bundle that has that U-Net, of which only the memory is asked."""
    part = Component("unet", {}, tensors(said["inputs"]), tensors(said["outputs"]))
    embedded = bundle.load(EMBEDDED_ONNX).manifest
    precision, parts = Precision(weights, "fp32"), {**embedded.components, "unet": part}
    sizes = dataclasses.replace(embedded.sizes, default=(64, 64), allowed=((64, 64),))
    changed = {"precision": precision, "components": parts, "sizes": sizes}
    return Bundle(folder, dataclasses.replace(embedded, **changed))


@linux
def test_memory_shrinks_as_the_file_does(large_unet, tmp_path):
    taken, stored, largest = {}, {}, 0
    said = onnx_export.export("unet", large_unet, {}, tmp_path / "fp32" / "unet")
    for weights in ("fp32", "w8", "w4"):
        made = as_bundle(tmp_path / weights, said, weights)
        if weights != "fp32":
            recipe = Recipe.uniform(weights)
            in_form(tmp_path / "fp32" / "unet", made.path("unet"), "unet", recipe)
        report = onnx_memory._in_a_process(made, "unet", frugal=False)
        taken[weights] = Memory(**report["memory"]["64x64"])
        stored[weights] = (made.path("unet") / "model.onnx.data").stat().st_size
        tables = externals(made.path("unet") / "model.onnx")
        largest = max(largest, *(4 * math.prod(w.shape) for w in tables))
    assert stored["fp32"] > 40 * MIB
    for weights in ("w8", "w4"):
        less = stored["fp32"] - stored[weights]
        assert taken["fp32"].weights - taken[weights].weights == pytest.approx(less, abs=MIB / 2)
        loaded = taken[weights].scratch - taken["fp32"].scratch
        assert loaded < 2 * MIB, "something is expanded while loading"
        running = taken[weights].activations - taken["fp32"].activations
        assert running < largest + 4 * MIB, "more than one weight is expanded at once"
        assert taken["fp32"].total - taken[weights].total > less - largest - 6 * MIB


# --- what it refuses ----------------------------------------------------------------------------


@pytest.fixture
def broken(checkpoint, tmp_path):
    """A copy of the checkpoint whose tensors a test may change."""
    copy = shutil.copytree(checkpoint, tmp_path / "tiny")

    def change(component, name, value):
        (path,) = (copy / component).glob("*.safetensors")
        arrays = load_file(path)
        arrays[name] = arrays[name].astype(np.float32)
        arrays[name].reshape(-1)[0] = value
        save_file(arrays, path)
        return copy

    return change


def test_a_weight_that_is_no_number_is_one_line(broken, tmp_path):
    folder = broken("unet", "mid_block.resnets.0.conv1.weight", np.nan)
    line = fails("convert", folder, "--weights", "w8", "-o", tmp_path / "out.ferro")
    assert "mid_block.resnets.0.conv1" in line
    assert "NaN" in line
    assert not (tmp_path / "out.ferro").exists()


def test_a_weight_without_a_scale_is_one_line(checkpoint, tmp_path):
    unet = modules.unet(open_checkpoint(checkpoint))
    unet.mid_block.resnets[0].conv1.weight[0, 0, 0, 0] = 1e8
    with pytest.raises(
        ConvertError, match=r"unet/mid_block.*conv1.weight: a scale of .* is needed"
    ):
        onnx_export.export("unet", unet, {}, tmp_path, SIZE, Recipe.uniform("w8"))
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ("w5", "weights for onnx: fp32, fp16, w8, w4 (t, c, bN, not a), or a recipe's file; no"),
        ("p6", "weights p6: an ONNX bundle has fp32, fp16, w8, w4 (t, c, bN, not a), or"),
        ("w8a", "weights w8a: an ONNX bundle has fp32, fp16, w8, w4"),
        ({"default": "w8", "rules": [{"match": "unet/*", "weights": "p4"}]}, "weights p4: an"),
        ({"default": "fp16", "rules": [{"match": "unet/*", "weights": "fp32"}]}, "nothing"),
    ],
    ids=str,
)  # fmt: skip
def test_what_it_cannot_store_is_one_line(checkpoint, tmp_path, weights, said):
    if isinstance(weights, dict):
        path = tmp_path / "recipe.json"
        path.write_text(json.dumps({"recipe": 1} | weights))
        weights = path
    line = fails("convert", checkpoint, "--weights", weights, "-o", tmp_path / "out.ferro")
    assert said in line
    assert not (tmp_path / "out.ferro").exists()


def test_a_pattern_that_matches_nothing_is_one_line(stored):
    one = stored("unet", "w8")
    recipe = Recipe(parse("w8"), (Rule("unet/typo*", parse("w4")),))
    target = OnnxTarget(SimpleNamespace(recipe=recipe))
    target.made["unet"] = {"quantized": one.quantized, "kept": one.kept, "fp16_underflow": {}}
    with pytest.raises(RecipeError, match=r"the recipe's pattern 'unet/typo\*' is the first match"):
        target.report()


def test_fp32_among_fp16_activations_is_one_line(checkpoint, tmp_path):
    path = tmp_path / "recipe.json"
    rules = [{"match": "unet/*", "weights": "fp32"}]
    path.write_text(json.dumps({"recipe": 1, "default": "w8", "rules": rules}))
    args = ("--weights", path, "--activations", "fp16", "-o", tmp_path / "out.ferro")
    assert "need the recipe's weights fp32 to be fp16" in fails("convert", checkpoint, *args)

"""ONNX components keep their weights mapped, and take what was predicted."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from ferrotype import bundle
from ferrotype.bundle import Bundle, BundleError, Memory, Precision
from ferrotype.runtime.engines import onnx_memory
from ferrotype.runtime.engines.onnx import OnnxEngine
from ferrotype.runtime.engines.onnx_memory import MARGIN, SLACK, memory
from ferrotype.runtime.engines.onnx_weights import externals
from ferrotype.runtime.pipeline import EMBEDDED_ONNX, Pipeline

MIB = 1 << 20
linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc tells a process's memory")


@pytest.fixture(scope="module")
def embedded():
    return bundle.load(EMBEDDED_ONNX)


def in_a_process(code):
    """What a fresh process prints, as JSON."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# --- the weights --------------------------------------------------------------------------------


def graph(folder, shape=(256, 4096), **changes):
    """A product with a weight beside the graph; `changes` are to what the graph says of it."""
    said = {"location": "model.onnx.data", "offset": 0, "length": 4 * int(np.prod(shape))}
    weight = TensorProto(data_type=TensorProto.FLOAT, dims=shape, name="w")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in (said | changes).items():
        weight.external_data.add(key=key, value=str(value))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, shape[0]))
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, shape[1]))
    made = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y])
    made.initializer.append(weight)
    opset = helper.make_opsetid("", 18)
    model = helper.make_model(made, opset_imports=[opset], ir_version=10)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return model, path


def test_the_table_of_weights_is_what_the_onnx_package_reads(embedded):
    for component in embedded.manifest.components:
        path = embedded.path(component) / "model.onnx"
        tensors = onnx.load(path, load_external_data=False).graph.initializer
        expected = {}
        for tensor in tensors:
            where = {entry.key: entry.value for entry in tensor.external_data}
            if where:
                dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
                place = (where["location"], int(where["offset"]), int(where["length"]))
                expected[tensor.name] = (*place, dtype, tuple(tensor.dims))
        assert {weight.name: tuple(weight[1:-1]) for weight in externals(path)} == expected
        assert len(expected) > 20


@linux
@pytest.mark.parametrize("lent", [True, False])
def test_a_large_model_runs_with_little_private_memory(tmp_path, lent):
    _, path = graph(tmp_path, shape=(4096, 16384))  # 256 MiB
    with (tmp_path / "model.onnx.data").open("wb") as file:
        file.truncate(4 * 4096 * 16384)
    code = f"""
import json, resource, numpy
from pathlib import Path
from ferrotype.runtime.engines.onnx import _session
from ferrotype.runtime.memory import read
import onnxruntime
data = [l for l in open("/proc/self/status") if l.startswith("VmData")][0]
limit = (int(data.split()[1]) << 10) + (160 << 20)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
borrowed = [] if {lent} else None
before = read()
try:
    session = _session(Path({str(path)!r}), 1, borrowed)
    session.run(None, {{"x": numpy.ones((1, 4096), "f4")}})
    after = read()
    print(json.dumps([after.anonymous - before.anonymous, after.file - before.file]))
except Exception as error:
    print(json.dumps(str(error)))
"""
    found = in_a_process(code)
    if lent:
        anonymous, file = found
        assert anonymous < 16 * MIB
        assert file > 250 * MIB
    else:  # onnxruntime's own mapping is private and writable
        assert "cannot load" in found


def test_weights_are_lent_and_the_result_is_the_same(embedded):
    engine = OnnxEngine(embedded, "unet", 1)
    assert len(engine._borrowed) == len(externals(embedded.path("unet") / "model.onnx"))
    assert not any(array.flags.writeable for array, _ in engine._borrowed)


@pytest.mark.parametrize(
    "change",
    [
        {"location": "../model.onnx.data"}, {"location": "/dev/zero"}, {"location": ""},
        {"location": ".."}, {"location": "a/model.onnx.data"}, {"location": "a\\b"},
        {"offset": -4}, {"offset": 2}, {"offset": "0x0"}, {"offset": "9" * 30}, {"offset": ""},
        {"length": 4}, {"length": -1}, {"length": 1 << 62}, {"length": ""}, {"length": "٤"},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_not_plainly_a_weight_is_not_lent(tmp_path, change):
    assert [weight.name for weight in externals(graph(tmp_path)[1])] == ["w"]
    assert externals(graph(tmp_path, **change)[1]) == []


def refused(folder):
    """A BundleError of one line, from a session that lends what it can."""
    from ferrotype.runtime.engines.onnx import _session

    with pytest.raises(BundleError, match="onnxruntime cannot load") as caught:
        _session(folder / "model.onnx", 1, [])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0, 1000, 4 * 256 * 4096 - 1])
def test_weights_that_end_early_are_refused(tmp_path, size):
    graph(tmp_path)
    (tmp_path / "model.onnx.data").write_bytes(bytes(size))
    refused(tmp_path)


def test_weights_behind_a_link_are_refused(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "secret").write_bytes(bytes(4 * 256 * 4096))
    (tmp_path / "in" / "model.onnx.data").symlink_to(tmp_path / "secret")
    graph(tmp_path / "in")
    refused(tmp_path / "in")


def test_a_name_that_two_weights_have_is_not_lent(tmp_path):
    model, path = graph(tmp_path)
    model.graph.initializer.append(helper.make_tensor("w", TensorProto.FLOAT, (1,), [0.0]))
    path.write_bytes(model.SerializeToString())
    assert externals(path) == []


def test_nothing_is_lent_to_a_graph_with_graphs_inside(tmp_path):
    """A weight in there could have the name of another, and another shape."""
    model, path = graph(tmp_path)
    assert externals(path)
    y = helper.make_tensor_value_info("z", TensorProto.FLOAT, (1,))
    value = helper.make_tensor("w", TensorProto.FLOAT, (1,), [0.0])
    inner = helper.make_graph([helper.make_node("Identity", ["w"], ["z"])], "i", [], [y], [value])
    node = helper.make_node("If", ["x"], ["z"], then_branch=inner, else_branch=inner)
    model.graph.node.append(node)
    path.write_bytes(model.SerializeToString())
    assert externals(path) == []


def test_a_graph_cut_anywhere_or_with_any_byte_changed_is_read_or_left(tmp_path):
    model, path = graph(tmp_path)
    whole = model.SerializeToString()
    rng = np.random.default_rng(0)
    for at in range(len(whole)):
        path.write_bytes(whole[:at])
        externals(path)
        changed = bytearray(whole)
        changed[at] = rng.integers(256)
        path.write_bytes(changed)
        for weight in externals(path):
            assert weight.bytes == np.prod(weight.shape) * weight.dtype.itemsize
            assert weight.offset >= 0
            assert "/" not in weight.file


# --- frugal -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (136, 200)], ids=str)
def test_frugal_gives_the_same_bytes(embedded, size):
    for component in embedded.manifest.components:
        feed = onnx_memory._inputs(embedded, component, size)
        normal, frugal = (OnnxEngine(embedded, component, 2, f)(feed) for f in (False, True))
        assert normal.keys() == frugal.keys()
        for name, value in normal.items():
            assert value.tobytes() == frugal[name].tobytes(), (component, name)


def test_a_frugal_picture_is_the_same_picture(embedded):
    prompt = "a red apple on a sky blue background"
    pictures = [
        Pipeline(embedded, opener=lambda b, name, f=frugal: OnnxEngine(b, name, 1, f))
        .generate(prompt, steps=2)
        .tobytes()
        for frugal in (False, True)
    ]
    assert pictures[0] == pictures[1]


# --- prediction ---------------------------------------------------------------------------------


def with_memory(embedded, memory, precision=("fp16", "fp32")):
    parts = embedded.manifest.components
    unet = dataclasses.replace(parts["unet"], memory=memory)
    changed = {"components": {**parts, "unet": unet}, "precision": Precision(*precision)}
    return Bundle(embedded.folder, dataclasses.replace(embedded.manifest, **changed))


def test_memory_is_a_line_over_the_pixels(embedded):
    known = {
        "200x100": Memory(1000, 200 * MIB, 50 * MIB),
        "100x100": Memory(1000, 100 * MIB, 50 * MIB),
        "100x100 frugal": Memory(2000, 300 * MIB, 0),
    }
    made = with_memory(embedded, known)

    def at(*size, frugal=False):
        found = memory(made, "unet", size, frugal)
        assert found.weights == (2000 if frugal else 1000)
        assert found.scratch == (0 if frugal else round(50 * MIB * (1 + MARGIN)))
        return round((found.activations - SLACK) / MIB / (1 + MARGIN), 3)

    assert [at(100, 100), at(100, 200), at(150, 100), at(400, 100)] == [100, 200, 150, 400]
    assert at(50, 50) == 100, "what is smaller than all measured takes as much as the least"
    assert at(1000, 1000, frugal=True) == 300, "one size alone is no line"


def test_what_does_not_grow_stays(embedded):
    known = {"10x10": Memory(0, 500, 9), "10x20": Memory(0, 400, 9)}
    far = memory(with_memory(embedded, known), "unet", (10, 1000))
    assert far.activations - SLACK == round(500 * (1 + MARGIN))


def test_frugal_is_as_normal_where_nothing_is_expanded(embedded):
    made = with_memory(embedded, {"10x10": Memory(5, 6, 7)}, ("fp32", "fp32"))
    assert memory(made, "unet", (9, 9), True) == memory(made, "unet", (9, 9))


@pytest.mark.parametrize("known", [{}, {"sm86": Memory(1, 1, 1)}, {"1x": Memory(1, 1, 1)}])
def test_a_bundle_that_says_nothing_is_to_be_converted_again(embedded, known):
    for frugal in (False, True):
        with pytest.raises(BundleError, match=r"what unet takes.*: convert the checkpoint again"):
            memory(with_memory(embedded, known), "unet", (128, 128), frugal)


@linux
@pytest.mark.parametrize("frugal", [False, True], ids=["normal", "frugal"])
@pytest.mark.parametrize("component", ["unet", "vae_decoder", "vae_encoder"])
def test_a_size_that_was_not_measured_takes_what_is_predicted(embedded, component, frugal):
    size = (192, 200)
    predicted = memory(embedded, component, size, frugal)
    code = f"""
import json
from ferrotype import bundle
from ferrotype.runtime.engines import onnx_memory as m
from ferrotype.runtime.engines.onnx import OnnxEngine
from ferrotype.runtime.memory import read, reset_peak
opened = bundle.load({str(EMBEDDED_ONNX)!r})
feed = m._inputs(opened, {component!r}, {size!r})
before = read().resident
reset_peak()
engine = OnnxEngine(opened, {component!r}, None, {frugal})
for _ in range(4):
    engine(feed)
print(json.dumps([read().peak - before, m._mapped(opened, {component!r})]))
"""
    peak, mapped = in_a_process(code)
    assert abs(mapped - predicted.weights) < MIB / 2
    assert peak <= predicted.total
    # SLACK is in it; pages of the library that are mapped already may be as much again, and half
    assert predicted.total - peak < 0.1 * peak + 3 * SLACK


@linux
def test_measuring_again_finds_the_same(embedded):
    """The figures of the bundle were measured on another day."""
    report = onnx_memory._in_a_process(embedded, "vae_decoder", frugal=True)
    stored = embedded.manifest.components["vae_decoder"].memory
    for name, fields in report["memory"].items():
        found, before = Memory(**fields), stored[name + " frugal"]
        assert abs(found.total - before.total) < 0.05 * before.total + SLACK


def test_the_embedded_bundle_says_what_every_component_takes(embedded):
    for component, part in embedded.manifest.components.items():
        sizes = ["128x128"] if component == "text_encoder" else ["64x64", "128x128", "256x256"]
        assert list(part.memory) == [n + f for f in ("", " frugal") for n in sizes]
    unet = embedded.manifest.components["unet"].memory
    assert unet["128x128 frugal"].total < unet["128x128"].total - 8 * MIB


def test_sizes_that_are_measured(embedded):
    sizes = embedded.manifest.sizes
    assert onnx_memory._sizes(sizes, "unet") == [(64, 64), (128, 128), (256, 256)]
    assert onnx_memory._sizes(sizes, "text_encoder") == [(128, 128)]
    narrow = dataclasses.replace(sizes, default=(72, 2048))
    assert onnx_memory._sizes(narrow, "unet") == [(64, 1024), (72, 2048), (144, 2048)]
    few = dataclasses.replace(sizes, allowed=((128, 128), (64, 64)))
    assert onnx_memory._sizes(few, "unet") == [(128, 128), (64, 64)]


def test_a_component_that_does_not_run_is_named(embedded, tmp_path):
    with pytest.raises(BundleError, match=r"unet could not be run to measure its memory: .*cannot"):
        onnx_memory.measured(
            Bundle(
                tmp_path,
                dataclasses.replace(
                    embedded.manifest, components={"unet": embedded.manifest.components["unet"]}
                ),
            )
        )


def test_where_the_system_says_nothing_nothing_is_measured(embedded, monkeypatch):
    monkeypatch.setattr(onnx_memory, "reset_peak", lambda: False)
    assert onnx_memory._report(embedded, "unet", False) is None
    monkeypatch.setattr(onnx_memory, "_in_a_process", lambda *_, **__: None)
    assert onnx_memory.measured(embedded) == {}


def test_frugal_figures_are_left_out_if_the_outputs_differ(embedded, monkeypatch):
    entry = {"weights": 1, "activations": 2, "scratch": 3}

    def report(opened, component, frugal):
        return {"memory": {"8x8": entry}, "outputs": "b" if frugal and component == "unet" else "a"}

    monkeypatch.setattr(onnx_memory, "_in_a_process", report)
    found = onnx_memory.measured(embedded)
    assert list(found["unet"]) == ["8x8"]
    assert list(found["vae_decoder"]) == ["8x8", "8x8 frugal"]

"""Graphs for TensorRT are built by its compiler, computed by onnxruntime, run on a stand-in GPU."""

import ctypes
import dataclasses
import gc
import itertools
import types
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import ferrotype
from ferrotype.bundle import Bundle, BundleError, Component, File, Sizes, Tensor
from ferrotype.parity import psnr
from ferrotype.runtime.engines import open_engine, tensorrt_builder
from ferrotype.runtime.engines import tensorrt as engines

torch = pytest.importorskip("torch")

from ferrotype.benchmarks.checkpoints import TINY, write_checkpoint  # noqa: E402
from ferrotype.convert import modules, tensorrt  # noqa: E402
from ferrotype.convert.checkpoint import ConvertError, open_checkpoint  # noqa: E402
from ferrotype.quantize.recipe import Recipe  # noqa: E402

COMPONENTS = ("text_encoder", "unet", "vae_decoder", "vae_encoder")
SIZE = (8, 8)  # of the latents
FLOOR = {"fp32": 90, "fp16": 40, "w8": 30, "w4": 15}  # dB
builder = pytest.mark.skipif(
    tensorrt_builder.vendor_module("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed"
)


class Exported:
    """A module, the graph that it was exported to, and what export said about it."""

    def __init__(self, component, checkpoint, folder, size=SIZE, weights="fp16", **options):
        self.component, self.model = component, folder / "model.onnx"
        make = modules.vae if component.startswith("vae") else getattr(modules, component)
        self.module = make(checkpoint)
        config = checkpoint.configs["vae" if component.startswith("vae") else component]
        self.said = tensorrt.export(
            component, self.module, config, folder, size, weights, **options
        )
        self.graph = onnx.load(self.model, load_external_data=False).graph

    def feeds(self, seed=0, **sizes):
        rng = np.random.default_rng(seed)
        feeds = {}
        for name, value in self.said["inputs"].items():
            shape = [sizes.get(n, n) for n in value["shape"]]
            feeds[name] = np.asarray(rng.standard_normal(shape), value["dtype"])
        if "timestep" in feeds:
            feeds["timestep"] = np.array(501.25, np.float32)
        if "input_ids" in feeds:
            last = self.module.config.vocab_size - 1
            feeds["input_ids"] = rng.integers(0, last, feeds["input_ids"].shape)
            feeds["input_ids"][:, 9:] = self.module.config.eos_token_id
        return feeds

    def run(self, feeds):
        session = ort.InferenceSession(self.model)
        return session.run(None, feeds)

    @torch.no_grad()
    def original(self, feeds):
        x = {k: torch.from_numpy(np.asarray(v)) for k, v in feeds.items()}
        x = {k: v.float() if v.is_floating_point() else v for k, v in x.items()}
        match self.component:
            case "text_encoder":
                out = self.module(**x)
                return [out.last_hidden_state.numpy(), out.pooler_output.numpy()]
            case "unet":
                return [self.module(**x).sample.numpy()]
            case "vae_decoder":
                return [self.module.decode(x["latent_sample"]).sample.numpy()]
        return [self.module.encode(x["sample"]).latent_dist.parameters.numpy()]

    def psnr(self, **sizes):
        feeds = self.feeds(**sizes)
        pairs = zip(self.original(feeds), self.run(feeds), strict=True)
        return min(psnr(a, b) for a, b in pairs)

    @property
    def stored(self):
        """Bytes of the weights beside the graph."""
        return self.model.with_name("model.onnx.data").stat().st_size


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return open_checkpoint(write_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny", TINY))


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    """The tiny components, by precision of the weights; exported when first asked for."""
    made = {}

    def get(component, weights="fp16", **options):
        key = component, weights, *options.items()
        if key not in made:
            folder = tmp_path_factory.mktemp(component)
            if component in ("text_encoder", "unet"):
                options = {"tokens": 77, **options}
            made[key] = Exported(component, checkpoint, folder, weights=weights, **options)
        return made[key]

    gc.disable()
    yield get
    gc.enable()


# --- the graph ----------------------------------------------------------------------------------


@pytest.mark.parametrize("component", COMPONENTS)
def test_the_graph_has_only_standard_operators_of_fixed_sizes_and_agrees_with_torch(
    exported, component
):
    one = exported(component)
    assert {node.domain for node in one.graph.node} == {""}
    for value in [*one.graph.input, *one.graph.output]:
        assert all(d.dim_value > 0 for d in value.type.tensor_type.shape.dim), value.name
    assert one.psnr() >= FLOOR["fp16"]
    assert one.said["quantized"] == {}


def test_float32_stays_float32(exported):
    one = exported("vae_decoder", "fp32", activations="fp32")
    assert {i.data_type for i in one.graph.initializer} <= {
        onnx.TensorProto.FLOAT,
        onnx.TensorProto.INT64,
    }
    assert one.psnr() >= FLOOR["fp32"]


@pytest.mark.parametrize("weights", ["w8", "w4"])
def test_integer_weights_carry_the_names_of_the_checkpoint(exported, weights):
    one = exported("unet", weights)
    kind = {"w8": onnx.TensorProto.INT8, "w4": onnx.TensorProto.INT4}[weights]
    state = one.module.state_dict()
    stored = {i.name: i for i in one.graph.initializer if i.data_type == kind}
    assert stored.keys() == one.said["quantized"].keys() <= state.keys()
    assert "conv_in.weight" in one.said["kept"]  # sensitive
    read = {node.input[0]: node for node in one.graph.node if node.op_type == "DequantizeLinear"}
    assert read.keys() == stored.keys()
    assert one.stored < exported("unet").stored * {"w8": 0.75, "w4": 0.65}[weights]


def test_blocks_of_filters_are_rows_since_tensorrt_takes_them_only_there(exported):
    one = exported("unet", "w4")
    dims = {i.name: list(i.dims) for i in one.graph.initializer}
    name = "up_blocks.0.resnets.0.conv1.weight"
    shape = list(one.module.state_dict()[name].shape)
    assert dims[name] == [shape[0], shape[1] * 9]
    assert dims[f"{name}.scale"] == [shape[0], shape[1] // 32]


@pytest.mark.parametrize(
    ("component", "weights"),
    [("text_encoder", "w8t"), *itertools.product(["text_encoder", "unet"], ["w8", "w4"])],
)
def test_integer_weights_are_close_to_the_original(exported, component, weights):
    assert exported(component, weights).psnr() >= FLOOR[weights[:2]]


def test_the_trained_unet_in_int8_is_close_to_the_original(trained, tmp_path):
    one = Exported("unet", open_checkpoint(trained), tmp_path, weights="w8", tokens=32)
    assert one.psnr() >= FLOOR["w8"]
    assert one.stored < 0.6 * 17.5e6
    if tensorrt_builder.vendor_module("tensorrt_rtx"):
        built = tensorrt.build(one.model, "8.6", component="unet")
        assert one.stored * 0.9 < built.memory.weights < one.stored * 1.1


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ("p6", "weights p6: TensorRT has no operator for palettes; choose w8 or w4, or fp16"),
        ("w8a", "weights w8a: TensorRT says: Non-zero zero point is not supported; choose w8"),
        ("w5", 'no form "w5"; there is: '),
        (Recipe.uniform("p4"), "weights p4: TensorRT has no"),
    ],
    ids=str,
)
def test_forms_that_tensorrt_has_not_are_refused_at_once(tmp_path, weights, reason):
    with pytest.raises(ConvertError) as caught:
        tensorrt.export("unet", None, {}, tmp_path, weights=weights)
    assert str(caught.value).startswith(reason)
    assert "\n" not in str(caught.value)


# --- the builder --------------------------------------------------------------------------------


@builder
@pytest.mark.parametrize("capability", ["8.6", "8.9", "12.0"])
@pytest.mark.parametrize("component", COMPONENTS)
def test_every_component_builds_for_every_gpu(exported, capfd, component, capability):
    one = exported(component)
    capfd.readouterr()
    built = tensorrt.build(one.model, capability)
    assert capfd.readouterr() == ("", "")
    assert built.file == f"sm{capability.replace('.', '')}.engine"
    assert built.bytes == (one.model.parent / built.file).stat().st_size > built.memory.weights
    floats = [p for p in one.module.parameters() if p.is_floating_point()]
    if component.startswith("vae"):
        part = component.removeprefix("vae_")
        floats = list(getattr(one.module, part).parameters())
    expected = 2 * sum(p.numel() for p in floats)
    assert 0.9 * expected < built.memory.weights < 1.2 * expected + 4096
    assert 0 < built.memory.activations + built.memory.scratch < 64 << 20
    assert built.builder.startswith("tensorrt_rtx 1.")
    assert built.seconds > 0
    assert not list(one.model.parent.glob("*.tmp"))


@builder
@pytest.mark.parametrize("weights", ["w8", "w4"])
@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae_decoder"])
def test_integer_weights_build_and_stay_integers(exported, component, weights):
    plain = tensorrt.build(exported(component).model, "8.9")
    built = tensorrt.build(exported(component, weights).model, "8.9")
    if exported(component, weights).said["quantized"]:
        assert built.memory.weights < 0.85 * plain.memory.weights
    else:
        assert built.memory.weights == plain.memory.weights


@builder
def test_a_range_of_sizes_builds_and_needs_the_memory_of_the_largest(
    exported, checkpoint, tmp_path
):
    one = Exported("vae_decoder", checkpoint, tmp_path, size=None)
    with pytest.raises(ConvertError, match="dimension 'height' is open and has no range"):
        tensorrt.build(one.model, "8.6")
    totals = [
        tensorrt.build(one.model, "8.6", dict.fromkeys(("width", "height"), (8, 8, most)))
        for most in (16, 64)
    ]
    assert totals[0].memory.total < totals[1].memory.total
    assert one.psnr(width=9, height=16) >= FLOOR["fp16"]


@builder
def test_weights_can_be_streamed(exported):
    built = tensorrt.build(exported("vae_encoder").model, "8.6", weight_streaming=True)
    assert built.bytes > 0


@pytest.mark.parametrize("capability", ["8.7", "9.0", "sm86", ""])
def test_a_capability_that_is_not_built_for_is_refused(tmp_path, capability):
    with pytest.raises(ConvertError) as caught:
        tensorrt.build(tmp_path / "model.onnx", capability)
    assert str(caught.value) == (
        f"compute capability {capability!r} is not one that tensorrt-rtx builds for (7.5, 8.0, "
        "8.6, 8.9, 12.0, 12.1); others build their own engine with tensorrt, on the device"
    )


def small_graph(path, *nodes):
    value = onnx.helper.make_tensor_value_info
    half = onnx.TensorProto.FLOAT16
    shape = [1, 2, 64, 8]
    names = dict.fromkeys(name for node in nodes for name in node.input)
    inputs = [value(name, half, shape) for name in names]
    graph = onnx.helper.make_graph(nodes, "g", inputs, [value("y", half, shape)])
    opsets = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.save(model, path)
    return path


@builder
@pytest.mark.parametrize(
    ("node", "reason"),
    [
        (
            onnx.helper.make_node("FastGelu", ["x"], ["y"], "gelu", domain="com.microsoft"),
            "cannot read the graph: FastGelu gelu: ",
        ),
        (  # the parser takes it; the compiler has no kernel for heads of 8
            onnx.helper.make_node("Attention", ["q", "k", "v"], ["y"], "a"),
            "Attention operation was not supported by a dedicated kernel",
        ),
    ],
    ids=["parser", "compiler"],
)
def test_what_the_builder_refuses_is_one_line_with_its_reason(tmp_path, capfd, node, reason):
    model = small_graph(tmp_path / "model.onnx", node)
    with pytest.raises(ConvertError) as caught:
        tensorrt.build(model, "8.6", component="unet")
    message = str(caught.value)
    assert message.startswith("unet, for 8.6: tensorrt_rtx 1.")
    assert reason in message
    assert message.endswith("; convert with other weights, or with --target onnx")
    assert "\n" not in message
    assert capfd.readouterr() == ("", "")
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


@builder
def test_a_graph_that_crashes_the_builder_does_not_crash_us(tmp_path, capfd):
    node = onnx.helper.make_node("Attention", ["x", "x", "x"], ["y"], "a")
    with pytest.raises(ConvertError, match=r"crashed with signal \d+ while|cannot build the graph"):
        tensorrt.build(small_graph(tmp_path / "model.onnx", node), "8.6")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("crash", ["os.abort()", "print('half an answ')", "os._exit(3)"])
def test_a_builder_that_dies_is_one_line(tmp_path, monkeypatch, crash):
    (tmp_path / "broken.py").write_text(f"import os\n{crash}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(tensorrt_builder, "__name__", "broken")
    with pytest.raises(ConvertError, match=r"unet, for 8.6: tensorrt_rtx (crashed|ended) "):
        tensorrt.build(tmp_path / "model.onnx", "8.6", component="unet")


# --- the engine, on a GPU that records what it is told ------------------------------------------


class Gpu:
    """Stand-ins for the vendor's modules; memory is the host's, kernels are onnxruntime's."""

    ILogger = type("ILogger", (), {"ERROR": 1, "INTERNAL_ERROR": 0, "INFO": 3})
    TensorIOMode = types.SimpleNamespace(INPUT="in", OUTPUT="out")
    __version__ = "1.7"

    def __init__(self, model, limits=None, capability="8.6"):
        self.model, self.limits = model, limits or {}
        self.capability = [int(n) for n in capability.split(".")]
        self.calls, self.memory, self.recording = [], {}, None
        self.failing = set()
        self.addresses = {}

    # cuda-python: every function returns a status first
    cudaDeviceAttr = types.SimpleNamespace(
        cudaDevAttrComputeCapabilityMajor=0, cudaDevAttrComputeCapabilityMinor=1
    )
    cudaMemcpyKind = types.SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaStreamCaptureMode = types.SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __getattr__(self, name):
        if not name.startswith("cuda"):
            raise AttributeError(name)

        def call(*arguments):
            self.calls.append(name)
            if name in self.failing:
                self.recording = None
                return (35, None)
            return (0, *getattr(self, f"_{name}", lambda *_: ())(*arguments))

        return call

    def cudaGetErrorString(self, status):
        return 0, b"insufficient driver"

    def _cudaGetDeviceCount(self):
        return (1,)

    def _cudaDeviceGetAttribute(self, which, device):
        return (self.capability[which],)

    def _cudaGetDeviceProperties(self, device):
        return (types.SimpleNamespace(name=b"Stand-in 9000"),)

    def _cudaMalloc(self, size):
        buffer = ctypes.create_string_buffer(size)
        self.memory[ctypes.addressof(buffer)] = buffer
        return (ctypes.addressof(buffer),)

    def _cudaFree(self, pointer):
        del self.memory[pointer]
        return ()

    def _cudaStreamCreate(self):
        return (77,)

    def _cudaMemcpyAsync(self, to, of, size, kind, stream):
        device = to if kind == 1 else of
        assert size <= len(self.memory[device])
        assert stream == 77
        assert self.recording is None
        ctypes.memmove(to, of, size)
        return ()

    def _cudaStreamBeginCapture(self, stream, mode):
        self.recording = []
        return ()

    def _cudaStreamEndCapture(self, stream):
        recorded, self.recording = self.recording, None
        return (recorded,)

    def _cudaGraphInstantiate(self, graph, flags):
        return (graph,)

    def _cudaGraphLaunch(self, graph, stream):
        for run in graph:
            run()
        return ()

    # tensorrt: one object is the runtime and the context, and most of the engine
    def Runtime(self, log):
        self.log = log
        return self

    def deserialize_cuda_engine(self, plan):
        if plan[:4] != b"plan":
            self.log.log(1, "bad magic\nnumber")
            return None
        self.session = ort.InferenceSession(self.model)
        self.tensors = {
            i.name: i for i in [*self.session.get_inputs(), *self.session.get_outputs()]
        }
        self.shapes = {}
        return Engine(self)

    @property
    def num_io_tensors(self):
        return len(self.tensors)

    def get_tensor_name(self, i):
        return list(self.tensors)[i]

    def get_tensor_mode(self, name):
        return "in" if name in {i.name for i in self.session.get_inputs()} else "out"

    def get_tensor_dtype(self, name):
        return self.tensors[name].type

    def nptype(self, kind):
        kinds = {"float16": np.float16, "float": np.float32, "int64": np.int64}
        return kinds[kind.removeprefix("tensor(").removesuffix(")")]

    def get_tensor_profile_shape(self, name, profile):
        shape = [self.limits.get(n, n) for n in self.tensors[name].shape]
        return shape, shape, shape

    def is_stream_capturable(self, stream):
        return "is_stream_capturable" not in self.failing

    def get_tensor_shape(self, name):
        if name in self.shapes:
            return self.shapes[name]
        sizes = {}
        for known, shape in self.shapes.items():
            sizes |= dict(zip(self.tensors[known].shape, shape, strict=True))
        found = []
        for n in self.tensors[name].shape:
            try:
                found.append(eval(n, {}, sizes) if isinstance(n, str) else n)
            except NameError:
                found.append(-1)
        return found

    def set_input_shape(self, name, shape):
        self.calls.append(f"set_input_shape {name}")
        most = [self.limits.get(n, n) for n in self.tensors[name].shape]
        if any(a > b for a, b in zip(shape, most, strict=True)):
            self.log.log(1, "out of the profile")
            return False
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name, pointer):
        self.calls.append(f"set_tensor_address {name}")
        self.addresses[name] = pointer

    def execute_async_v3(self, stream):
        self.calls.append("execute_async_v3")
        if "execute_async_v3" in self.failing:
            self.log.log(1, "it broke")
            return False
        if self.recording is None:
            self._run()
        else:
            self.recording.append(self._run)
        return True

    def _run(self):
        def array(name):
            shape, dtype = (
                self.get_tensor_shape(name),
                np.dtype(self.nptype(self.tensors[name].type)),
            )
            size = int(np.prod(shape)) * dtype.itemsize
            raw = (ctypes.c_char * size).from_address(self.addresses[name])
            return np.frombuffer(raw, dtype).reshape(shape)

        names = [o.name for o in self.session.get_outputs()]
        found = self.session.run(names, {i.name: array(i.name) for i in self.session.get_inputs()})
        for name, value in zip(names, found, strict=True):
            raw = np.ascontiguousarray(value)
            ctypes.memmove(self.addresses[name], raw.ctypes.data, raw.nbytes)

    def device(self, *vendors):
        self.__name__ = "tensorrt_rtx"
        return engines.Device(dict.fromkeys(vendors or ("tensorrt_rtx",), self), self)


class Engine:
    """An engine knows shapes only as far as they are fixed."""

    def __init__(self, gpu):
        self.gpu = gpu

    def __getattr__(self, name):
        return getattr(self.gpu, name)

    def create_execution_context(self):
        return self.gpu

    def get_tensor_shape(self, name):
        return [n if isinstance(n, int) else -1 for n in self.gpu.tensors[name].shape]


@pytest.fixture
def bundle(tmp_path):
    """A function that makes a bundle of one exported component, with engines."""

    def make(one, have=("8.6", "12.0"), plan=b"plan"):
        whole = ferrotype.load().bundle
        folder, files = tmp_path / one.component, {}
        folder.mkdir()
        for name in ("model.onnx", *map(tensorrt_builder.engine_name, have)):
            (folder / name).write_bytes(one.model.read_bytes() if name.endswith("onnx") else plan)
            files[f"{one.component}/{name}"] = File(1, "0" * 64)
        described = [
            {n: Tensor(t["dtype"], tuple(t["shape"])) for n, t in one.said[way].items()}
            for way in ("inputs", "outputs")
        ]
        component = Component(one.component, {}, *described)
        manifest = dataclasses.replace(
            whole.manifest,
            target="tensorrt",
            components={**whole.manifest.components, one.component: component},
            files=files,
        )
        return Bundle(tmp_path, manifest)

    return make


@pytest.fixture
def unet(exported, bundle):
    one = exported("unet")
    return one, bundle(one), Gpu(one.model)


def test_the_engine_computes_what_the_graph_does_and_frees_what_it_took(unet):
    one, bundle, gpu = unet
    engine = engines.TensorrtEngine(bundle, "unet", device=gpu.device())
    for seed in range(4):  # plain, recorded, and launched twice
        feeds = one.feeds(seed)
        given = {name: array.astype(np.float32) for name, array in feeds.items()}
        found = engine(given)["out_sample"]
        assert found.dtype == np.float32
        assert np.array_equal(found, one.run(feeds)[0].astype(np.float32))
    assert len(gpu.memory) == 4
    assert gpu.calls.count("cudaMalloc") == 4
    del engine
    assert gpu.memory == {}
    assert gpu.calls[-6:] == ["cudaGraphExecDestroy", *["cudaFree"] * 4, "cudaStreamDestroy"]


def test_the_order_of_calls(unet):
    one, bundle, gpu = unet
    engine = engines.TensorrtEngine(bundle, "unet", device=gpu.device())
    inputs, names = list(one.said["inputs"]), [*one.said["inputs"], "out_sample"]
    take = [("cudaMalloc", f"set_tensor_address {name}") for name in names]
    assert gpu.calls[4:] == [
        *(f"set_input_shape {name}" for name in inputs),
        "cudaStreamCreate",
        *itertools.chain(*take),
    ]
    gpu.calls.clear()
    engine(one.feeds())
    copies = ["cudaMemcpyAsync"] * 3
    assert gpu.calls == [*copies, "execute_async_v3", "cudaMemcpyAsync", "cudaStreamSynchronize"]
    gpu.calls.clear()
    engine(one.feeds())
    record = ["cudaStreamBeginCapture", "execute_async_v3", "cudaStreamEndCapture"]
    record += ["cudaGraphInstantiate", "cudaGraphDestroy"]
    launch = [*copies, "cudaGraphLaunch", "cudaMemcpyAsync", "cudaStreamSynchronize"]
    assert gpu.calls == [*copies, *record, *launch[3:]]
    gpu.calls.clear()
    engine(one.feeds())
    assert gpu.calls == launch


@pytest.mark.parametrize(
    "call",
    [
        "cudaStreamBeginCapture",
        "cudaStreamEndCapture",
        "cudaGraphInstantiate",
        "is_stream_capturable",
    ],
)
def test_without_graphs_it_runs_as_before(unet, call):
    one, bundle, gpu = unet
    gpu.failing.add(call)
    engine = engines.TensorrtEngine(bundle, "unet", device=gpu.device())
    for seed in range(3):
        feeds = one.feeds(seed)
        assert np.array_equal(engine(feeds)["out_sample"], one.run(feeds)[0].astype(np.float32))
    assert "cudaGraphLaunch" not in gpu.calls
    tried = gpu.calls.count("cudaStreamBeginCapture")
    assert tried == (call != "is_stream_capturable")  # and not again


def test_open_sizes_are_set_when_they_change_and_are_not_recorded(checkpoint, bundle, tmp_path):
    one = Exported("vae_decoder", checkpoint, tmp_path / "open", size=None)
    gpu = Gpu(one.model, {"width": 16, "height": 16})
    engine = engines.TensorrtEngine(bundle(one), "vae_decoder", device=gpu.device())
    gpu.calls.clear()
    for width, height in ((8, 8), (8, 8), (9, 16), (16, 16)):
        feeds = one.feeds(width=width, height=height)
        found = engine(feeds)["sample"]
        assert np.array_equal(found, one.run(feeds)[0].astype(np.float32))
        assert found.shape == (1, 3, 8 * height, 8 * width)
    assert gpu.calls.count("set_input_shape latent_sample") == 3
    assert "cudaStreamBeginCapture" not in gpu.calls
    with pytest.raises(BundleError, match=r"\(1, 4, 8, 17\) is outside the engine's range: out of"):
        engine(one.feeds(width=17, height=8))


@pytest.mark.parametrize("call", ["cudaMalloc", "cudaStreamCreate"])
def test_what_was_taken_is_given_back_when_loading_fails(unet, call):
    _, bundle, gpu = unet
    device = gpu.device()
    allocate, taken = device.allocate, []

    def fail_at_the_third(size):
        if len(taken) == 2:
            gpu.failing.add(call)
        taken.append(size)
        return allocate(size)

    device.allocate = fail_at_the_third
    if call == "cudaStreamCreate":
        gpu.failing.add(call)
    with pytest.raises(BundleError, match=f"^{call}: cuda error 35: insufficient driver$"):
        engines.TensorrtEngine(bundle, "unet", device=device)
    assert gpu.memory == {}
    assert ("cudaStreamDestroy" in gpu.calls) == (call == "cudaMalloc")


@pytest.mark.parametrize(
    ("failing", "reason"),
    [
        ("execute_async_v3", "sm86.engine failed on the GPU: it broke"),
        ("cudaMemcpyAsync", "cudaMemcpyAsync: cuda error 35: insufficient driver"),
        ("cudaStreamSynchronize", "cudaStreamSynchronize: cuda error 35: insufficient driver"),
    ],
)
def test_a_run_that_fails_is_one_line_and_the_memory_is_still_given_back(unet, failing, reason):
    one, bundle, gpu = unet
    engine = engines.TensorrtEngine(bundle, "unet", device=gpu.device())
    gpu.failing.add(failing)
    with pytest.raises(BundleError) as caught:
        engine(one.feeds())
    assert str(caught.value).endswith(reason)
    del engine, caught
    gc.collect()
    assert gpu.memory == {}


def test_an_engine_that_cannot_be_read_says_why(exported, bundle):
    one = exported("unet")
    for plan, reason in (
        (b"junk", r"cannot read .*sm86.engine: bad magic number; convert again with this version$"),
        (b"", r"sm86.engine is empty: copy or convert the bundle again$"),
    ):
        made = bundle(one, plan=plan)
        with pytest.raises(BundleError, match=reason):
            engines.TensorrtEngine(made, "unet", device=Gpu(one.model).device())
        for path in (made.folder / "unet").iterdir():
            path.unlink()
        (made.folder / "unet").rmdir()


def test_inputs_must_be_those_of_the_manifest(unet):
    one, bundle, gpu = unet
    engine = engines.TensorrtEngine(bundle, "unet", device=gpu.device())
    feeds = one.feeds()
    with pytest.raises(BundleError, match="takes sample, timestep, encoder_hidden_states; given s"):
        engine({"sample": feeds["sample"]})
    with pytest.raises(
        BundleError, match=r"sample has the shape \(1, 4, 8, 7\), the manifest says"
    ):
        engine({**feeds, "sample": feeds["sample"][..., 1:]})


def test_an_engine_of_other_tensors_than_the_manifest_is_refused(exported, unet):
    _, bundle, _ = unet
    gpu = Gpu(exported("vae_decoder").model)
    with pytest.raises(BundleError, match="takes latent_sample; the manifest says sample, time"):
        engines.TensorrtEngine(bundle, "unet", device=gpu.device())


# --- which engine, which device -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "move"),
    [
        ("8.7", "8.7: install tensorrt, which builds it on the device"),
        ("8.9", "8.9: convert it again for 8.9, or install tensorrt, which builds it on the"),
    ],
)
def test_a_gpu_that_the_bundle_has_no_engine_for(unet, capability, move):
    one, bundle, _ = unet
    device = Gpu(one.model, capability=capability).device()
    with pytest.raises(BundleError) as caught:
        engines.TensorrtEngine(bundle, "unet", device=device)
    assert "compute capability 8.6, 12.0, this Stand-in 9000 has " + move in str(caught.value)


def test_with_tensorrt_the_engine_is_built_once_on_the_device(unet, monkeypatch, tmp_path):
    one, bundle, _ = unet
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    asked = []

    def compile_engine(model, engine, capability, sizes, vendor):
        asked.append((model, capability, vendor))
        assert sizes["sequence"] == (32, 32, 32)  # of the embedded bundle
        engine.write_bytes(b"plan")

    monkeypatch.setattr(engines, "compile_engine", compile_engine)
    for _ in range(2):
        device = Gpu(one.model, capability="8.7").device("tensorrt")
        engine = engines.TensorrtEngine(bundle, "unet", device=device)
        assert engine(one.feeds())["out_sample"].shape == (1, 4, 8, 8)
    assert asked == [(bundle.path("unet/model.onnx"), None, "tensorrt")]
    (built,) = (tmp_path / "home" / ".cache" / "ferrotype").iterdir()
    assert built.name == f"Stand-in-9000-tensorrt-rtx-1.7-{bundle.sha256[:16]}"
    assert [p.name for p in built.iterdir()] == ["unet.engine"]


def test_the_sizes_that_are_built_for_are_those_of_the_manifest(unet):
    _, bundle, _ = unet
    sizes = Sizes((128, 64), 8, 64, 256)
    wide = dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, sizes=sizes))
    scale = 2 ** (len(wide.component("vae_decoder").config["block_out_channels"]) - 1)
    found = engines.ranges(wide, "unet")
    assert found["width"] == (64 // scale, 128 // scale, 256 // scale)
    assert found["height"] == (64 // scale, 64 // scale, 256 // scale)
    assert engines.ranges(wide, "vae_encoder")["width"] == (64, 128, 256)


def test_without_a_gpu_it_is_one_line(unet):
    _, bundle, gpu = unet
    have = "this bundle has engines for compute capability 8.6, 12.0: convert with --target onnx"
    with pytest.raises(BundleError) as caught:
        open_engine(bundle, "unet")  # this machine
    assert have in str(caught.value)
    assert str(caught.value).startswith(("needs ", "no NVIDIA GPU found"))
    assert "\n" not in str(caught.value)
    gpu.failing.add("cudaGetDeviceCount")
    with pytest.raises(
        BundleError, match=r"^no NVIDIA GPU found \(cudaGetDeviceCount: cuda error 35"
    ):
        gpu.device()


@pytest.mark.parametrize(
    ("there", "missing"),
    [((), "needs tensorrt-rtx: pip install tensorrt-rtx cuda-python on a machine with an NVIDIA"),
     (("tensorrt_rtx",), "needs cuda-python: pip install"),
     (("cuda.bindings.runtime",), "needs tensorrt-rtx")],
)  # fmt: skip
def test_a_missing_package_is_named(monkeypatch, there, missing):
    monkeypatch.setattr(engines, "vendor_module", lambda name: object() if name in there else None)
    with pytest.raises(BundleError) as caught:
        engines.open_device()
    assert str(caught.value).startswith(missing)

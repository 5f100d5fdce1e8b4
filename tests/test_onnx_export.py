"""Every exported graph computes what torch computes, at every size, and holds nothing else."""

import gc
import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from ferrotype.convert.checkpoint import CheckpointError, ConvertError, open_checkpoint, tensors
from ferrotype.parity import psnr

torch = pytest.importorskip("torch")

from ferrotype.convert import modules, wrappers  # noqa: E402
from ferrotype.convert.blame import blame, worst  # noqa: E402
from ferrotype.convert.onnx import export, interface  # noqa: E402

COMPONENTS = ("text_encoder", "unet", "vae_decoder", "vae_encoder")
# (batch, latent height, latent width, tokens of text); torch saw (2, 72, 56, 11)
SIZES = [(1, 8, 8, 7), (2, 9, 7, 77), (3, 5, 16, 7), (1, 33, 31, 154)]


def tiny_text_encoder(**changes):
    from transformers import CLIPTextConfig, CLIPTextModel

    config = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 100,
        "eos_token_id": 99,
    }
    return CLIPTextModel(CLIPTextConfig(**config | changes))


def tiny_unet(**changes):
    from diffusers import UNet2DConditionModel

    config = {
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return UNet2DConditionModel(**config | changes)


def tiny_vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 16, 16, 16),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )


def tiny(component, **changes):
    torch.manual_seed(0)
    makers = {"text_encoder": tiny_text_encoder, "unet": tiny_unet}
    with modules.quiet():
        module = makers.get(component, tiny_vae)(**changes)
    return module.eval().requires_grad_(False)


@pytest.fixture(scope="module", autouse=True)
def no_garbage_collection():
    """The exporter's many small objects make collecting a third of its time."""
    gc.disable()
    yield
    gc.enable()


class Exported:
    """A module, the folder that it was exported to, and what export said about it."""

    def __init__(self, component, module, folder, **options):
        self.component, self.module, self.folder = component, module, folder
        self.said = export(component, module, {"_class_name": "X"}, folder, **options)
        self.graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
        self.session = ort.InferenceSession(folder / "model.onnx")

    def inputs(self, batch=1, height=8, width=8, sequence=7):
        rng = np.random.default_rng(0)
        sizes = {"batch": batch, "height": height, "width": width, "sequence": sequence}
        if self.component == "vae_encoder":
            sizes |= {"height": 8 * height, "width": 8 * width}
        feeds = {}
        for name, value in self.said["inputs"].items():
            shape = [sizes.get(n, n) for n in value["shape"]]
            feeds[name] = np.asarray(rng.standard_normal(shape), value["dtype"])
        if "timestep" in feeds:
            feeds["timestep"] = np.array(501.25, np.float32)
        if "input_ids" in feeds:  # the end token, then padding, as a tokenizer writes it
            ids = rng.integers(0, 98, feeds["input_ids"].shape)
            ids[:, 9:] = self.module.config.eos_token_id
            feeds["input_ids"] = ids
        return feeds

    def run(self, feeds):
        return self.session.run(None, feeds)

    @torch.no_grad()
    def original(self, feeds):
        """diffusers' and transformers' own forward, not ours."""
        x = {k: torch.from_numpy(np.asarray(v)) for k, v in feeds.items()}
        x = {k: v.float() if v.is_floating_point() else v for k, v in x.items()}
        if self.component == "text_encoder":
            out = self.module(**x)
            return [out.last_hidden_state.numpy(), out.pooler_output.numpy()]
        if self.component == "unet":
            return [self.module(**x).sample.numpy()]
        if self.component == "vae_decoder":
            return [self.module.decode(x["latent_sample"]).sample.numpy()]
        return [self.module.encode(x["sample"]).latent_dist.parameters.numpy()]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The tiny components in float32, exported when first asked for."""
    made = {}

    def get(component):
        if component not in made:
            folder = tmp_path_factory.mktemp(component)
            made[component] = Exported(component, tiny(component), folder)
        return made[component]

    return get


def assert_same(found, expected, relative=1e-4):
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= relative * np.abs(b).max()


# --- it computes the same -----------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("component", COMPONENTS)
def test_the_graph_agrees_with_torch_at_every_size(exported, component, size):
    one = exported(component)
    feeds = one.inputs(*size)
    assert_same(one.run(feeds), one.original(feeds))


@torch.no_grad()
def test_old_text_encoders_pool_at_the_largest_id():
    module = tiny("text_encoder", eos_token_id=2)
    ids = torch.from_numpy(np.random.default_rng(0).integers(3, 99, (3, 77)))
    ids[[0, 1, 2], [5, 76, 0]] = 99
    found, expected = wrappers.wrap("text_encoder", module)(ids), module(ids)
    torch.testing.assert_close(found[0], expected.last_hidden_state)
    torch.testing.assert_close(found[1], expected.pooler_output)


def test_text_is_causal_and_a_masked_token_has_no_weight_at_all(exported):
    one = exported("text_encoder")
    feeds = one.inputs()
    before = one.run(feeds)[0]
    feeds["input_ids"][:, 40] = 1
    after = one.run(feeds)[0]
    assert np.array_equal(before[:, :40], after[:, :40])
    assert not np.array_equal(before[:, 40:], after[:, 40:])


@pytest.mark.parametrize(
    ("component", "changes", "shape"),
    [
        ("unet", {"time_cond_proj_dim": 6}, ["batch", 4, 9, 6]),  # LCM's embedded guidance
        ("vae_encoder", {}, ["batch", 3, 72, 48]),
    ],
)
def test_a_fixed_size_takes_only_that_size(tmp_path, component, changes, shape):
    one = Exported(component, tiny(component, **changes), tmp_path, latent_size=(6, 9))
    assert one.session.get_inputs()[0].shape == shape
    assert one.said["inputs"]["sample"]["shape"] == shape
    feeds = one.inputs(2)
    assert_same(one.run(feeds), one.original(feeds))
    with pytest.raises(Exception, match="Got invalid dimensions"):
        one.run({**feeds, "sample": feeds["sample"][..., :-1]})
    if component == "unet":
        assert one.said["inputs"]["timestep_cond"]["shape"] == ["batch", 6]
        other = {**feeds, "timestep_cond": feeds["timestep_cond"] + 1}
        assert np.abs(one.run(other)[0] - one.run(feeds)[0]).max() > 1e-3


def test_a_trained_unet_in_half_the_bytes_agrees_with_torch(trained, tmp_path):
    checkpoint = open_checkpoint(trained)
    unet = modules.unet(checkpoint)
    one = Exported("unet", unet, tmp_path, weights="fp16", latent_size=(15, 17))
    assert one.said["fp16_underflow"] == {}
    feeds = one.inputs(2, sequence=32)
    assert_same(one.run(feeds), one.original(feeds))  # exact weights: the checkpoint is float16
    found = {i.name: i for i in one.graph.initializer}
    names = [name for name, array in tensors(checkpoint, "unet") if array.ndim == 4]
    assert all(found[name].data_type == onnx.TensorProto.FLOAT16 for name in names)
    assert (tmp_path / "model.onnx.data").stat().st_size < 17.5e6


# --- half precision -----------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[("fp16", "fp32", 65), ("fp16", "fp16", 50)], ids=str)
def half(request, tmp_path_factory):
    weights, activations, floor = request.param
    options = {"weights": weights, "activations": activations, "latent_size": (7, 9)}
    folder = tmp_path_factory.mktemp("half")
    return {
        name: Exported(name, tiny(name), folder / name, **options)
        for name in ("text_encoder", "unet")
    }, floor


def test_half_precision_is_close_to_the_original(half):
    variants, floor = half
    for one in variants.values():
        feeds = one.inputs(2, 9, 7)
        for found, expected in zip(one.run(feeds), one.original(feeds), strict=True):
            assert found.dtype == one.said["outputs"][next(iter(one.said["outputs"]))]["dtype"]
            assert psnr(expected, found) > floor


def test_half_precision_is_half_the_size(half, exported):
    for name, one in half[0].items():
        small, large = (
            sum(f.stat().st_size for f in (folder / "model.onnx.data",))
            for folder in (one.folder, exported(name).folder)
        )
        assert small < 0.6 * large


def test_the_timestep_stays_float32(half):
    timestep = next(i for i in half[0]["unet"].session.get_inputs() if i.name == "timestep")
    assert (timestep.type, timestep.shape) == ("tensor(float)", [])


def test_the_original_is_left_as_it_was(half):
    for one in half[0].values():
        assert {p.dtype for p in one.module.parameters()} == {torch.float32}
        fresh = tiny(one.component).state_dict()
        assert all(torch.equal(v, fresh[k]) for k, v in one.module.state_dict().items())


@pytest.mark.parametrize("activations", ["fp32", "fp16"])
def test_a_weight_beyond_float16_is_refused(tmp_path, activations):
    module = tiny("vae_encoder")
    module.encoder.conv_out.weight[0, 0, 0, 0] = -1e5
    options = {"weights": "fp16", "activations": activations, "latent_size": (2, 2)}
    with pytest.raises(ConvertError, match=r"encoder.conv_out.weight reaches 1e\+05, float16 ends"):
        export("vae_encoder", module, {}, tmp_path, **options)
    assert not (tmp_path / "model.onnx").exists()


def test_weights_that_vanish_in_float16_are_counted():
    lost = {}
    module = tiny("vae_encoder")
    module.encoder.conv_in.weight[:, 0, 0, 0] = 1e-9
    wrappers.wrap("vae_encoder", module, half=True, lost=lost)
    assert lost == {"encoder.conv_in.weight": 8}


# --- what the files hold ------------------------------------------------------------------------


@pytest.mark.parametrize("component", COMPONENTS)
def test_names_and_dimensions_are_those_of_the_ecosystem(exported, component):
    one = exported(component)
    names = {
        "text_encoder": (["input_ids"], ["last_hidden_state", "pooler_output"]),
        "unet": (["sample", "timestep", "encoder_hidden_states"], ["out_sample"]),
        "vae_decoder": (["latent_sample"], ["sample"]),
        "vae_encoder": (["sample"], ["latent_parameters"]),
    }
    assert (list(one.said["inputs"]), list(one.said["outputs"])) == names[component]
    for said, found in (
        (one.said["inputs"], one.session.get_inputs()),
        (one.said["outputs"], one.session.get_outputs()),
    ):
        assert {i.name: i.shape for i in found} == {n: v["shape"] for n, v in said.items()}
    dims = {
        d.dim_param
        for v in [*one.graph.value_info, *one.graph.input, *one.graph.output]
        for d in v.type.tensor_type.shape.dim
    }
    words = {
        w for d in dims for w in "".join(c if c.isalpha() or c == "_" else " " for c in d).split()
    }
    known = {"batch", "height", "width", "sequence"}
    assert words <= known


@pytest.mark.parametrize("component", COMPONENTS)
def test_the_files_are_valid_and_hold_nothing_of_this_machine(exported, component):
    folder = exported(component).folder
    onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)
    data = (folder / "model.onnx").read_bytes()
    for mark in (b"/work", b"/root", b"/home", b"site-packages", b".py", b"stack_trace", b"pkg."):
        assert mark not in data
    assert json.loads((folder / "config.json").read_text()) == {"_class_name": "X"}


@pytest.mark.parametrize("component", COMPONENTS)
def test_weights_are_beside_the_graph_aligned_and_named_as_in_the_checkpoint(exported, component):
    one = exported(component)
    state = one.module.state_dict()
    for tensor in one.graph.initializer:
        where = {e.key: e.value for e in tensor.external_data}
        size = int(np.prod(tensor.dims)) * 4
        if size >= 1024:
            assert where["location"] == "model.onnx.data"
            assert int(where["offset"]) % (4096 if size >= 65536 else 64) == 0
            assert int(where["length"]) == size
        if len(tensor.dims) > 1 and size >= 1024:
            assert tensor.name in state or tensor.name in ("mask", "embedding_1")


@pytest.mark.parametrize("component", COMPONENTS)
def test_no_constant_is_infinite(exported, component):
    one = exported(component)
    for tensor in one.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor, base_dir=str(one.folder))
        assert array.dtype.kind != "f" or np.abs(array).max() <= 10_000
    assert not any(n.op_type in ("Constant", "ConstantOfShape") for n in one.graph.node)


def test_an_infinite_mask_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("ferrotype.convert.wrappers.MASKED", -torch.inf)
    with pytest.raises(ConvertError, match="mask is a constant with NaN or Inf"):
        export("text_encoder", tiny("text_encoder"), {}, tmp_path)


def test_attention_is_fused_and_its_scores_are_never_held(exported):
    one = exported("unet")
    ops = [n.op_type for n in one.graph.node]
    assert ops.count("MultiHeadAttention") == sum(
        1 for name, _ in one.module.named_modules() if name.endswith(("attn1", "attn2"))
    )
    assert "Softmax" not in ops
    assert "Softmax" not in [n.op_type for n in exported("vae_decoder").graph.node]
    code = f"""
import numpy as np, onnxruntime as ort, resource
session = ort.InferenceSession({str(one.folder / "model.onnx")!r})
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
session.run(None, dict(sample=np.ones((1, 4, 64, 64), np.float32), timestep=np.array(1, np.float32),
                       encoder_hidden_states=np.ones((1, 77, 32), np.float32)))
print(peak() - before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    scores = 4 * 4096 * 4096 * 4 // 2**20  # heads x tokens x tokens x bytes, in MiB
    assert int(run.stdout) < scores / 4


def test_the_same_module_gives_the_same_bytes_in_another_process(exported, tmp_path):
    one = exported("vae_decoder")
    code = """
import importlib.util, pathlib, sys
spec = importlib.util.spec_from_file_location("t", sys.argv[1])
t = importlib.util.module_from_spec(spec)
spec.loader.exec_module(t)
t.export("vae_decoder", t.tiny("vae_decoder"), {"_class_name": "X"}, pathlib.Path(sys.argv[2]))
"""
    command = [sys.executable, "-c", code, __file__, str(tmp_path)]
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    subprocess.run(command, check=True, env=environment, cwd=tmp_path)
    for name in ("model.onnx", "model.onnx.data", "config.json"):
        first, second = (
            hashlib.sha256((folder / name).read_bytes()).hexdigest()
            for folder in (one.folder, tmp_path)
        )
        assert first == second, name


# --- what it refuses ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"component": "safety_checker"}, "safety_checker is not a component; choose from"),
        ({"activations": "fp16"}, "activations fp16 need weights fp16"),
        ({"weights": "int8"}, "weights 'int8' is not known; choose fp32 or fp16"),
    ],
)
def test_options_that_do_not_exist_are_refused(tmp_path, options, said):
    component = options.pop("component", "unet")
    with pytest.raises(ConvertError, match=said):
        export(component, None, {}, tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_a_unet_with_other_inputs_is_refused(tmp_path):
    module = tiny("unet", num_class_embeds=3)
    with pytest.raises(CheckpointError, match="num_class_embeds is 3"):
        export("unet", module, {}, tmp_path)


# --- which layer lost it ------------------------------------------------------------------------


def damage(folder, name, factor):
    """Scale one weight in the written file."""
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    tensor = next(i for i in graph.initializer if i.name == name)
    where = {e.key: e.value for e in tensor.external_data}
    data = np.memmap(folder / where["location"], np.uint8, "r+")
    first = int(where["offset"])
    kind = {onnx.TensorProto.FLOAT: np.float32, onnx.TensorProto.FLOAT16: np.float16}
    weight = data[first : first + int(where["length"])].view(kind[tensor.data_type])
    weight *= factor
    data.flush()


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_good_graph_has_no_bad_layer(exported, component):
    one = exported(component)
    layers = blame(component, one.module, one.folder, one.inputs(2, 9, 7))
    assert min(value for _, value in layers) > 100
    weighted = {name.rpartition(".")[0] for name, _ in one.module.named_parameters()}
    folded = {n for n in weighted if n.endswith("position_embedding")}  # a constant
    other = "encoder." if component == "vae_decoder" else "decoder."
    mine = {n for n in weighted - folded if not n.startswith(other) or component == "unet"}
    mine -= {"vae_decoder": {"quant_conv"}, "vae_encoder": {"post_quant_conv"}}.get(
        component, set()
    )
    assert {layer for layer, _ in layers} == (weighted - folded if "vae" not in component else mine)


@pytest.mark.parametrize(
    "layer",
    ["mid_block.resnets.0.conv1", "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v"],
)
def test_the_damaged_layer_is_named(half, layer):
    one = half[0]["unet"]
    damage(one.folder, f"{layer}.weight", 1.5)
    try:
        name, value = worst("unet", one.module, one.folder, one.inputs(2, 9, 7))
    finally:
        damage(one.folder, f"{layer}.weight", 1 / 1.5)
    assert name == layer
    assert value < 45


def test_the_layer_that_falls_furthest_is_blamed_not_those_it_drags_down(monkeypatch):
    layers = [("a", 180.0), ("b", 88.0), ("c", 90.0), ("d", 45.0), ("e", 70.0), ("f", 38.0)]
    monkeypatch.setattr("ferrotype.convert.blame.blame", lambda *_: layers)
    assert worst("unet", None, None, {}) == ("d", 45.0)


def test_interface_needs_no_export():
    inputs, outputs = interface("vae_decoder", tiny("vae_decoder"), (3, 2), "fp16")
    assert inputs == {"latent_sample": {"dtype": "float16", "shape": ["batch", 4, 2, 3]}}
    assert outputs == {"sample": {"dtype": "float16", "shape": ["batch", 3, 16, 24]}}

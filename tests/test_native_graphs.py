"""Graphs of the native engine: what they compute, against torch, and where they put things.

Every network runs twice: on `numpy_engine`, in float64 on the planned arena, and on the engine.
"""

import dataclasses
import functools
import itertools
import json
import math
import re

import numpy as np
import pytest

from ferrotype import bundle as bundles
from ferrotype import kernels
from ferrotype.benchmarks.checkpoints import SD15, SDXL, TINY, TINY_SD2, TINY_XL
from ferrotype.bundle import Bundle, BundleError, Component, Precision
from ferrotype.kernels import LANES, Kind, Type
from ferrotype.runtime import models
from ferrotype.runtime.bands import Bands, choices, in_bands
from ferrotype.runtime.engines.native import NativeEngine, narrow, read_output, widen, write_input
from ferrotype.runtime.layout import lay_out
from ferrotype.runtime.models.taesd import LOG_VARIANCE
from ferrotype.runtime.pipeline import EMBEDDED
from ferrotype.runtime.program import STORED, GraphError, Weight, activation_type
from ferrotype.tests import numpy_engine

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from ferrotype.convert import native, wrappers  # noqa: E402

FP32 = 1e-4  # relative error of a network in fp32: norm of the difference by that of torch's output
# bfloat16 has 8 bits: each rounding is off by 2^-9 at most, and these networks round some dozen
# times one after the other, which adds up like a random walk of larger steps.
BF16, FP16 = 3e-2, 4e-3
NO_ENGINE = pytest.mark.skipif(not kernels.available(), reason="the native engine is not built")

NAMES = {kind: name for name, kind in STORED.items()}
ENDS = {"bos_token_id": 2046, "eos_token_id": 2047, "pad_token_id": 2047}
CLIP = ENDS | TINY["text_encoder"]
UNET, VAE = TINY["unet"], TINY["vae"]
TAESD = {
    "_class_name": "AutoencoderTiny", "encoder_block_out_channels": [16] * 3,
    "decoder_block_out_channels": [16] * 3, "num_encoder_blocks": [1, 2, 1],
    "num_decoder_blocks": [2, 1, 1],
}  # fmt: skip
SMALL_XL = TINY_XL["unet"] | {"block_out_channels": [16, 32, 48], "norm_num_groups": 8,
    "attention_head_dim": [2, 4, 3], "transformer_layers_per_block": [1, 2, 3],
    "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
    "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"], "layers_per_block": 2,
}  # fmt: skip
WIDE = UNET | {"block_out_channels": [32, 64], "attention_head_dim": [4, 2]}
# name -> component, config, sizes of the input (width, height)
CASES = {
    "clip": ("text_encoder", CLIP, [(8, 8)]),
    "clip-old-eos": ("text_encoder", CLIP | {"eos_token_id": 2, "max_position_embeddings": 20},
                     [(8, 8)]),
    "clip-gelu": ("text_encoder", CLIP | {"hidden_act": "gelu", "hidden_size": 48,
                                          "num_attention_heads": 3}, [(8, 8)]),
    "clip-xl": ("text_encoder", ENDS | TINY_XL["text_encoder"], [(8, 8)]),
    "clip-xl-2": ("text_encoder_2", ENDS | TINY_XL["text_encoder_2"], [(8, 8)]),
    "unet": ("unet", UNET, [(8, 8), (12, 6), (2, 10)]),
    "unet-sd2": ("unet", TINY_SD2["unet"], [(6, 10)]),
    "unet-xl": ("unet", TINY_XL["unet"], [(8, 8), (4, 14)]),
    "unet-xl-3": ("unet", SMALL_XL, [(8, 12)]),
    "unet-sliced": ("unet", WIDE, [(4, 6)]),
    "unet-lcm": ("unet", UNET | {"time_cond_proj_dim": 20, "flip_sin_to_cos": False,
                                 "freq_shift": 1, "time_embedding_dim": 40}, [(4, 4)]),
    "unet-cross": ("unet", WIDE | {"only_cross_attention": [True, False], "act_fn": "gelu",
                                   "down_block_types": ["CrossAttnDownBlock2D"] * 2,
                                   "up_block_types": ["CrossAttnUpBlock2D"] * 2,
                                   "layers_per_block": [2, 1], "norm_eps": 1e-3}, [(6, 4)]),
    "unet-reversed": ("unet", UNET | {"transformer_layers_per_block": [[2], [1]],
                                      "reverse_transformer_layers_per_block": [[1, 1], [2, 1]]},
                      [(4, 4)]),
    "unet-short": ("unet", UNET | {"mid_block_type": "UNetMidBlock2D"}, [(4, 6)]),
    "unet-without-middle": ("unet", UNET | {"mid_block_type": None}, [(6, 4)]),
    "vae_decoder": ("vae_decoder", VAE, [(2, 2), (3, 5)]),
    "vae_decoder-odd": ("vae_decoder", VAE | {"block_out_channels": [12, 20], "layers_per_block": 2,
        "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
        "use_post_quant_conv": False, "mid_block_add_attention": False}, [(5, 3)]),
    "vae_encoder": ("vae_encoder", VAE, [(16, 16), (40, 24)]),
    "vae_encoder-wide": ("vae_encoder", VAE | {"block_out_channels": [16, 64],
        "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
        "use_quant_conv": False}, [(10, 6)]),
    "taesd_decoder": ("vae_decoder", TAESD, [(3, 2)]),
    "taesd_encoder": ("vae_encoder", TAESD, [(12, 20)]),
}  # fmt: skip
RUNS = [(name, size) for name, (_, _, sizes) in CASES.items() for size in sizes]


# --- networks -----------------------------------------------------------------------------------


class Network:
    """A torch module with random weights; what the native engine needs of it."""

    def __init__(self, component, config, hidden_states=False):
        self.component, self.config, self.hidden_states = component, config, hidden_states
        torch.manual_seed(len(str(config)))
        self.module = self._module().eval().requires_grad_(False)
        for key, value in self.module.named_parameters():
            value.copy_(draw(key, value.shape))
        self.inputs, self.outputs = models.interface(component, config, hidden_states)
        self.packed = models.weights(component, config, self.outputs)

    def _module(self):
        config = {k: v for k, v in self.config.items() if not k.startswith("_")}
        if self.component.startswith("text"):
            config["output_hidden_states"] = self.hidden_states
            suffix = "WithProjection" if self.component == "text_encoder_2" else ""
            kind = getattr(transformers, f"CLIPTextModel{suffix}")
            return kind(transformers.CLIPTextConfig(**config))
        if self.component == "unet":
            return diffusers.UNet2DConditionModel(**config)
        return getattr(diffusers, self.config.get("_class_name", "AutoencoderKL"))(**config)

    def arrays(self):
        """The checkpoint's tensors, by the names that they have there."""
        prefix = "text_model." if self.component.startswith("text") else ""
        return {
            k if k.startswith((prefix, "text_projection")) else prefix + k: v.numpy()
            for k, v in self.module.state_dict().items()
        }

    def parts(self, weights, narrow=False):
        """Every tensor of the weights file: what was asked for, its place and its bytes."""
        arrays = self.arrays()
        places = native.layout(self.packed, STORED[weights], narrow=narrow)
        for request in self.packed:
            sources = [arrays[source] for source in request.sources]
            yield request, places[request.name], native.pack(request, sources, weights)

    def files(self, weights, narrow=False):
        """Places in the weights file, and its bytes; matrices are `weights`."""
        places, pieces = {}, []
        for request, place, data in self.parts(weights, narrow):
            assert data.size == place.bytes
            places[request.name] = place
            pieces += [np.zeros(place.offset - sum(map(len, pieces)), np.uint8), data]
        return places, np.concatenate(pieces)

    def write(self, folder, weights, activations):
        """A bundle with this component alone."""
        part = folder / self.component
        part.mkdir(parents=True)
        tensors = {}
        with (part / "weights.bin").open("wb") as file:
            for request, place, data in self.parts(weights):
                file.seek(place.offset)
                file.write(data.data)
                tensors[request.name] = {
                    "form": request.form,
                    "type": NAMES[place.type],
                    "offset": place.offset,
                    "bytes": place.bytes,
                    "shape": request.shape(place.type),
                }
            size = file.tell()
        index = {"format": 1, "bytes": size, "tensors": tensors}
        (part / "weights.json").write_text(json.dumps(index))
        component = Component(self.component, self.config, self.inputs, self.outputs)
        manifest = dataclasses.replace(
            bundles.load(EMBEDDED).manifest,
            target="native",
            precision=Precision(weights, activations),
            components={self.component: component},
        )
        return Bundle(folder, manifest)

    def feed(self, size):
        """Random inputs for a size in pixels of the encoder, else in latents."""
        rng = np.random.default_rng(1)
        shapes = models.sizes(self.component, self.config, size, 7)
        feed = {n: rng.standard_normal(s, dtype=np.float32) for n, s in shapes.items()}
        if "input_ids" in feed:
            ids = rng.integers(0, 2040, shapes["input_ids"])
            ids[0, 5] = 2047
            ids[0, 9:] = 2047
            feed["input_ids"] = ids
        if "timestep" in feed:
            feed["timestep"] = np.array(601.5, np.float32)
        if "time_ids" in feed:
            feed["time_ids"] = np.array([[96, 64, 0, 8, 96, 64]], np.float32)
        return feed

    def reference(self, feed):
        """torch's outputs by name."""
        with torch.no_grad():
            given = {name: torch.from_numpy(np.asarray(value)) for name, value in feed.items()}
            found = self._forward(given)
        return dict(zip(self.outputs, (value.numpy() for value in found), strict=True))

    def _forward(self, given):
        if self.component.startswith("text"):
            return wrappers.wrap(self.component, self.module)(**given)
        if self.component == "unet":
            added = {n: given.pop(n) for n in ("text_embeds", "time_ids") if n in given}
            return self.module(**given, added_cond_kwargs=added, return_dict=False)
        tiny, x = "_class_name" in self.config, next(iter(given.values()))
        if self.component == "vae_decoder":
            return self.module.decode(x, return_dict=False)
        if tiny:
            latents = self.module.encoder(x)
            return [torch.cat([latents, torch.full_like(latents, LOG_VARIANCE)], 1)]
        return [self.module.encode(x).latent_dist.parameters]


def draw(name, shape):
    if len(shape) == 1:
        return 0.2 * torch.randn(shape) + (0 if name.endswith("bias") else 1)
    return torch.randn(shape) / math.sqrt(math.prod(shape[1:]))


@functools.cache
def network(name):
    component, config, _ = CASES[name]
    return Network(component, config, name.startswith("clip-xl"))


def error(found, expected):
    """The largest over outputs of the norm of the difference by that of what is expected."""
    assert found.keys() == expected.keys()
    worst = 0.0
    for name, value in expected.items():
        assert found[name].shape == value.shape
        assert found[name].dtype == np.float32
        computed = value != LOG_VARIANCE  # which is large, and always the same
        np.testing.assert_array_equal(found[name][~computed], LOG_VARIANCE)
        difference = (found[name] - value)[computed]
        worst = max(worst, np.linalg.norm(difference) / np.linalg.norm(value[computed]))
    return worst


# --- on NumPy -----------------------------------------------------------------------------------


def region(placed, storage):
    """Where all of a tensor's space starts and ends."""
    start = placed.offsets[storage] - storage.lead
    return start, start + storage.bytes


def content(machine, placed, storage):
    return machine.arena[slice(*region(placed, storage))]


def run_checked(graph, placed, machine, feed):
    """Run ops one by one; a tensor that is read must be as it was written.

    Before it is written, all of a tensor's space becomes NaN: whatever lives there is lost.
    """
    for entry in graph.inputs:
        write_input(machine.arena, placed.offsets, entry, feed[entry.name])
    wrote = {e.value.storage: content(machine, placed, e.value.storage).copy()
             for e in graph.inputs}  # fmt: skip
    in_place = 0
    for node, op, scratch in zip(graph.nodes, placed.ops, placed.scratch, strict=True):
        for value in node.reads:
            np.testing.assert_array_equal(
                content(machine, placed, value.storage), wrote[value.storage], node.name
            )
        space = region(placed, node.out.storage)
        if any(region(placed, value.storage) == space for value in node.reads):
            in_place += 1
        else:
            machine.arena[slice(*space)] = 0xFF
        machine.run(op, scratch)
        wrote[node.out.storage] = content(machine, placed, node.out.storage).copy()
    for entry in graph.outputs:
        storage = entry.value.storage
        np.testing.assert_array_equal(content(machine, placed, storage), wrote[storage])
    return in_place


def interpret(name, size, weights="fp32", activations="fp32"):
    net = network(name)
    feed = net.feed(size)
    shapes = {n: v.shape for n, v in feed.items()}
    kind = activation_type(activations)
    graph = models.build(net.component, net.config, shapes, kind, net.outputs)
    places, data = net.files(weights, activations == "int8")
    placed = lay_out(graph, places, lambda op: 100 + op.kind)
    machine = numpy_engine.Machine(placed.arena_bytes, data)
    run_checked(graph, placed, machine, feed)
    return {o.name: read_output(machine.arena, placed.offsets, o) for o in graph.outputs}


@pytest.mark.parametrize("name, size", RUNS, ids=str)
def test_graph_is_torchs(name, size):
    expected = network(name).reference(network(name).feed(size))
    assert error(interpret(name, size), expected) <= 1e-5


@pytest.mark.parametrize("keep", [0, -1], ids=["forgotten", "kept"])
@pytest.mark.parametrize("rows", [2, 6])
@pytest.mark.parametrize(
    "name, size",
    [("vae_decoder", (3, 5)), ("vae_decoder-odd", (5, 9)), ("vae_encoder", (40, 24)),
     ("taesd_decoder", (3, 2)), ("taesd_encoder", (12, 20)), ("unet", (10, 16))],
)  # fmt: skip
def test_graph_in_bands_is_torchs(name, size, rows, keep):
    """tests/test_banded_graphs.py compares the bytes of the engine; this one, what is computed."""
    net = network(name)
    feed = net.feed(size)
    whole = models.build(net.component, net.config, {n: v.shape for n, v in feed.items()},
                         Type.F32, net.outputs)  # fmt: skip
    sizes = choices(whole)
    if not sizes:
        pytest.skip("nothing in it is large enough")
    graph = in_bands(whole, Bands(rows, sizes[keep]), lambda node: True)
    assert len(graph.nodes) > len(whole.nodes)
    places, data = net.files("fp32")
    placed = lay_out(graph, places, lambda op: 100 + op.kind)
    machine = numpy_engine.Machine(placed.arena_bytes, data)
    for entry in graph.inputs:
        write_input(machine.arena, placed.offsets, entry, feed[entry.name])
    for op, scratch in zip(placed.ops, placed.scratch, strict=True):
        machine.run(op, scratch)
    found = {o.name: read_output(machine.arena, placed.offsets, o) for o in graph.outputs}
    assert error(found, net.reference(feed)) <= 1e-5


@pytest.mark.parametrize("name", ["clip-xl-2", "unet-xl", "unet-sliced", "vae_decoder"])
def test_graph_in_bfloat16_is_torchs_within_its_precision(name):
    size = CASES[name][2][0]
    expected = network(name).reference(network(name).feed(size))
    assert error(interpret(name, size, "bf16", "bf16"), expected) <= BF16


# --- on the engine ------------------------------------------------------------------------------


def make_bundle(folder, name, weights="fp32", activations="fp32"):
    return network(name).write(folder, weights, activations)


def on_engine(folder, name, size, weights, activations, **options):
    bundle = make_bundle(folder, name, weights, activations)
    engine = NativeEngine(bundle, network(name).component, **options)
    return engine(network(name).feed(size))


@NO_ENGINE
@pytest.mark.parametrize("name, size", RUNS, ids=str)
def test_engine_is_torchs(tmp_path, name, size):
    expected = network(name).reference(network(name).feed(size))
    assert error(on_engine(tmp_path, name, size, "fp32", "fp32"), expected) <= FP32


@NO_ENGINE
@pytest.mark.parametrize(
    "weights, activations, bound",
    [
        ("bf16", "bf16", BF16),
        ("fp16", "fp16", FP16),
        ("bf16", "fp32", BF16),
        ("fp16", "fp32", FP16),
    ],
)
@pytest.mark.parametrize("name", CASES)
def test_engine_in_16_bits_is_torchs_within_its_precision(
    tmp_path, name, weights, activations, bound
):
    size = CASES[name][2][0]
    expected = network(name).reference(network(name).feed(size))
    assert error(on_engine(tmp_path, name, size, weights, activations), expected) <= bound


FEW_BITS_RUNS = [  # weights, activations, how far the engine is from the oracle on the same weights
    ("int8", "fp32", FP32), ("int4", "fp32", FP32),
    ("int8", "fp16", FP16), ("int4", "fp16", FP16),
    ("int8", "bf16", BF16), ("int4", "bf16", BF16),
    ("int8", "int8", 2 * BF16),  # where the last bit differs, a pixel may round to another 127th
]  # fmt: skip


@NO_ENGINE
@pytest.mark.parametrize("weights, activations, bound", FEW_BITS_RUNS)
@pytest.mark.parametrize(
    "name", ["clip", "clip-xl-2", "unet", "unet-sliced", "vae_decoder-odd", "vae_encoder-wide"]
)
def test_engine_in_few_bits_is_the_oracle(tmp_path, name, weights, activations, bound):
    size = CASES[name][2][0]
    expected = interpret(name, size, weights, activations)
    assert error(on_engine(tmp_path, name, size, weights, activations), expected) <= bound


@NO_ENGINE
@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("activations", ["bf16", "int8"])
def test_pixels_become_int8_where_weights_are_if_the_bundle_says_so(tmp_path, weights, activations):
    net = network("unet")
    engine = NativeEngine(net.write(tmp_path, weights, activations), "unet", 1)
    ops = engine.program(models.sizes("unet", net.config, (8, 8), 7)).ops
    products = [op for op in ops if op.kind == Kind.MATMUL]
    assert {Type(op.weight_type) for op in products} == {STORED[weights]}
    assert {op.narrow for op in products} == {int(weights == activations == "int8")}


@NO_ENGINE
@pytest.mark.parametrize("activations", ["bf16", "int8"])
def test_attention_over_many_keys_is_of_int8_if_the_bundle_says_so(tmp_path, activations):
    net = network("unet")
    engine = NativeEngine(net.write(tmp_path, "int8", activations), "unet", 1)
    ops = engine.program(models.sizes("unet", net.config, (16, 16), 7)).ops
    attentions = [op for op in ops if op.kind == Kind.ATTENTION]
    many = [op.b.h * op.b.w >= 256 for op in attentions]
    assert set(many) == {False, True}
    assert [op.narrow for op in attentions] == [activations == "int8" and m for m in many]


# Twice what these networks come to: a step is a 127th or a 7th of the largest of its row.
NEAR = {("int8", "fp32"): 0.05, ("int4", "fp32"): 0.6, ("int8", "int8"): 0.1}


@pytest.mark.parametrize("name", ["clip", "unet", "vae_decoder"])
@pytest.mark.parametrize("weights, activations", NEAR)
def test_graph_in_few_bits_is_near_torchs(name, weights, activations):
    """The weights mean what they were made of, whatever both readers agree on."""
    size = CASES[name][2][0]
    expected = network(name).reference(network(name).feed(size))
    assert (
        error(interpret(name, size, weights, activations), expected) <= NEAR[weights, activations]
    )


@NO_ENGINE
@pytest.mark.parametrize("activations", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("name", ["clip", "unet", "vae_decoder"])
def test_engine_gives_the_same_bytes_with_any_threads_and_on_every_run(tmp_path, name, activations):
    bundle = make_bundle(tmp_path, name, activations, activations)
    feeds = [network(name).feed(size) for size in CASES[name][2]]
    first = [NativeEngine(bundle, network(name).component, 1)(feed) for feed in feeds]
    engine = NativeEngine(bundle, network(name).component, 3)
    for _ in range(2):  # other sizes in between, in the same arena
        for feed, expected in zip(feeds, first, strict=True):
            for key, value in engine(feed).items():
                np.testing.assert_array_equal(value, expected[key])


@NO_ENGINE
def test_engine_knows_its_plan_and_keeps_few_programs(tmp_path):
    engine = NativeEngine(make_bundle(tmp_path, "unet"), "unet", 1)
    net = network("unet")
    peaks = []
    for side in range(2, 16, 2):
        shapes = models.sizes("unet", net.config, (side, 4), 7)
        placed, program = engine.layout(shapes), engine.program(shapes)
        assert engine.program(shapes) is program
        assert [bytes(op) for op in program.ops] == [bytes(op) for op in placed.ops]
        assert program.arena_bytes == placed.arena_bytes
        peaks.append(placed.arena_bytes)
    assert peaks == sorted(peaks)
    assert len(engine._prepared) <= 4


@NO_ENGINE
@pytest.mark.parametrize(
    "change, message",
    [
        ({"sample": np.zeros((2, 4, 8, 8))}, "sample has the shape"),
        ({"sample": np.zeros((1, 4, 7, 8))}, "no multiples of 2"),
        ({"encoder_hidden_states": np.zeros((1, 7, 31))}, "encoder_hidden_states has the shape"),
        ({"timestep": np.zeros(2)}, "timestep has the shape"),
        ({"more": np.zeros(2)}, "takes sample, timestep, encoder_hidden_states"),
    ],
    ids=str,
)
def test_engine_refuses_inputs_that_do_not_fit(tmp_path, change, message):
    engine = NativeEngine(make_bundle(tmp_path, "unet"), "unet", 1)
    with pytest.raises(BundleError, match=re.escape(message)):
        engine(network("unet").feed((8, 8)) | change)


def spoil(index, name):
    """Ways in which an index can be wrong, and what the message says."""
    entry = index["tensors"][name]
    return {
        "format": lambda: index.update(format=2),
        "bytes": lambda: index.update(bytes=index["bytes"] + 1),
        "fields": lambda: index.update(more=1),
        f"no tensor '{name}'": lambda: index["tensors"].pop(name),
        "unknown tensor 'zero'": lambda: index["tensors"].update(zero=entry),
        "another form": lambda: entry.update(form="vector"),
        "no type": lambda: entry.update(type=["fp32"]),
        "is of no type": lambda: entry.update(type="int2"),
        "shape": lambda: entry.update(shape=[1]),
        "has not": lambda: entry.update(bytes=entry["bytes"] - 64),
        "is not at a multiple": lambda: entry.update(offset=entry["offset"] + 4),
        "inside the file": lambda: entry.update(offset=index["bytes"] // 64 * 64),
        "is not at": lambda: entry.update(offset=-64),
        "overlaps": lambda: entry.update(offset=index["tensors"]["conv_out.weight"]["offset"] - 64),
        f"the fields of {name}": lambda: entry.update(more=1),
        "must be fp32": lambda: index["tensors"]["conv_in.bias"].update(type="bf16"),
    }


@NO_ENGINE
@pytest.mark.parametrize("message", spoil({"tensors": {"a": {}}}, "a"))
def test_engine_refuses_an_index_that_does_not_fit(tmp_path, message):
    bundle = make_bundle(tmp_path, "unet")
    path, name = tmp_path / "unet" / "weights.json", "conv_in.weight"
    index = json.loads(path.read_text())
    message = message.replace("'a'", f"'{name}'").replace(" of a", f" of {name}")
    spoil(index, name)[message]()
    path.write_text(json.dumps(index))
    with pytest.raises(BundleError, match=re.escape(message)):
        NativeEngine(bundle, "unet", 1)


@NO_ENGINE
def test_engine_refuses_weights_of_another_type_than_activations(tmp_path):
    with pytest.raises(BundleError, match="activations are BF16"):
        NativeEngine(make_bundle(tmp_path, "unet", "fp32", "bf16"), "unet", 1)


def test_engine_that_is_not_built_says_so(tmp_path, monkeypatch):
    bundle = make_bundle(tmp_path, "taesd_decoder")
    monkeypatch.setattr(kernels, "_path", lambda: None)
    kernels.library.cache_clear()
    with pytest.raises(kernels.KernelError, match="not built") as caught:
        NativeEngine(bundle, "vae_decoder")
    assert "\n" not in str(caught.value)


# --- at full size -------------------------------------------------------------------------------

SD21 = {
    "text_encoder": SD15["text_encoder"] | {"hidden_size": 1024, "intermediate_size": 4096,
        "num_hidden_layers": 23, "num_attention_heads": 16, "hidden_act": "gelu"},
    "unet": SD15["unet"] | {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20],
                            "use_linear_projection": True},
}  # fmt: skip
FULL = {
    "sd15-text_encoder": (SD15, (8, 8)),
    "sd15-unet": (SD15, (32, 24)),
    "sd15-vae_decoder": (SD15, (16, 24)),
    "sd15-vae_encoder": (SD15, (192, 128)),
    "sd21-text_encoder": (SD21, (8, 8)),
    "sd21-unet": (SD21, (24, 32)),
    "sdxl-text_encoder": (SDXL, (8, 8)),
    "sdxl-text_encoder_2": (SDXL, (8, 8)),
    "sdxl-unet": (SDXL, (32, 16)),
}


@NO_ENGINE
@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_full_size_engine_is_torchs(tmp_path, request, name):
    if "slow" not in request.config.option.markexpr:
        pytest.skip("slow: ask for it with -m slow")
    component = name.split("-")[1]
    configs, size = FULL[name]
    config = configs["vae" if "vae" in component else component]
    net = Network(component, config, name == "sdxl-text_encoder" or component == "text_encoder_2")
    feed = net.feed(size)
    expected = net.reference(feed)
    bundle = {kind: net.write(tmp_path / kind, kind, kind) for kind in ("fp32", "bf16")}
    net.module = None
    errors = {}
    for kind in bundle:
        errors[kind] = error(NativeEngine(bundle[kind], component)(feed), expected)
        (tmp_path / kind / component / "weights.bin").unlink()
    print(name, errors)
    assert errors["fp32"] <= FP32
    assert errors["bf16"] <= BF16


# --- plans --------------------------------------------------------------------------------------


def full_size(config, component, size, kind=Type.BF16):
    """The plan of a real architecture; scratch as a tile for each of two threads."""
    part = config["vae" if "vae" in component else component]
    shapes = models.sizes(component, part, size)
    places = {p.name: Weight(p.type(kind), 0, 0) for p in models.weights(component, part)}
    graph = models.build(component, part, shapes, kind)
    return graph, lay_out(graph, places, lambda op: 200_000 if op.kind == Kind.MATMUL else 5000)


@pytest.mark.parametrize(
    "config, component, size",
    [
        (SD15, "text_encoder", (64, 64)),
        (SD15, "unet", (64, 64)),
        (SD15, "unet", (40, 72)),
        (SD15, "vae_decoder", (64, 64)),
        (SD15, "vae_encoder", (512, 512)),
        (SDXL, "unet", (128, 128)),
        (SDXL, "text_encoder_2", (64, 64)),
    ],
)
def test_no_two_live_tensors_overlap_and_the_arena_is_hardly_more_than_the_peak(
    config, component, size
):
    graph, placed = full_size(config, component, size)
    assert placed.arena_bytes <= 1.05 * placed.peak
    last = {v.storage: i for i, node in enumerate(graph.nodes) for v in node.reads}
    last |= {o.value.storage: len(graph.nodes) for o in graph.outputs}
    live = {region(placed, i.value.storage): last[i.value.storage] for i in graph.inputs}
    for index, (node, op) in enumerate(zip(graph.nodes, placed.ops, strict=True)):
        space = region(placed, node.out.storage)
        under = [v.storage for v in node.reads if region(placed, v.storage) == space]
        assert all(last[storage] == index for storage in under)
        live[space] = last[node.out.storage]
        spaces = sorted(live)
        if placed.scratch[index]:
            spaces = sorted([*spaces, (op.scratch, op.scratch + placed.scratch[index])])
        assert spaces[0][0] >= 0
        assert spaces[-1][1] <= placed.arena_bytes
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spaces)), node.name
        live = {s: end for s, end in live.items() if end > index}


def test_a_plan_is_the_same_each_time():
    (_, one), (_, two) = (full_size(SD15, "unet", (32, 32)) for _ in range(2))
    assert [bytes(op) for op in one.ops] == [bytes(op) for op in two.ops]
    assert one.live == two.live


def test_residuals_and_norms_are_written_in_place():
    graph, placed = full_size(SD15, "unet", (32, 32))
    in_place = {
        node.name
        for node in graph.nodes
        if any(region(placed, v.storage) == region(placed, node.out.storage) for v in node.reads)
    }
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0" in in_place
    assert "down_blocks.1.resnets.0.norm2" in in_place
    assert "up_blocks.0.resnets.0.conv2" in in_place


def test_the_decoder_needs_no_more_than_its_two_largest_tensors_and_room_for_scratch():
    _, placed = full_size(SD15, "vae_decoder", (64, 64))
    widest = 514 * 514 * 256 * 2
    assert placed.arena_bytes <= 2.05 * widest


@pytest.mark.parametrize("config", [SD15, SDXL, TINY_XL])
def test_weights_do_not_depend_on_size_and_have_a_name_each(config):
    for component in models.COMPONENTS:
        part = config.get("vae" if "vae" in component else component)
        if not part:
            continue
        packed = models.weights(component, part)
        assert len({p.name for p in packed}) == len(packed)
        size = (64, 128)
        graph = models.build(component, part, models.sizes(component, part, size), Type.BF16)
        assert list(graph.packed) == packed


# --- configs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "component, config, message",
    [
        ("unet", UNET | {"class_embed_type": "timestep"}, "class_embed_type is 'timestep'"),
        ("unet", UNET | {"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift"),
        ("unet", UNET | {"down_block_types": ["SimpleDown", "DownBlock2D"]}, "no block SimpleDown"),
        ("unet", UNET | {"attention_head_dim": [1, 2, 3]}, "3 values for 2 blocks"),
        ("unet", UNET | {"attention_head_dim": 3}, "not divisible by 3 heads"),
        ("unet", UNET | {"norm_num_groups": 5}, "not divisible by 5 groups"),
        ("unet", UNET | {"act_fn": "mish"}, "act_fn is 'mish'"),
        ("unet", UNET | {"block_out_channels": [24, 40]}, "no multiple of 16"),
        ("unet", UNET | {"cross_attention_dim": [32, 48]}, "only one width"),
        ("vae_decoder", VAE | {"up_block_types": ["Other"] * 4}, "up_block_types"),
        ("vae_decoder", VAE | {"shift_factor": 0.1}, "shift_factor is 0.1"),
        ("vae_decoder", TAESD | {"upsampling_scaling_factor": 4}, "upsampling_scaling_factor"),
        ("vae_encoder", TAESD | {"encoder_block_out_channels": [16, 32, 32]}, "one number of"),
        ("text_encoder", CLIP | {"hidden_act": "tanh"}, "hidden_act is 'tanh'"),
        ("text_encoder", CLIP | {"eos_token_id": [1, 2]}, "eos_token_id"),
        ("safety_checker", {}, "safety_checker is not a component"),
    ],
)
def test_a_config_that_is_not_supported_is_one_clear_line(component, config, message):
    with pytest.raises(GraphError, match=re.escape(message)) as caught:
        models.weights(component, config)
    assert "\n" not in str(caught.value)


def test_an_output_that_there_is_not():
    with pytest.raises(GraphError, match=re.escape("no output hidden_states.0")):
        models.weights("text_encoder", CLIP, ["hidden_states.0"])


@pytest.mark.parametrize("kind", [Type.F32, Type.BF16, Type.F16])
def test_narrowed_numbers_are_the_nearest(kind):
    values = np.array([1, 1 + 2**-8, 1 + 3 * 2**-8, -0.1, 3e-6, 6e4, np.inf, np.nan], np.float32)
    dtype = {Type.F32: torch.float32, Type.BF16: torch.bfloat16, Type.F16: torch.float16}[kind]
    expected = torch.from_numpy(values).to(dtype).float().numpy()
    np.testing.assert_array_equal(widen(narrow(values, kind), kind), expected)


def test_slices_of_joined_projections_are_aligned():
    graph, placed = full_size(SD15, "unet", (8, 8))
    slices = [v for node in graph.nodes for v in node.reads if v.first]
    assert slices
    assert all(v.first * 2 % 64 == 0 and v.c % LANES == 0 for v in slices)
    assert all(op.a.offset % 64 == 0 and op.out.offset % 64 == 0 for op in placed.ops)

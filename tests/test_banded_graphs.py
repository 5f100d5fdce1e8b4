"""Networks in bands of rows: the bytes of the whole, in places that nobody else writes upon.

Every run begins with an arena of NaN, so that what is read before it is written shows.
"""

import itertools
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferrotype import bundle as bundles
from ferrotype import kernels
from ferrotype.benchmarks import random_bundles
from ferrotype.kernels import Kind, Program
from ferrotype.runtime import models
from ferrotype.runtime.bands import ABOVE, BELOW, Bands, choices, in_bands
from ferrotype.runtime.engines.native import (
    WEIGHTS,
    Files,
    Fit,
    NativeEngine,
    _uses_winograd,
    read_index,
    read_output,
    write_input,
)
from ferrotype.runtime.layout import IN_PLACE, lay_out
from ferrotype.runtime.pipeline import EMBEDDED
from ferrotype.runtime.program import INT8, activation_type
from ferrotype.tests.random_networks import FEW_BITS, MORE, PRECISIONS, few, kl, tiny, vae

pytestmark = pytest.mark.skipif(not kernels.available(), reason="the native engine is not built")

ISAS = kernels.isas() if kernels.available() else []
UNIT = 16  # bytes: every tensor's pixels are blocks of so many, whatever its type
ROWS = (2, 3, 5, 8, 16, 30, 32, 64)


# --- networks -----------------------------------------------------------------------------------

SHAPE = vae([16, 32, 64, 64], layers_per_block=2)  # as Stable Diffusion's, an eighth as wide


@st.composite
def networks(draw, most):
    """Either half of an autoencoder, for pictures of up to `most` pixels in a side."""
    component = draw(st.sampled_from(["vae_decoder", "vae_encoder"]))
    config = draw(st.one_of(kl(), tiny()))
    scale = 2 ** (len(config["block_out_channels"]) - 1)
    sides = st.integers(1, most // scale)
    size = draw(st.tuples(sides, sides))
    if component == "vae_encoder":
        size = size[0] * scale, size[1] * scale
    return Network(component, config, size, *draw(st.sampled_from([*PRECISIONS, *FEW_BITS])))


class Network:
    """A component with random weights, as the engine sees it; weights are made when it runs."""

    def __init__(self, component, config, size, weights="bf16", activations="bf16"):
        self.text = f"Network{component, config, size, weights, activations}"
        self.shapes = models.sizes(component, config, size)
        outputs = tuple(models.interface(component, config)[1])
        packed = models.weights(component, config, outputs)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            forms = random_bundles.forms(component, packed, weights, activations)
            random_bundles.write_weights(folder, packed, *forms)
            places = read_index(folder, packed, activations == INT8)
            data = np.fromfile(folder / WEIGHTS, np.uint8)
        self.weights = kernels.aligned(data.nbytes)
        self.weights[:] = data
        kind = activation_type(activations)
        narrow = activations == INT8
        self.files = Files(component, config, outputs, Path(), places, data.nbytes, kind, narrow)
        rng = np.random.default_rng(1)
        self.inputs = {
            name: rng.standard_normal(shape, np.float32) for name, shape in self.shapes.items()
        }

    def __repr__(self):
        return self.text

    def graph(self):
        return self.files.graph(self.shapes)

    def keeps(self):
        return choices(self.graph())

    def prepare(self, bands=None, threads=1, isa=None):
        return self.files.prepare(self.shapes, bands, threads, isa)

    def run(self, bands=None, threads=1, isa=None, prepared=None):
        """Every output's bytes; the arena is NaN before."""
        graph, placed = prepared or self.prepare(bands, threads, isa)
        arena = kernels.aligned(placed.arena_bytes)
        arena[:] = 0xFF
        for entry in graph.inputs:
            write_input(arena, placed.offsets, entry, self.inputs[entry.name])
        program = Program(placed.ops, placed.arena_bytes, self.weights.nbytes, threads, isa)
        program.run(arena, self.weights)
        found = {o.name: read_output(arena, placed.offsets, o) for o in graph.outputs}
        assert all(np.isfinite(array).all() for array in found.values())
        return {name: array.tobytes() for name, array in found.items()}


# --- the same bytes -----------------------------------------------------------------------------


@few(max_examples=20 * MORE)
@given(
    network=networks(most=72),
    rows=st.one_of(st.sampled_from(ROWS), st.integers(2, 64)),
    threads=st.integers(1, 3),
    isa=st.sampled_from(ISAS[:-1] or ISAS or [None]),
)
def test_bands_give_the_bytes_of_the_whole(network, rows, threads, isa):
    whole = network.run(threads=threads, isa=isa)
    for keep in network.keeps():
        assert network.run(Bands(rows, keep), threads, isa) == whole, keep


@few(max_examples=8 * MORE)
@given(network=networks(most=32), rows=st.integers(2, 16), data=st.data())
def test_scalar_bands_give_the_bytes_of_the_whole(network, rows, data):
    keep = data.draw(st.sampled_from(network.keeps() or [0]), "keep")
    whole = network.run(isa="scalar")
    assert network.run(Bands(rows, keep), 1, "scalar") == whole


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", [*PRECISIONS, *FEW_BITS], ids="-".join)
def test_every_type_on_every_instruction_set(isa, precision):
    for component, size in (("vae_decoder", (3, 5)), ("vae_encoder", (40, 24))):
        network = Network(component, vae([16, 32, 48, 64]), size, *precision)
        types = {place.type.name for place in network.files.places.values()}
        assert precision not in FEW_BITS or types & {"I8", "I4"}
        whole = network.run(isa=isa)
        for keep in network.keeps()[::3]:
            assert network.run(Bands(8, keep), 2, isa) == whole


@pytest.mark.parametrize("size", [(2, 4), (2, 5), (5, 2), (1, 9)], ids=str)
def test_bands_of_any_height(size):
    """From two rows to more than there are; those of the smallest images move by one row."""
    network = Network("vae_decoder", vae([16, 16, 32]), size)
    whole = network.run()
    for rows in range(2, 4 * size[1] + 2):
        assert network.run(Bands(rows, 0)) == whole, rows


def test_the_border_below_comes_along_with_the_last_rows():
    """A copy clears the border below it first, which was the row that it was to read."""
    for rows, height in ((2, 8), (3, 9)):
        network = Network("vae_decoder", vae([16, 16, 16, 16]), (1, height))
        whole = network.run()
        assert all(network.run(Bands(rows, keep)) == whole for keep in network.keeps()[::2])


def test_a_product_does_not_lie_upon_what_it_multiplies():
    """Attention's last layer reads all channels of a pixel for every panel of its own."""
    network = Network("vae_decoder", vae([96, 96]), (6, 10), "fp32", "fp32")
    whole = network.run()
    for keep in network.keeps():
        prepared = network.prepare(Bands(4, keep))
        check_owners(*prepared)
        assert network.run(prepared=prepared) == whole


@pytest.mark.parametrize(
    ("channels", "groups", "size", "rows"),
    [([24, 96], 2, (26, 26), 30), ([32, 16, 24, 24], 8, (40, 64), 32)],
    ids=str,
)
def test_what_grows_or_makes_room_is_in_nobody_elses_place(channels, groups, size, rows):
    """A tensor that is pinned has its life to itself: not that of one that it might lie upon."""
    config = vae(channels, groups, layers_per_block=2, mid_block_add_attention=False)
    network = Network("vae_encoder", config, size)
    whole = network.run()
    for keep in network.keeps():
        prepared = network.prepare(Bands(rows, keep))
        check_owners(*prepared)
        assert network.run(prepared=prepared) == whole


def test_two_layouts_are_alike():
    """A plan's and the run's: the order of a set hangs on the addresses of objects."""
    network = Network("vae_encoder", vae([32, 16, 24, 24], 8, layers_per_block=2), (40, 64))
    for keep in network.keeps():
        arenas = {network.prepare(Bands(32, keep))[1].arena_bytes for _ in range(8)}
        assert len(arenas) == 1


def test_a_small_picture_is_left_alone():
    network = Network("vae_decoder", vae([16, 16]), (3, 3))
    assert network.keeps() == []
    assert len(network.prepare(Bands(16, 0))[0].nodes) == len(network.graph().nodes)


def test_the_embedded_autoencoder_in_bands_gives_its_own_bytes():
    bundle = bundles.load(EMBEDDED)
    for component, size in (("vae_decoder", (20, 28)), ("vae_encoder", (160, 224))):
        shapes = models.sizes(component, bundle.component(component).config, size)
        rng = np.random.default_rng(0)
        inputs = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
        plain = NativeEngine(bundle, component, 2)
        (whole,) = plain(inputs).values()
        for keep in choices(plain._files.graph(shapes))[::2]:
            banded = NativeEngine(bundle, component, 2, fit=Fit(Bands(16, keep)))
            (found,) = banded(inputs).values()
            assert found.tobytes() == whole.tobytes()
            assert banded.layout(shapes).arena_bytes < plain.layout(shapes).arena_bytes


# --- places -------------------------------------------------------------------------------------


def reach(node, role):
    """The first and last row that an op reads of an image, with what lies beyond those given."""
    value, settings = getattr(node, role), node.settings
    top, end = value.top, value.top + value.h
    if role != "a" or node.kind is not Kind.MATMUL or settings.get("side") != 3:
        return top, end
    doubled, pad = settings.get("upsample"), settings.get("pad")
    above = doubled or pad
    below = doubled or settings["stride"] == 1 or not pad
    return top - bool(above), end + bool(below)


def span(value, rows, offset):
    """Units of 16 bytes in the arena, of rows from the border on their left to that on the right.

    A planar tensor, and one whose pixels are joined, is a single piece.
    """
    s = value.storage
    if s.planar or value.joined:
        return offset // UNIT, -(-(offset + s.bytes - s.lead) // UNIT)
    size, edge = s.row * s.type.bytes, s.border * s.pixel * s.type.bytes
    return (offset + rows[0] * size - edge) // UNIT, (offset + rows[1] * size - edge) // UNIT


def check_owners(graph, placed):
    """Walk through a program and watch whose bytes every piece of the arena holds.

    What an op reads must be its tensor's own, written by it and by nobody since.
    """
    owner = np.full(placed.arena_bytes // UNIT + 1, -1, np.int64)
    number = {storage: i for i, storage in enumerate(placed.offsets)}

    def pixel(value):
        return placed.offsets[value.storage] + value.tensor().offset - value.storage.lead

    def piece(value, rows):
        first, last = span(value, rows, placed.offsets[value.storage])
        assert 0 <= first <= last < len(owner)
        return slice(first, last)

    for entry in graph.inputs:
        owner[piece(entry.value, (0, entry.value.h))] = number[entry.value.storage]
    for index, (node, op) in enumerate(zip(graph.nodes, placed.ops, strict=True)):
        for role in ("a", "b", "c", "add"):
            if (value := getattr(node, role)) is not None:
                found = owner[piece(value, reach(node, role))]
                assert (found == number[value.storage]).all(), (index, node.name, role)
        mine, work = -2 - index, op.scratch // UNIT
        owner[work : work + placed.scratch[index] // UNIT] = mine
        for value in (*node.reads, node.out):
            rows = value.top, value.top + value.h
            assert not (owner[piece(value, rows)] == mine).any(), (index, node.name, "scratch")
        out, border = node.out, node.out.storage.border
        rows = (
            out.top - border * (not node.band & ABOVE),
            out.top + out.h + border * (not node.band & BELOW),
        )
        written = piece(out, rows)
        for role in ("a", "b", "c", "add"):
            if (value := getattr(node, role)) is not None:
                read = piece(value, reach(node, role))
                apart = read.stop <= written.start or written.stop <= read.start
                in_place = role in IN_PLACE.get(node.kind, ()) and pixel(value) == pixel(out)
                assert apart or in_place, (index, node.name, role, "is written upon")
        owner[written] = number[out.storage]
    for entry in graph.outputs:
        found = owner[piece(entry.value, (0, entry.value.h))]
        assert (found == number[entry.value.storage]).all(), entry.name


def lives(graph):
    """The first and the last op at which every tensor is written or read."""
    found = {entry.value.storage: [0, 0] for entry in graph.inputs}
    for i, node in enumerate(graph.nodes):
        for value in (node.out, *node.reads):
            found.setdefault(value.storage, [i, i])[1] = i
    for entry in graph.outputs:
        found[entry.value.storage][1] = len(graph.nodes) - 1
    return found


def check_overlaps(graph, placed):
    """Tensors of the same time lie apart, unless one was put upon the other on purpose."""
    alive = lives(graph)
    start = {s: placed.offsets[s] - s.lead for s in alive}
    for storage, first in start.items():
        assert first % 64 == 0
        assert 0 <= first <= placed.arena_bytes - storage.bytes
    for a, b in itertools.combinations(alive, 2):
        early, late = sorted((a, b), key=lambda s: alive[s])
        if alive[early][1] < alive[late][0]:
            continue
        if start[a] >= start[b] + b.bytes or start[b] >= start[a] + a.bytes:
            continue
        pinned = a.pin is not None and b.pin is not None
        in_place = start[a] == start[b] and alive[early][1] == alive[late][0]
        assert pinned or in_place or under(late) is under(early), (alive[a], alive[b])


def under(storage):
    """The tensor at the bottom of those that lie in one place."""
    return storage if storage.upon is None else under(storage.upon)


@few(max_examples=20 * MORE)
@given(network=networks(most=128), rows=st.sampled_from(ROWS), threads=st.integers(1, 4))
def test_a_tensor_has_its_place_to_itself_as_long_as_it_is_read(network, rows, threads):
    for bands in (None, *(Bands(rows, keep) for keep in network.keeps()[::3])):
        graph, placed = network.prepare(bands, threads)
        check_overlaps(graph, placed)
        check_owners(graph, placed)


@pytest.mark.parametrize("component", ["vae_decoder", "vae_encoder"])
def test_a_tensor_that_grows_into_the_place_of_another(component):
    """They overlap, and save something; the owners of all bytes are watched."""
    network = Network(component, SHAPE, (12, 9) if component == "vae_decoder" else (96, 72))
    whole, pinned = network.run(), 0
    for keep, rows in itertools.product(network.keeps()[::2], (3, 8, 16)):
        graph, placed = network.prepare(Bands(rows, keep))
        pins = [s for s in placed.offsets if s.pin is not None]
        if pins:
            pinned += 1
            end = max(placed.offsets[s] - s.lead + s.bytes for s in pins)
            assert end < sum(s.bytes for s in pins)
            assert min(s.pin for s in pins) == 0
        check_owners(graph, placed)
        assert network.run(prepared=(graph, placed)) == whole
    assert pinned > 8


@few(max_examples=15 * MORE)
@given(network=networks(most=160), rows=st.sampled_from([4, 16, 32]))
def test_bands_never_take_more_than_the_whole_and_their_rings(network, rows):
    plain = network.prepare()[1].arena_bytes
    for keep in network.keeps():
        graph = network.graph()
        before = {v.storage for n in graph.nodes for v in (n.out, *n.reads)}
        winograd = partial(_uses_winograd, network.files.places, None)
        banded = in_bands(graph, Bands(rows, keep), winograd)
        rings = {v.storage for n in banded.nodes for v in (n.out, *n.reads)} - before
        placed = lay_out(banded, network.files.places, partial(kernels.scratch, threads=1))
        assert placed.arena_bytes <= plain + sum(s.bytes for s in rings), keep

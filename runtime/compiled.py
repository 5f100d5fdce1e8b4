"""Compiled programs: what an app without Python needs to draw with a native bundle, in one file.

The graphs, their layouts, the ladder of budgets, the sampler tables and the tokenizer are worked
out here, by the same functions that draw in Python; embed/c only interprets the result.  The file
holds fixed records in little-endian sections (docs/embed-c.md); weights stay in the bundle, whose
identity the file names.  Programs are for any number of threads and any instruction set: an op's
scratch lies above everything that is in use during it, so its size need not be known.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .. import bundle as bundles
from .. import kernels
from ..bundle import TEXT_ENCODERS, Bundle
from ..errors import FerrotypeError
from ..kernels import Op, Range
from . import plan, samplers
from .bands import in_bands
from .engines.native import WEIGHTS, Files, open_files
from .layout import Layout, lay_out
from .pipeline import Pipeline
from .program import Graph, Input, Output
from .recipes import RecipeRefusal
from .tokenizer import Tokenizer
from .window import schedule

MAGIC, VERSION = b"FERROC1\n", 1
ALIGN = 64  # bytes: where sections start
NONE = 0xFFFFFFFF
PAGE = 1 << 14  # the largest of the systems that run it: windows are of whole pages
ISA = "scalar"  # of the questions that have one answer on all; see _uses_winograd
STEPS = range(1, 51)  # of a model that takes any number
COMPONENTS = ("text_encoder", "text_encoder_2", "unet", "vae_decoder")
PORTS = (
    "input_ids", "sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids",
    "timestep_cond", "latent_sample", "states", "pooled", "out_sample", "picture",
)  # fmt: skip
ZERO_NEGATIVE, EMBEDS_GUIDANCE, POOLED, TIME_IDS, CHUNKS, LIMITED = (1 << i for i in range(6))
# Bytes beside weights and the arena in a process without Python, measured (docs/embed-c.md).
HOST = 2 << 20
PER_OP = 2 * ctypes.sizeof(Op) + 100  # the file's page, the executor's copy, a range
LATENT = 40  # per latent value: what the sampler's loop holds
TEXT = 16  # per value of a prompt's states: of two prompts, joined from pieces
PIXEL = 3
LESS = 0.95  # a way to run that saves less memory than this over a faster one is left out

SECTIONS = {  # of fixed records, in this order
    "text": "s",
    "model": "14I3d2f",
    "encoders": "14I",
    "added": "4I",
    "merges": "4I",
    "frequencies": "d",
    "preview": "f",
    "files": "4IQ32s",
    "programs": "8I5Q",
    "offers": "2I3Q",
    "ports": "6If1I2Q",
    "ops": f"{ctypes.sizeof(Op)}s",
    "ranges": "4Q",
    "tables": "5If",
    "rows": "9f",
    "symbols": "I",
}
HEADER = struct.Struct("<8s32sIIIIQ32s")


class CompileError(FerrotypeError):
    """A bundle that the C runtime cannot draw with, or not as asked."""


@dataclass
class _Sections:
    """The file's records, by section."""

    text: bytearray = field(default_factory=bytearray)
    records: dict[str, list[bytes]] = field(default_factory=lambda: {name: [] for name in SECTIONS})

    def add(self, section: str, *values: Any) -> int:
        """A record, packed by the section's form; returns its index."""
        self.records[section].append(struct.pack(f"<{SECTIONS[section]}", *values))
        return len(self.records[section]) - 1

    def count(self, section: str) -> int:
        return len(self.records[section])

    def spell(self, text: str) -> tuple[int, int]:
        """Where a text is, and its bytes."""
        data = text.encode()
        at = self.text.find(data)
        if at < 0:
            at = len(self.text)
            self.text += data
        return at, len(data)

    def to_bytes(self, identity: bytes) -> bytes:
        """The file: magic, the hash of all that follows it, the rest of the header, sections."""
        start = HEADER.size + 16 * len(SECTIONS)
        places, body = b"", bytearray()
        for name, records in self.records.items():
            body += b"\0" * (-(start + len(body)) % ALIGN)
            data = bytes(self.text) if name == "text" else b"".join(records)
            count = len(data) if name == "text" else len(records)
            places += struct.pack("<QQ", start + len(body), count)
            body += data
        rest = struct.pack(
            "<IIIIQ32s", VERSION, ctypes.sizeof(Op), kernels.ABI, len(SECTIONS),
            start + len(body), identity,
        ) + places + body  # fmt: skip
        return MAGIC + hashlib.sha256(rest).digest() + rest


def compile_programs(
    bundle: Bundle,
    sizes: Sequence[tuple[int, int]] = (),
    chunks: int = 1,
    samplers: Sequence[str] = (),
    steps: Sequence[int] = (),
) -> bytes:
    """The file of a native bundle for pictures of `sizes`, (width, height), by default its own.

    `chunks`: the most of a prompt.  `samplers`: names, by default the recipe's.  `steps`: numbers
    of them, by default all that the recipe allows, or 1 to 50.  The first of each is drawn where
    nobody says.  Raises CompileError, ValueError for a size or a sampler that the bundle does not
    take.
    """
    manifest = bundle.manifest
    if manifest.target != "native":
        raise CompileError(
            f"{bundle.folder} is for {manifest.target}: the C runtime draws with native bundles, "
            "convert with --target native"
        )
    if bundles.hash_file(bundle.path(bundles.MANIFEST)) != bundle.sha256:
        raise CompileError(
            f"{bundle.folder}: its {bundles.MANIFEST} was edited by hand, so its hash is not the "
            "bundle's identity: convert the checkpoint again"
        )
    sizes = [manifest.sizes.check(size) for size in sizes or [manifest.sizes.default]]
    encoders = [name for name in TEXT_ENCODERS if name in manifest.components]
    made = _Sections()
    recipe = manifest.recipe
    first = samplers[0] if samplers else recipe.sampler, steps[0] if steps else recipe.steps
    _add_model(made, bundle, encoders, sizes[0], *first)
    for name in encoders:
        _add_encoder(made, bundle, name)
    _add_files(made, bundle, (*encoders, "unet", "vae_decoder"))
    _add_tables(made, bundle, samplers, steps)
    for name in encoders:
        _add_component(made, bundle, name, sizes[0], 1)
    most = chunks if _reads_chunks(bundle) else 1
    for size in dict.fromkeys(sizes):
        for count in range(1, most + 1):
            _add_component(made, bundle, "unet", size, count)
        _add_component(made, bundle, "vae_decoder", size, 1)
    return made.to_bytes(bytes.fromhex(bundle.sha256))


# --- the model ----------------------------------------------------------------------------------


def _add_model(
    made: _Sections,
    bundle: Bundle,
    encoders: Sequence[str],
    size: tuple[int, int],
    sampler: str,
    steps: int,
) -> None:
    """With the size, the sampler and the steps of a caller who names none."""
    manifest, recipe = bundle.manifest, bundle.manifest.recipe
    pipe = Pipeline(bundle)
    decoder = bundle.component("vae_decoder").config
    inputs = bundle.component("unet").inputs
    widths = [_widths(bundle, name) for name in encoders]
    low, high = recipe.guidance_range or (0.0, 50.0)
    flags = (
        ZERO_NEGATIVE * recipe.zero_negative
        + EMBEDS_GUIDANCE * ("timestep_cond" in inputs)
        + POOLED * ("text_embeds" in inputs)
        + TIME_IDS * ("time_ids" in inputs)
        + CHUNKS * _reads_chunks(bundle)
        + LIMITED * (recipe.guidance_range is not None)
    )
    frequencies: Iterable[float] = ()
    if "timestep_cond" in inputs:  # as Pipeline._guidance_embedding
        frequencies = pipe.guidance_frequencies().tolist()
    for number in frequencies:
        made.add("frequencies", number)
    for number in np.array(manifest.preview, np.float32).reshape(-1).tolist():
        made.add("preview", number)
    made.add(
        "model", decoder["latent_channels"], pipe.pixels_per_latent, *size,
        steps, *made.spell(sampler), flags, sum(width for width, _ in widths),
        widths[-1][1] if "text_embeds" in inputs else 0, 2 * made.count("frequencies"),
        *made.spell(manifest.model), 0, recipe.guidance, low, high, decoder["scaling_factor"], 0.0,
    )  # fmt: skip


def _widths(bundle: Bundle, encoder: str) -> tuple[int, int]:
    """Channels of a text encoder's states, and of its pooled ones; 0 without."""
    outputs = bundle.component(encoder).outputs
    pooled = outputs.get("text_embeds")
    states = outputs[bundles.states_of(outputs)].shape[-1]
    return int(states), int(pooled.shape[-1]) if pooled else 0


def _reads_chunks(bundle: Bundle) -> bool:
    return isinstance(bundle.component("unet").inputs["encoder_hidden_states"].shape[1], str)


def _add_files(made: _Sections, bundle: Bundle, names: Sequence[str]) -> None:
    for name in names:
        path = f"{bundle.component(name).path}/{WEIGHTS}"
        file = bundle.manifest.files[path]
        digest = bytes.fromhex(file.sha256)
        made.add("files", COMPONENTS.index(name), *made.spell(path), 0, file.bytes, digest)


def _add_tables(
    made: _Sections, bundle: Bundle, names: Sequence[str], steps: Sequence[int]
) -> None:
    pipe, own = Pipeline(bundle), bundle.manifest.recipe
    usual = sorted({*(own.allowed_steps or STEPS), own.steps})
    for name in names or [own.sampler]:
        for count in steps or usual:
            try:
                table = samplers.table(pipe.recipe(count, name))
            except RecipeRefusal:
                raise
            except ValueError:  # as more steps than timesteps
                if steps:
                    raise
                continue
            first = made.count("rows")
            for row in table.rows:
                made.add("rows", *row)
            rows = len(table.rows)
            made.add("tables", *made.spell(name), count, first, rows, table.start_noise)


# --- the tokenizer ------------------------------------------------------------------------------

WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
NORMALIZER = {
    "type": "Sequence",
    "normalizers": [
        {"type": "NFC"},
        {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
        {"type": "Lowercase"},
    ],
}
SUFFIX = "</w>"


def _add_encoder(made: _Sections, bundle: Bundle, name: str) -> None:
    """A text encoder's tokenizer: byte symbols, merges and added tokens."""
    spec = bundle.manifest.tokenizers[TEXT_ENCODERS[name]]
    path = bundle.path(f"{spec.path}/tokenizer.json")
    tokenizer = Tokenizer(bundle, TEXT_ENCODERS[name])
    raw = json.loads(path.read_text(encoding="utf-8"))
    if not _is_clips(raw):
        raise CompileError(f"{path} is no CLIP tokenizer: the C runtime knows no other")
    if not tokenizer.is_plain:
        raise CompileError(
            f"{path} has a token of several vectors: the C runtime does not spell those out"
        )
    vocabulary: dict[str, int] = raw["model"]["vocab"]
    first_added = made.count("added")
    for token in raw["added_tokens"]:
        content, normal = token["content"], bool(token["normalized"])
        text = tokenizer.normalized(content) if normal else content
        made.add("added", *made.spell(text), token["id"], normal)
    first_merge = made.count("merges")
    for merge in _merges(raw["model"]["merges"], vocabulary):
        made.add("merges", *merge)
    for suffix in ("", SUFFIX):
        for symbol in byte_symbols():
            made.add("symbols", vocabulary.get(symbol + suffix, NONE))
    width, pooled = _widths(bundle, name)
    start, end, pad = tokenizer.frame
    unknown = vocabulary.get(raw["model"]["unk_token"] or "", NONE)
    restore = bundles.states_of(bundle.component(name).outputs) == "last_hidden_state"
    made.add(
        "encoders", COMPONENTS.index(name), spec.max_length, start, end, pad, unknown,
        first_added, made.count("added") - first_added,
        first_merge, made.count("merges") - first_merge, width, pooled, restore, 0,
    )  # fmt: skip


def _is_clips(raw: dict[str, Any]) -> bool:
    """Whether tokenizer.json computes what embed/c does; its ids and merges may be any."""
    first, second = raw["pre_tokenizer"].get("pretokenizers", [{}, {}])
    model = raw["model"]
    return (
        raw["normalizer"] == NORMALIZER
        and first.get("type") == "Split"
        and first["pattern"] == {"Regex": WORDS}
        and (first["behavior"], first["invert"]) == ("Removed", True)
        and second.get("type") == "ByteLevel"
        and (second["add_prefix_space"], second.get("use_regex", True)) == (False, True)
        and model["type"] == "BPE"
        and not any(model.get(k) for k in ("dropout", "continuing_subword_prefix", "fuse_unk"))
        and not any(model.get(k) for k in ("byte_fallback", "ignore_merges"))
        and model["end_of_word_suffix"] == SUFFIX
        and not any(t[k] for t in raw["added_tokens"] for k in ("lstrip", "rstrip", "single_word"))
    )


def _merges(merges: list, vocabulary: dict[str, int]) -> list[tuple[int, int, int, int]]:
    """(left, right, rank, result), sorted, so that a pair is found by halving."""
    found = {}
    for rank, merge in enumerate(merges):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        found[vocabulary[left], vocabulary[right]] = rank, vocabulary[left + right]
    return sorted((*pair, *what) for pair, what in found.items())


def byte_symbols() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary (Radford et al. 2019).

    Bytes that print stand for themselves, the others in their order for 256 and on.
    """
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in plain else next(others)) for byte in range(256)]


# --- programs -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Way:
    """A component's program, and how much of the weights it holds: all, or a window."""

    graph: Graph
    layout: Layout
    ranges: tuple[Range, ...]
    rows: int  # of bands
    offers: tuple[tuple[int, int], ...]  # bytes of the window or 0, bytes of weights in memory


def _add_component(
    made: _Sections, bundle: Bundle, name: str, size: tuple[int, int], chunks: int
) -> None:
    """Its programs, fastest first."""
    files = open_files(bundle, name)
    host = _host(bundle, name, size, chunks)
    for way in _ways(bundle, files, size, chunks):
        _add_program(made, files, way, (0, 0) if name in TEXT_ENCODERS else size, chunks, host)


def _add_program(
    made: _Sections, files: Files, way: _Way, size: tuple[int, int], chunks: int, host: int
) -> None:
    outputs = (output for output in way.graph.outputs if _port(files, output.name))
    ports: list[Input | Output] = [*way.graph.inputs, *outputs]
    first_port, first_op = made.count("ports"), made.count("ops")
    first_range = made.count("ranges")
    for entry in ports:
        _add_port(made, files, way.layout, entry)
    for op, above in zip(way.layout.ops, way.layout.ends, strict=True):
        op.scratch = above
        made.add("ops", bytes(op))
    for r in way.ranges:
        made.add("ranges", r.offset, r.bytes, r.first, r.last)
    program = made.add(
        "programs", COMPONENTS.index(files.component), *size, chunks, way.rows,
        first_port, len(ports), 0, first_op, len(way.layout.ops), first_range, len(way.ranges),
        way.layout.arena_bytes,
    )  # fmt: skip
    own = PER_OP * len(way.layout.ops)
    for window, weights in way.offers:
        made.add("offers", program, 0, window, weights, host + own)


def _ways(bundle: Bundle, files: Files, size: tuple[int, int], chunks: int) -> Iterator[_Way]:
    """Those that a budget could choose: each takes less memory than all before."""
    shapes = plan.shapes_of(bundle, files.component, size, chunks)
    least = math.inf
    for bands in plan.ways(files, shapes):
        graph = files.graph(shapes)
        if bands:
            graph = in_bands(graph, bands, lambda node: _uses_winograd(files, node))
        way = _way(files, graph, bands.rows if bands else 0)
        if way.layout.arena_bytes <= least * LESS:
            least = way.layout.arena_bytes
            yield way


def _way(files: Files, graph: Graph, rows: int) -> _Way:
    layout = lay_out(graph, files.places, lambda op: 0)
    passing = schedule(graph, files.places, files.bytes, PAGE)
    weights = plan.weights_but_tables(graph, files)
    offers = [(0, weights), *((w, w) for w in passing.windows(weights))]
    held = tuple((window, most + passing.rows) for window, most in offers)
    return _Way(graph, layout, passing.ranges, rows, held)


def _uses_winograd(files: Files, node: Any) -> bool:
    """Alike on all instruction sets, but for those with a matrix unit, which never do."""
    return kernels.uses_winograd(node.lower(files.places), ISA)


def _host(bundle: Bundle, name: str, size: tuple[int, int], chunks: int) -> int:
    """Bytes beside weights, arena and what each op and thread takes."""
    decoder = bundle.component("vae_decoder").config
    side = 2 ** (len(decoder["block_out_channels"]) - 1)
    pixels = size[0] * size[1]
    latents = decoder["latent_channels"] * pixels // side**2
    encoders = [n for n in TEXT_ENCODERS if n in bundle.manifest.components]
    width = sum(_widths(bundle, encoder)[0] for encoder in encoders)
    length = bundle.manifest.tokenizers["tokenizer"].max_length
    text = TEXT * chunks * length * width
    own = PIXEL * pixels if name == "vae_decoder" else 0
    return HOST + LATENT * latents + text + own


def _port(files: Files, name: str) -> str:
    """What the C runtime calls an array of a network; empty for an output that it does not read."""
    if name in PORTS and not (files.component == "vae_decoder" and name == "sample"):
        pooled = files.component in TEXT_ENCODERS and name == "text_embeds"
        return "pooled" if pooled else name
    if name == "sample":
        return "picture"
    return "states" if name == bundles.states_of(files.outputs) else ""


def _add_port(made: _Sections, files: Files, layout: Layout, entry: Input | Output) -> None:
    storage = entry.value.storage
    if storage.border or entry.value.c != storage.c or entry.value.h != storage.h:
        raise CompileError(f"{files.component}: {entry.name} does not lie in one piece")
    comes = isinstance(entry, Input)
    made.add(
        "ports", PORTS.index(_port(files, entry.name)), storage.type, storage.planar, storage.c,
        1 if storage.planar else storage.pixel, storage.h * storage.w,
        entry.shift if isinstance(entry, Input) else entry.fill, not comes,
        layout.offsets[storage], math.prod(entry.shape),
    )  # fmt: skip

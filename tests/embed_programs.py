"""The smallest file of programs that has every section: what the reader is fuzzed and broken with.

`python -m ferrotype.tests.embed_programs FOLDER` writes it as a corpus for embed/c/fuzz.cpp.
"""

import hashlib
import sys
from pathlib import Path

from ferrotype.kernels import Act, Type
from ferrotype.runtime import compiled
from ferrotype.runtime.compiled import COMPONENTS, NONE, _Sections
from ferrotype.runtime.engines.native import Files
from ferrotype.runtime.program import LINE, Net, Weight, round_up

SIZE, SIDE, CHANNELS, TOKENS, WIDTH = 64, 16, 4, 8, 16
HASHED = len(compiled.MAGIC) + 32  # where what is hashed begins


def smallest(kind: Type = Type.F32) -> bytes:
    """A model of a few ops a stage; its weights may be zeros."""
    made = _Sections()
    for number in range(3 * (CHANNELS + 1)):
        made.add("preview", number / 10)
    made.add(
        "model", CHANNELS, SIDE, SIZE, SIZE, 2, *made.spell("lcm"), 0, WIDTH, 0, 0,
        *made.spell("smallest"), 0, 1.0, 0.0, 50.0, 0.5, 0.0,
    )  # fmt: skip
    _add_tokenizer(made)
    for name, graph in _networks(kind).items():
        files = _files(name, graph, kind)
        path = made.spell(f"{name}/weights.bin")
        made.add("files", COMPONENTS.index(name), *path, 0, files.bytes, bytes(32))
        size = (0, 0) if name == "text_encoder" else (SIZE, SIZE)
        compiled._add_program(made, files, compiled._way(files, graph, 0), size, 1, 1 << 20)
    row = made.add("rows", 999, 1, 0.5, 0.5, 1, 0.5, 0, 0, 0.5)
    made.add("rows", 1, 1, 0.5, 0.5, 1, 0.5, 0.25, 0, 0)
    made.add("tables", *made.spell("lcm"), 2, row, 2, 1.0)
    return made.to_bytes(bytes(32))


def _add_tokenizer(made: _Sections) -> None:
    """Bytes, and words of two of them."""
    for suffix in (0, 256):
        for byte in range(256):
            made.add("symbols", suffix + byte if byte else NONE)
    for rank, pair in enumerate([(ord("a"), 256 + ord("b")), (ord("b"), ord("c"))]):
        made.add("merges", *pair, rank, 512 + rank)
    made.add("added", *made.spell("<|endoftext|>"), 515, 0)
    made.add("added", *made.spell("apple"), 516, 1)
    ids = (514, 515, 515, 515)
    made.add("encoders", 0, TOKENS, *ids, 0, 2, 0, 2, WIDTH, 0, 1, 0)


def _networks(kind: Type):
    text = Net(kind)
    ids = text.number_input("input_ids", (1, TOKENS), Type.I32)
    x = text.embedding("e", ids, 520, WIDTH, "table", "places", TOKENS)
    text.token_output("last_hidden_state", text.layer_norm("norm", x, 1e-5))
    unet = Net(kind)
    side = SIZE // SIDE
    x = unet.load(unet.image_input("sample", CHANNELS, side, side))
    time = unet.sinusoid("time", unet.number_input("timestep", (1,)), WIDTH, False, 0.0)
    states = unet.token_input("encoder_hidden_states", TOKENS, WIDTH)
    x = unet.conv("in", x, WIDTH, add=unet.linear("t", time, WIDTH, act=Act.SILU))
    x = unet.attention("attend", x, states, states, 2)
    unet.image_output("out_sample", unet.store(unet.conv("out", x, CHANNELS)))
    decoder = Net(kind)
    x = decoder.load(decoder.image_input("latent_sample", CHANNELS, side, side))
    x = decoder.group_norm("norm", decoder.conv("up", x, WIDTH, upsample=True), 4, 1e-5, Act.SILU)
    for i in range(3):
        x = decoder.conv(f"up{i}", x, WIDTH if i < 2 else 3, upsample=True)
    decoder.image_output("sample", decoder.store(x))
    return {
        "text_encoder": text.graph(), "unet": unet.graph(), "vae_decoder": decoder.graph()
    }  # fmt: skip


def _files(name, graph, kind):
    places, end = {}, 0
    for packed in graph.packed:
        size, _ = packed.bytes(kind)
        places[packed.name] = Weight(packed.type(kind), end, size)
        end = round_up(end + size, LINE)
    outputs = tuple(output.name for output in graph.outputs)
    return Files(name, {}, outputs, Path("unused"), places, end, kind, False)


def sealed(data: bytes | bytearray) -> bytes:
    """A file that was changed, with the hash that it should have."""
    magic, rest = data[: len(compiled.MAGIC)], data[HASHED:]
    return magic + hashlib.sha256(rest).digest() + rest


if __name__ == "__main__":
    for one in (Type.F32, Type.BF16):
        Path(sys.argv[1], f"smallest-{one.name.lower()}").write_bytes(smallest(one))


__all__ = ["HASHED", "SIZE", "sealed", "smallest"]

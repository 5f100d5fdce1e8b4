"""The checkpoint's CLIP tokenizer, written in both forms that other tools read."""

from __future__ import annotations

import gzip
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from .. import bundle as bundles
from .checkpoint import VOCABULARY, Checkpoint, ConvertError
from .clip import END, SPECIAL, START, ClipTokenizer

TOKEN_FIELDS = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
SHIPPED = ("vocab.json", "merges.txt", "special_tokens_map.json")


def write_tokenizer(
    checkpoint: Checkpoint, folder: Path, encoder: str = "text_encoder"
) -> bundles.Tokenizer:
    """Write the tokenizer of a text encoder to a folder of its name below `folder`.

    It gets tokenizer.json, and vocab.json with merges.txt for older tools.
    Raises ConvertError if it is no CLIP tokenizer.
    """
    kind = bundles.TEXT_ENCODERS[encoder]
    out = folder / kind
    out.mkdir()
    given = checkpoint.tokenizers[kind]
    if given == VOCABULARY:
        _write_vocabulary(out)
        given = out
    for name in SHIPPED:
        if (given / name).is_file() and given != out:
            shutil.copyfile(given / name, out / name)
    source = of(checkpoint, kind)
    fast = source.backend.to_str(pretty=False)
    (out / "tokenizer.json").write_text(fast + "\n", encoding="utf-8")
    length = checkpoint.configs[encoder]["max_position_embeddings"]
    _write_old_form(out)
    if kind in checkpoint.pads:
        _write_special_tokens(out, source)
    _write_config(given, out, source, length)
    if added := checkpoint.tokens.get(kind):
        _write_added(out, source, added)
    return bundles.Tokenizer(path=kind, max_length=length, pad_token=source.pad_token)


def of(checkpoint: Checkpoint, kind: str) -> ClipTokenizer:
    """The tokenizer of a checkpoint, with its new tokens.

    Raises ConvertError if its text encoder knows fewer tokens.
    """
    with _folder(checkpoint, kind) as folder:
        found = ClipTokenizer(folder, checkpoint.pads.get(kind))
    encoder = next(name for name, k in bundles.TEXT_ENCODERS.items() if k == kind)
    known = checkpoint.configs[encoder].get("vocab_size", len(found))
    if len(found) > known:
        raise ConvertError(
            f"{kind} has {len(found):,} tokens, {encoder} knows {known:,}: give its own, "
            "--tokenizer FOLDER"
        )
    found.add(checkpoint.tokens.get(kind, ()))
    return found


def theirs(checkpoint: Checkpoint, kind: str) -> Any:
    """transformers' own tokenizer of a checkpoint, new tokens too: what a check compares with."""
    with _folder(checkpoint, kind) as folder:
        found = original(folder, checkpoint.pads.get(kind))
    found.add_tokens(list(checkpoint.tokens.get(kind, ())))
    return found


@contextmanager
def _folder(checkpoint: Checkpoint, kind: str) -> Iterator[Path]:
    """Where the tokenizer's files are; CLIP's own are unpacked for so long."""
    given = checkpoint.tokenizers[kind]
    if given != VOCABULARY:
        yield given
        return
    with tempfile.TemporaryDirectory() as folder:
        _write_vocabulary(Path(folder))
        yield Path(folder)


def original(folder: Path, pad: str | None = None) -> Any:
    """transformers' own tokenizer of a folder, which pads with `pad` if that is told."""
    from transformers import CLIPTokenizerFast

    options = {} if pad is None else {"pad_token": pad}
    try:
        return CLIPTokenizerFast.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:  # transformers raises whatever its parsers raise
        message = str(error).strip().splitlines()[0]
        raise ConvertError(f"{folder} is no CLIP tokenizer: {message}") from None


def original_ids(tokenizer: Any, prompt: str, length: int) -> np.ndarray:
    """A prompt's ids, (1, length), by transformers; diffusers spells new tokens out."""
    from diffusers.loaders import TextualInversionLoaderMixin

    prompt = TextualInversionLoaderMixin().maybe_convert_prompt(prompt, tokenizer)
    ids = tokenizer(prompt, padding="max_length", truncation=True, max_length=length).input_ids
    return np.array([ids], np.int64)


def _write_vocabulary(out: Path) -> None:
    """CLIP's tokenizer: bytes, bytes that end a word, one token for every merge, and two ends."""
    with gzip.open(VOCABULARY, "rt", encoding="utf-8") as file:
        merges = file.read().split("\n")[:-1]
    letters = list(_letters())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    tokens += [merge.replace(" ", "") for merge in merges] + [START, END]
    vocab = {token: i for i, token in enumerate(tokens)}
    text = json.dumps(vocab, ensure_ascii=False)
    (out / "vocab.json").write_text(text + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *merges]
    (out / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _letters() -> str:
    """The 256 characters that stand for bytes, in the order of CLIP's first tokens.

    Those that can be printed stand for themselves, the others for what follows Latin's first 256.
    """
    ends = (("!", "~"), ("¡", "¬"), ("®", "ÿ"))
    printed = [code for first, last in ends for code in range(ord(first), ord(last) + 1)]
    others = range(256, 256 + 256 - len(printed))
    return "".join(map(chr, [*printed, *others]))


def _write_special_tokens(out: Path, source: ClipTokenizer) -> None:
    special = SPECIAL | {"pad_token": source.pad_token}
    text = json.dumps(special, indent=1, ensure_ascii=False)
    (out / "special_tokens_map.json").write_text(text + "\n", encoding="utf-8")


def _write_old_form(out: Path) -> None:
    model = json.loads((out / "tokenizer.json").read_text("utf-8"))["model"]
    vocab, merges = out / "vocab.json", out / "merges.txt"
    if not vocab.is_file():
        vocab.write_text(json.dumps(model["vocab"], ensure_ascii=False) + "\n", encoding="utf-8")
    if not merges.is_file():
        pairs = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        merges.write_text("\n".join(["#version: 0.2", *pairs]) + "\n", encoding="utf-8")


def _write_added(out: Path, source: ClipTokenizer, added: Sequence[str]) -> None:
    """New tokens for transformers 4: beside its configuration, or in there if that has others."""
    known = source.added().items()
    tokens = {i: token for i, token in known if token.content in added}
    config = json.loads((out / "tokenizer_config.json").read_text("utf-8"))
    if "added_tokens_decoder" in config:
        config["added_tokens_decoder"] |= {
            str(i): {field: getattr(token, field) for field in TOKEN_FIELDS}
            for i, token in tokens.items()
        }
    files = {
        "added_tokens.json": {token.content: i for i, token in tokens.items()},
        "tokenizer_config.json": config,
    }
    for name, value in files.items():
        text = json.dumps(value, indent=1, ensure_ascii=False)
        (out / name).write_text(text + "\n", encoding="utf-8")


def _write_config(given: Path, out: Path, source: ClipTokenizer, length: int) -> None:
    """The checkpoint's tokenizer_config.json with the length that the graph takes.

    Other tools pad to model_max_length, whatever the text encoder reads.
    """
    path = given / "tokenizer_config.json"
    config = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    config |= {
        "model_max_length": length,
        "pad_token": source.pad_token,
        "tokenizer_class": "CLIPTokenizer",
    }
    text = json.dumps(config, indent=1, ensure_ascii=False)
    (out / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")

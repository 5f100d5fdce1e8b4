"""The checkpoint's CLIP tokenizer, written in both forms that other tools read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from .. import bundle as bundles
from .checkpoint import Checkpoint, ConvertError

SHIPPED = ("vocab.json", "merges.txt", "special_tokens_map.json")


def write_tokenizer(
    checkpoint: Checkpoint, folder: Path, encoder: str = "text_encoder"
) -> bundles.Tokenizer:
    """Write the tokenizer of a text encoder to a folder of its name below `folder`.

    It gets tokenizer.json, and vocab.json with merges.txt for older tools.
    Raises ConvertError if it is no CLIP tokenizer.
    """
    kind = bundles.TEXT_ENCODERS[encoder]
    given, out = checkpoint.tokenizers[kind], folder / kind
    out.mkdir()
    for name in SHIPPED:
        if (given / name).is_file():
            shutil.copyfile(given / name, out / name)
    source = original(checkpoint, kind)
    fast = source.backend_tokenizer.to_str(pretty=False)
    (out / "tokenizer.json").write_text(fast + "\n", encoding="utf-8")
    length = checkpoint.configs[encoder]["max_position_embeddings"]
    _write_old_form(out)
    _write_config(given, out, source, length)
    return bundles.Tokenizer(path=kind, max_length=length, pad_token=source.pad_token)


def original(checkpoint: Checkpoint, kind: str) -> Any:
    """transformers' own tokenizer, with the checkpoint's new tokens: what a check compares with."""
    from transformers import CLIPTokenizerFast

    folder = checkpoint.tokenizers[kind]
    try:
        source = CLIPTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises whatever its parsers raise
        message = str(error).strip().splitlines()[0]
        raise ConvertError(f"{folder} is no CLIP tokenizer: {message}") from None
    source.add_tokens(list(checkpoint.tokens.get(kind, ())))
    return source


def original_ids(tokenizer: Any, prompt: str, length: int) -> np.ndarray:
    """A prompt's ids, (1, length), by transformers; diffusers spells new tokens out."""
    from diffusers.loaders import TextualInversionLoaderMixin

    prompt = TextualInversionLoaderMixin().maybe_convert_prompt(prompt, tokenizer)
    ids = tokenizer(prompt, padding="max_length", truncation=True, max_length=length).input_ids
    return np.array([ids], np.int64)


def _write_old_form(out: Path) -> None:
    model = json.loads((out / "tokenizer.json").read_text("utf-8"))["model"]
    vocab, merges = out / "vocab.json", out / "merges.txt"
    if not vocab.is_file():
        vocab.write_text(json.dumps(model["vocab"], ensure_ascii=False) + "\n", encoding="utf-8")
    if not merges.is_file():
        pairs = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        merges.write_text("\n".join(["#version: 0.2", *pairs]) + "\n", encoding="utf-8")


def _write_config(given: Path, out: Path, source: Any, length: int) -> None:
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

"""CLIP's tokenizer, built from a checkpoint's files with the `tokenizers` library.

The rules are those of OpenAI's simple_tokenizer.py: NFC, white space to blanks, lower case, words,
bytes, byte-pair encoding with an end of word, a start and an end around the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from .errors import ConvertError

START, END = "<|startoftext|>", "<|endoftext|>"
SPECIAL = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
TOKENIZER = "tokenizer.json"
ADDED = "added_tokens.json"
ROLES = ("tokenizer_config.json", "special_tokens_map.json")
MAX_TOKENS = 1 << 22
MAX_BYTES = 1 << 28  # of a file


class ClipTokenizer:
    """The tokenizer of a folder, which pads with `pad` if that is told.

    Raises ConvertError if the folder holds no CLIP tokenizer.
    """

    def __init__(self, folder: Path, pad: str | None = None) -> None:
        try:
            vocab, merges, added = _read(folder)
            special = _special(folder) | ({} if pad is None else {"pad_token": pad})
            self.backend = _built(vocab, merges, special, added)
        except ConvertError:
            raise
        except Exception as error:  # whatever others' files make the parsers raise
            line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise ConvertError(f"{folder} is no CLIP tokenizer: {line}") from None
        self.pad_token, self.eos_token = special["pad_token"], special["eos_token"]

    def __len__(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def eos_token_id(self) -> int:
        """The id of the token that ends a text."""
        return self.vocab()[self.eos_token]

    def vocab(self) -> dict[str, int]:
        """Every token and its id."""
        return self.backend.get_vocab(with_added_tokens=True)

    def add(self, tokens: Sequence[str]) -> None:
        """New tokens, each a word of its own."""
        self.backend.add_tokens(list(tokens))

    def added(self) -> dict[int, tokenizers.AddedToken]:
        """Special and new tokens by id."""
        return self.backend.get_added_tokens_decoder()


def _read(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]], dict[int, str]]:
    """Ids by token, merges in their order, and tokens that were added later, by id."""
    added = {}
    if (folder / TOKENIZER).is_file():
        whole = _json(folder / TOKENIZER)
        model = whole["model"]
        if model.get("type", "BPE") != "BPE":
            raise ValueError(f"its model is {model['type']}")
        vocab, lines = model["vocab"], model["merges"]
        added = {int(t["id"]): str(t["content"]) for t in whole.get("added_tokens", ())}
    else:
        vocab = _json(folder / "vocab.json")
        text = (folder / "merges.txt").read_text("utf-8")
        lines = [line for line in text.split("\n") if line and not line.startswith("#version")]
    for name, ids in (_json(folder / ADDED) if (folder / ADDED).is_file() else {}).items():
        added[int(ids)] = str(name)
    merges = []
    for line in lines:
        first, second = line.split(" ") if isinstance(line, str) else line
        merges.append((str(first), str(second)))
    if not vocab or len(vocab) > MAX_TOKENS:
        raise ValueError(f"it has {len(vocab):,} tokens")
    return vocab, merges, {i: t for i, t in sorted(added.items()) if t not in vocab}


def _special(folder: Path) -> dict[str, str]:
    """The tokens around a text, after it and for what is unknown."""
    found = dict(SPECIAL)
    for name in ROLES:
        told = _json(folder / name) if (folder / name).is_file() else {}
        for role in SPECIAL:
            value = told.get(role)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                found[role] = value
    return found


def _built(
    vocab: dict[str, int],
    merges: list[tuple[str, str]],
    special: dict[str, str],
    added: dict[int, str],
) -> tokenizers.Tokenizer:
    missing = [f"{role} {token!r}" for role, token in special.items() if token not in vocab]
    if missing:
        raise ValueError(f"{', '.join(missing)} is not in the vocabulary")
    start, end = special["bos_token"], special["eos_token"]
    model = models.BPE(
        vocab=vocab,
        merges=merges,
        unk_token=special["unk_token"],
        continuing_subword_prefix="",
        end_of_word_suffix="</w>",
    )
    made = tokenizers.Tokenizer(model)
    blank = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
    made.normalizer = normalizers.Sequence([normalizers.NFC(), blank, normalizers.Lowercase()])
    words = tokenizers.Regex("|".join([*(re.escape(token) for token in (START, END)), WORDS]))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    made.post_processor = processors.RobertaProcessing(
        (end, vocab[end]), (start, vocab[start]), trim_offsets=False, add_prefix_space=False
    )
    made.decoder = decoders.ByteLevel()
    for token in dict.fromkeys(special.values()):
        made.add_special_tokens([tokenizers.AddedToken(token, normalized=False, special=True)])
    for i, token in added.items():
        made.add_tokens([token])
        if made.token_to_id(token) != i:
            free = made.token_to_id(token)
            raise ValueError(f"{token!r} is number {i}, the next free one is {free}")
    return made


def _json(path: Path) -> dict[str, Any]:
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ConvertError(f"{path} has {size:,} bytes, a tokenizer's file at most {MAX_BYTES:,}")
    value = json.loads(path.read_text("utf-8"))
    if not isinstance(value, dict):
        raise ConvertError(f"{path} holds a {type(value).__name__}, not an object")
    return value

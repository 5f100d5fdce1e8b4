"""Textual inversion: vectors that a new token of the prompt stands for."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle import TEXT_ENCODERS
from . import tokenizer
from .checkpoint import (
    Addition,
    Checkpoint,
    CheckpointError,
    Tensors,
    read_finite,
)
from .pickles import is_zip, read_text
from .single import FAMILY_OF, open_file

ANY = "*"  # what the token was in training, in files of A1111's web UI; its name is beside it
ENCODERS = {  # names in a file -> whose vectors; any other name alone is the token itself
    "emb_params": "text_encoder",
    ANY: "text_encoder",
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
    "text_encoders_0": "text_encoder",
    "text_encoders_1": "text_encoder_2",
}
WIDTHS = FAMILY_OF | {1280: "sdxl"}  # of a vector
TABLE = "embeddings.token_embedding.weight"
OLD_EOS = 2  # in configs of before transformers 4.31; there the end token is the largest id


@dataclass(frozen=True)
class Appended:
    """A patch: the first `start` rows of the table, then these."""

    start: int
    rows: np.ndarray  # (vectors, width)

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (self.start + len(self.rows), *shape[1:])

    def __call__(self, values: np.ndarray, base: np.ndarray) -> np.ndarray:
        return np.concatenate([values[: self.start], self.rows.astype(values.dtype)])


def add(checkpoint: Checkpoint, path: Path | str, token: str | None = None) -> Checkpoint:
    """The checkpoint with one more token, which stands for the vectors of a file.

    Without a `token` it is the one that the file states, or the file's own name as `<name>`.
    Raises CheckpointError for a file that is not made for these text encoders, and for a token that
    they know already.
    """
    path = Path(path)
    stated, vectors = _read(path)
    token = token or stated or f"<{path.stem}>"
    if not token.isprintable() or any(c.isspace() for c in token):
        raise CheckpointError(
            f"{path.name}: the token {token!r} has a space or an unprintable sign"
        )
    _check_vectors(checkpoint, path, vectors)
    count = len(next(iter(vectors.values())))
    added = (token, *(f"{token}_{i}" for i in range(1, count)))
    for encoder, rows in vectors.items():
        checkpoint = _append(checkpoint, path, encoder, rows, added)
    many = f"{count} vectors" if count > 1 else "1 vector"
    addition = Addition(path, f"embedding {path.name}, token {token}, {many}")
    return dataclasses.replace(checkpoint, additions=(*checkpoint.additions, addition))


def _read(path: Path) -> tuple[str | None, dict[str, np.ndarray]]:
    """The token that a file states, if any, and its vectors, (count, width), by text encoder."""
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file; give an embedding as safetensors or .pt")
    found = open_file(path)
    known = set(found) & set(ENCODERS)
    if not found or (known != set(found) and len(found) != 1):
        seen = f" ({', '.join(sorted(found)[:3])})" if found else ""
        raise CheckpointError(
            f"{path.name} is no embedding: it holds {len(found)} tensors{seen}, an embedding "
            "clip_l and clip_g, emb_params or one that is named as its token"
        )
    vectors: dict[str, np.ndarray] = {}
    for name, stored in found.items():
        if len(stored.shape) not in (1, 2) or not stored.is_float:
            raise CheckpointError(
                f"{path.name}: {name} is {stored.dtype} of shape {stored.shape}, not vectors"
            )
        encoder = ENCODERS.get(name, "text_encoder")
        if encoder in vectors:
            raise CheckpointError(f"{path.name} has vectors for {encoder} twice")
        vectors[encoder] = np.atleast_2d(read_finite(name, stored))
    stated = read_text(path, "name") if ANY in found and is_zip(path) else None
    return next(iter(set(found) - known), stated), vectors


def _check_vectors(checkpoint: Checkpoint, path: Path, vectors: dict[str, np.ndarray]) -> None:
    """Every text encoder must get vectors of its width, and as many as the others."""
    encoders = [name for name in TEXT_ENCODERS if name in checkpoint.configs]
    for encoder, rows in vectors.items():
        width = checkpoint.configs.get(encoder, {}).get("hidden_size")
        if rows.shape[1] != width:
            family = WIDTHS.get(rows.shape[1])
            hint = f"; it is for {family}, the checkpoint is {checkpoint.family}" if family else ""
            needs = f"reads {width}" if width else "is not there"
            raise CheckpointError(
                f"{path.name} has vectors of {rows.shape[1]} values, {encoder} {needs}{hint}"
            )
    if missing := [name for name in encoders if name not in vectors]:
        raise CheckpointError(
            f"{path.name} has no vectors for {missing[0]}; a model with {len(encoders)} text "
            "encoders needs a file with clip_l and clip_g"
        )
    if len(counts := {len(rows) for rows in vectors.values()}) > 1:
        raise CheckpointError(
            f"{path.name} has {' and '.join(map(str, sorted(counts)))} vectors for the text "
            "encoders; they must be as many"
        )
    length = min(checkpoint.configs[name]["max_position_embeddings"] for name in encoders)
    if counts.pop() > length - 2:
        raise CheckpointError(
            f"{path.name} has {len(rows)} vectors, a prompt has room for {length - 2}"
        )


def _append(
    checkpoint: Checkpoint, path: Path, encoder: str, rows: np.ndarray, added: tuple[str, ...]
) -> Checkpoint:
    """The checkpoint whose text encoder and tokenizer know these tokens, a row each."""
    kind, config = TEXT_ENCODERS[encoder], checkpoint.configs[encoder]
    source = tokenizer.of(checkpoint, kind)
    _check_tokens(path, source, added, checkpoint.tokens.get(kind, ()))
    start, table = len(source), Tensors(checkpoint, encoder)
    name = next((name for name in table if name.endswith(TABLE)), None)
    if name is None or table.shape(name)[0] < start:
        found = "none" if name is None else f"{table.shape(name)[0]:,}"
        raise CheckpointError(
            f"{encoder} has vectors for {found} of the {start:,} tokens of its {kind}: "
            "they do not belong together"
        )
    config = config | {"vocab_size": start + len(rows)}
    if config.get("eos_token_id") == OLD_EOS:  # the largest id is the end's no longer
        config["eos_token_id"] = source.eos_token_id
    patches = dict(checkpoint.patches.get(encoder, {}))
    patches[name] = (*patches.get(name, ()), Appended(start, rows))
    return dataclasses.replace(
        checkpoint,
        configs=checkpoint.configs | {encoder: config},
        patches=checkpoint.patches | {encoder: patches},
        tokens=checkpoint.tokens | {kind: (*checkpoint.tokens.get(kind, ()), *added)},
    )


def _check_tokens(
    path: Path, source: Any, added: tuple[str, ...], earlier: tuple[str, ...]
) -> None:
    """Refuse tokens that a tokenizer knows, in whatever case, and those that look like vectors."""
    known = {token.lower() for token in source.vocab()}
    others = {token.lower() for token in earlier}
    name, _, number = added[0].lower().rpartition("_")
    for token in (*added, f"{added[0]}_1"):
        if token.lower() in known or (number.isdecimal() and name in others):
            raise CheckpointError(
                f"{path.name}: the token {token} is in the vocabulary already; give another one, "
                f"{path.name}:<NAME>"
            )

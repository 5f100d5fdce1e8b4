"""Prompt to token ids: CLIP's byte-pair encoding through the `tokenizers` library."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..bundle import Bundle, BundleError


class Tokens(NamedTuple):
    ids: npt.NDArray[np.int64]  # (1, max_length): start, tokens, end, padding
    dropped: str  # the end of the prompt that did not fit; empty if all of it did


class Tokenizer:
    """The bundle's tokenizer of that name.

    Raises BundleError if its tokenizer.json cannot be read.
    """

    def __init__(self, bundle: Bundle, name: str = "tokenizer") -> None:
        import tokenizers

        spec = bundle.manifest.tokenizers.get(name)
        if spec is None:
            raise BundleError(f"{bundle.folder} has no {name}")
        path = bundle.path(f"{spec.path}/tokenizer.json")
        try:
            self._encoder = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise BundleError(f"{path} is not a tokenizer: {error}") from None
        pad = self._encoder.token_to_id(spec.pad_token)
        if pad is None:
            raise BundleError(f"{path} does not know the padding token {spec.pad_token!r}")
        added = self._encoder.get_added_tokens_decoder().values()
        self._spelled = _spelled(token.content for token in added)
        self._encoder.enable_truncation(spec.max_length)
        self._encoder.enable_padding(length=spec.max_length, pad_id=pad, pad_token=spec.pad_token)

    def __call__(self, prompt: str) -> Tokens:
        """Encode one prompt; what does not fit is cut off at the end, and told."""
        prompt = prompt.encode("utf-8", "replace").decode()  # half a surrogate pair has no bytes
        prompt = _spell_out(prompt, self._spelled)
        encoding = self._encoder.encode(prompt)
        ends = [end for _, end in encoding.offsets]
        dropped = prompt[max(ends, default=0) :] if encoding.overflowing else ""
        return Tokens(np.array([encoding.ids], np.int64), dropped.strip())


def _spelled(added: Iterable[str]) -> dict[str, str]:
    """Tokens that were added to CLIP's, in lower case; one of several vectors with all of them.

    The vectors of `<x>` are `<x>`, `<x>_1`, `<x>_2` and so on, as diffusers names them.
    """
    known = {token.lower() for token in added}
    spelled = {}
    for token in known:
        every = [token]
        while f"{token}_{len(every)}" in known:
            every.append(f"{token}_{len(every)}")
        spelled[token] = " ".join(every)
    return spelled


def _spell_out(prompt: str, spelled: dict[str, str]) -> str:
    """A prompt with all vectors of its tokens; the longest of those that begin at one place."""
    if all(token == every for token, every in spelled.items()):
        return prompt
    longest_first = sorted(spelled, key=len, reverse=True)
    pattern = "|".join(map(re.escape, longest_first))
    return re.sub(pattern, lambda m: spelled[m[0].lower()], prompt, flags=re.IGNORECASE)

"""Prompt to token ids: CLIP's byte-pair encoding through the `tokenizers` library."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..bundle import Bundle, BundleError
from . import prompts
from .prompts import Span

Array32 = npt.NDArray[np.float32]


class Tokens(NamedTuple):
    """A prompt in chunks of what the text encoder reads: start, tokens, end, padding."""

    ids: npt.NDArray[np.int64]  # (chunks, max_length)
    dropped: str  # the end of the prompt that did not fit; empty if all of it did
    weights: Array32  # (chunks, max_length), 1 where nobody said another
    empty: npt.NDArray[np.int64]  # (1, max_length): a chunk of no text

    def padded(self, chunks: int) -> Tokens:
        """So many chunks, at least those there are: empty ones are added."""
        more = chunks - len(self.ids)
        ids = np.concatenate([self.ids, *[self.empty] * more])
        weights = np.concatenate([self.weights, *[np.ones_like(self.weights[:1])] * more])
        return self._replace(ids=ids, weights=weights)


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
        self._encoder.no_truncation()
        self._encoder.no_padding()
        frame = self._encoder.encode("").ids
        if len(frame) != 2:
            raise BundleError(f"{path} puts {len(frame)} tokens around a text, not a start and end")
        self._start, self._end = frame
        self._pad, self._length = pad, spec.max_length

    @property
    def frame(self) -> tuple[int, int, int]:
        """Ids of the start, the end and the padding."""
        return self._start, self._end, self._pad

    @property
    def is_plain(self) -> bool:
        """Whether every token that was added is one vector, so that prompts are read as written."""
        return all(token == every for token, every in self._spelled.items())

    def normalized(self, text: str) -> str:
        """A text as words are looked for in it."""
        normalizer = self._encoder.normalizer
        return normalizer.normalize_str(text) if normalizer else text

    def __call__(self, prompt: str) -> Tokens:
        """Encode a text as it is into one chunk; what does not fit is cut off at the end."""
        return self._chunks([[Span(self._spell_out(prompt), 1.0)]], 1)

    def chunks(self, prompt: str, most: int) -> Tokens:
        """Encode a prompt, with its weights, into at most `most` chunks.

        Raises ValueError for a weight out of range.
        """
        return self._chunks(prompts.parse(self._spell_out(prompt)), most)

    def _spell_out(self, prompt: str) -> str:
        return _spell_out(_utf8(prompt), self._spelled)

    def _chunks(self, sections: list[list[Span]], most: int) -> Tokens:
        room = self._length - 2
        rows: list[list[tuple[int, float]]] = []
        dropped = ""
        for i, spans in enumerate(sections):
            found = [self._encoder.encode(text, add_special_tokens=False) for text, _ in spans]
            tokens = [
                (token, weight)
                for encoding, (_, weight) in zip(found, spans, strict=True)
                for token in encoding.ids
            ]
            pieces = [tokens[at : at + room] for at in range(0, len(tokens), room)]
            if not pieces and (i < len(sections) - 1 or not rows):  # as before a BREAK
                pieces = [[]]
            left = max(0, most - len(rows))
            if len(pieces) > left:
                dropped += _rest(spans, found, left * room)
            rows += pieces[:left]
        ids = np.stack([self._framed([token for token, _ in row]) for row in rows])
        weights = np.ones(ids.shape, np.float32)
        for row, target in zip(rows, weights, strict=True):
            target[1 : 1 + len(row)] = [weight for _, weight in row]
        return Tokens(ids, dropped.strip(), weights, self._framed([])[None])

    def _framed(self, tokens: list[int]) -> npt.NDArray[np.int64]:
        """(max_length,)."""
        ids = [self._start, *tokens, self._end]
        return np.array(ids + [self._pad] * (self._length - len(ids)), np.int64)


def _utf8(text: str) -> str:
    return text.encode("utf-8", "replace").decode()  # half a surrogate pair has no bytes


def _rest(spans: list[Span], found: list, kept: int) -> str:
    """The text of spans from the token on that is the first beyond `kept`."""
    for i, encoding in enumerate(found):
        if kept < len(encoding.ids):
            begin = max((end for _, end in encoding.offsets[:kept]), default=0)
            return spans[i].text[begin:] + "".join(span.text for span in spans[i + 1 :]) + " "
        kept -= len(encoding.ids)
    return ""


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
    # What IGNORECASE alone takes for a letter of theirs (a long s) is none to the encoder.
    return re.sub(pattern, lambda m: spelled.get(m[0].lower(), m[0]), prompt, flags=re.IGNORECASE)

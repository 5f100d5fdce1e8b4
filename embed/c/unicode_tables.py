"""Write unicode.inc, what the C tokenizer knows of characters: `python embed/c/unicode_tables.py`.

Words and normal forms are those of the `tokenizers` library, the syntax of prompts those of Python.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path

from tokenizers import Regex, normalizers, pre_tokenizers

CODES = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000]
HANGUL = range(0xAC00, 0xD7A4)  # composed by arithmetic
OVERLAY, IOTA = "\u0334", "\u0345"  # of the lowest and the highest combining class
NFC, NFD, LOWER = normalizers.NFC(), normalizers.NFD(), normalizers.Lowercase()


def ranges(codes: Iterable[int]) -> list[tuple[int, int]]:
    """First and last of every run."""
    found: list[tuple[int, int]] = []
    for code in codes:
        if found and found[-1][1] == code - 1:
            found[-1] = found[-1][0], code
        else:
            found.append((code, code))
    return found


def matching(expression: str) -> list[int]:
    """What the library's regular expressions match."""
    split = pre_tokenizers.Split(Regex(f"{expression}+"), "removed", invert=True)
    pieces = split.pre_tokenize_str("".join(map(chr, CODES)))
    return [ord(c) for piece, _ in pieces for c in piece]


def where(holds: Callable[[str], bool]) -> list[int]:
    return [code for code in CODES if holds(chr(code))]


def changed(normalizer: normalizers.Normalizer) -> dict[int, str]:
    """Characters that a normalizer replaces."""
    skipped = set(HANGUL) if normalizer is NFD else set()
    texts = ((code, normalizer.normalize_str(chr(code))) for code in CODES if code not in skipped)
    return {code: text for code, text in texts if text != chr(code)}


def combining() -> list[tuple[int, int, int]]:
    """(first, last, class) of runs, of characters that the library puts in order."""
    classes: dict[int, list[int]] = {}
    for code in CODES:
        kind = unicodedata.combining(chr(code))
        before, after = OVERLAY + chr(code), chr(code) + IOTA
        probe = after[::-1] if kind < 240 else before[::-1]
        if (kind and NFD.normalize_str(probe) != probe) or chr(code) in (OVERLAY, IOTA):
            classes.setdefault(kind, []).append(code)
    return sorted((*run, kind) for kind, codes in classes.items() for run in ranges(codes))


def compositions() -> list[tuple[int, int, int]]:
    """(first, second, both) of what NFC joins."""
    found = []
    for code in changed(NFD):
        parts = unicodedata.decomposition(chr(code)).split()
        if len(parts) == 2 and NFC.normalize_str(chr(code)) == chr(code):
            found.append((int(parts[0], 16), int(parts[1], 16), code))
    return sorted(found)


def texts(found: dict[int, str], width: int) -> list[tuple[int, ...]]:
    """(code, its replacement, zeros up to `width`)."""
    assert all(len(text) <= width for text in found.values())
    return [(c, *(map(ord, text)), *[0] * (width - len(text))) for c, text in found.items()]


def zeros() -> list[tuple[int]]:
    """The digit 0 of every script that Python's `\\d` matches; 1 to 9 follow it."""
    digits = where(str.isdecimal)
    starts = [code for code in digits if unicodedata.decimal(chr(code)) == 0]
    assert digits == [start + i for start in starts for i in range(10)]
    return [(start,) for start in starts]


def tables() -> str:
    kinds: dict[str, tuple[str, list]] = {
        "LETTERS": ("Run", ranges(matching(r"\p{L}"))),
        "NUMBERS": ("Run", ranges(matching(r"\p{N}"))),
        "WHITE": ("Run", ranges(matching(r"\s"))),
        "SPACES": ("Run", ranges(where(str.isspace))),
        "WORDS": ("Run", ranges(where(lambda c: c.isalnum() or c == "_"))),
        "ZEROS": ("Zero", zeros()),
        "LOWER": ("Lower", texts(changed(LOWER), 2)),
        "DECOMPOSED": ("Decomposed", texts(changed(NFD), 4)),
        "COMPOSED": ("Composed", compositions()),
        "COMBINING": ("Combining", combining()),
    }
    lines = ["// Written by unicode_tables.py.", "// clang-format off"]
    for name, (kind, rows) in kinds.items():
        lines.append(f"const {kind} {name}[] = {{")
        line = ""
        for row in rows:
            cell = "{" + ",".join(f"0x{n:x}" if n > 9 else str(n) for n in row) + "},"
            if len(line) + len(cell) > 100:
                lines.append(line)
                line = ""
            line += cell
        lines += [line, "};"]
    return "\n".join([*lines, "// clang-format on", ""])


if __name__ == "__main__":
    Path(__file__).with_name("unicode.inc").write_text(tables(), encoding="ascii")

"""Which characters are letters and numbers to the tokenizer; generate.py writes them.

CLIP's tokenizer asks for \\p{L} and \\p{N}.  Every host's regular expressions have their own
version of Unicode, so hosts carry these tables instead, as the `tokenizers` library has them.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Regex, pre_tokenizers

HERE = Path(__file__).parent
TABLES = HERE / "unicode.json"
TYPESCRIPT = HERE.parents[1] / "embed" / "js" / "src" / "unicode.ts"
SURROGATES = range(0xD800, 0xE000)
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def ranges(expression: str) -> list[list[int]]:
    """First and last code points, inclusive, of all that an expression matches."""
    every = "".join(chr(code) for code in range(0x110000) if code not in SURROGATES)
    split = pre_tokenizers.Split(Regex(f"{expression}+"), "removed", invert=True)
    found: list[list[int]] = []
    for piece, _ in split.pre_tokenize_str(every):
        for code in map(ord, piece):
            if found and found[-1][1] == code - 1:
                found[-1][1] = code
            else:
                found.append([code, code])
    return found


def tables() -> dict[str, list[list[int]]]:
    return {"letters": ranges(r"\p{L}"), "numbers": ranges(r"\p{N}"), "white": ranges(r"\s")}


def to_json(found: dict[str, list[list[int]]]) -> str:
    lines = (f' "{name}": {json.dumps(table)}' for name, table in found.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def to_typescript(found: dict[str, list[list[int]]]) -> str:
    """The tables as texts: from the end of one range to the next, and its length, in base 36."""
    parts = ["/** As the tokenizers library has them; tests/conformance/generate.py wrote it. */\n"]
    for name in ("letters", "numbers"):
        last, words = 0, []
        for first, end in found[name]:
            words.append(base36(first - last) + (f".{base36(end - first)}" if end > first else ""))
            last = end
        lines, line = [], ""
        for word in words:
            if len(line) + len(word) > 96:
                lines, line = [*lines, line], ""
            line += f"{word} "
        text = "\n".join(f'  "{line}" +' for line in [*lines, line])
        parts.append(f"export const {name.upper()} =\n{text.removesuffix(' +')};\n")
    return "\n".join(parts)


def base36(number: int) -> str:
    text = DIGITS[number % 36]
    return base36(number // 36) + text if number >= 36 else text


def write(found: dict[str, list[list[int]]]) -> None:
    TABLES.write_text(to_json(found), encoding="utf-8")
    TYPESCRIPT.write_text(to_typescript(found), encoding="utf-8")

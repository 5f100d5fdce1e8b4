"""Which tensor is stored in which form: the names of forms, and recipes of rules."""

from __future__ import annotations

import fnmatch
import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bundle import strict_json
from ..errors import FerrotypeError

VERSION = 1
MAX_BYTES = 1 << 20
MAX_RULES = 1000
MAX_TEXT = 1000  # characters of a pattern or a note
MAX_GROUP = 4096
MINIMUM = 2048  # values; p8's table of 512 bytes is an eighth of such a tensor in fp16
GRANULARITIES = {
    ("palette", 2): ("tensor", "grouped"),
    ("palette", 4): ("tensor", "grouped"),
    ("palette", 6): ("tensor", "grouped"),
    ("palette", 8): ("tensor", "grouped"),
    ("int", 4): ("channel", "block"),
    ("int", 8): ("tensor", "channel", "block"),
    ("fp16", 16): ("tensor",),
    ("fp32", 32): ("tensor",),
}
FORMS = "fp32, fp16, p8 p6 p4 p2 (gN), w8 (t, bN, a), w4 (bN, c, a); for example p6, p4g16, w4b32a"
# What the native target stores of the weights that stay as they are where others are in few bits,
# by what it computes in.
UNQUANTIZED = {"bf16": "bf16", "fp32": "fp32", "fp16": "fp16", "int8": "bf16"}
SENSITIVE = {
    r"[/.]conv_in\.": "first convolution of the network",
    r"[/.]conv_out\.": "last convolution of the network",
    r"[/.](time|add)_embedding\.": "embedding of the time step, which every block reads",
    r"[/.]position_embedding\.": "position embedding, added to every token",
}


class RecipeError(FerrotypeError):
    """A recipe cannot be read, or does not say what it must.  The message says where."""


@dataclass(frozen=True)
class Form:
    """How a tensor is stored; `str` gives the name that `parse` reads."""

    kind: str  # palette, int, fp16 or fp32
    bits: int
    granularity: str = "tensor"  # or channel, grouped (palette), block (int)
    group: int = 0  # output channels per table, or input values per scale
    symmetric: bool = True  # no zero point

    def __post_init__(self) -> None:
        bits = [b for kind, b in GRANULARITIES if kind == self.kind]
        kinds = ", ".join(dict.fromkeys(kind for kind, _ in GRANULARITIES))
        _require(bits, f"kind {self.kind!r} is not one of {kinds}")
        _require(
            type(self.bits) is int and self.bits in bits,
            f"{self.kind} of {self.bits!r} bits: there is {', '.join(map(str, bits))}",
        )
        known = GRANULARITIES[self.kind, self.bits]
        _require(
            self.granularity in known,
            f"{self.kind} of {self.bits} bits per {self.granularity}: there is {', '.join(known)}",
        )
        _require(self.symmetric or self.kind == "int", f"{self.kind} has no zero point")
        self._check_group()

    def _check_group(self) -> None:
        least = {"grouped": 1, "block": 2}.get(self.granularity)
        if least is None:
            _require(self.group == 0, f"group is {self.group}, per {self.granularity} it is 0")
        else:
            _require(
                type(self.group) is int and least <= self.group <= MAX_GROUP,
                f"{self.granularity} by {self.group!r}, not in {least}..{MAX_GROUP}",
            )

    @property
    def quantizes(self) -> bool:
        """Whether it is more than a cast."""
        return self.kind in ("palette", "int")

    def __str__(self) -> str:
        if not self.quantizes:
            return self.kind
        if self.kind == "palette":
            return f"p{self.bits}" + (f"g{self.group}" if self.group else "")
        usual = (8, "channel", 0), (4, "block", 32)
        suffix = {"tensor": "t", "channel": "c", "block": f"b{self.group}"}[self.granularity]
        if (self.bits, self.granularity, self.group) in usual:
            suffix = ""
        return f"w{self.bits}{suffix}{'' if self.symmetric else 'a'}"


def parse(text: str) -> Form:
    """The form of that name; ValueError lists what there is."""
    palette = re.fullmatch(r"p([2468])(?:g([1-9][0-9]{0,5}))?", text, re.ASCII)
    integers = re.fullmatch(r"w([48])(t|c|b([1-9][0-9]{0,5}))?(a?)", text, re.ASCII)
    try:
        if text in ("fp16", "fp32"):
            return Form(text, int(text[2:]))
        if palette:
            bits, group = int(palette[1]), int(palette[2] or 0)
            return Form("palette", bits, "grouped" if group else "tensor", group)
        if integers:
            bits, how = int(integers[1]), integers[2] or {"4": "b32", "8": "c"}[integers[1]]
            granularity = {"t": "tensor", "c": "channel", "b": "block"}[how[0]]
            return Form("int", bits, granularity, int(how[1:] or 0), not integers[4])
    except ValueError as error:
        raise ValueError(f"no form {_short(text)}: {error}; there is: {FORMS}") from None
    raise ValueError(f"no form {_short(text)}; there is: {FORMS}")


@dataclass(frozen=True)
class Rule:
    """Tensors whose component/name matches the pattern take the form."""

    match: str
    form: Form
    why: str = ""

    def __str__(self) -> str:
        return self.match + (f" ({self.why})" if self.why else "")


@dataclass(frozen=True)
class Recipe:
    """Rules in order, the first that matches wins, and the form of what none matches."""

    default: Form
    rules: tuple[Rule, ...] = ()
    minimum: int = MINIMUM  # values; smaller tensors are not quantized
    model: str | None = None  # what the recipe was made for
    note: str = ""

    @classmethod
    def uniform(cls, form: str) -> Recipe:
        """One form, by name, for all but sensitive and small tensors."""
        return cls(parse(form))

    @classmethod
    def load(cls, path: str | os.PathLike) -> Recipe:
        """Read a recipe's file; every fault is a RecipeError of one line."""
        return cls.loads(_read_text(Path(path)), str(path))

    @classmethod
    def loads(cls, text: str, where: str = "recipe") -> Recipe:
        """Parse a recipe's text; every fault is a RecipeError that names the field."""
        try:
            return _read_recipe(strict_json(text))
        except RecursionError:
            raise RecipeError(f"{where} is not a valid recipe: it nests too deeply") from None
        except ValueError as error:
            raise RecipeError(f"{where} is not a valid recipe: {error}") from None

    def dump(self) -> str:
        """The text that `loads` reads; equal recipes are equal text."""
        rules = [
            {"match": r.match, "weights": str(r.form)} | ({"why": r.why} if r.why else {})
            for r in self.rules
        ]
        fields = {
            "recipe": VERSION,
            "model": self.model,
            "note": self.note,
            "default": str(self.default),
            "minimum": self.minimum,
            "rules": rules,
        }
        return json.dumps(fields, indent=1) + "\n"

    def choose(self, component: str, name: str, shape: tuple[int, ...]) -> tuple[Form, str]:
        """The form of a tensor, and the reason: a rule, the default, or why it is not quantized.

        A rule overrides the built-in list of sensitive tensors; one-dimensional and small tensors
        are never quantized, since tables and scales would cost more than they save.
        """
        tensor = f"{component}/{name}"
        index = self._first(tensor)
        form = self.default if index is None else self.rules[index].form
        reason = "default" if index is None else f"rule {index + 1}: {self.rules[index]}"
        if not form.quantizes:
            return form, reason
        kept = _unworthy(shape, self.minimum) or (_sensitive(tensor) if index is None else None)
        return (self.unquantized, kept) if kept else (form, reason)

    @property
    def least_bits(self) -> int | None:
        """The fewest bits that it asks for; None if it only casts."""
        forms = [self.default, *(rule.form for rule in self.rules)]
        return min((form.bits for form in forms if form.quantizes), default=None)

    def unused(self, tensors: Iterable[str]) -> tuple[str, ...]:
        """The patterns that are the first match of none of the tensors, given as component/name."""
        used = {self._first(tensor) for tensor in tensors}
        return tuple(rule.match for i, rule in enumerate(self.rules) if i not in used)

    def check_used(self, tensors: Iterable[str]) -> None:
        """Raise RecipeError for a pattern that decides none of the tensors."""
        if unused := self.unused(tensors):
            raise RecipeError(
                f"the recipe's pattern {unused[0]!r} is the first match of no weight: it would be "
                "ignored, so mend or remove it"
            )

    @property
    def unquantized(self) -> Form:
        """The form of what is not quantized."""
        return parse("fp32" if self.default.kind == "fp32" else "fp16")

    def _first(self, tensor: str) -> int | None:
        name = _without_clip(tensor)
        patterns = (_without_clip(rule.match) for rule in self.rules)
        matches = (i for i, p in enumerate(patterns) if fnmatch.fnmatchcase(name, p))
        return next(matches, None)


def _without_clip(name: str) -> str:
    """Checkpoints and libraries differ in whether a text encoder's tensors have this prefix."""
    return name.replace("/text_model.", "/")


def _unworthy(shape: tuple[int, ...], minimum: int) -> str | None:
    count = math.prod(shape)
    if len(shape) < 2:
        return "one-dimensional: a norm or a bias"
    return f"fewer than {minimum} values" if count < minimum else None


def _sensitive(tensor: str) -> str | None:
    return next((why for what, why in SENSITIVE.items() if re.search(what, tensor)), None)


# --- reading a recipe ---------------------------------------------------------------------------


def _read_text(path: Path) -> str:
    try:
        if not path.is_file():  # never opened: a pipe would wait for ever
            raise RecipeError(f"{path} is {'no file' if path.exists() else 'not there'}")
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror or error}") from None
    if len(data) > MAX_BYTES:
        raise RecipeError(f"{path} has more than {MAX_BYTES:,} bytes, which is the limit")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text: {error.reason}") from None


def _read_recipe(raw: Any) -> Recipe:
    _expect(dict, raw, "recipe")
    _require("recipe" in raw, "recipe: missing; it is the version, 1")
    version = _expect(int, raw["recipe"], "recipe")
    if version != VERSION:  # first: a newer version may have fields we do not know
        raise ValueError(f"recipe: version {version}, this ferrotype reads {VERSION}")
    _check_keys(raw, {"recipe", "default"}, {"rules", "minimum", "model", "note"}, "")
    rules = _expect(list, raw.get("rules", []), "rules")
    _require(len(rules) <= MAX_RULES, f"rules: {len(rules)} of them, at most {MAX_RULES}")
    minimum = _expect(int, raw.get("minimum", MINIMUM), "minimum")
    _require(minimum >= 0, f"minimum: {minimum}, it cannot be negative")
    return Recipe(
        _read_form(raw["default"], "default"),
        tuple(_read_rule(rule, f"rules[{i}]") for i, rule in enumerate(rules)),
        minimum,
        None if raw.get("model") is None else _line(raw["model"], "model"),
        _line(raw.get("note", ""), "note"),
    )


def _read_rule(raw: Any, where: str) -> Rule:
    _expect(dict, raw, where)
    _check_keys(raw, {"match", "weights"}, {"why"}, f"{where}.")
    match = _line(raw["match"], f"{where}.match")
    _require(match, f"{where}.match: it is empty and would match nothing")
    form = _read_form(raw["weights"], f"{where}.weights")
    return Rule(match, form, _line(raw.get("why", ""), f"{where}.why"))


def _read_form(raw: Any, where: str) -> Form:
    text = _expect(str, raw, where)
    try:
        return parse(text)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _check_keys(raw: dict[str, Any], needed: set[str], optional: set[str], dot: str) -> None:
    for name in sorted(needed - raw.keys()):
        raise ValueError(f"{dot}{name}: missing")
    for name in sorted(raw.keys() - needed - optional):
        known = ", ".join(sorted(needed | optional))
        raise ValueError(f"{dot}{_short(name)}: not a field; there is {known}")


def _line(raw: Any, where: str) -> str:
    text = _expect(str, raw, where)
    _require(len(text) <= MAX_TEXT, f"{where}: {len(text)} characters, at most {MAX_TEXT}")
    _require(text.isprintable(), f"{where}: {_short(text)} is not one line of printable text")
    return text


def _expect(kind: type, value: Any, where: str) -> Any:
    _require(type(value) is kind, f"{where}: {kind.__name__} expected, found {_short(value)}")
    return value


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:39] + "…"


def _require(holds: object, message: str) -> None:
    if not holds:
        raise ValueError(message)

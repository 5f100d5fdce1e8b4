"""Core ML conversions over all their options: how close each is to the original.

    python benchmarks/coreml.py          # about 25 minutes; writes results/coreml.md
    python benchmarks/coreml.py --full   # every combination: hours

By default every two values of any two axes meet; with the trained model both activations meet every
form of weights and both attentions.  Each conversion is the real one with its own check, except
that translating a network, the slow part, is done once and remembered: weights and chunks come
after it.  One below its floor is reported, and repeated without floors for its figures.  The exit
code is 1 if any failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from itertools import combinations, groupby, product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest.mock import patch

from ferrotype import parity
from ferrotype.benchmarks import measure
from ferrotype.benchmarks.checkpoints import EMOJI, TINY, TINY_SD2, TINY_XL, write_checkpoint
from ferrotype.convert import CoremlOptions, convert, coreml, mil
from ferrotype.parity import ParityError

TRAINED = "emoji"
RANDOM = {"random SD 1": TINY, "random SD 2": TINY_SD2, "random SDXL": TINY_XL}
PLAIN = "plain"  # weights of the type that the networks compute in
FROM_IOS18 = ("w4", "p4g16")
AXES: tuple[tuple[Any, ...], ...] = (
    (TRAINED, *RANDOM),
    ("ios16", "ios17", "ios18"),
    ("fp16", "fp32"),
    ("original", "split-einsum"),
    (PLAIN, "p8", "p6", "p4", "p2", "w8", *FROM_IOS18),
    (1, 2),
)
NO_FLOORS = {precision: {"component": 0.0, "picture": 0.0} for precision in parity.FLOORS}


class Case(NamedTuple):
    """One conversion."""

    model: str
    deployment: str
    activations: str
    attention: str
    weights: str
    chunks: int

    @property
    def form(self) -> str:
        """The form of its weights by name."""
        return self.activations if self.weights == PLAIN else self.weights

    @property
    def translation(self) -> tuple[str, ...]:
        """What the translated networks depend on."""
        return self.model, self.deployment, self.activations, self.attention

    def __str__(self) -> str:
        return " ".join(map(str, self))


class Found(NamedTuple):
    """What became of a case: the bundle's report of parity, and what went wrong."""

    case: Case
    report: dict[str, Any]  # empty if there was no bundle
    problem: str
    seconds: float

    @property
    def component(self) -> tuple[float, str]:
        """The lowest PSNR of any output, and whose it is."""
        components = self.report["components"].items()
        return min((o["psnr"], name) for name, outputs in components for o in outputs.values())

    @property
    def picture(self) -> float:
        return self.report["picture"]["psnr"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="every combination")
    chosen = parser.parse_args()
    start, found = time.perf_counter(), list[Found]()
    cases = every_case() if chosen.full else covering(every_case())
    command = "python benchmarks/coreml.py" + (" --full" if chosen.full else "")
    made_with = measure.describe("torch", "coremltools")
    with tempfile.TemporaryDirectory() as temporary:
        for one in sweep(sorted(cases, key=order), Path(temporary)):
            found.append(one)
            minutes = (time.perf_counter() - start) / 60
            print(f"{len(found)}/{len(cases)} {line(one)}", flush=True)
            head = [
                "# Core ML by every option",
                "",
                f"`{command}` on {made_with}; {len(found)} of {len(cases)} conversions in "
                f"{minutes:.0f} minutes.",
            ]
            text = "\n".join([*head, *results(found), ""])
            (measure.RESULTS / "coreml.md").write_text(text)
    print(text)
    sys.exit(any(one.problem for one in found))


# --- what is run --------------------------------------------------------------------------------


def every_case() -> list[Case]:
    cases = (Case(*values) for values in product(*AXES))
    return [c for c in cases if c.weights not in FROM_IOS18 or c.deployment == "ios18"]


def covering(every: list[Case]) -> list[Case]:
    """Cases that cover what all do, chosen greedily; a new translation costs what one gain is."""
    missing = set[Any]().union(*map(covers, every))
    translated, taken = set[tuple[str, ...]](), list[Case]()
    while missing:
        useful = [case for case in every if covers(case) & missing]
        best = max(
            useful, key=lambda c: len(covers(c) & missing) - (c.translation not in translated)
        )
        taken.append(best)
        translated.add(best.translation)
        missing -= covers(best)
    return taken


def covers(case: Case) -> set[Any]:
    """Every two of its values; of the trained model, also the threes that matter most."""
    pairs: set[Any] = set(combinations(enumerate(case), 2))
    if case.model == TRAINED:
        pairs |= {(case.activations, case.weights), (case.activations, case.attention)}
    return pairs


def order(case: Case) -> tuple[int, ...]:
    """As the axes are written: cases of one translation are neighbours."""
    return tuple(axis.index(value) for axis, value in zip(AXES, case, strict=True))


# --- running ------------------------------------------------------------------------------------


def sweep(cases: Iterable[Case], folder: Path) -> Iterable[Found]:
    for model, group in groupby(cases, key=lambda case: case.model):
        place = folder / model
        place.mkdir()
        known = model == TRAINED
        checkpoint = EMOJI if known else write_checkpoint(place / "checkpoint", RANDOM[model])
        with patch.object(coreml, "_translate", remembered(coreml._translate, place)):
            for case in group:
                yield run(case, checkpoint, place / "out.ferro")


def remembered(translate: Callable[..., Any], folder: Path) -> Callable[..., Any]:
    """coreml._translate of one model, once for each way, then from a saved package."""
    saved: dict[Any, tuple[Path, dict[str, str]]] = {}

    def again(
        component: str,
        wrapper: Any,
        inputs: dict,
        outputs: dict,
        half: bool,
        options: CoremlOptions,
        batch: int,
    ) -> tuple[Any, dict[str, str]]:
        key = component, str(inputs), half, dataclasses.replace(options, chunks=1), batch
        if key not in saved:
            program, names = translate(component, wrapper, inputs, outputs, half, options, batch)
            saved[key] = folder / f"{len(saved)}.mlpackage", names
            mil.save(program, saved[key][0], options.ios)
        package, names = saved[key]
        return mil.load(package), names

    return again


def run(case: Case, checkpoint: Path, out: Path) -> Found:
    """Convert; below a floor once more without floors.  The sweep goes on after any fault."""
    start, problem = time.perf_counter(), ""
    report: dict[str, Any] = {}
    try:
        try:
            report = converted(case, checkpoint, out)
        except ParityError as error:
            problem = str(error)
            with patch.dict(parity.FLOORS, NO_FLOORS):
                report = converted(case, checkpoint, out)
    except Exception as error:
        traceback.print_exc()
        problem = f"{type(error).__name__}: {error}".splitlines()[0]
    return Found(case, report, problem, time.perf_counter() - start)


def converted(case: Case, checkpoint: Path, out: Path) -> dict[str, Any]:
    """The report of a bundle, which is deleted."""
    options = CoremlOptions(case.deployment, attention=case.attention, chunks=case.chunks)
    bundle = convert(checkpoint, out, "coreml", case.form, case.activations, options=options)
    shutil.rmtree(out)
    return bundle.manifest.parity


# --- what is written ----------------------------------------------------------------------------


def results(found: list[Found]) -> list[str]:
    compared = [one for one in found if one.report]
    forms = ["fp32", "fp16", *AXES[4][1:]]
    groups = {
        (form, model): [f for f in compared if f.case.form == form and f.case.model == model]
        for form, model in product(forms, AXES[0])
    }
    rows = [row(form, model, group) for (form, model), group in groups.items() if group]
    problems = [f"- {one.case}: `{one.problem}`" for one in found if one.problem]
    return [
        *TEXT,
        *rows,
        "",
        "## Failures",
        "",
        *(problems or ["None."]),
        "",
        "## Every conversion",
        "",
        "| model | deployment | activations | attention | weights | chunks | component | picture "
        "| seconds |",
        "|---|---|---|---|---|---:|---:|---:|---:|",
        *map(line, found),
    ]


def row(form: str, model: str, found: list[Found]) -> str:
    """A form of weights of one model: the lowest by activations, and the middle of all."""
    cells = []
    for activations in AXES[2]:
        some = [one for one in found if one.case.activations == activations]
        lowest, where = min((one.component for one in some), default=(0.0, ""))
        cells.append(f"{lowest:.1f} {where}" if some else "")
        cells.append(f"{min(one.picture for one in some):.1f}" if some else "")
    components = median(one.component[0] for one in found)
    pictures = median(one.picture for one in found)
    return (
        f"| {form} | {model} | {' | '.join(cells)} | {len(found)} | {components:.1f} "
        f"| {pictures:.1f} |"
    )


def line(one: Found) -> str:
    """One conversion as a row."""
    figures = "failed |"
    if one.report:
        lowest, where = one.component
        figures = f"{lowest:.1f} {where} | {one.picture:.1f}"
    return f"| {' | '.join(map(str, one.case))} | {figures} | {one.seconds:.0f} |"


TEXT = [
    "",
    "PSNR in dB against torch, of what our reader computes from the saved packages: of the output",
    "that lost most, with its component, and of the picture after all steps.  The trained model",
    "draws 128x128, the random ones 64x64.  Each figure is the lowest of the conversions with that",
    "model, weights and activations; the medians are over both activations.  Every two values of",
    "any two options meet; w4 and p4g16 need ios18.  Times are of a shared machine; the first",
    "conversion that needs a translation includes it.",
    "",
    "| weights | model | fp16 component | fp16 picture | fp32 component | fp32 picture "
    "| conversions | median component | median picture |",
    "|---|---|---:|---:|---:|---:|---:|---:|---:|",
]

if __name__ == "__main__":
    main()

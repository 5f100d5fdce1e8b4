"""README's section on performance, from the results files: no figure in it is written by hand.

    python benchmarks/readme.py       # rewrites the section and its pictures

A test compares README with what this would write.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ferrotype.benchmarks import peers as peers_table
from ferrotype.benchmarks.measure import RESULTS, ROOT
from ferrotype.runtime.bench import report, results, tables, verdict

README = ROOT / "README.md"
BEGIN = "<!-- performance: written by `python benchmarks/readme.py`; a test compares -->"
END = "<!-- /performance -->"
ENGINES = {  # of results/native.md, as README calls them
    "native-bf16": "Ferrotype",
    "openvino-bf16": "OpenVINO",
    "torch-bf16": "torch, channels last",
    "onnxruntime-fp32": "onnxruntime (fp32)",
}
FORMS = {  # of results/quantization.md
    "w8": "w8",
    "w8, int8": "w8, int8 activations",
    "mixed": "mixed",
    "w4": "w4",
    "onnxruntime, static W8A8 per channel (QDQ)": "onnxruntime, static W8A8",
    "NNCF, INT8_SYM weights": "NNCF, int8 weights",
    "NNCF, W8A8": "NNCF, W8A8",
}
BUDGETS = ("none", "256 MiB", "512 MiB", "118 MiB (the smallest)")  # of results/memory.md
PICTURES = {"stages": "latency.svg", "frontier": "frontier.svg"}  # of results/latency.json
LATENCY = RESULTS / "latency.json"
PEERS = RESULTS / "peers.json"
COLUMNS = ("", "U-Net step", "VAE", "picture", "ready after", "peak", "to the first")  # of peers


@dataclass(frozen=True)
class Table:
    """A table of a results file: cells by column."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def named(self, first: str) -> dict[str, str]:
        """The row whose first cell is that; KeyError that names it."""
        for row in self.rows:
            if row[0] == first:
                return dict(zip(self.head, row, strict=True))
        raise KeyError(f"no row {first!r} in a table of {', '.join(self.head)}")


class Results:
    """A results file: its command, and its tables in order below each heading."""

    def __init__(self, name: str) -> None:
        self.name = name
        text = (RESULTS / name).read_text(encoding="utf-8")
        found = re.search(r"^`(python benchmarks/[^`]+)`", text, re.MULTILINE)
        assert found, f"{name} names no command"
        self.command = re.sub(r" +--(check|folder FOLDER)\b", "", found[1]).strip()
        self._tables: dict[str, list[Table]] = {}
        for heading, body in re.findall(r"^#+ (.*?)\n(.*?)(?=^#|\Z)", text, re.M | re.S):
            self._tables[heading] = [_table(lines) for lines in re.findall(r"(?:^\|.*\n?)+", body,
                                                                           re.M)]  # fmt: skip

    def table(self, heading: str, index: int = 0) -> Table:
        return self._tables[heading][index]

    @property
    def link(self) -> str:
        return f"[benchmarks/results/{self.name}](benchmarks/results/{self.name})"

    @property
    def again(self) -> str:
        """Where the rows are from, and how to have them again."""
        return f"Every row again: `{self.command}`; from {self.link}."


def _table(lines: str) -> Table:
    head, _, *rows = [
        tuple(cell.strip() for cell in line.strip().strip("|").split("|"))
        for line in lines.strip().splitlines()
    ]
    return Table(head, tuple(rows))


# --- the parts of the section -------------------------------------------------------------------


def engines() -> str:
    """Stable Diffusion 1.5 beside other engines."""
    found = Results("native.md")
    stages, fresh = found.table("512x512", 0), found.table("512x512", 1)
    times = {(row[0], row[1]): row[2] for row in stages.rows}
    rows = []
    for peer, name in ENGINES.items():
        run = fresh.named(peer)
        parts = (times[stage, peer] for stage in ("U-Net step", "VAE decode", "four-step total"))
        cells = [f"{float(ms.replace(',', '')) / 1000:.2f} s" for ms in parts]
        rows.append((name, *cells, f"{run['load s']} s", f"{run['peak RSS MiB']} MiB"))
    head = ("", "U-Net step", "VAE decode", "4 steps in all", "ready after", "peak RSS")
    return _part(
        "Beside other engines",
        "Stable Diffusion 1.5 shapes at 512x512 in bf16, 2 threads of an AMD EPYC with "
        "AVX512_BF16, every engine in turn in one run.",
        tables.Table(head, tuple(rows)).markdown(),
        found.again,
    )


def peers() -> str:
    """Our engines and their peers by the protocol of `ferrotype bench`."""
    found = results.load(PEERS)
    about = found.measured[0].settings
    missing = [f"{v.name} ({v.error})" for v in found.variants if not v.samples]
    told = f"  Not measured: {'; '.join(missing)}." if missing else ""
    return _part(
        "Beside other engines",
        f"Stable Diffusion 1.5 shapes at {about['size']}, {about['steps']} steps, "
        f"{about['threads']} threads of {found.machine.cpu} ({', '.join(found.machine.units)}): "
        f"{tables.how(found)}.  native-* and onnx-* are Ferrotype's.",
        peers_table.table(found).only(*COLUMNS).markdown(),
        f"Every row again: `{found.command.replace(' --folder FOLDER', '')}`; from "
        f"[benchmarks/results/{PEERS.stem}.md](benchmarks/results/{PEERS.stem}.md).{told}  "
        f"At 512x512 in bf16: {Results('native.md').link}.",
    )


def budgets() -> str:
    """The same within budgets."""
    found = Results("memory.md")
    table = found.table("Stable Diffusion 1.5, native bf16, 512x512")
    rows = [
        (budget, f"{row['predicted']} MiB", f"{row['measured']} MiB", row["time"])
        for budget in BUDGETS
        for row in [table.named(budget)]
    ]
    large = found.table("SDXL base, native bf16, 1024x1024").named("512 MiB")
    head = ("budget", "predicted peak", "measured", "time, to that without a budget")
    return _part(
        "Within a budget",
        "Stable Diffusion 1.5 shapes at 512x512, 4 steps, above the interpreter's own "
        f"{table.named('none')['process before']} MiB.",
        tables.Table(head, tuple(rows)).markdown(),
        f"SDXL shapes at 1024x1024 draw in 512 MiB: {large['predicted']} predicted, "
        f"{large['measured']} measured, at {large['time']} of the time.  {found.again}",
    )


def bits() -> str:
    """What fewer bits cost and bring."""
    found, speed = Results("quantization.md"), Results("few_bits.md")
    every = [*found.table("Native bundles").rows]
    every += found.table("Others' quantizers, on the same model in ONNX").rows
    by_form = {row[0]: row for row in every}
    rows = [
        (name, by_form[form][2], f"{by_form[form][3]} dB", f"{by_form[form][5]} dB")
        for form, name in FORMS.items()
    ]
    step = speed.table("A U-Net step, avx512bf16")
    memory = speed.table("Memory of a picture")
    told = "; ".join(
        f"{name} takes {step.named(name)['to bf16']} of the time of bf16 and "
        f"{memory.named(name)['to bf16']} of its memory"
        for name in ("w8, int8", "w4")
    )
    theirs = speed.table("Beside OpenVINO and NNCF").named("w8, int8")["to openvino-w8a8"]
    plain = speed.table("A U-Net step, avx512vnni").named("w8, int8")["to fp32"]
    own = Results("embedded.md")
    ours, before, ratio = (own.table("The embedded bundle").named(n)
                           for n in ("embedded", "bf16", "ratio"))  # fmt: skip
    head = ("", "MiB", "mean PSNR", "worst")
    return _part(
        "In fewer bits",
        "The trained emoji model, 64 pictures that it did not see before, against fp32.",
        tables.Table(head, tuple(rows)).markdown(),
        found.again,
        f"Stable Diffusion 1.5 shapes at 512x512: {told}.  w8, int8 takes {theirs} of the time of "
        f"OpenVINO's W8A8 and, with VNNI and without bf16, {plain} of that of fp32 "
        f"(`{speed.command}`, {speed.link}).  The embedded bundle has {ours['MiB']} MiB instead "
        f"of {before['MiB']} and draws in {ratio['each after it']} of the time "
        f"(`{own.command}`, {own.link}).",
    )


def latency() -> str:
    """The emoji model in every precision, with pictures."""
    found = results.load(LATENCY)
    said = [one.text for one in verdict.verdicts(found)]
    shown = "\n\n".join(
        f"![{title}](docs/pictures/{PICTURES[plot]})"
        for plot, title in (
            ("stages", "Latency of a picture by stage and precision"),
            ("frontier", "Quality, size and speed of each precision"),
        )
    )
    size = found.variants[0].settings["size"]
    return _part(
        "A small model, stage by stage",
        f"The trained emoji model at {size}, {found.variants[0].settings['steps']} steps, loaded "
        f"anew for every picture: {tables.how(found)}; {tables.conditions(found)}.  The lines on "
        f"the bars are {found.protocol.confidence:.0%} intervals.",
        shown,
        "\n".join(f"- {text}" for text in said),
        "Again: `python benchmarks/latency.py`; from [benchmarks/results/latency.json]"
        "(benchmarks/results/latency.json).  Quality is mean PSNR to the bundle in bf16.",
    )


# The full comparison is there once `python benchmarks/peers.py` was run.
FIRST = peers if PEERS.exists() else engines
PARTS: tuple[Callable[[], str], ...] = (FIRST, budgets, bits, latency)


def _part(title: str, *paragraphs: str) -> str:
    return "\n\n".join([f"### {title}", *paragraphs])


def section(parts: Sequence[Callable[[], str]] = PARTS) -> str:
    """Everything between the marks."""
    head = (
        "Measured on a shared virtual machine; `ferrotype bench` measures yours, and "
        "[docs/bench.md](docs/bench.md) says how."
    )
    return "\n\n".join([BEGIN, head, *(part() for part in parts), END])


def pictures() -> dict[Path, str]:
    """The pictures of the section, by where they are."""
    found = [results.load(LATENCY)]
    folder = ROOT / "docs" / "pictures"
    return {folder / name: report.picture(found, plot) for plot, name in PICTURES.items()}


def replaced(text: str) -> str:
    """README with the section as it should be; ValueError if the marks are not there once."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or END in after:
        raise ValueError(f"README.md must have one {BEGIN} and one {END}")
    return before + section() + after


def main() -> None:
    README.write_text(replaced(README.read_text(encoding="utf-8")), encoding="utf-8")
    for path, text in pictures().items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

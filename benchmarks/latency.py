"""The trained emoji model in several precisions, drawn in turn by `ferrotype bench`.

    python benchmarks/latency.py --seconds 300      # writes results/latency.json and .md

The bundles are made first (a few minutes), each with the report of its quality.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from ferrotype.benchmarks import measure
from ferrotype.benchmarks.checkpoints import EMOJI
from ferrotype.runtime.bench import results, tables

PRECISIONS = {  # by name: options of quantize; none: as converted
    "bf16": (),
    "w8": ("--weights", "w8"),
    "w8-int8": ("--weights", "w8", "--activations", "int8"),
    "mixed": ("--size-budget", "10MB"),
    "w4": ("--weights", "w4"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=300, help="default: %(default)s")
    parser.add_argument("--folder", type=Path, help="keep the bundles here")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (chosen.folder or Path(temporary)).absolute()
        folder.mkdir(exist_ok=True)
        bundles = [str(prepare(folder, name)) for name in PRECISIONS]
        target = measure.RESULTS / "latency.json"
        options = ("--seconds", str(chosen.seconds), "--no-store", "-f", "-o", str(target))
        print(measure.run(*measure.ferrotype("bench", *bundles, "--size", "256", *options)).stdout)
    text = tables.markdown([results.load(target)])
    head = "# Latency\n\n`python benchmarks/latency.py`\n"
    target.with_suffix(".md").write_text(text.replace("# Latency\n", head, 1))


def prepare(folder: Path, name: str) -> Path:
    """The model in a precision, made unless the folder has it."""
    out, options = folder / f"{name}.ferro", PRECISIONS[name]
    if out.exists():
        return out
    if options:
        source = prepare(folder, "bf16")
        measure.run(*measure.ferrotype("quantize", str(source), "-o", str(out), *options))
    else:
        command = ("convert", str(EMOJI), "-o", str(out), "--target", "native")
        measure.run(*measure.ferrotype(*command))
    return out


if __name__ == "__main__":
    main()

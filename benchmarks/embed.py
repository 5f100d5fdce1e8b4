"""The JavaScript library beside the Python runtime: time and memory per stage, and sizes.

    python benchmarks/embed.py       # two minutes; writes results/embed.md

Each round starts a fresh process for each host in turn; a process draws some pictures, and every
picture loads, runs and releases each component.  The first picture of a process is left out.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
from pathlib import Path
from statistics import median

import ferrotype
from ferrotype import bundle as bundles
from ferrotype.benchmarks import measure
from ferrotype.runtime import demo
from ferrotype.runtime.pipeline import EMBEDDED_ONNX

EMBED = Path(ferrotype.__file__).parent / "embed" / "js"
THREADS = 1  # what onnxruntime-web runs with in Node
PICTURES = 5
LAST = "The C library, beside Python's native engine: [embed-c.md](embed-c.md)."
STAGES = {"text_encoder": "text encoder", "unet": "U-Net, 4 steps", "vae_decoder": "decoder"}
PYTHON = """
import json, sys, time
from ferrotype.runtime.pipeline import Pipeline
from ferrotype.benchmarks import measure
pictures = []
for seed in range(int(sys.argv[3])):
    pipe = Pipeline.load(sys.argv[1], threads=int(sys.argv[2]))
    times = [time.perf_counter()]
    pipe.encode("a red apple on a sky blue background")
    times.append(time.perf_counter())
    *_, last = pipe.steps("a red apple on a sky blue background", seed=seed)
    times.append(time.perf_counter())
    pipe.decode(last)
    pipe.release()
    times.append(time.perf_counter())
    names = ("text_encoder", "unet", "vae_decoder")
    pictures.append({n: b - a for n, a, b in zip(names, times, times[1:])})
print(json.dumps({"pictures": pictures, "rss": measure.status()["VmHWM"] * 2**20}))
"""
HOSTS = {"Python": "onnxruntime", "Node": "onnxruntime-node", "wasm": "onnxruntime-web in Node"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    chosen = parser.parse_args()
    subprocess.run(["npm", "run", "build"], cwd=EMBED, check=True, capture_output=True)
    found: dict[str, list[dict[str, float]]] = {host: [] for host in HOSTS}
    for i in range(chosen.rounds):
        for host in HOSTS if i % 2 else reversed(HOSTS):
            found[host].append(one(host))
    report = "\n".join([*head(chosen.rounds), *times(found), "", *sizes(), "", LAST, ""])
    (measure.RESULTS / "embed.md").write_text(report)
    print(report)


def one(host: str) -> dict[str, float]:
    """Median seconds per stage of one process, and the MiB that it had in the end."""
    shared = (str(EMBEDDED_ONNX), str(THREADS), str(PICTURES))
    if host == "Python":
        command = (sys.executable, "-c", PYTHON, *shared)
    else:
        folder, threads, count = shared
        command = ("node", "examples/time.mjs", folder, host.lower(), threads, count)
    done = subprocess.run(command, cwd=EMBED, capture_output=True, text=True, check=True)
    said = json.loads(done.stdout)
    later = said["pictures"][1:]
    stages = {stage: median(picture[stage] for picture in later) for stage in STAGES}
    return {**stages, "rss": said["rss"] / 2**20}


def head(rounds: int) -> list[str]:
    versions = json.loads((EMBED / "package.json").read_text())["devDependencies"]
    node = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout
    return [
        "# The JavaScript library",
        "",
        "`python benchmarks/embed.py`",
        "",
        f"{measure.describe()} Node {node.strip()}, onnxruntime-node and onnxruntime-web "
        f"{versions['onnxruntime-node']}; {THREADS} thread.",
        "",
        f"The embedded ONNX bundle, 128x128, 4 steps. Medians of {rounds} processes of each host",
        f"in turn, {PICTURES - 1} pictures each after a first one; each loads and releases",
        "every component, its hashes verified in JavaScript.",
        "",
    ]


def times(found: dict[str, list[dict[str, float]]]) -> list[str]:
    lines = [
        "| | " + " | ".join(STAGES.values()) + " | in all | of Python's | memory of the process |",
        "|---" * (len(STAGES) + 4) + "|",
    ]
    for host, rounds in found.items():
        cells = [f"{1000 * median(r[stage] for r in rounds):.0f} ms" for stage in STAGES]
        total = [sum(r[stage] for stage in STAGES) for r in rounds]
        base = [sum(r[stage] for stage in STAGES) for r in found["Python"]]
        ratio = median(a / b for a, b in zip(total, base, strict=True))
        cells += [f"{1000 * median(total):.0f} ms", f"{ratio:.2f}x"]
        cells.append(f"{median(r['rss'] for r in rounds):.0f} MiB")
        lines.append(f"| {host}, {HOSTS[host]} | " + " | ".join(cells) + " |")
    lines += ["", "Python's memory is its peak, Node's what it had at the end."]
    return lines


def sizes() -> list[str]:
    made = bundles.load(EMBEDDED_ONNX)
    drawing = ("text_encoder", "unet", "vae_decoder", "tokenizer")
    rows = [
        ("the library, minified in the page's worker with onnxruntime's JavaScript", "worker.js")
    ]
    rows += [
        ("the page and its script", "index.html"),
        ("", "page.js"),
        ("service worker", "sw.js"),
    ]
    rows += [("onnxruntime's wasm", "ort-wasm-simd-threaded.wasm.gz")]
    lines = ["| of the page | file | KiB | compressed |", "|---|---|---:|---:|"]
    for what, name in rows:
        data = (demo.PAGE / name).read_bytes()
        plain = gzip.decompress(data) if name.endswith(".gz") else data
        packed = len(data) if name.endswith(".gz") else len(gzip.compress(data))
        lines.append(f"| {what} | {name} | {len(plain) / 1024:,.0f} | {packed / 1024:,.0f} |")
    size = sum(made.bytes_of(name) for name in drawing) / 1024
    lines.append(f"| the bundle, what drawing from text takes | bundle/ | {size:,.0f} | |")
    return lines


if __name__ == "__main__":
    main()

"""The whole recipe, from the two npm packages to an evaluated checkpoint.

    python models/emoji/run.py WORK            # hours; after a kill it goes on where it was
    python models/emoji/run.py WORK --smoke    # minutes: tiny sizes, to see that all of it runs

Each stage is a program of its own (python models/emoji/STAGE.py WORK), which skips what is done.
WORK/recipe.json can change the length of a stage, also of one that is under way: see config.py.
"""

from __future__ import annotations

import argparse
import fcntl
import subprocess
import sys
import time
from pathlib import Path

STAGES = (
    "data",
    "tokenizer",
    "vae",
    "latents",
    "diffusion",
    "distillation",
    "tiny_vae",
    "export",
    "evaluate",
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path, help="folder for data and state; 1 GB at the end")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it all runs")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    with (given.work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"{given.work} is in use by another run of the recipe") from None
        for name in STAGES:
            print(f"{time.strftime('%F %T')} {name}", flush=True)
            script = Path(__file__).with_name(f"{name}.py")
            flags = ["--smoke"] if given.smoke else []
            done = subprocess.run([sys.executable, str(script), str(given.work), *flags])
            if done.returncode:
                raise SystemExit(
                    f"{name} failed; once it is mended, the same command goes on from there"
                )


if __name__ == "__main__":
    main()

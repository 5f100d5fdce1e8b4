"""The files of a bundle that Ferrotype does not read and other tools look for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from .checkpoint import Checkpoint


def write_ecosystem_files(checkpoint: Checkpoint, folder: Path) -> None:
    """Write model_index.json and scheduler/ beside the component folders."""
    shutil.copyfile(checkpoint.folder / "model_index.json", folder / "model_index.json")
    scheduler = folder / "scheduler"
    scheduler.mkdir()
    text = json.dumps(checkpoint.scheduler, indent=2, sort_keys=True)
    (scheduler / "scheduler_config.json").write_text(text + "\n", encoding="utf-8")

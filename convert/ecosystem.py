"""The files of a bundle that Ferrotype does not read and other tools look for."""

from __future__ import annotations

import json
from pathlib import Path

from .checkpoint import Checkpoint


def write_ecosystem_files(checkpoint: Checkpoint, folder: Path) -> None:
    """Write model_index.json and scheduler/ beside the component folders."""
    index = json.dumps(checkpoint.model_index, indent=2)
    (folder / "model_index.json").write_text(index + "\n", encoding="utf-8")
    scheduler = folder / "scheduler"
    scheduler.mkdir()
    text = json.dumps(checkpoint.scheduler, indent=2, sort_keys=True)
    (scheduler / "scheduler_config.json").write_text(text + "\n", encoding="utf-8")

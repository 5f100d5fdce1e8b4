"""Bundles to try things on."""

import shutil

import pytest
from ferrotype.runtime.pipeline import EMBEDDED


@pytest.fixture
def emoji(tmp_path):
    """A copy of the embedded bundle to break."""
    return shutil.copytree(EMBEDDED, tmp_path / "emoji.ferro")

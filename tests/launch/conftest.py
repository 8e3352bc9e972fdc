"""Fixtures that several files of these tests share."""

import os
from pathlib import Path

import pytest

from tests.support import slurm


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A SLURM of this machine; its folder."""
    folder = tmp_path / "slurm"
    monkeypatch.setenv("PATH", f"{slurm.install(folder)}{os.pathsep}{os.environ['PATH']}")
    return folder

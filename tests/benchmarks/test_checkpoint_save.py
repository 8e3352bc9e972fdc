"""`benchmarks.checkpoint_save`: on two real ranks, and end to end."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import checkpoint_save
from data.files import verify
from tests.support.spawn import spawn
from tests.support.train import two_ranks
from train.checkpoint import Checkpoints


def _measured(run: Path) -> dict[str, Any]:
    with two_ranks() as ranks:
        return checkpoint_save.measure(run, ranks, rounds=2, overrides=["debug=smoke"])


def test_both_ways_save_what_can_be_read(tmp_path: Path) -> None:
    first, second = spawn(_measured, tmp_path)
    assert first["checkpoint_bytes"] > 12 * first["parameters"] > 0  # masters and both moments, in float32
    assert second["verify_bytes_per_second"] is None  # the first rank's alone
    assert {way: len(stalls) for way, stalls in first["stalls"].items()} == {
        "synchronous": 2,
        "asynchronous": 2,
    }
    assert 0 < first["stall_asynchronous"] < first["published_asynchronous"]
    newest = Checkpoints(tmp_path, inputs={}).newest()
    assert newest is not None
    assert verify(newest.folder) == []


@pytest.mark.slow
def test_the_command_starts_its_ranks_and_writes_its_page(tmp_path: Path) -> None:
    out = tmp_path / "saves.json"
    given = ["--ranks", "2", "--rounds", "1", "--folder", str(tmp_path), "--out", str(out), "debug=smoke"]
    assert checkpoint_save.main(given) == 0
    result = json.loads(out.read_text())
    assert (result["ranks"], result["rounds"]) == (2, 1)
    assert "--ranks 2 --rounds 1 debug=smoke`" in out.with_suffix(".md").read_text()

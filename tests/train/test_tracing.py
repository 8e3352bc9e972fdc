"""torch's profiler around the steps of a stage: once, for as many steps as were asked for, and closed in any case."""

import gzip
import json
from contextlib import closing
from pathlib import Path

import torch

from train.tracing import Tracing


def matmuls(trace: Path) -> int:
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    return sum(event.get("name") == "aten::mm" for event in events)


def walk(tracing: Tracing, steps: int) -> list[int]:
    """An epoch of steps, each one matrix product, left before its inputs are at their end."""
    taken = []
    with closing(tracing.around(iter(range(100)))) as given:
        for _ in range(steps):
            taken.append(next(given))
            torch.ones(8, 8) @ torch.ones(8, 8)
    return taken


def test_some_steps_are_traced_once(tmp_path: Path) -> None:
    tracing = Tracing(tmp_path / "profile", "warmup", steps=3, snapshot=True)
    assert walk(tracing, 8) == list(range(8))
    trace = tmp_path / "profile/warmup.json.gz"
    assert matmuls(trace) == 3
    assert "aten::mm" in (tmp_path / "profile/warmup.txt").read_text()
    trace.unlink()
    walk(tracing, 8)  # the next epoch
    assert not trace.exists()


def test_a_stage_that_ends_early_leaves_what_there_is(tmp_path: Path) -> None:
    walk(Tracing(tmp_path, "warmup", steps=3, snapshot=False), 4)
    assert matmuls(tmp_path / "warmup.json.gz") == 2

"""`memory3 bank audit`: what rows read with the filters and without, of held-out rows and of trained ones."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from memorybank.config import QueryMode
from memorybank.pool import window_slots
from tests.support.launch import trained, within


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("audit") / "runs"
    shutil.copytree(trained().root, root)
    yield root
    shutil.rmtree(root)


def audited(root: Path, *arguments: str):
    output = root / "audit.json"
    done = within("bank", "audit", "m", "--root", str(root), "--output", str(output), *arguments)
    assert done.code == 0, done.err
    return json.loads(output.read_text()), done.out


def overlapping(audit) -> int:
    return audit["audit"]["buckets"][-1]["slots"]


def contents(run: Path) -> list[Path]:
    """Everything but memories that are kept when they are first read."""
    return sorted(path for path in run.rglob("*") if "cold-" not in str(path.relative_to(run)))


def test_held_out_rows_are_audited_and_nothing_else_is_left_in_the_run(root: Path) -> None:
    before = contents(root / "m")
    found, said = audited(root, "--rows", "3")
    assert contents(root / "m") == before
    assert {key: found[key] for key in ("split", "rows", "query", "pattern", "step")} == {
        "split": "validation", "rows": 3, "query": "own", "pattern": "inference", "step": 4,
    }  # fmt: skip
    configured, off = found["audits"]
    assert configured["filter"] == "as configured: no document of the row, overlap ≤ 0.67"
    assert overlapping(configured) == 0
    for each in (configured, off):
        result = each["audit"]
        assert result["slots"] == 3 * 2 * 5
        assert result["empty"] == result["slots"] - sum(bucket["slots"] for bucket in result["buckets"])
    assert "filter off" in said
    assert f"results: {root}/audit.json" in said


def test_trained_rows_read_what_the_last_bank_epoch_read(root: Path) -> None:
    found, _ = audited(root, "--split", "train", "--rows", "8")
    configured, off = found["audits"]
    assert (found["pattern"], found["rows"]) == ("training", 8)
    assert configured["filter"].endswith("overlap ≤ 0.90")
    epoch = root / "m/neighbours/continual-0001"
    assert found["references"] == json.loads((epoch / "manifest.json").read_text())["extra"]["references"]
    trained_on = np.load(epoch / "training.npy")[:8]
    assert configured["exhausted"] == (trained_on < 0).sum()
    assert configured["audit"]["empty"] == (window_slots(trained_on, QueryMode.own) < 0).sum()
    assert off["refused_own_document"] == off["refused_overlap"] == 0


def test_previous_query_leaves_the_first_chunk_without_memory(root: Path) -> None:
    found, said = audited(root, "--query", "previous", "--rows", "2")
    assert found["query"] == "previous"
    assert found["audits"][1]["audit"]["unread"]["chunks"] == 2
    assert "query previous" in said


def test_runs_without_memory_and_impossible_numbers_are_refused(root: Path) -> None:
    done = within("bank", "audit", "c", "--root", str(root))
    assert done.code == 2
    assert done.err.startswith(f"memory3 bank: {root}/c reads no memory (continual.memory is null)")
    done = within("bank", "audit", "m", "--root", str(root), "--rows", "0")
    assert done.code == 2
    assert "--rows 0 is below 1" in done.err


def test_training_rows_before_the_continual_stage_are_refused(root: Path) -> None:
    shutil.copytree(root / "m", root / "young")
    for folder in (root / "young/checkpoints").glob("continual-*"):
        shutil.rmtree(folder)
    done = within("bank", "audit", "young", "--root", str(root), "--split", "train")
    assert done.code == 2
    assert "young has not reached its continual stage" in done.err

"""What a rank refuses, and restores, before it trains."""

import json
from pathlib import Path

import pytest

from launch import worker
from tests.support.train import state
from train.checkpoint import Checkpoint
from train.history import History


def test_a_run_that_lost_all_its_checkpoints_does_not_begin_anew(tmp_path: Path) -> None:
    """Fault 4."""
    worker._refuse_a_new_beginning(tmp_path)
    lines = [{"stage": "warmup", "step": 1, "loss": 2.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    worker._refuse_a_new_beginning(tmp_path)  # killed before its first save
    lines.append({"stage": "warmup", "step": 1, "checkpoint": "warmup-00000001"})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(
        ValueError, match=r"published warmup-00000001, and .* holds none now; restore it from a copy"
    ):
        worker._refuse_a_new_beginning(tmp_path)


@pytest.mark.parametrize("there", [False, True])
def test_the_id_at_wandb_comes_back_with_the_checkpoint(there: bool, tmp_path: Path) -> None:
    folder = tmp_path / "warmup-00000001"
    folder.mkdir()
    (folder / "origin.json").write_text('{"torch": "2.0", "wandb": "old"}')
    if there:
        (tmp_path / "wandb-id").write_text("own")
    history = History.empty(3)
    worker._restore_wandb_id(tmp_path, Checkpoint(folder, state(1), history, history.finished, keep=False))
    assert (tmp_path / "wandb-id").read_text() == ("own" if there else "old")

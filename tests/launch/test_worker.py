"""What a rank refuses, restores, and supposes before it trains."""

import json
from pathlib import Path

import pytest

from launch import build, worker
from launch.compose import compose_config
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


@pytest.mark.parametrize(
    ("settings", "has_gpu", "expected"),
    [
        ([], False, 0.2),
        (["engine.threads_per_rank=4"], False, 0.8),
        (["engine.threads_per_rank=4", "engine.precision=fp32"], False, 0.2),
        (["logging.peak_tflops=3"], False, 3.0),
        (["logging.peak_tflops=3"], True, 3.0),
        ([], True, None),  # a GPU that nobody knows
    ],
)
def test_the_nominal_peak_is_the_stated_one_or_that_of_a_ranks_threads(
    settings: list[str], has_gpu: bool, expected: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "device_here", lambda: ("cpu", 2))
    config = compose_config(["experiment=demo", *settings])
    assert build.nominal_tflops(config, has_gpu=has_gpu) == expected


def test_the_nominal_peak_of_a_known_gpu_is_its_makers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "device_here", lambda: ("h100", 8))
    assert build.nominal_tflops(compose_config(["experiment=demo"]), has_gpu=True) == 989


def test_later_stages_are_counted_in_steps_of_a_stages_own_size() -> None:
    sizes = ["warmup.steps=100", "warmup.rows_per_step=4", "continual.steps=60", "continual.rows_per_step=8"]
    config = compose_config(["experiment=demo", *sizes])
    assert worker.later_steps(config) == {"warmup": 120.0, "continual": 0.0}
    assert worker.later_steps(compose_config(["experiment=demo", "stage=warmup"])) == {"warmup": 0.0}

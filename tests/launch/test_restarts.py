"""Started again after a crash, with real ranks: from the newest checkpoint to the same bytes, or not where it repeats.

By `supervise=true`, and by torchrun where torchrun started the ranks.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.kill_and_resume import differences, newest_checkpoint
from launch import agent, launchers, pretrain
from launch.compose import compose_config
from launch.config import RunConfig
from launch.run_log import RunLog
from tests.support.launch import run_settings, trained
from tests.support.spawn import HANG_SECONDS
from train.metrics import read_metrics

FAULTY = """
import os, signal, sys
from pathlib import Path
from launch import cli, worker
from train.state import RunState

fault = Path(__file__).with_name("fault")
after = RunState.after

def faulty(self, *arguments, **settings):
    state = after(self, *arguments, **settings)
    if (state.stage, state.step) == ("continual", 4) and fault.exists():
        rank, what = fault.read_text().split(maxsplit=1)
        if rank == os.environ["RANK"] and what == "killed once":
            fault.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == os.environ["RANK"]:
            raise RuntimeError("a row that always breaks it")
    return state

RunState.after = faulty
worker.leave(worker.main(Path(sys.argv[1])) if len(sys.argv) == 2 else cli.main(sys.argv[1:]))
"""
"""A rank that crashes in the fourth update of the continual stage: once, or always."""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run `m`, as it was when its continual stage began; its ranks are faulty."""
    root = Path(shutil.copytree(trained().root, tmp_path / "runs"))
    for path in (root / "m/checkpoints").glob("continual-*"):
        shutil.rmtree(path)
    (tmp_path / "faulty.py").write_text(FAULTY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    commands = launchers.commands
    monkeypatch.setattr(
        launchers, "commands",
        lambda config, folder, **given: [[*each, "--worker=faulty"] for each in commands(config, folder, **given)],
    )  # fmt: skip
    return root


def supervised(root: Path) -> RunConfig:
    return compose_config([*run_settings(root, "m"), "supervise=true", "supervision.backoff_seconds=0.1"])


def events(root: Path, name: str) -> list[dict[str, object]]:
    return [line for line in read_metrics(root / "m/metrics.jsonl") if line.get("event") == name]


def assert_undisturbed(root: Path) -> None:
    """Assert that the run ended as one that nobody disturbed, and reported every update once."""
    assert differences(newest_checkpoint(trained().main), newest_checkpoint(root / "m")) == []
    steps = [line["step"] for line in read_metrics(root / "m/metrics.jsonl") if "loss" in line]
    assert steps == [1, 2, 3, 4] * 2


def test_a_rank_that_was_killed_is_started_again_and_the_run_ends_with_the_same_bytes(root: Path) -> None:
    (root.parent / "fault").write_text("1 killed once")
    assert pretrain.pretrain(supervised(root)) == 0
    (crash,) = events(root, "crashed")
    assert crash["code"] == 137
    assert str(crash["cause"]).startswith("rank 1 was ended by SIGKILL")
    assert not (root / "m/failure.json").exists()  # it goes with the next start
    assert (crash["checkpoint"], crash["restarted_after"]) == ("continual-00000002", 0.1)
    resumed = events(root, "resumed")[-1]
    assert resumed["checkpoint"] == "continual-00000002"
    assert float(str(resumed["checkpoint_time"])) < float(str(crash["time"]))  # not when it was resumed
    assert RunLog.read(root / "m").recoveries[-1] == resumed
    assert_undisturbed(root)


@pytest.mark.slow
def test_a_crash_that_repeats_is_left_to_the_user(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    (root.parent / "fault").write_text("0 breaks always")
    assert pretrain.pretrain(supervised(root)) == 1
    first, second = events(root, "crashed")
    assert "a row that always breaks it" in str(first["cause"])
    assert first["restarted_after"] == 0.1
    assert second["restarted_after"] is None
    said = "not started again: the same crash after update 3 of the continual stage for the second time: it will repeat"
    assert said in caplog.text
    (root.parent / "fault").unlink()
    assert pretrain.pretrain(supervised(root)) == 0
    assert_undisturbed(root)


@pytest.mark.slow
def test_torchrun_starts_its_ranks_again_where_the_run_was(root: Path) -> None:
    (root.parent / "fault").write_text("1 killed once")
    here = Path(agent.__file__).parents[1]
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    command = [
        *torchrun,
        str(root.parent / "faulty.py"),
        "pretrain",
        "--no-prepare",
        *run_settings(root, "m"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=here, env={**os.environ, "PYTHONPATH": str(here)},
        capture_output=True, text=True, check=False, timeout=HANG_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert events(root, "resumed")[-1]["checkpoint"] == "continual-00000002"
    assert not (root.parent / "fault").exists()
    assert_undisturbed(root)

"""Fault 9: a rank that hangs is found, named and ended, with the stacks of all; one that waits or works is not."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from launch import agent
from launch.watchdog import Sign, judge
from tests.support.spawn import HANG_SECONDS

RANK = """
import os, signal, sys, time
from pathlib import Path
from launch import joined
from launch.watchdog import PULSES
from train import distributed
from train.announced import announced

run = Path(sys.argv[1])
if PULSES not in os.environ:
    joined.watched(run, announced(), os.environ["MASTER_PORT"])
ranks = distributed.start(threads=1)
stacks = run / "stacks" / f"rank-{ranks.rank}.txt"
ranks.pulse.show(Path(os.environ[PULSES]), stacks, rank=ranks.rank, batch_seconds=5, phase_seconds=600)
with ranks.pulse.phase("a search"):
    time.sleep(7 * (1 - ranks.rank))
    ranks.barrier()
with ranks.pulse.batches("an update"):
    for _ in range(4):
        time.sleep(0.5)
        ranks.pulse.beat()
        ranks.barrier()
    if ranks.rank == 1 and (run / "how").read_text() == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    while ranks.rank == 1:
        pass
    ranks.barrier()
"""


def hung(how: str, folder: Path, *launcher: str) -> "subprocess.CompletedProcess[str]":
    """Start two ranks, of which the second hangs."""
    (folder / "how").write_text(how)
    program = folder / "rank.py"
    program.write_text(RANK)
    root = Path(agent.__file__).parents[1]
    return subprocess.run(
        [sys.executable, "-m", *launcher],
        cwd=root, env={**os.environ, "PYTHONPATH": f"{root}:{folder}", "TMPDIR": str(folder)},
        capture_output=True, text=True, check=False, timeout=HANG_SECONDS,
    )  # fmt: skip


def assert_stacks(folder: Path, said: str) -> None:
    """Assert that all ranks wrote where they were."""
    waiting, hanging = ((folder / "stacks" / f"rank-{rank}.txt").read_text() for rank in (0, 1))
    assert said in waiting
    assert "in barrier" in waiting
    assert f'{folder}/rank.py", line' in hanging


@pytest.mark.parametrize(
    ("how", "said"),
    [("stopped", "rank 1 has been stopped for"), ("loop", "rank 1 hangs: ")],
)
def test_a_rank_that_hangs_is_named_and_all_write_their_stacks(how: str, said: str, tmp_path: Path) -> None:
    done = hung(how, tmp_path, "launch.agent", str(tmp_path), "2", "--worker=rank")
    assert done.returncode == agent.HUNG, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"memory3 pretrain: {said}")
    assert "in an update" in last
    assert last.endswith(f"the stacks of all ranks are in {tmp_path}/stacks")
    assert_stacks(tmp_path, said)
    failure = (tmp_path / agent.FAILURE).read_text()
    assert '"code": 4' in failure


def test_ranks_that_torchrun_started_are_watched_too(tmp_path: Path) -> None:
    """Even one that is stopped, which could not say so itself."""
    options, said = (
        ["torch.distributed.run", "--standalone", "--nproc-per-node=2"],
        "rank 1 has been stopped for",
    )
    done = hung("stopped", tmp_path, *options, str(tmp_path / "rank.py"), str(tmp_path))
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("memory3 pretrain: ")]
    assert line.startswith(f"memory3 pretrain: {said}")
    assert line.endswith(f"the stacks of all ranks are in {tmp_path}/stacks")
    assert "-9" in done.stderr  # torchrun noticed
    assert_stacks(tmp_path, said)
    deadline = time.monotonic() + HANG_SECONDS
    while found := list(
        tmp_path.glob("memory3-ranks-*")
    ):  # the watchdog goes with its ranks, and so do the records
        assert time.monotonic() < deadline, found
        time.sleep(0.1)


BUSY = Sign(0, 1, "an update", "train/engine.py:1 (train_step)", 1.0, 0.1, 10.0, 10.0, False, False, "")
WAITS = replace(BUSY, rank=1, silent=100.0, limit=1000.0, waiting=True)


def test_who_waits_for_others_does_not_hang() -> None:
    assert judge([]) is None
    assert judge([BUSY, WAITS]) is None
    assert judge([replace(BUSY, silent=9.0), replace(WAITS, silent=1900.0)]) is None


def test_the_rank_that_is_silent_and_does_not_wait_is_named() -> None:
    hang = judge([replace(BUSY, silent=11.0), replace(WAITS, limit=10.0)])
    assert hang is not None
    assert hang.rank == 0
    assert hang.says == (
        "rank 0 hangs: 11 s in an update without getting on, at train/engine.py:1 (train_step)"
    )


def test_a_long_phase_has_its_own_limit_unless_the_rank_is_stopped() -> None:
    search = replace(BUSY, phase="a search", silent=500.0, limit=1000.0)
    assert judge([search]) is None
    hang = judge([replace(search, stopped=True)])
    assert hang is not None
    assert "has been stopped for 500 s" in hang.says


def test_a_rank_that_says_nothing_does_not_wait() -> None:
    """It holds the interpreter: what it said last of waiting is old."""
    hang = judge([replace(WAITS, silent=1100.0, stale=50.0)])
    assert hang is not None
    assert hang.rank == 1


def test_where_all_wait_nobody_is_named_and_twice_the_time_is_given() -> None:
    both = [replace(WAITS, rank=rank, limit=100.0, silent=150.0) for rank in (0, 1)]
    assert judge(both) is None
    hang = judge([replace(sign, silent=201.0) for sign in both])
    assert hang is not None
    assert hang.rank is None
    assert "have waited for others, or for a device, for 201 s" in hang.says

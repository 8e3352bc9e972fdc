"""Fault 9: a rank that hangs is found, named and ended, with the stacks of all; one that waits or works is not."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launch import agent
from launch.watchdog import Sign, judge

RANK = """
import os, signal, sys, time
from pathlib import Path
from launch.watchdog import PULSES
from train import distributed

run = Path(sys.argv[1])
ranks = distributed.start(threads=1)
stacks = run / "stacks" / f"rank-{ranks.rank}.txt"
ranks.pulse.show(Path(os.environ[PULSES]), stacks, rank=ranks.rank, batch_seconds=3, phase_seconds=600)
with ranks.pulse.phase("a search"):
    time.sleep(5 * (1 - ranks.rank))
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


@pytest.mark.parametrize(
    ("how", "said"),
    [("stopped", "rank 1 has been stopped for"), ("loop", "rank 1 hangs: ")],
)
def test_a_rank_that_hangs_is_named_and_all_write_their_stacks(how: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "how").write_text(how)
    program = tmp_path / "rank.py"
    program.write_text(RANK)
    root = Path(agent.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "launch.agent", str(tmp_path), "2", f"--worker={program.stem}"],
        cwd=root, env={**os.environ, "PYTHONPATH": f"{root}:{program.parent}"},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == agent.HUNG, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"memory3 pretrain: {said}")
    assert "in an update" in last
    assert last.endswith(f"the stacks of all ranks are in {tmp_path}/stacks")
    waiting, hanging = ((tmp_path / "stacks" / f"rank-{rank}.txt").read_text() for rank in (0, 1))
    assert said in waiting
    assert "in barrier" in waiting
    assert f'{program}", line' in hanging
    failure = (tmp_path / agent.FAILURE).read_text()
    assert '"code": 4' in failure


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

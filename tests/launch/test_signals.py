"""Signals through torchrun (fault 10): a step is finished and published, a compilation is left at once."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from data.files import verify
from launch import agent
from launch.run_log import RunLog
from tests.support.launch import prepared_root, run_settings, trained
from tests.support.spawn import HANG_SECONDS
from train.metrics import read_metrics

RANK = """
import os, signal, sys, time
from pathlib import Path
from launch import worker
from train import continual, stopping
from train.engine import DeepSpeedEngine

stops = []
class Seen(stopping.Stop):
    def __init__(self):
        super().__init__()
        stops.append(self)

worker.Stop = Seen
queue_step = DeepSpeedEngine.queue_step

def tell_the_agent(number):
    if os.environ["RANK"] == "0":
        Path(sys.argv[1], "told").write_text(str(time.time()))
        os.kill(os.getppid(), number)

def step(self, inputs, *, lr):
    result = queue_step(self, inputs, lr=lr)
    tell_the_agent(signal.SIGUSR1)
    while not stops[0].requested:
        time.sleep(0.01)
    return result

def compiling(*arguments, **settings):
    tell_the_agent(signal.SIGTERM)
    time.sleep(60)

if "{what}" == "step":
    DeepSpeedEngine.queue_step = step
else:
    continual.compile_generation = compiling
worker.leave(worker.main(Path(sys.argv[1])))
"""


@dataclass(frozen=True)
class Stopped:
    code: int
    seconds: float
    said: str
    checkpoints: list[str]


def stopped(run: Path, what: str) -> Stopped:
    """Start the ranks of a run, whose agent gets a signal in the middle of something."""
    program = run.parent / f"{what}.py"
    program.write_text(RANK.replace("{what}", what))
    root = Path(agent.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "launch.agent", str(run), "2", f"--worker={program.stem}"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": f"{root}:{program.parent}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG_SECONDS,
    )
    seconds = time.time() - float((run / "told").read_text())
    published = sorted(path.name for path in (run / "checkpoints").glob("continual-*"))
    return Stopped(done.returncode, seconds, done.stderr, published)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run `m`, as it was when its continual stage began."""
    root = Path(shutil.copytree(trained().root, tmp_path_factory.mktemp("signals") / "runs"))
    for path in (root / "m/checkpoints").glob("continual-*"):
        shutil.rmtree(path)
    shutil.rmtree(root / "m/bank/generation-continual-0001")
    return root / "m"


def test_a_signal_during_an_update_publishes_it_and_one_during_a_compilation_leaves_at_once(
    run: Path,
) -> None:
    step = stopped(run, "step")
    assert step.code == 138, step.said
    assert step.checkpoints[-1] == "continual-00000001"  # between two saves of the schedule
    assert "stopped after 1 steps of the continual stage, and published a checkpoint" in step.said

    compilation = stopped(run, "compilation")
    assert compilation.code == 143, compilation.said
    assert compilation.checkpoints[-1] == "continual-00000002"  # the edge of the bank epoch
    for name in compilation.checkpoints:
        assert verify(run / "checkpoints" / name) == []
    assert compilation.seconds < 30  # torchrun's patience
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line and line["stage"] == "continual"] == [1, 2]


def test_a_launcher_that_is_killed_takes_its_run_with_it_checkpoint_first_and_ctrl_c_is_no_fault(
    tmp_path: Path,
) -> None:
    root = tmp_path / "runs"
    root.mkdir()
    (root / "prepared").symlink_to(prepared_root() / "prepared")
    killed = ended_by(signal.SIGKILL, root)
    (checkpoint,) = (root / "w/checkpoints").iterdir()
    assert verify(checkpoint) == []
    assert killed.events == []  # the launcher is who tells
    stopped = ended_by(signal.SIGINT, root)
    resumed, stop = stopped.events
    assert resumed["checkpoint"] == checkpoint.name
    assert checkpoint.stat().st_mtime - 10 < resumed["checkpoint_time"] < resumed["time"]
    assert (stop["event"], stop["code"]) == ("stopped", 130)
    assert stopped.recoveries == []  # nothing was lost either time


def test_a_launcher_outlives_its_agent_and_the_ranks_end_with_it(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    root.mkdir()
    (root / "prepared").symlink_to(prepared_root() / "prepared")

    def kills_the_agent(launcher: subprocess.Popen[bytes]) -> None:
        (child,) = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        os.kill(int(child), signal.SIGKILL)
        assert launcher.wait(HANG_SECONDS) == 128 + signal.SIGKILL
        assert not _is_alive(launcher.pid)

    ended_by(kills_the_agent, root)
    (checkpoint,) = (root / "w/checkpoints").iterdir()
    assert verify(checkpoint) == []


def ended_by(end: signal.Signals | Callable[[subprocess.Popen[bytes]], None], root: Path) -> RunLog:
    """Start a run without end, send its launcher a signal after an update or end it otherwise, and wait for all of its
    processes.
    """
    path = root / "w/metrics.jsonl"
    endless = [
        "warmup.steps=100000",
        "saving.every_steps=100000",
        "logging.validate_every=100000",
        "stage=warmup",
    ]
    before = len(steps_of(path))
    launcher = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "pretrain", "--no-prepare", *run_settings(root, "w"), *endless],
        cwd=Path(agent.__file__).parents[1], start_new_session=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_for(lambda: len(steps_of(path)) > before)
        if isinstance(end, signal.Signals):
            launcher.send_signal(end)
            launcher.wait()
        else:
            end(launcher)
        wait_for(lambda: not _is_alive(launcher.pid))
    finally:
        with suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
    return RunLog.read(root / "w")


def steps_of(path: Path) -> list[dict[str, object]]:
    return [line for line in read_metrics(path) if "loss" in line] if path.exists() else []


def _is_alive(session: int) -> bool:
    """Whether the launcher, its agent or a rank is left."""
    try:
        os.killpg(session, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + HANG_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)

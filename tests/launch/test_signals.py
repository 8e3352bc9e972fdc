"""Signals through torchrun (fault 10): a step is finished and published, a compilation is left at once."""

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from data.files import verify
from launch import agent
from tests.support.launch import trained
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
train_step = DeepSpeedEngine.train_step

def tell_the_agent(number):
    if os.environ["RANK"] == "0":
        Path(sys.argv[1], "told").write_text(str(time.time()))
        os.kill(os.getppid(), number)

def step(self, inputs, *, lr):
    result = train_step(self, inputs, lr=lr)
    tell_the_agent(signal.SIGUSR1)
    while not stops[0].requested:
        time.sleep(0.01)
    return result

def compiling(*arguments, **settings):
    tell_the_agent(signal.SIGTERM)
    time.sleep(60)

if "{what}" == "step":
    DeepSpeedEngine.train_step = step
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

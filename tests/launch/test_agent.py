"""What a user sees when a rank fails: the first cause, once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch import agent
from launch.compose import compose_config, save_config
from tests.support.spawn import HANG_SECONDS
from train.distributed import free_port

RANK = """
import os, sys, time
from pathlib import Path
from launch import worker
from train.divergence import HopelessError

def fail(run, stop, meeting):
    how = (Path(run) / os.environ["RANK"]).read_text()
    if how == "wait":
        time.sleep(60)
    if how == "kill":
        is_told = Path(run, str(1 - int(os.environ["RANK"]))).read_text().startswith("told")
        while is_told and not Path(run, "computing").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), 9)
    if how == "lost":
        raise RuntimeError("connection closed by peer")
    if how.startswith("told"):  # the launcher ends this rank, which is computing, and only then looks for the other
        with stop.deferred():
            Path(run, "computing").touch()
            while not stop.requested:
                time.sleep(0.01)
            worker._GRACE_SECONDS = 0
            raise RuntimeError(how.removeprefix("told, "))
    if how == "full":
        raise OSError(28, "No space left on device", "metrics.jsonl")
    raise {"value": ValueError, "bug": ZeroDivisionError, "hopeless": HopelessError}[how]("this is why")

worker._run = fail
worker._GRACE_SECONDS = 30
sys.exit(worker.main(Path(sys.argv[1])))
"""


@pytest.mark.parametrize(
    ("ranks", "code", "last", "traceback"),
    [
        (("value", "lost"), 2, "memory3 pretrain: rank 0: this is why", False),
        (("wait", "value"), 2, "memory3 pretrain: rank 1: this is why", False),
        (("hopeless", "lost"), 3, "memory3 pretrain: rank 0: this is why", False),
        (
            ("full", "wait"),
            2,
            "memory3 pretrain: rank 0: [Errno 28] No space left on device: 'metrics.jsonl'; what was "
            "published is as it was: make room, and the same command goes on",
            False,
        ),
        (("wait", "bug"), 1, "memory3 pretrain: rank 1: ZeroDivisionError: this is why", True),
        (("wait", "kill"), 137, "memory3 pretrain: rank 1 was ended by SIGKILL; ", False),
        (
            ("told, Connection closed by peer", "kill"),
            137,
            "memory3 pretrain: rank 1 was ended by SIGKILL; ",
            False,
        ),
        (("told, a bug", "kill"), 137, "memory3 pretrain: rank 1 was ended by SIGKILL; ", True),
    ],
    ids=["peer-lost", "value", "diverged", "full", "bug", "killed", "killed-peer-lost", "killed-bug"],
)
def test_first_cause_is_said_once(
    ranks: tuple[str, str], code: int, last: str, traceback: bool, tmp_path: Path
) -> None:
    save_config(compose_config(["experiment=demo"]), tmp_path / "config.yaml")
    for rank, how in enumerate(ranks):
        (tmp_path / str(rank)).write_text(how)
    root = Path(agent.__file__).parents[1]
    program = tmp_path / "rank.py"
    program.write_text(RANK)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "launch.agent", str(tmp_path), "2", f"--worker={program.stem}"],
        cwd=root, env={**os.environ, "PYTHONPATH": f"{root}:{program.parent}", "TMPDIR": str(temporary)},
        capture_output=True, text=True, check=False, timeout=HANG_SECONDS,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert list(temporary.iterdir()) == []  # torchrun's own log folder would stay
    said = done.stderr.splitlines()[-1]
    assert said.startswith(last)
    assert len(said) == len(last) or code == 137
    if code == 137:  # what may have been the reason, what takes most, what to set
        assert "for want of memory" in said
        assert "optimizer" in said
        assert "set continual.micro_rows=" in said or "set warmup.micro_rows=" in said
    failure = json.loads((tmp_path / agent.FAILURE).read_text())
    assert (failure["code"], failure["from_outside"]) == (code, code == 137)
    assert ("Traceback" in done.stderr) is traceback
    assert sum(line.startswith("memory3 pretrain") for line in done.stderr.splitlines()) == 1


APART = """
import os, sys
from pathlib import Path
from launch import worker
from train import distributed

def fail(run, stop, meeting):
    ranks = distributed.start(threads=1)
    ranks.barrier()
    if ranks.is_first:
        os.kill(os.getpid(), 9)
    ranks.barrier()

worker._run = fail
sys.exit(worker.main(Path(sys.argv[1])))
"""


def test_a_rank_that_lost_one_of_another_machine_says_so_in_a_line(tmp_path: Path) -> None:
    """The agents of two machines, with a rank each: only the first knows that its rank was killed."""
    save_config(compose_config(["experiment=demo"]), tmp_path / "config.yaml")
    (tmp_path / "apart.py").write_text(APART)
    root = Path(agent.__file__).parents[1]
    given = ["1", "--nodes=2", f"--address=127.0.0.1:{free_port()}", "--worker=apart"]
    agents = [
        subprocess.Popen(
            [sys.executable, "-m", "launch.agent", str(tmp_path), *given, f"--node={node}"],
            cwd=root, env={**os.environ, "PYTHONPATH": f"{root}:{tmp_path}"},
            stderr=subprocess.PIPE, text=True,
        )
        for node in range(2)
    ]  # fmt: skip
    killed, lost = (each.communicate(timeout=HANG_SECONDS)[1] for each in agents)
    assert [each.returncode for each in agents] == [137, 1]
    assert killed.startswith("memory3 pretrain: rank 0 was ended by SIGKILL; ")
    assert lost.startswith("memory3 pretrain: rank 1: lost another rank, whose own launcher says why: ")
    assert lost.count("\n") == 1, lost
    assert json.loads((tmp_path / agent.FAILURE).read_text())["code"] == 137


def test_ranks_of_one_machine_meet_where_no_name_has_to_be_known(tmp_path: Path) -> None:
    """A host may not know its own name, in containers for instance: ranks then waited for minutes."""
    (tmp_path / "meeting.py").write_text(
        "import os, sys, pathlib; pathlib.Path(sys.argv[1], os.environ['RANK']).write_text(os.environ['MASTER_ADDR'])"
    )
    root = Path(agent.__file__).parents[1]
    subprocess.run(
        [sys.executable, "-m", "launch.agent", str(tmp_path), "1", "--worker=meeting"],
        cwd=root, env={**os.environ, "PYTHONPATH": f"{root}:{tmp_path}"}, check=True, timeout=HANG_SECONDS,
    )  # fmt: skip
    assert (tmp_path / "0").read_text() == "127.0.0.1"

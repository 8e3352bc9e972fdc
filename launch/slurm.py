"""SLURM: the script of a job, the five commands that are asked, and where a job says how it goes.

A job runs the same command that its user gave. `--signal` has SLURM send SIGUSR1 before the time limit, and before a
preemption where the cluster sends it: the run publishes a checkpoint, and its job is queued again, under its number
and with the same script. A job is found by its name, which follows from the run's folder, so that no file has to know
its number.
Not here: what the command does (`launch.pretrain`, `launch.trial`).
"""

import getpass
import logging
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from data.files import named_apart
from launch.config import RunConfig

log = logging.getLogger(__name__)

_PORTS = 1000
"""So many jobs in a row meet at different ports."""
_QUEUE_SECONDS = 10.0
"""A list of jobs is as old as this at most: `squeue` asks a service that all users of a cluster share."""


def job_name(folder: Path) -> str:
    """The name of the job of a run, or of a sweep."""
    return named_apart(folder)


def script(config: RunConfig, folder: Path, command: str, *, array: bool = False) -> str:
    """The text that `sbatch` is given; its command runs in the folder where `sbatch` was called.

    Args:
        config: Of the run, or of any trial of a sweep.
        folder: Of the run or the sweep, from the root for the same text everywhere; it takes the output.
        command: A line of shell; its process receives the signals.
        array: Whether this is an array of jobs, whose tasks `sbatch --array` names.
    """
    asked, per_node = config.launcher.slurm, ranks_per_node(config)
    options = [
        f"--job-name={job_name(folder)}",
        f"--output={folder.resolve()}/slurm-{'%A_%a' if array else '%j'}.out",
        "--open-mode=append",
        "--requeue",
        f"--signal=B:USR1@{asked.signal_seconds}",
        f"--time={asked.time}",
        f"--nodes={asked.nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={per_node * config.engine.threads_per_rank}",
        *([f"--gpus-per-node={per_node}"] if asked.gpus else []),
        *asked.options,
    ]
    root = str(Path(__file__).resolve().parent.parent)
    path = f"export PYTHONPATH={shlex.quote(root)}${{PYTHONPATH:+:$PYTHONPATH}}"
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {option}" for option in options),
        *asked.setup,
        'cd "$SLURM_SUBMIT_DIR"',  # the lines above may have left it
        path,
        f"exec {command}",
    ]
    return "".join(f"{line}\n" for line in lines)


def ranks_per_node(config: RunConfig) -> int:
    """Ranks of each node."""
    return config.engine.num_ranks // config.launcher.slurm.nodes


def srun_command(config: RunConfig, agent: Sequence[str], address: str) -> list[str]:
    """The command that starts an agent on every node of the allocation; several meet at the address."""
    nodes, per_node = config.launcher.slurm.nodes, ranks_per_node(config)
    srun = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    srun.append(f"--cpus-per-task={per_node * config.engine.threads_per_rank}")
    agent = [*agent, str(per_node)]
    if nodes == 1:
        return [*srun, *agent]
    agent += [f"--nodes={nodes}", f"--address={address}"]
    return [*srun, "sh", "-c", 'exec "$@" --node="$SLURM_NODEID"', "agent", *agent]


def meeting_place(port: int) -> str:
    """First node and port of the allocation that this process lives in: jobs that share a node differ in the port.

    Raises:
        ValueError: It lives in none.
    """
    listed, job = os.environ.get("SLURM_JOB_NODELIST"), os.environ.get("SLURM_JOB_ID")
    if listed is None or job is None:
        raise ValueError(
            "launcher.slurm.submit=false, and this is no allocation of SLURM; give the command within `salloc`, or "
            "leave launcher.slurm.submit away"
        )
    node = _ask("scontrol", "show", "hostnames", listed).split()[0]
    return f"{node}:{port + int(job.partition('_')[0]) % _PORTS}"


def submit(folder: Path, text: str, *, tasks: Sequence[int] | None = None) -> str:
    """Write the script into a folder and hand it to `sbatch`; the number of the job.

    Args:
        folder: Of the run or the sweep.
        text: The script.
        tasks: Of the array.
    """
    path = folder / "job.sbatch"
    path.write_text(text)
    array = [] if tasks is None else [f"--array={','.join(map(str, tasks))}"]
    return _ask("sbatch", "--parsable", *array, str(path)).strip().partition(";")[0]


def newest_output(folder: Path, task: int | None) -> Path | None:
    """What the newest job of a run says, or the newest task of that number in arrays; None before any has run."""
    found = folder.glob("slurm-*.out")
    name = re.compile(r"slurm-(\d+)" + ("" if task is None else f"_{task}") + r"\.out")
    numbers = {int(match[1]): path for path in found if (match := name.fullmatch(path.name))}
    return numbers[max(numbers)] if numbers else None


def requeue() -> None:
    """Have SLURM queue the job again that this process lives in; it then ends this process."""
    log.info("the time of this job is over: it is queued again")
    try:
        _ask("scontrol", "requeue", os.environ["SLURM_JOB_ID"])
    except ValueError as problem:  # of an allocation that is no batch job
        log.warning("it could not be queued again: %s", problem)


def asks_for_requeue(code: int, config: RunConfig) -> bool:
    """Whether a run that ended so wants to go on in another job: SIGUSR1 came before the time was over."""
    return code == 128 + signal.SIGUSR1 and "SLURM_JOB_ID" in os.environ and not config.launcher.slurm.submit


class Queue:
    """The jobs of one name that wait or run."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._asked = float("-inf")
        self._jobs: dict[int | None, str] = {}

    def jobs(self) -> dict[int | None, str]:
        """Their numbers, by the task of the array; None where there is no array."""
        if time.monotonic() - self._asked > _QUEUE_SECONDS:
            # %K: the task, N/A where there is no array; %A would be another number for every task.
            said = _ask(
                "squeue", "--noheader", "--array", f"--user={getpass.getuser()}", f"--name={self._name}",
                "--format=%i %K",
            )  # fmt: skip
            rows = [line.split() for line in said.splitlines()]
            self._jobs = {int(task) if task.isdigit() else None: job for job, task in rows}
            self._asked = time.monotonic()
        return self._jobs

    def forget(self) -> None:
        """Ask anew next time: a job was submitted or cancelled."""
        self._asked = float("-inf")

    def cancel(self, task: int | None) -> None:
        """End a job, by its task."""
        if task in self.jobs():
            _ask("scancel", self.jobs()[task])
        self.forget()


def _ask(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ValueError(
            f"{command[0]} is not here: launcher=slurm is for machines that belong to a SLURM cluster; leave it away, "
            "or give the command there"
        ) from None
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ValueError(f"{command[0]} failed: {said}; the command was: {shlex.join(command)}")
    return done.stdout

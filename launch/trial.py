"""A trial of a sweep, or a run of a grid: in a process group or a job of its own, known by its files alone.

    RUN/trial.lock       held by the trial's processes, however they were started; its text is the process group
    RUN/trial.json       of a job: its settings
    RUN/trial.log        what it says; a job says it in RUN/slurm-JOB.out, a sweep's in SWEEP/slurm-JOB_TASK.out
    RUN/trial-exit       its exit code, once it has ended by itself
    RUN/metrics.jsonl    its validation losses
    RUN/evaluation-validation.json    what it knows of facts, where that is the objective

A controller that did not start a trial can so watch, stop and judge it like its own. The trial's process is
`python -m launch.trial FOLDER DESCRIPTOR SETTINGS`, where the descriptor is that of the lock; in a job it is
`python -m launch.trial FOLDER`, and the queue says whether it lives. One of the settings may be `--evaluate`: then the
trained run is evaluated as well.
Not here: which trials there are (`launch.study`, `launch.grid`), what is made of their losses (`launch.sweep`).
"""

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import NoReturn, Protocol

from data.files import write_atomic
from launch import cli, preflight, slurm
from launch.config import LauncherKind, RunConfig
from launch.lock import is_in_use
from launch.slurm import Queue
from launch.supervise import FAILURE
from memorybank.config import QueryMode

PROGRAM = (sys.executable, "-m", "launch.trial")
_STOP_SECONDS = 60
"""Within this time torchrun has ended its ranks, and killed those that did not listen."""
_POLL_SECONDS = 0.1
_STARTED = "--- started\n"
"""Stands in a log before what a start of the trial says: it may have been started before."""
_OBJECTIVES = ("validation_memory", "validation_none")
EVALUATE = "--evaluate"
"""Stands among the settings of a trial that is evaluated when it is trained."""


@dataclass(frozen=True, slots=True)
class Loss:
    """A validation of a trial.

    Attributes:
        step: Finished updates, over both stages.
        loss: With memory where memory was read, else without; nats per token of held-out text.
        is_last: Whether nothing comes after it.
    """

    step: int
    loss: float
    is_last: bool


@dataclass(slots=True)
class TrialRun(ABC):
    """The files of a trial.

    Attributes:
        folder: The run's folder.
        config: Its configuration.
        settings: The overrides that it is composed of.
    """

    folder: Path
    config: RunConfig
    settings: Sequence[str]
    _read: int = field(default=0, kw_only=True)
    _file: int | None = field(default=None, kw_only=True)

    @abstractmethod
    def is_alive(self) -> bool:
        """Whether it waits or trains, whoever started it."""

    @abstractmethod
    def stop(self) -> None:
        """End all of its processes."""

    @abstractmethod
    def log(self) -> Path | None:
        """The file that takes what it says; None where nothing of it has ever run."""

    def exit_code(self) -> int | None:
        """The exit code of a trial that has ended; None when it could not say one, being killed."""
        path = self.folder / "trial-exit"
        return int(path.read_text()) if path.exists() else None

    def took_too_much_memory(self) -> bool:
        """Whether the kernel ended a rank for want of memory, as far as is known of a rank that was killed."""
        path = self.folder / FAILURE
        killed = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return killed.get("code") == 128 + signal.SIGKILL and not killed["from_outside"]

    def check_room(self) -> None:
        """Once it has failed: see that it was not for want of room on the disk, else forget that it did.

        Raises:
            ValueError: There is too little; the message says what to do.
        """
        try:
            preflight.check_room(self.config, self.folder)
        except preflight.NoRoomError as full:
            (self.folder / "trial-exit").unlink()
            raise ValueError(f"{full}; the same command then goes on") from None
        except ValueError:  # what it failed of
            pass

    def cancelled(self) -> str | None:
        """The number of its job, if that was seen to wait and has left the queue before it began."""
        return None

    def last_words(self) -> str:
        """The line that says best why it ended."""
        path = self.log()
        lines = [] if path is None else path.read_text(errors="replace").rpartition(_STARTED)[2].split("\n")
        lines = [line.strip() for line in lines if line.strip()]
        own = [line for line in lines if line.startswith("memory3 ")]
        return (own or lines or ["it said nothing"])[-1]

    def new_losses(self) -> Iterator[Loss]:
        """The validations since the last call; all of them again once a resumed run has rewritten its metrics."""
        try:
            file = (self.folder / "metrics.jsonl").open("rb")
        except FileNotFoundError:
            return
        with file:
            found = os.fstat(file.fileno())
            if found.st_ino != self._file or found.st_size < self._read:
                self._file, self._read = found.st_ino, 0
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._read += len(line)
                yield from self._losses(line)

    def evaluation(self) -> dict[str, float]:
        """Losses of a trained run's evaluation by name: first that of facts, with memory where memory is read.

        Raises:
            ValueError: It was not evaluated, or there are no facts.
        """
        from launch.evaluate import read_results
        from train.arms import Arm, Pattern
        from train.evaluate import ArmResult

        results = read_results(self.folder, "validation")
        facts = {result.arm: result.loss for result in results if not result.is_text}
        if not facts:
            raise ValueError(f"{self.folder}: its corpus has no fact probes; choose --objective text")
        read, none = Arm.memory in facts, facts[Arm.none]
        losses = {"facts": facts[Arm.memory] if read else none}
        if read:
            losses |= {"facts, shuffled": facts[Arm.shuffled], "facts, no memory": none}

        def text(arm: Arm, query: QueryMode | None, pattern: Pattern | None) -> ArmResult:
            wanted = (arm, query, pattern)
            (found,) = (
                each for each in results if each.is_text and (each.arm, each.query, each.pattern) == wanted
            )
            return found

        if read:
            losses["text"] = text(Arm.memory, QueryMode.previous, Pattern.inference).loss
        losses["text, no memory" if read else "text"] = text(Arm.none, None, None).loss
        return losses

    def _losses(self, line: bytes) -> Iterator[Loss]:
        values = json.loads(line)
        key = next((key for key in _OBJECTIVES if key in values), None)
        if key is not None:
            before = self.config.warmup.steps if self.config.warmup and values["stage"] == "continual" else 0
            step = before + int(values["step"])
            yield Loss(step, float(values[key]), is_last=step == total_steps(self.config))


@dataclass(slots=True)
class TrialProcess(TrialRun):
    """A trial on this machine.

    Attributes:
        program: What is started, before folder, descriptor and settings.
    """

    program: Sequence[str] = PROGRAM
    _process: "subprocess.Popen[bytes] | None" = None

    def start(self) -> None:
        """Start it, or let it go on at its newest checkpoint; nothing of it may live."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "trial-exit").unlink(missing_ok=True)
        root = str(Path(__file__).resolve().parent.parent)
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        with (self.folder / "trial.log").open("ab") as log, (self.folder / "trial.lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            log.write(_STARTED.encode())
            log.flush()
            self._process = subprocess.Popen(
                [*self.program, str(self.folder), str(lock.fileno()), *self.settings],
                env={**os.environ, "PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[lock.fileno()],
            )

    def log(self) -> Path | None:
        path = self.folder / "trial.log"
        return path if path.exists() else None

    def is_alive(self) -> bool:
        """Whether any of its processes lives, whoever started it."""
        if not self.folder.exists():
            return False
        with (self.folder / "trial.lock").open("ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        if self._process is not None:
            self._process.wait()  # it has let go of the lock, so it is ending
        # Asked second: a launcher that begins must not meet our hand on the run's own lock.
        return is_in_use(self.folder)

    def stop(self) -> None:
        """End all of its processes."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            deadline = time.monotonic() + _STOP_SECONDS
            told: int | None = None
            while self.is_alive():
                group = self._group()
                if group is not None and group != told:
                    with suppress(ProcessLookupError):
                        os.killpg(group, number)
                    told = group
                if time.monotonic() > deadline:
                    break
                time.sleep(_POLL_SECONDS)
            else:
                (self.folder / "trial-exit").unlink(missing_ok=True)  # that of our signal
                return
        raise ValueError(
            f"{self.folder}: processes of the trial cannot be ended; end them, then the same command goes on"
        )

    def _group(self) -> int | None:
        text = (self.folder / "trial.lock").read_text().strip()
        return int(text) if text else None


@dataclass(slots=True)
class TrialJob(TrialRun):
    """A trial that is a job of SLURM.

    Attributes:
        jobs_folder: The sweep's, or that of a job of its own, where jobs leave what they say.
        task: Its number in an array of jobs; None of a job of its own.
        queue: The jobs of the sweep's name, or of the run's.
        program: What a job of its own starts, before the folder.
    """

    jobs_folder: Path
    task: int | None
    queue: Queue
    program: Sequence[str] = PROGRAM
    _job: str | None = None

    def hand_over(self) -> None:
        """Leave its settings to the job that will be submitted."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "trial-exit").unlink(missing_ok=True)
        write_atomic(self.folder / "trial.json", json.dumps(list(self.settings)).encode())

    def submit(self) -> str:
        """Submit a job of its own, and return its number."""
        self.hand_over()
        command = shlex.join([*self.program, str(self.folder.resolve())])
        return slurm.submit(self.folder, slurm.script(self.config, self.folder, command))

    def log(self) -> Path | None:
        return slurm.newest_output(self.jobs_folder, self.task)

    def is_alive(self) -> bool:
        job = self.queue.jobs().get(self.task)
        self._job = job or self._job
        return job is not None

    def cancelled(self) -> str | None:
        # SLURM makes the file of what a job says when the job begins.
        has_begun = (self.jobs_folder / f"slurm-{self._job}.out").exists()
        return None if has_begun else self._job

    @property
    def was_submitted(self) -> bool:
        """Whether a job for it was ever asked for."""
        return (self.folder / "trial.json").exists()

    def stop(self) -> None:
        deadline = time.monotonic() + _STOP_SECONDS
        self.queue.cancel(self.task)
        while self.task in self.queue.jobs():
            if time.monotonic() > deadline:
                job = self.queue.jobs()[self.task]
                raise ValueError(f"job {job} cannot be ended; end it, then the same command goes on")
            time.sleep(_POLL_SECONDS)
            self.queue.forget()
        (self.folder / "trial-exit").unlink(missing_ok=True)


class Trials(Protocol):
    """Where trials are trained, and how many at the same time."""

    at_once: int

    def run(self, number: int, folder: Path, config: RunConfig, settings: Sequence[str]) -> TrialRun:
        """A trial, wherever it stands."""
        ...

    def start(self, runs: Sequence[TrialRun]) -> None:
        """Start trials of which nothing lives, or let them go on at their newest checkpoints."""
        ...


@dataclass(slots=True)
class Processes:
    """Trials on this machine, one after the other."""

    program: Sequence[str] = PROGRAM
    at_once: int = 1

    def run(self, number: int, folder: Path, config: RunConfig, settings: Sequence[str]) -> TrialRun:
        return TrialProcess(folder, config, settings, self.program)

    def start(self, runs: Sequence[TrialRun]) -> None:
        for run in runs:
            assert isinstance(run, TrialProcess)
            run.start()


class Jobs:
    """Trials as tasks of arrays.

    Args:
        config: Of any trial: what a job asks for.
        folder: The sweep's; its jobs are found by its name.
        program: What is started, before the trial's folder.
    """

    def __init__(self, config: RunConfig, folder: Path, program: Sequence[str] = PROGRAM) -> None:
        self.at_once = config.launcher.slurm.array_tasks
        prefix = shlex.quote(str(folder.resolve()))
        command = f'{shlex.join(program)} {prefix}-"$(printf %03d "$SLURM_ARRAY_TASK_ID")"'
        self._folder = folder
        self._script = slurm.script(config, folder, command, array=True)
        self._queue = Queue(slurm.job_name(folder))

    def run(self, number: int, folder: Path, config: RunConfig, settings: Sequence[str]) -> TrialRun:
        settings = [*settings, "launcher.slurm.submit=false"]
        return TrialJob(folder, config, settings, self._folder, number, self._queue)

    def start(self, runs: Sequence[TrialRun]) -> None:
        tasks = []
        for run in runs:
            assert isinstance(run, TrialJob)
            assert run.task is not None
            run.hand_over()
            tasks.append(run.task)
        slurm.submit(self._folder, self._script, tasks=tasks)
        self._queue.forget()


@contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGTERM do what Ctrl-C does."""

    def interrupt(signal_number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def on_slurm(config: RunConfig) -> bool:
    """Whether trials are handed to SLURM."""
    return config.launcher.kind is LauncherKind.slurm and config.launcher.slurm.submit


def total_steps(config: RunConfig) -> int:
    """Updates of both stages."""
    return sum(stage.steps for stage in config.stages.values())


def main(folder: str, descriptor: str | None = None, *settings: str) -> int:
    """Train, and write down how it ended."""
    run = Path(folder)
    if descriptor is None:
        settings = tuple(json.loads((run / "trial.json").read_text()))
        (run / "trial-exit").unlink(missing_ok=True)
    else:
        os.pwrite(int(descriptor), f"{os.getpid()}\n".encode(), 0)
        os.set_inheritable(int(descriptor), True)
    code = cli.main(["pretrain", "--no-prepare", *(text for text in settings if text != EVALUATE)])
    if code == 0 and EVALUATE in settings:
        code = cli.main(["evaluate", str(run), "--root", str(run.parent)])
    write_atomic(run / "trial-exit", f"{code}\n".encode())
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

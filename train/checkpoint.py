"""Checkpoints: folders that are written aside, hashed, and published by one rename.

    <run>/checkpoints/<stage>-<step>/
        manifest.json        sizes and hashes of everything below (`data.files`)
        state.json           RunState: position, cursor, generation, how the stage has been going
        finished.npy, drawn.npy   History at the beginning of the epoch
        read.npy             documents finished by now
        model.safetensors    parameters in the training type: all that inference needs
        engine/              DeepSpeed's files: fp32 masters and optimizer state, one file per rank; the random
                             number generators of every rank
        config.yaml          the run's configuration
        origin.json          the code that wrote it, and the run's id at wandb

Saving may be asynchronous: a copy of everything is taken in memory, and a thread on every rank writes, syncs, hashes
and publishes it while training goes on, one checkpoint at a time.

A folder without a whole manifest is damaged, one with another name is unfinished. Before anything is read every byte is
hashed, by one rank for all; the newest checkpoint that passes wins, damaged ones are named and passed over, and a run
that has only damaged ones, or none where its metrics tell of one, stops. Order is by stage and step, never by time.

An export is a checkpoint without its engine, beside the tokenizer and the model's sizes (`launch.checkpoint`).
Not here: what the files of the engine hold (`engine`), hashing and renaming (`data.files`).
"""

import errno
import json
import logging
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from threading import Thread

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.files import MANIFEST, delete_artefact, hold, is_held, open_manifest, partial, publishing, verify
from train.config import STAGES
from train.distributed import Ranks
from train.engine import UNIVERSAL, Engine, Snapshot
from train.history import History
from train.state import RunState

log = logging.getLogger(__name__)

KIND = "checkpoint"
VERSION = 1
Documents = NDArray[np.bool_]
CONFIG, ORIGIN, WEIGHTS = "config.yaml", "origin.json", "model.safetensors"
_NAME = re.compile(r"(warmup|continual)-(\d{8})")
_DELETED, _OUTDATED = ".deleted", ".outdated"


class GoneError(ValueError):
    """A checkpoint was deleted, or replaced, while it was looked at: a run that trains keeps only some."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A verified checkpoint.

    Attributes:
        folder: Where it lies.
        state: Position of the run.
        history: What had been read when its epoch began.
        read: (documents,) bool: what had been finished by then.
        keep: Whether it was published to stay.
    """

    folder: Path
    state: RunState
    history: History
    read: Documents
    keep: bool

    @property
    def published(self) -> float:
        """When it was, in seconds since the epoch, by the clock of the file system."""
        return (self.folder / MANIFEST).stat().st_mtime

    def weights(self) -> dict[str, Tensor]:
        """Parameters by name."""
        weights: dict[str, Tensor] = load_file(self.folder / WEIGHTS)
        return weights

    def origin(self) -> dict[str, str]:
        """The code that wrote it, and the run's id at wandb, by name."""
        path = self.folder / ORIGIN
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


@dataclass(frozen=True, slots=True)
class Retention:
    """Which checkpoints of a stage stay; those that another stage may branch from, and a stage's last, always do.

    Attributes:
        last: So many newest ones.
        every: Those whose step is a multiple of this.
        best: So many with the lowest validation loss.
    """

    last: int = 2
    every: int | None = None
    best: int = 1


@dataclass(frozen=True, slots=True)
class Entry:
    """A published checkpoint as a list shows it: its sizes were compared with the manifest's, not its bytes.

    Attributes:
        folder: Where it lies.
        stage: Its stage.
        step: Its step.
        problem: Why it cannot be used, as far as one sees without reading it all.
        state: None when there is a problem.
        keep: Whether it was published to stay.
        size: Bytes of all files, in all.
        ranks: Processes that wrote it.
    """

    folder: Path
    stage: str
    step: int
    problem: str | None = None
    state: RunState | None = None
    keep: bool = False
    size: int = 0
    ranks: int = 0


def entries(run: Path) -> list[Entry]:
    """All published checkpoints of a run folder, oldest first."""
    found = [_entry(folder) for folder in _published(run / "checkpoints")]
    # What is gone by now was rotated away meanwhile, and is no damage.
    return [entry for entry in found if entry.problem is None or entry.folder.exists()]


def leftovers(run: Path) -> list[Path]:
    """What interrupted saves and deletions left in a run folder."""
    found = [
        path
        for ending in (".partial", UNIVERSAL, _DELETED, _OUTDATED)
        for path in (run / "checkpoints").glob(f"*{ending}")
        if _NAME.fullmatch(path.name.removesuffix(ending))
    ]
    return sorted(found)


def reasons_to_keep(found: Sequence[Entry], retention: Retention) -> dict[Path, list[str]]:
    """Why each checkpoint stays, by folder; an empty list means that it may go.

    Damaged ones stay, and count for nothing: whether something can be saved of them is not for us to say.
    """
    reasons: dict[Path, list[str]] = {entry.folder: [] for entry in found}
    for stage in STAGES:
        sound = [entry for entry in found if entry.stage == stage and entry.problem is None]
        measured = [
            (entry.state.validation, -entry.step, entry.folder)
            for entry in sound
            if entry.state is not None and entry.state.validation is not None
        ]
        for _, _, folder in sorted(place for place in measured if isfinite(place[0]))[: retention.best]:
            reasons[folder].append("best")
        for entry in sound:
            if entry.keep:
                reasons[entry.folder].append("end of a stage, or branch point")
            if retention.every is not None and entry.step % retention.every == 0:
                reasons[entry.folder].append(f"every {retention.every}")
        for entry in sound[-retention.last :]:
            reasons[entry.folder].append(f"last {retention.last}")
    for entry in found:
        if entry.problem is not None:
            reasons[entry.folder].append("damaged")
    return reasons


def delete(folder: Path) -> bool:
    """Delete a checkpoint unless somebody reads it; a kill on the way leaves nothing that looks like one."""
    if is_held(folder):
        log.warning("%s is being read, and stays for now", folder)
        return False
    _remove(folder)
    return True


def damage(folder: Path) -> str | None:
    """What is wrong with the bytes of a published checkpoint, all of which are read; None when nothing is.

    Raises:
        GoneError: It was deleted meanwhile.
    """
    problem = ""
    try:
        damaged = verify(folder)
    except ValueError as error:
        damaged, problem = [], str(error)
    except FileNotFoundError:
        damaged = [MANIFEST]
    if damaged:
        problem = f"checkpoint {folder} is damaged: {', '.join(damaged)}"
    if problem and not folder.exists():
        raise GoneError(f"checkpoint {folder} is gone: its run, which trains, has published newer ones")
    if problem:
        return problem
    settings = open_manifest(folder, kind=KIND, version=VERSION).settings
    if _NAME.fullmatch(folder.name) and (settings["stage"], settings["step"]) != _parse(folder):
        return f"checkpoint {folder} is not what its name says: it is of {settings['stage']}, step {settings['step']}"
    return None


def cannot_write(problem: BaseException) -> bool:
    """Whether a file could not be written for want of room, or of the right to."""
    if isinstance(problem, OSError):
        return problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)
    return "PytorchStreamWriter" in str(problem)  # torch's own word for it


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint that was published.

    Attributes:
        folder: Where it lies.
        state: Where the run stood.
        seconds_stalled: How long training stood still for it.
        seconds: From the beginning of the save to the end of publication.
    """

    folder: Path
    state: RunState
    seconds_stalled: float
    seconds: float


class _Writing:
    """A checkpoint that a thread writes."""

    def __init__(self, write: Callable[[], Saved]) -> None:
        self._write = write
        self._outcome: Saved | BaseException | None = None
        self._thread = Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive()

    def result(self) -> Saved:
        """Wait for it; what it raised is raised here."""
        self._thread.join()
        assert self._outcome is not None
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        return self._outcome

    def _run(self) -> None:
        try:
            self._outcome = self._write()
        except BaseException as problem:
            self._outcome = problem


class Checkpoints:
    """The checkpoints of one run folder.

    Args:
        run: The run folder.
        inputs: Fingerprints of what the run is made from.
        retention: Which checkpoints stay.
        ranks: Of the training process; None for readers, who publish nothing. What these open is not deleted for as
            long as their process lives.
        origin: The code that writes, by name of its parts.
        aside: The same ranks in a group of their own, for a thread that writes while training goes on; None: saving
            is over when `save` returns.
    """

    def __init__(
        self,
        run: Path,
        *,
        inputs: Mapping[str, str],
        retention: Retention | None = None,
        ranks: Ranks | None = None,
        origin: Mapping[str, str] | None = None,
        aside: Ranks | None = None,
    ) -> None:
        self._run = run
        self._folder = run / "checkpoints"
        self._inputs = dict(inputs)
        self._retention = retention or Retention()
        self._ranks = ranks
        self._origin = dict(origin or {})
        self._aside = aside
        self._writing: _Writing | None = None
        self._saved: list[Saved] = []

    def save(self, engine: Engine, state: RunState, history: History, read: Documents, *, keep: bool) -> None:
        """Publish a checkpoint, or begin to; a collective. One that is being written is finished first.

        Args:
            engine: Weights and optimizer state.
            state: Where the run stands.
            history: What had been read when the epoch began.
            read: (documents,) bool: what has been finished by now.
            keep: Protects the checkpoint from rotation.

        Raises:
            ValueError: It, or the one before it, could not be written; those that are published are as they were.
        """
        assert self._ranks is not None
        started = time.perf_counter()
        self.finish()
        snapshot = engine.snapshot(copy=self._aside is not None)
        seconds_stalled = time.perf_counter() - started
        ranks = self._aside or self._ranks

        def write() -> Saved:
            folder = self._write(snapshot, state, history, read, ranks, keep=keep)
            seconds = time.perf_counter() - started
            return Saved(folder, state, seconds if self._aside is None else seconds_stalled, seconds)

        if self._aside is None:
            self._saved.append(write())
        else:
            self._writing = _Writing(write)

    def finish(self) -> None:
        """Wait for what is being written.

        Raises:
            ValueError: It could not be written.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            self._saved.append(writing.result())

    def saved(self) -> list[Saved]:
        """What was published and not told yet.

        Raises:
            ValueError: It could not be written.
        """
        if self._writing is not None and self._writing.is_over:
            self.finish()
        told, self._saved = self._saved, []
        return told

    def _write(
        self,
        snapshot: Snapshot,
        state: RunState,
        history: History,
        read: Documents,
        ranks: Ranks,
        *,
        keep: bool,
    ) -> Path:
        folder = folder_of(self._run, state.stage, state.step)
        settings = {"stage": state.stage, "step": state.step, "ranks": ranks.world_size, "keep": keep}
        try:
            with ExitStack() as stack:
                work = partial(folder)
                if ranks.is_first:
                    delete_artefact(work)  # of a killed save, with files that libraries have not finished
                    publication = publishing(
                        folder, kind=KIND, version=VERSION, settings=settings, inputs=self._inputs
                    )
                    stack.enter_context(publication)
                ranks.barrier()
                snapshot.write(work)
                if ranks.is_first:
                    (work / "state.json").write_text(json.dumps(state.to_json(), indent=1), encoding="utf-8")
                    history.save(work)
                    np.save(work / "read.npy", np.packbits(read))
                    save_file(dict(snapshot.weights), work / WEIGHTS)
                    self._describe(work)
                ranks.barrier()
        except (OSError, RuntimeError) as problem:  # torch says RuntimeError when a file cannot be written
            if not cannot_write(problem):
                raise
            raise ValueError(
                f"checkpoint {folder} could not be written: {problem}; {shutil.disk_usage(self._folder).free:,} bytes "
                "are free there. The checkpoints before it are as they were: make room, and the same command goes on"
            ) from problem
        if ranks.is_first:
            self._rotate(state.stage)
        ranks.barrier()
        return folder

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that passes verification; None when the run never published one. A collective.

        Raises:
            ValueError: When every checkpoint is damaged, or the newest whole one was made from another corpus.
        """
        if self._ranks is not None and self._ranks.is_first:
            self._recover()
        return self._on_first(self._newest)

    def of(self, stage: str, step: int) -> Checkpoint:
        """The checkpoint of a stage's step, verified; a collective.

        Raises:
            ValueError: There is none, or it is damaged: a stage is never started from another one in silence.
        """

        def find() -> Path:
            folder = folder_of(self._run, stage, step)
            if folder.is_dir():
                return _verified(folder)
            raise ValueError(
                f"{self._folder} holds no {stage} checkpoint of step {step}; finish the {stage} stage first, or name "
                "the run that has it in continual.branch_from"
            )

        found = self._on_first(find)
        assert found is not None
        return found

    def before(self, stage: str, step: int) -> Checkpoint | None:
        """The newest checkpoint that passes verification of a stage up to a step; a collective."""

        def find() -> Path | None:
            folders = [folder for folder in _published(self._folder) if _parse(folder)[0] == stage]
            return _newest_sound([folder for folder in folders if _parse(folder)[1] <= step])

        return self._on_first(find)

    def withdraw_after(self, state: RunState) -> None:
        """Delete what the stage published after a state that it goes back to; a collective."""
        assert self._ranks is not None
        if self._ranks.is_first:
            for folder in _published(self._folder):
                name, step = _parse(folder)
                if name == state.stage and step > state.step:
                    _remove(folder)  # whoever reads it or not: no resumed run may begin there
        self._ranks.barrier()

    def open(self, folder: Path) -> Checkpoint:
        """Verify every byte, then read the state.

        Raises:
            ValueError: Naming the damaged file, or the input (corpus, tokenizer) that is another one now.
        """
        if self._ranks is None:
            with suppress(FileNotFoundError):
                hold(folder)
        return self._read(_verified(folder))

    def _newest(self) -> Path | None:
        folders = _published(self._folder)
        try:
            found = _newest_sound(folders, held=self._ranks is None)
        except (GoneError, FileNotFoundError):
            return self._newest()  # there are newer ones now
        if found is None and folders:
            raise ValueError(
                f"all {len(folders)} checkpoints in {self._folder} are damaged (see the warnings above); restore one "
                "from a copy, or start anew in another run folder: set run=NAME"
            )
        return found

    def _on_first(self, find: Callable[[], Path | None]) -> Checkpoint | None:
        """Find a checkpoint on one rank, which reads every byte of it, and open it on all."""
        ranks = self._ranks
        found: Path | None = None
        problem: str | None = None
        if ranks is None or ranks.is_first:
            try:
                found = find()
            except ValueError as error:
                problem = str(error)
        if ranks is not None:
            found, problem = ranks.broadcast((found, problem))
        if problem is not None:
            raise ValueError(problem)
        return None if found is None else self._read(found)

    def _read(self, folder: Path) -> Checkpoint:
        manifest = open_manifest(folder, kind=KIND, version=VERSION, inputs=self._inputs)
        state = RunState.from_json(json.loads((folder / "state.json").read_text()))
        history = History.load(folder)
        packed = np.load(folder / "read.npy", allow_pickle=False)
        read = np.unpackbits(packed, count=len(history.drawn)).astype(np.bool_)
        return Checkpoint(folder, state, history, read, keep=bool(manifest.settings["keep"]))

    def _describe(self, work: Path) -> None:
        """Put in what decides nothing, and says where a checkpoint comes from."""
        origin = dict(self._origin)
        with suppress(FileNotFoundError):
            origin["wandb"] = (self._run / "wandb-id").read_text()
        (work / ORIGIN).write_text(json.dumps(origin, indent=1), encoding="utf-8")
        if (self._run / CONFIG).exists():
            shutil.copyfile(self._run / CONFIG, work / CONFIG)

    def _recover(self) -> None:
        """Put back what a kill took away between the two renames of a replacement; name what is unfinished."""
        for folder in leftovers(self._run):
            name = folder.name.removesuffix(_OUTDATED)
            if name != folder.name and not folder.with_name(name).exists():
                folder.rename(folder.with_name(name))
            elif folder.suffix == ".partial":
                log.warning("%s is unfinished, and ignored; the next save sweeps it", folder)

    def _rotate(self, stage: str) -> None:
        for leftover in leftovers(self._run):
            delete_artefact(leftover)
        reasons = reasons_to_keep(entries(self._run), self._retention)
        for folder, reason in reasons.items():
            if not reason and _parse(folder)[0] == stage:
                delete(folder)
            elif "damaged" in reason:
                log.warning("%s is damaged; left where it is", folder)


def _remove(folder: Path) -> None:
    doomed = folder.with_name(folder.name + _DELETED)
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)  # without its name it no longer exists for readers
    shutil.rmtree(doomed)


def _entry(folder: Path) -> Entry:
    stage, step = _parse(folder)
    try:
        manifest = open_manifest(folder, kind=KIND, version=VERSION)
        state = RunState.from_json(json.loads((folder / "state.json").read_text()))
    except (ValueError, TypeError, KeyError, OSError) as problem:
        return Entry(folder, stage, step, problem=str(problem))
    size = sum(file.bytes for file in manifest.files.values())
    settings = manifest.settings
    return Entry(folder, stage, step, None, state, bool(settings["keep"]), size, int(settings["ranks"]))


def _newest_sound(folders: Sequence[Path], *, held: bool = False) -> Path | None:
    for folder in reversed(folders):
        if held:
            hold(folder)
        problem = damage(folder)
        if problem is None:
            return folder
        log.warning("%s; falling back to the one before it", problem)
    return None


def _verified(folder: Path) -> Path:
    problem = damage(folder)
    if problem is not None:
        raise ValueError(f"{problem}; restore it from a copy")
    return folder


def folder_of(run: Path, stage: str, step: int) -> Path:
    """Where the checkpoint of a stage's step stands, or would stand."""
    return run / "checkpoints" / f"{stage}-{step:08d}"


def newest_of(run: Path, stage: str) -> Path | None:
    """The newest checkpoint that a run published of a stage; it is not read."""
    found = [folder for folder in _published(run / "checkpoints") if _parse(folder)[0] == stage]
    return found[-1] if found else None


def _published(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=_order)


def _parse(folder: Path) -> tuple[str, int]:
    match = _NAME.fullmatch(folder.name)
    assert match is not None
    return match[1], int(match[2])


def _order(folder: Path) -> tuple[int, int]:
    stage, step = _parse(folder)
    return STAGES.index(stage), step

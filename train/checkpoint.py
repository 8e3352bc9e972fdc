"""Checkpoints: folders that are written aside, hashed, and published by one rename.

    <run>/checkpoints/<stage>-<step>/
        manifest.json        sizes and hashes of everything below (`data.files`)
        state.json           RunState
        finished.npy, drawn.npy   History at the beginning of the epoch
        read.npy             documents finished by now
        model.safetensors    parameters in the training type: all that inference needs
        engine/              DeepSpeed's files: fp32 masters and optimizer state, one file per rank

A folder without its manifest does not exist. Before anything is read every byte is hashed; the newest checkpoint that
passes wins, damaged ones are named and passed over, and a run that has only damaged ones stops. Order is by stage and
step, never by time.
Not here: what the files of the engine hold (`engine`), hashing and renaming (`data.files`).
"""

import json
import logging
import re
import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.files import open_manifest, partial, publishing, verify
from train.distributed import Ranks
from train.engine import Engine
from train.state import History, RunState

log = logging.getLogger(__name__)

KIND = "checkpoint"
VERSION = 1
Documents = NDArray[np.bool_]
STAGES = ("warmup", "continual")
_NAME = re.compile(r"(warmup|continual)-(\d{8})")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A verified checkpoint.

    Attributes:
        folder: Where it lies.
        state: Position of the run.
        history: What had been read when its epoch began.
        read: (documents,) bool: what had been finished by then.
    """

    folder: Path
    state: RunState
    history: History
    read: Documents

    def weights(self) -> dict[str, Tensor]:
        """Parameters by name."""
        weights: dict[str, Tensor] = load_file(self.folder / "model.safetensors")
        return weights


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(
        self, run: Path, *, inputs: dict[str, str], keep_last: int, ranks: Ranks | None = None
    ) -> None:
        self._folder = run / "checkpoints"
        self._inputs = inputs
        self._keep_last = keep_last
        self._ranks = ranks

    def save(self, engine: Engine, state: RunState, history: History, read: Documents, *, keep: bool) -> Path:
        """Publish a checkpoint; a collective.

        Args:
            engine: Weights and optimizer state.
            state: Where the run stands.
            history: What had been read when the epoch began.
            read: (documents,) bool: what has been finished by now.
            keep: Protects the checkpoint from rotation.
        """
        ranks = self._ranks
        assert ranks is not None
        folder = self._folder / f"{state.stage}-{state.step:08d}"
        settings = {"stage": state.stage, "step": state.step, "ranks": ranks.world_size, "keep": keep}
        weights = engine.weights()
        with ExitStack() as stack:
            work = partial(folder)
            if ranks.is_first:
                stack.enter_context(
                    publishing(folder, kind=KIND, version=VERSION, settings=settings, inputs=self._inputs)
                )
            ranks.barrier()
            engine.save(work)
            if ranks.is_first:
                (work / "state.json").write_text(json.dumps(state.to_json(), indent=1), encoding="utf-8")
                history.save(work)
                np.save(work / "read.npy", np.packbits(read))
                save_file(weights, work / "model.safetensors")
            ranks.barrier()
        if ranks.is_first:
            self._rotate(state.stage)
        ranks.barrier()
        return folder

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that passes verification; None when the run never published one.

        Raises:
            ValueError: When every checkpoint is damaged, or the newest whole one was made from another corpus.
        """
        folders = self._published()
        for folder in reversed(folders):
            damage = _damage(folder)
            if damage is None:
                return self._read(folder)
            log.warning("%s; falling back to the one before it", damage)
        if folders:
            raise ValueError(
                f"all {len(folders)} checkpoints in {self._folder} are damaged (see the warnings above); restore one "
                "from a copy, or start anew in another run folder: set run=NAME"
            )
        return None

    def last_of(self, stage: str, *, at_most: int | None = None) -> Checkpoint:
        """The newest verified checkpoint of a stage, at most `at_most` steps in."""
        for folder in reversed(self._published()):
            name, step = _parse(folder)
            if name == stage and (at_most is None or step <= at_most):
                return self.open(folder)
        raise ValueError(
            f"{self._folder} holds no {stage} checkpoint"
            + ("" if at_most is None else f" from step {at_most} or before")
            + f"; run the {stage} stage first, or name the run that has it in continual.branch_from"
        )

    def open(self, folder: Path) -> Checkpoint:
        """Verify every byte, then read the state.

        Raises:
            ValueError: Naming the damaged file, or the input (corpus, tokenizer) that is another one now.
        """
        damage = _damage(folder)
        if damage is not None:
            raise ValueError(damage)
        return self._read(folder)

    def _read(self, folder: Path) -> Checkpoint:
        open_manifest(folder, kind=KIND, version=VERSION, inputs=self._inputs)
        state = RunState.from_json(json.loads((folder / "state.json").read_text()))
        history = History.load(folder)
        packed = np.load(folder / "read.npy", allow_pickle=False)
        read = np.unpackbits(packed, count=len(history.drawn)).astype(np.bool_)
        return Checkpoint(folder, state, history, read)

    def _published(self) -> list[Path]:
        if not self._folder.is_dir():
            return []
        folders = [path for path in self._folder.iterdir() if _NAME.fullmatch(path.name)]
        return sorted((path for path in folders if (path / "manifest.json").exists()), key=_order)

    def _rotate(self, stage: str) -> None:
        for leftover in self._folder.glob("*.deleted"):  # of a process that was killed here
            shutil.rmtree(leftover)
        folders = [path for path in self._published() if _parse(path)[0] == stage]
        for folder in folders[: -self._keep_last]:
            try:
                keep = open_manifest(folder, kind=KIND, version=VERSION).settings["keep"]
            except ValueError as problem:
                log.warning("%s; left where it is", problem)
                continue
            if not keep:
                doomed = folder.with_name(folder.name + ".deleted")
                folder.rename(doomed)  # without its name it no longer exists for readers
                shutil.rmtree(doomed)


def _damage(folder: Path) -> str | None:
    """What is wrong with the bytes of a published checkpoint; None when nothing is."""
    try:
        damaged = verify(folder)
    except ValueError as problem:
        return str(problem)
    return f"checkpoint {folder} is damaged: {', '.join(damaged)}" if damaged else None


def _parse(folder: Path) -> tuple[str, int]:
    match = _NAME.fullmatch(folder.name)
    assert match is not None
    return match[1], int(match[2])


def _order(folder: Path) -> tuple[int, int]:
    stage, step = _parse(folder)
    return STAGES.index(stage), step

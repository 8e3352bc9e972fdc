"""What a run needs of disk and corpus, looked at before anything is started: that it may write, that there is room, and
that there are enough references for the index that was asked for.

Sizes are computed from the configuration: all checkpoints that the rules keep and one that is being written, and the
memories that every bank epoch reads at most. What stands there already counts as room.
Not here: what a full disk does in the middle of a run (`train.checkpoint`), a bank that users keep (`launch.estimate`).
"""

import logging
import os
import shutil
import time
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from pathlib import Path

from rich.filesize import decimal

from launch.config import RunConfig
from memorybank.config import CodecKind, vector_size
from memorybank.cost import memory_bytes, position_bytes
from memorybank.index_plan import plan_index
from model.flops import count_parameters
from train.config import Precision, StageConfig
from train.schedule import epoch_begins, most_generations

log = logging.getLogger(__name__)

GRACE_SECONDS = 30
"""What torchrun gives the ranks between a signal and the kill."""
_PROBE_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes that a run needs.

    Attributes:
        checkpoint: Of one checkpoint.
        checkpoints: How many there are at most.
        memories: Of all generations that lie there at a time.
    """

    checkpoint: int
    checkpoints: int
    memories: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.checkpoint * self.checkpoints + self.memories


def check(config: RunConfig, folder: Path, *, num_references: int) -> None:
    """Try the run folder, and compare what the run needs with what is free; the index's kind with the references.

    Raises:
        ValueError: It cannot be written, or there is too little room, or too few references to train the index on.
    """
    size = vector_size(config.retrieval.embedder)
    if size is not None and any(stage.memory is not None for stage in config.stages.values()):
        plan_index(num_references, size, config.retrieval.index)
    rate = write_rate(folder)
    room = needed(config, num_references)
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(folder).free
    if room.total > free + there:
        raise ValueError(
            f"{folder} has room for {decimal(free)} and holds {decimal(there)}, but this run needs up to "
            f"{decimal(room.total)}: {room.checkpoints} checkpoints of {decimal(room.checkpoint)}, and "
            f"{decimal(room.memories)} of memories; make room, set paths.root to another disk, or lower "
            "saving.keep_last, saving.keep_best or saving.keep_generations"
        )
    seconds = room.checkpoint / rate
    if seconds > GRACE_SECONDS:
        log.warning(
            "%s takes %s a second: a checkpoint of %s is written in %.0f s, and a signal leaves %d s for the last one; "
            "send it earlier (SLURM: --signal), or lower saving.every_steps",
            folder, decimal(int(rate)), decimal(room.checkpoint), seconds, GRACE_SECONDS,
        )  # fmt: skip


def write_rate(folder: Path) -> float:
    """Write, fsync, rename and delete a file, as a checkpoint does; bytes per second.

    Raises:
        ValueError: The folder cannot be made or written.
    """
    probe, renamed = folder / f"preflight.{os.getpid()}", folder / f"preflight.{os.getpid()}.renamed"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        with probe.open("wb") as file:
            file.write(os.urandom(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
        seconds = time.perf_counter() - started
        probe.rename(renamed)
    except OSError as problem:
        raise ValueError(
            f"{folder} cannot be written: {problem}; set paths.root to a folder that can"
        ) from problem
    finally:
        for path in (probe, renamed):
            try:
                path.unlink(missing_ok=True)
            except OSError:  # the folder itself is the problem, and has been named
                break
    return _PROBE_BYTES / seconds


def needed(config: RunConfig, num_references: int) -> Room:
    """The room that a run takes at most."""
    parameters = count_parameters(config.model).total
    weights = 2 if config.engine.precision is Precision.bf16 else 4
    stages = list(config.stages.values())
    return Room(
        # For inference and for DeepSpeed; masters and two moments in float32.
        checkpoint=parameters * (2 * weights + 12),
        checkpoints=1 + sum(_kept(config, stage) for stage in stages),
        memories=sum(_memories(config, stage, num_references) for stage in stages),
    )


def _kept(config: RunConfig, stage: StageConfig) -> int:
    saving = config.saving
    published = ceil(stage.steps / saving.every_steps) + 2
    every = 0 if saving.keep_every is None else stage.steps // saving.keep_every
    return min(published, saving.keep_last + saving.keep_best + every + 2)


def _memories(config: RunConfig, stage: StageConfig, num_references: int) -> int:
    if stage.memory is None:
        return 0
    codec = "bfloat16" if config.codec.kind is CodecKind.model else config.codec.kind.name
    if codec == "bfloat16" and config.engine.precision is Precision.fp32:
        record = 2 * memory_bytes(config.model) + position_bytes(config.model)
    else:
        record = memory_bytes(config.model, codec) + position_bytes(config.model)
    begins = epoch_begins(stage) or [0]
    num_generations = most_generations(begins, stage, config.saving)
    longest = max(end - begin for begin, end in pairwise([*begins, stage.steps]))
    chunks = config.model.row_tokens // config.model.chunk_tokens
    rows = longest * stage.rows_per_step + config.logging.validation_rows
    return num_generations * min(num_references, rows * chunks) * record

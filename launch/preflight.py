"""What a run needs of disk and corpus, looked at before anything is started: that it may write, that there is room, and
that there are enough references for the index that was asked for.

Not here: the sizes (`launch.planning`), what a full disk does in the middle of a run (`train.checkpoint`), a bank that
users keep (`launch.estimate`).
"""

import logging
import os
import shutil
import time
from pathlib import Path

from rich.filesize import decimal

from data.prepare import prepared_sizes
from launch.config import RunConfig
from launch.devices import DEVICES
from launch.forecast import forecast, held_bytes
from launch.planning import DiskPlan, Site, plan

log = logging.getLogger(__name__)

GRACE_SECONDS = 30
"""What torchrun gives the ranks between a signal and the kill."""
_PROBE_BYTES = 8 << 20


class NoRoomError(ValueError):
    """A run writes more than is free."""


def check(config: RunConfig, folder: Path) -> None:
    """Try the run folder, and compare what searching and training write with what is free.

    Args:
        config: Of the run, filled in with what the tokenizer decides.
        folder: Of the run.

    Raises:
        ValueError: It cannot be written, there is too little room, the corpus has too few references for the index
            that was asked for, or training will refuse it.
    """
    rate = write_rate(folder)
    disk = check_room(config, folder)
    seconds = disk.checkpoint / rate
    if seconds > GRACE_SECONDS:
        log.warning(
            "%s takes %s a second: a checkpoint of %s is written in %.0f s, and a signal leaves %d s for the last one; "
            "send it earlier (SLURM: --signal), or lower saving.every_steps",
            folder, decimal(int(rate)), decimal(disk.checkpoint), seconds, GRACE_SECONDS,
        )  # fmt: skip


def check_room(config: RunConfig, folder: Path) -> DiskPlan:
    """Compare what searching and training write with what is free, and return the former.

    Raises:
        NoRoomError: There is too little room.
        ValueError: Training will refuse the corpus.
    """
    disk, held, free = _planned(config), held_bytes(config), shutil.disk_usage(folder).free
    if disk.written > free + held:
        raise NoRoomError(
            f"{folder} has room for {decimal(free)}, beside {decimal(held)} that lie there already, but searching and "
            f"training write up to {decimal(disk.written)}: {disk.checkpoints + 1} checkpoints of "
            f"{decimal(disk.checkpoint)}, {decimal(disk.bank)} of memories, and "
            f"{decimal((disk.search or 0) + (disk.queries or 0))} to search with; make room, set paths.root to another "
            "disk, or lower saving.keep_last, saving.keep_best or saving.keep_generations"
        )
    return disk


def _planned(config: RunConfig) -> DiskPlan:
    sizes = prepared_sizes(config.data, Path(config.paths.root) / "prepared")
    if sizes is None:  # it was deleted since
        return plan(config, Site(device=DEVICES["cpu"], mfu=1.0)).disk
    site = Site(
        device=DEVICES["cpu"],
        mfu=1.0,
        documents=sizes.documents,
        references=sizes.references,
        epochs=forecast(config, sizes),
        tokens=sizes.tokens,
    )
    return plan(config, site).disk


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

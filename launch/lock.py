"""One user per run folder, by locks that the kernel frees when their holders are gone, however they ended.

    lock         held alone by the launcher, and by the torchrun agent, which inherits it
    lock-ranks   shared by the ranks: a run whose launcher was killed still counts as running

Not here: what is done with the folder (`launch.pretrain`, `launch.worker`).
"""

import fcntl
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PATIENCE_SECONDS = 60


@contextmanager
def only_user(folder: Path, *, other: str = "set run=NAME") -> Iterator[None]:
    """Hold a folder for its launcher.

    Args:
        folder: A run's folder, or a sweep's.
        other: What to do in order to use another one.

    Raises:
        ValueError: The folder is in use by another process.
    """
    with _opened(folder / "lock") as descriptor, _opened(folder / "lock-ranks") as ranks:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(ranks, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            gone = f", which is gone: `pkill -f 'launch.(agent|worker) {folder.resolve()}'` ends it, with a checkpoint"
            raise ValueError(
                f"{folder} is in use by a run that {holder or 'another process'} started"
                f"{gone * _is_gone(holder)}; wait for it, or {other}"
            ) from None
        fcntl.flock(ranks, fcntl.LOCK_UN)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"pid {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
        os.set_inheritable(descriptor, True)
        yield


@contextmanager
def one_of_ranks(folder: Path) -> Iterator[None]:
    """Keep a run folder in use for as long as this rank lives."""
    with _opened(folder / "lock-ranks") as descriptor:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield


def wait_for_ranks(folder: Path) -> None:
    """Wait until no rank of a run is left, for a minute at most."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    with _opened(folder / "lock-ranks") as ranks:
        while time.monotonic() < deadline:
            try:
                return fcntl.flock(ranks, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.1)


def is_in_use(folder: Path) -> bool:
    """Whether a launcher, an agent or a rank of the run lives."""
    try:
        with _opened(folder / "lock") as descriptor, _opened(folder / "lock-ranks") as ranks:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(ranks, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def _is_gone(holder: str) -> bool:
    """Whether the launcher that `lock` names was one of this machine, and lives no more."""
    match = re.fullmatch(r"pid (\d+) on (.*)", holder)
    if match is None or match[2] != os.uname().nodename:
        return False
    try:
        os.kill(int(match[1]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        yield descriptor
    finally:
        os.close(descriptor)

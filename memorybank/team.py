"""The processes that share a work: they encode, embed or fit together, and one of them publishes.

Invariant: what all of them have to agree on is looked up by the first one, which tells the others: what a shared file
system lists lags between hosts, and two that disagree would wait for each other, or do the same twice.
Not here: what carries their words (`train.distributed.Ranks` is a team), how they are started.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from os import listdir
from pathlib import Path
from typing import Any, Protocol, TypeVar

_LAG_SECONDS = 120
"""So long a file system may take to list here what another host has written: twice what NFS keeps of a folder."""
_POLL_SECONDS = 0.5

Value = TypeVar("Value")


class Team(Protocol):
    """This process among those that share a work."""

    @property
    def rank(self) -> int:
        """Number of this process, 0 to world_size - 1."""
        ...

    @property
    def world_size(self) -> int:
        """Number of processes."""
        ...

    def barrier(self) -> None:
        """Wait until every process has called it."""
        ...

    def broadcast(self, value: Any) -> Any:
        """Return the value of rank 0 on every rank; a collective."""
        ...


@dataclass(frozen=True, slots=True)
class Alone:
    """A team of one."""

    rank: int = 0
    world_size: int = 1

    def barrier(self) -> None:
        """Wait for nobody."""

    def broadcast(self, value: Any) -> Any:
        """Return the value."""
        return value


ALONE = Alone()


def seen_by_first(team: Team, look: Callable[[], Value]) -> Value:
    """Return what the first rank finds when it looks; a collective."""
    found: Value = team.broadcast(look() if team.rank == 0 else None)
    return found


def wait_to_see(folder: Path, names: set[str]) -> None:
    """Return when files that all ranks have written are listed here: a manifest names what its writer sees.

    Raises:
        ValueError: they are not, for too long.
    """
    deadline = time.monotonic() + _LAG_SECONDS
    while unseen := names.difference(listdir(folder)):
        if time.monotonic() > deadline:
            raise ValueError(
                f"{folder / min(unseen)} was written by another rank, and this host has not seen it for "
                f"{_LAG_SECONDS} s; put paths.root on a file system that all hosts share, and mount it with shorter "
                "caches (NFS: actimeo=1). The same command goes on with what is there"
            )
        time.sleep(_POLL_SECONDS)

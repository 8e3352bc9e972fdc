"""The ranks of a run as one process group.

Not here: what a launcher says of a process (`announced`), gradients and parameter sharding (`engine`).
"""

import json
import os
import random
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from train.announced import Announced, announced
from train.pulse import Pulse


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among its peers.

    Attributes:
        rank: Number of this process, 0 to world_size - 1.
        world_size: Number of processes.
        device: Where this process computes.
        local_size: Processes on this machine.
        pulse: What this process shows of its life.
        group: Processes whose collectives are meant; None is the group of all.
    """

    rank: int
    world_size: int
    device: torch.device
    local_size: int = 1
    pulse: Pulse = field(default_factory=Pulse, compare=False)
    group: Any = field(default=None, compare=False)

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world_size > 1:
            dist.barrier(group=self.group)

    def aside(self, *, timeout_seconds: int = 1800) -> "Ranks":
        """The same processes, for a thread beside the one that trains: its collectives mix with no others; CPU alone.

        A collective.
        """
        if self.world_size == 1:
            return replace(self, pulse=Pulse())
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
        return replace(self, group=group, pulse=Pulse())

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Use the CPU threads of all ranks of this machine, while the others wait for this one."""
        threads = torch.get_num_threads()
        torch.set_num_threads(threads * self.local_size)
        try:
            yield
        finally:
            torch.set_num_threads(threads)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Add a small tensor over all ranks."""
        if self.world_size > 1:
            dist.all_reduce(values, group=self.group)
        return values

    def any(self, flag: bool) -> bool:
        """Whether a flag is set on any rank; a collective, with the same answer everywhere."""
        return bool(self.sum(torch.tensor([float(flag)])).item())

    def broadcast(self, value: Any) -> Any:
        """Send a small picklable value of rank 0 to all ranks."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]


def start(*, threads: int, timeout_seconds: int = 1800, meeting: "Meeting | None" = None) -> Ranks:
    """Join the process group that a launcher announces; without a launcher, a group of one.

    Args:
        threads: Of this process.
        timeout_seconds: How long a collective may take.
        meeting: Where these ranks met before.
    """
    torch.set_num_threads(threads)
    given = announced() or Announced(rank=0, world_size=1, local_rank=0, local_size=1)
    for name, value in (
        ("RANK", given.rank),
        ("WORLD_SIZE", given.world_size),
        ("LOCAL_RANK", given.local_rank),
        ("MASTER_ADDR", "127.0.0.1"),
    ):
        os.environ.setdefault(name, str(value))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", given.local_rank) if cuda else torch.device("cpu")
    if cuda:
        # Activations, a bank's compilation and validation ask for blocks of other sizes in turn.
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        timeout = timedelta(seconds=timeout_seconds)
        where: dict[str, Any] = {}  # else at the address that a launcher has set
        if meeting is not None:
            where = {"store": meeting.store(), "rank": given.rank, "world_size": given.world_size}
        elif given.world_size == 1:  # in need of no port
            where = {"store": dist.HashStore(), "rank": 0, "world_size": 1}  # type: ignore[attr-defined]
        dist.init_process_group(backend, timeout=timeout, **where)
    return Ranks(dist.get_rank(), dist.get_world_size(), device, given.local_size)


class Meeting:
    """Announced ranks before they are a process group: the first says one thing, and the others wait for it.

    However long that takes: the first may be preparing a corpus. A launcher that starts its ranks again keeps the store
    where they meet (torchrun does), and in it what the ranks before them said. So each rank asks under a word that it
    has just drawn, and the first rank answers until all have heard.

    Attributes:
        word: Names this start: the same on all ranks once it was said, and never used before.
    """

    def __init__(self) -> None:
        # Kept: on the first rank of deepspeed's launcher this object is what the others speak to.
        self._store, self._rank, self._world_size = next(rendezvous("env://", timeout=timedelta(days=30)))
        self.word = secrets.token_hex(8)

    def say(self, text: str) -> None:
        """Tell the other ranks, and wait until they have heard."""
        answer = json.dumps([self.word, text])
        left = set(range(1, self._world_size))
        while left:
            for rank in sorted(left):
                if self._store.check([f"memory3-asks-{rank}"]):
                    asks = self._store.get(f"memory3-asks-{rank}").decode()
                    self._store.set(f"memory3-told-{asks}", answer)
                if self._store.check([f"memory3-heard-{self.word}-{rank}"]):
                    left.remove(rank)
            time.sleep(_POLL_SECONDS if left else 0)

    def hear(self) -> str:
        """What the first rank says."""
        self._store.set(f"memory3-asks-{self._rank}", self.word)
        self.word, text = json.loads(self._store.get(f"memory3-told-{self.word}"))
        self._store.set(f"memory3-heard-{self.word}-{self._rank}", "")
        return str(text)

    def store(self) -> Any:
        """Where the ranks that met become a process group: without what others left there."""
        return dist.PrefixStore(self.word, self._store)  # type: ignore[attr-defined]


_POLL_SECONDS = 0.05


def lost_a_peer(problem: BaseException) -> bool:
    """Whether a collective failed because another rank is gone, in the words of gloo, of NCCL and of the store."""
    said = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited",
            "Failed to recv, got 0 bytes")  # fmt: skip
    return isinstance(problem, RuntimeError) and any(each in str(problem) for each in said)


def free_port() -> int:
    """A port of this machine that nobody listens at, below those that the kernel gives to new connections."""
    while True:
        port = random.SystemRandom().randrange(20_000, 30_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()

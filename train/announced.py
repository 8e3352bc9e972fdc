"""What a launcher says to the processes that it starts, in their environment; the only reader of rank variables.

torchrun and the `deepspeed` launcher speak alike, but for the number of ranks on a machine. Imports no torch.
Not here: joining the process group (`train.distributed`), starting ranks (`launch.launchers`).
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Announced:
    """A process among those that a launcher started.

    Attributes:
        rank: Its number, 0 to world_size - 1.
        world_size: Number of processes.
        local_rank: Its number on its machine.
        local_size: Processes on its machine.
    """

    rank: int
    world_size: int
    local_rank: int
    local_size: int


def announced(environment: Mapping[str, str] | None = None) -> Announced | None:
    """Read what the environment says of this process; None where no launcher started it.

    Raises:
        ValueError: Some variables are set and others are missing.
    """
    given = os.environ if environment is None else environment
    if "RANK" not in given and "WORLD_SIZE" not in given:
        return None
    missing = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name not in given]
    if missing:
        raise ValueError(
            f"the environment announces ranks, but {' and '.join(missing)} is missing; unset RANK and WORLD_SIZE, or "
            "start with torchrun or deepspeed, which set all of them"
        )
    world_size = int(given["WORLD_SIZE"])
    local_size = int(given.get("LOCAL_WORLD_SIZE") or given.get("LOCAL_SIZE") or world_size)
    return Announced(int(given["RANK"]), world_size, int(given["LOCAL_RANK"]), local_size)

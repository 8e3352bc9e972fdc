"""`memory3 pretrain` as one of the ranks that another launcher started: torchrun, deepspeed, or a scheduler's own.

    torchrun --nproc-per-node=8 -m launch.cli pretrain ...        deepspeed --module launch.cli pretrain ...

The first rank composes, prepares, checks and freezes, as `launch.pretrain` does where there is one process; the others
wait for the folder's name. Hydra so runs in one process here, too. A watchdog stands beside the ranks of each machine;
starting again is the launcher's affair (`torchrun --max-restarts`), and goes on at the newest checkpoint.
Not here: what a rank does (`launch.worker`), starting ranks (`launch.launchers`).
"""

import argparse
import os
import socket
import sys
import tempfile
from pathlib import Path

from launch import watchdog, worker
from launch.compose import compose_config
from launch.config import RunConfig
from launch.lock import only_user
from train.announced import Announced
from train.distributed import Meeting

_REFUSED = ""


def run(arguments: argparse.Namespace, own: Announced) -> int:
    """Train as this rank; it returns where training did not begin, and ends the process otherwise."""
    meeting = Meeting()
    if own.rank:
        folder = meeting.hear()
        if folder != _REFUSED:
            worker.leave(_train(Path(folder), own, meeting))
        return 2  # the first rank says why
    try:
        config = compose_for(arguments.overrides, own.world_size)
        if not arguments.no_prepare:
            from launch import prepare

            prepare.ensure(config)
        _begin(config, meeting, own)
    except ValueError:
        meeting.say(_REFUSED)
        raise
    return 0


def compose_for(overrides: list[str], world_size: int) -> RunConfig:
    """The configuration of a run whose ranks are there already.

    Raises:
        ValueError: The settings ask for another number of ranks.
    """
    for override in overrides:
        key, _, value = override.partition("=")
        if key == "engine.num_ranks" and value != str(world_size):
            raise ValueError(
                f"{override}, but the launcher started {world_size} ranks; leave engine.num_ranks away, or start "
                f"{value} ranks"
            )
    return compose_config([*overrides, f"engine.num_ranks={world_size}"])


def _begin(config: RunConfig, meeting: Meeting, own: Announced) -> None:
    from launch import pretrain

    folder = pretrain.folder_of(config)
    with only_user(folder):
        pretrain.make_ready(config, folder)
        meeting.say(str(folder.resolve()))
        worker.leave(_train(folder, own, meeting))


def watched(folder: Path, own: Announced, word: str) -> None:
    """Have the ranks of this machine watched, from now until the first of them ends.

    Args:
        folder: Of the run.
        own: This rank.
        word: Names the start: the same for all ranks, and for nobody else.
    """
    records = Path(tempfile.gettempdir()) / f"memory3-ranks-{word}-{socket.gethostname()}"
    records.mkdir(mode=0o700, exist_ok=True)
    os.environ[watchdog.PULSES] = str(records)
    if own.local_rank == 0:
        watchdog.beside(records, folder)


def _train(folder: Path, own: Announced, meeting: Meeting) -> int:
    watched(folder, own, meeting.word)

    def say(problem: BaseException) -> None:
        print(f"memory3 pretrain: rank {own.rank}: {problem}", file=sys.stderr)

    return worker.main(folder, say=say, meeting=meeting)

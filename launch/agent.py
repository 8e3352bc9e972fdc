"""The process above the ranks of one machine: torchrun, with one clear line in place of its own report of a failure.

Started by `launch.launchers`; its exit code is that of the rank that failed first (`launch.worker`), 4 when the
watchdog found one that hangs, or 128 + n when signal n stopped it: it hands the signal on, and the ranks have 30
seconds to publish a checkpoint. What is said of a failure stands in `failure.json` of the run folder as well.
Not here: what a rank does (`launch.worker`, `launch.bank_worker`), which of them hangs (`launch.watchdog`), starting
again (`launch.supervise`).
"""

import argparse
import logging
import os
import signal
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Thread

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args
from torch.distributed.run import run as torchrun

from data.files import write_json_atomic
from launch import rank_memory
from launch.supervise import FAILURE
from launch.watchdog import PULSES, Watchdog, stacks_in
from train.stopping import STOPPED, heeds_hangup

HUNG = 4
PRETRAIN = "memory3 pretrain"
_SIGNALS = ("SIGTERM", "SIGINT", "SIGQUIT", "SIGUSR1")


@dataclass(frozen=True, slots=True)
class Failure:
    """The first cause.

    Attributes:
        code: The exit code.
        rank: That failed first; None when nobody can be named.
        cause: In a line.
        from_outside: Whether somebody killed a rank: neither itself nor, as far as it says, the kernel.
    """

    code: int
    rank: int | None
    cause: str | None
    from_outside: bool = False


def main(*argv: str) -> int:
    """Run the ranks of this machine to their end."""
    parser = argparse.ArgumentParser(prog="launch.agent")
    parser.add_argument("told", help="what the ranks are told: the run's folder")
    parser.add_argument("num_ranks", type=int, help="on this machine")
    parser.add_argument("--nodes", type=int, default=1, help="machines of the run")
    parser.add_argument(
        "--address", help="HOST:PORT where the agents of all machines meet; HOST is the first"
    )
    parser.add_argument("--node", type=int, default=0, help="which of them this is")
    parser.add_argument(
        "--listen", action="store_true", help="signals come as numbers, a line each, on stdin"
    )
    parser.add_argument("--program", default=PRETRAIN, help="what the user called")
    parser.add_argument("--worker", default="launch.worker", help="module of a rank")
    given = parser.parse_args(argv)
    logging.disable(logging.CRITICAL)  # torchrun's own words about a failure; ours follow
    # A launcher that this one listens to heeds Ctrl-C.
    signals = [name for name in _SIGNALS if name != "SIGINT" or not given.listen]
    signals += ["SIGHUP"] if heeds_hangup() else []
    launch = [f"--nproc-per-node={given.num_ranks}", f"--signals-to-handle={','.join(signals)}"]
    if given.nodes == 1:
        launch += ["--standalone", "--local-addr=127.0.0.1"]  # a host may not know its own name
    else:
        host, _, port = given.address.rpartition(":")
        launch += [f"--nnodes={given.nodes}", f"--node-rank={given.node}"]
        launch += [f"--master-addr={host}", f"--master-port={port}"]
    if given.listen:
        Thread(target=_listen, daemon=True).start()
    run = Path(given.told) if given.program == PRETRAIN else None
    killed_before = rank_memory.kernel_kills()
    # A folder of our own, since torchrun never removes the one that it makes.
    with tempfile.TemporaryDirectory(prefix="memory3-ranks-", ignore_cleanup_errors=True) as own:
        os.environ[PULSES] = own
        watchdog = Watchdog(Path(own))
        try:
            arguments = [*launch, f"--log-dir={own}", "-m", given.worker, given.told]
            torchrun(parse_args(arguments))  # type: ignore[no-untyped-call]
            return 0
        except ChildFailedError as failed:
            watchdog.close()
            failure = _failure(run, failed, watchdog, killed_before)
        except SignalException as stopped:
            return 128 + int(stopped.sigval)
    if failure.code not in STOPPED:  # a signal reached the ranks alone
        if run is not None and not (run / FAILURE).exists():  # otherwise another machine was first
            write_json_atomic(run / FAILURE, asdict(failure))
        if failure.cause is not None:
            named = "" if failure.rank is None else f"rank {failure.rank}: "
            print(f"{given.program}: {named}{failure.cause}", file=sys.stderr)
    return failure.code


def _failure(run: Path | None, failed: ChildFailedError, watchdog: Watchdog, killed_before: int) -> Failure:
    if run is not None and watchdog.found is not None:
        return Failure(HUNG, None, f"{watchdog.found.says}; {stacks_in(run)}")
    rank, first = failed.get_first_failure()
    if first.exitcode < 0:
        name = signal.Signals(-first.exitcode).name
        cause, killed = f"rank {rank} was ended by {name}", -first.exitcode == signal.SIGKILL
        by_kernel = rank_memory.kernel_kills() > killed_before
        if run is not None and killed:
            cause += rank_memory.explain_kill(run, by_kernel=by_kernel)
        return Failure(128 - first.exitcode, None, cause, from_outside=killed and not by_kernel)
    data = first.error_file_data.get("message")
    if not isinstance(data, dict):  # the rank died before it could say why
        return Failure(first.exitcode, rank, None)
    cause = data["message"].removeprefix("ValueError: ").removeprefix("HopelessError: ")
    return Failure(first.exitcode, rank, cause)


def _listen() -> None:
    """Take signals from the launcher, and its end for one, however it ended."""
    # Unbuffered: nobody may hold a lock when the process ends.
    while said := os.read(sys.stdin.fileno(), 1024):
        for number in said.split():
            os.kill(os.getpid(), int(number))
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

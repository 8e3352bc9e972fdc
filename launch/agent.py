"""The process above the ranks of one machine: torchrun, with one clear line in place of its own report of a failure.

Started by `launch.launchers`; its exit code is that of the rank that failed first (`launch.worker`), or 128 + n when
signal n stopped it: it hands the signal on, and the ranks have 30 seconds to publish a checkpoint.
Not here: what a rank does (`launch.worker`, `launch.bank_worker`).
"""

import argparse
import logging
import os
import signal
import sys
import tempfile
from threading import Thread

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args
from torch.distributed.run import run as torchrun

from train.stopping import STOPPED

_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


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
    parser.add_argument("--program", default="memory3 pretrain", help="what the user called")
    parser.add_argument("--worker", default="launch.worker", help="module of a rank")
    given = parser.parse_args(argv)
    logging.disable(logging.CRITICAL)  # torchrun's own words about a failure; ours follow
    launch = [f"--nproc-per-node={given.num_ranks}", f"--signals-to-handle={_SIGNALS}"]
    if given.nodes == 1:
        launch.append("--standalone")
    else:
        host, _, port = given.address.rpartition(":")
        launch += [f"--nnodes={given.nodes}", f"--node-rank={given.node}"]
        launch += [f"--master-addr={host}", f"--master-port={port}"]
    if given.listen:
        Thread(target=_listen, daemon=True).start()
    try:
        # A folder of our own, since torchrun never removes the one that it makes.
        with tempfile.TemporaryDirectory(prefix="memory3-ranks-") as errors:
            arguments = [*launch, f"--log-dir={errors}", "-m", given.worker, given.told]
            torchrun(parse_args(arguments))  # type: ignore[no-untyped-call]
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if failure.exitcode in STOPPED:  # a signal reached the ranks alone
            return failure.exitcode
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            print(f"{given.program}: rank {rank} was ended by {name}", file=sys.stderr)
            return 128 - failure.exitcode
        data = failure.error_file_data.get("message")
        if isinstance(data, dict):  # absent when the rank died before it could say why
            message = data["message"].removeprefix("ValueError: ").removeprefix("HopelessError: ")
            print(f"{given.program}: rank {rank}: {message}", file=sys.stderr)
        return failure.exitcode
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    return 0


def _listen() -> None:
    """Take signals from a launcher on another machine, and its end for one."""
    for line in sys.stdin:
        os.kill(os.getpid(), int(line))
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

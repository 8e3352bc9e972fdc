"""The process above the ranks of one machine: torchrun, with one clear line in place of its own report of a failure.

Started by `launch.ranks`: `python -m launch.agent PROGRAM NUM_RANKS WORKER ...`, WORKER as torchrun takes it; its exit
code is that of the rank that failed first (`launch.worker`), or 128 + n when signal n stopped it: it hands the signal
on, and the ranks have 30 seconds to publish a checkpoint.
Not here: what a rank does (`launch.worker`, `launch.bank_worker`).
"""

import logging
import signal
import sys
import tempfile

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args
from torch.distributed.run import run as torchrun

from train.stopping import STOPPED

_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


def main(program: str, num_ranks: str, *worker: str) -> int:
    """Run the ranks of a program to their end."""
    logging.disable(logging.CRITICAL)  # torchrun's own words about a failure; ours follow
    launch = ["--standalone", f"--nproc-per-node={num_ranks}", f"--signals-to-handle={_SIGNALS}"]
    try:
        # A folder of our own, since torchrun never removes the one that it makes.
        with tempfile.TemporaryDirectory(prefix="memory3-ranks-") as errors:
            arguments = [*launch, f"--log-dir={errors}", *worker]
            torchrun(parse_args(arguments))  # type: ignore[no-untyped-call]
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if failure.exitcode in STOPPED:  # a signal reached the ranks alone
            return failure.exitcode
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            print(f"{program}: rank {rank} was ended by {name}", file=sys.stderr)
            return 128 - failure.exitcode
        data = failure.error_file_data.get("message")
        if isinstance(data, dict):  # absent when the rank died before it could say why
            message = data["message"].removeprefix("ValueError: ").removeprefix("HopelessError: ")
            print(f"{program}: rank {rank}: {message}", file=sys.stderr)
        return failure.exitcode
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

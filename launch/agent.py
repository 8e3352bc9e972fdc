"""The process above the ranks of one machine: torchrun, with one clear line in place of its own report of a failure.

Started by `launch.pretrain`: `python -m launch.agent RUN_FOLDER NUM_RANKS`; its exit code is that of the rank that
failed first, 2 for a mistake of the user.
Not here: what a rank does (`launch.worker`).
"""

import logging
import signal
import sys
import tempfile

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args
from torch.distributed.run import run as torchrun

WORKER = ["-m", "launch.worker"]


def main(folder: str, num_ranks: str) -> int:
    """Run the ranks to their end."""
    logging.disable(logging.CRITICAL)  # torchrun's own words about a failure; ours follow
    launch = ["--standalone", f"--nproc-per-node={num_ranks}"]
    try:
        # A folder of our own, since torchrun never removes the one that it makes.
        with tempfile.TemporaryDirectory(prefix="memory3-ranks-") as errors:
            arguments = [*launch, f"--log-dir={errors}", *WORKER, folder]
            torchrun(parse_args(arguments))  # type: ignore[no-untyped-call]
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            print(f"memory3 pretrain: rank {rank} was ended by {name}", file=sys.stderr)
            return 128 - failure.exitcode
        data = failure.error_file_data.get("message")
        if isinstance(data, dict):  # absent when the rank died before it could say why
            message = data["message"].removeprefix("ValueError: ")
            print(f"memory3 pretrain: rank {rank}: {message}", file=sys.stderr)
        return failure.exitcode
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

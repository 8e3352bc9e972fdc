"""One rank of an edit of a bank: the command line's arguments, and the others to share the work with.

Started by `launch.agent`: `python -m launch.bank_worker ARGUMENTS`, which are JSON. Exit codes as of `launch.worker`.
Not here: the edits (`launch.bank`).
"""

import argparse
import json
import logging
import sys
from datetime import timedelta

import torch

from launch import bank
from launch.worker import leave, reported
from train import distributed
from train.stopping import Stop, end_with_parent

_PATIENCE = timedelta(days=30)
"""The others wait while one cuts text, or builds the index; one that dies ends them all at once (`launch.agent`)."""


def main(given: str) -> int:
    """Do this rank's share of an edit; a signal ends it at once, and what is whole stays."""
    Stop().listen(leave)
    end_with_parent()

    def work() -> int:
        ranks = distributed.start(
            threads=torch.get_num_threads(), timeout_seconds=int(_PATIENCE.total_seconds())
        )
        logging.basicConfig(format="%(message)s")
        logging.getLogger().setLevel(logging.INFO if ranks.is_first else logging.ERROR)
        try:
            code = bank.edit(argparse.Namespace(**json.loads(given)), ranks)
            ranks.barrier()  # nobody leaves while a peer still speaks to it
        finally:
            distributed.stop()
        return code

    return reported(work)


if __name__ == "__main__":
    leave(main(sys.argv[1]))

"""Starts the ranks of this machine below `launch.agent`, and waits for them.

Invariants: open descriptors are inherited, so that a lock that is held here lasts as long as any rank; a signal that
comes here reaches the ranks.
Not here: what a rank does (`launch.worker`, `launch.bank_worker`).
"""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def run_ranks(program: str, worker: Sequence[str], *, num_ranks: int, threads: int) -> int:
    """Run ranks to their end and return the exit code, as `launch.agent` states it.

    Args:
        program: What the user called, for messages.
        worker: Of a rank: `-m MODULE ARGUMENT ...`.
        num_ranks: Processes.
        threads: Of each.
    """
    command = [sys.executable, "-m", "launch.agent", program, str(num_ranks), *worker]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    package_root = str(Path(__file__).resolve().parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
    ranks = subprocess.Popen(command, env=environment, close_fds=False)
    handlers = {
        number: signal.signal(number, lambda number, _: ranks.send_signal(number))
        for number in (signal.SIGTERM, signal.SIGUSR1)
    }
    try:
        return ranks.wait()
    except KeyboardInterrupt:
        ranks.terminate()
        return ranks.wait()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)

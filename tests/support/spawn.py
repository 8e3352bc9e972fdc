"""Real processes for tests: `spawn(fn, world_size=2)` runs a function on ranks that torchrun could have started.

The processes come from one fork server that has imported torch and DeepSpeed, so that only the first call pays for it.
"""

import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from train.distributed import free_port

HANG_SECONDS = 1200.0
"""What takes longer hangs. No test measures this: a slow machine may take its time."""
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "deepspeed", "faiss", "datasets", "transformers", "hydra"])


def spawn(
    fn: Callable[..., Any], *args: Any, world_size: int = 2, timeout_seconds: float = HANG_SECONDS
) -> list[Any]:
    """Call `fn(*args)` in one process per rank, with torchrun's variables set, and return the results by rank.

    Raises:
        RuntimeError: A rank raised (its traceback is the message), or ended without a word.
        TimeoutError: A rank took longer than the timeout; all are ended.
    """
    port = free_port()
    pipes, processes = [], []
    for rank in range(world_size):
        here, there = _CONTEXT.Pipe(duplex=False)
        process = _CONTEXT.Process(target=_run, args=(fn, args, rank, world_size, port, there), daemon=True)
        process.start()
        there.close()
        pipes.append(here)
        processes.append(process)
    try:
        return _collect(pipes, time.monotonic() + timeout_seconds, timeout_seconds)
    finally:
        for process in processes:
            process.kill()  # those that are done are gone already
            process.join()


def _collect(pipes: list[Connection], deadline: float, timeout_seconds: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            ranks = [pipes.index(pipe) for pipe in waiting]
            raise TimeoutError(f"ranks {ranks} were not done after {timeout_seconds:g} s")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = pipes.index(pipe)
            try:
                failed, result = pickle.loads(pipe.recv_bytes())
            except EOFError:
                raise RuntimeError(f"rank {rank} ended without a word") from None
            if failed:
                raise RuntimeError(f"rank {rank} raised:\n{result}")
            results[rank] = result
    return [results[rank] for rank in range(len(pipes))]


def _run(
    fn: Callable[..., Any], args: tuple[Any, ...], rank: int, world_size: int, port: int, pipe: Connection
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    try:
        sent = pickle.dumps(
            (False, fn(*args))
        )  # not `send`, with which torch would share tensors with this process
    except BaseException:
        sent = pickle.dumps((True, traceback.format_exc()))
    pipe.send_bytes(sent)

"""Tensors to a device and from it, so that neither waits for the other.

Not here: in which order work is queued (`train.inputs`, `train.engine`, `memorybank.writer`).
"""

from collections.abc import Callable

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on a device, for which nothing waits: a GPU copies from pages that stay in place, in its order.

    From other pages the copy would begin when all that was queued before it is done, and this thread would wait.
    """
    device = torch.device(device)
    if device.type == "cuda" and tensor.device.type == "cpu":
        # Kept until it is copied. A slice would be copied by way of other pages, and nothing expanded can be pinned.
        tensor = tensor.contiguous().pin_memory()
    return tensor.to(device, non_blocking=True)


def fetched(tensor: Tensor) -> Callable[[], Tensor]:
    """Begin to copy a tensor to the CPU; return what waits for the copy, and for nothing that is queued later."""
    copy = tensor.to("cpu", non_blocking=True)
    if tensor.device.type != "cuda":
        return lambda: copy
    there = torch.cuda.Event()  # type: ignore[no-untyped-call]
    there.record()

    def wait() -> Tensor:
        there.synchronize()
        return copy

    return wait

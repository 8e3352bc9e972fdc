"""From the references that chunks retrieved to the slots that chunks read: pure functions on ids.

    retrieved ids --window_slots / fresh_slots--> ids_BCK --distinct--> ids_N, slots_BCK

Invariants: -1 is an empty slot and stays one; no reference stands twice among the slots of one chunk; a
reference stands once in the pool however many chunks read it.

Not here: the memories themselves (bank.py reads or encodes them for `ids_N`).
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memorybank.config import QueryMode

Ids = NDArray[np.int64]


def window_slots(ids_BC: Ids, query: QueryMode, *, window: int = 5) -> Ids:
    """Return the slots (B, C, window) of the training pattern: one reference per chunk, shared by a window.

    Args:
        ids_BC: the reference that each chunk's own text retrieved.
        query: `own`: chunk c reads the references of chunks c-window+1..c (paper, section 3.6);
            `previous`: of c-window..c-1, so that no token is predicted with a memory it chose itself.
        window: chunks whose references a chunk reads.
    """
    last = 0 if query is QueryMode.own else 1
    return _once_each(np.stack([_delayed(ids_BC, last + j) for j in reversed(range(window))], axis=2))


def fresh_slots(ids_BCk: Ids, query: QueryMode) -> Ids:
    """Return the slots (B, C, k) of the inference pattern: every chunk reads what one query found.

    `own`: chunk c reads what it retrieved; `previous`: what chunk c-1 retrieved, and chunk 0 reads nothing.
    """
    return _once_each(ids_BCk if query is QueryMode.own else _delayed(ids_BCk, 1))


def distinct(ids_BCK: Ids) -> tuple[Ids, Tensor]:
    """Return the distinct ids (N,), ascending, and the slots (B, C, K) as positions in them; -1 stays -1."""
    ids_N, inverse = np.unique(ids_BCK, return_inverse=True)
    num_empty = int(np.searchsorted(ids_N, 0))  # 0 or 1: -1 sorts first
    slots_BCK = inverse.reshape(ids_BCK.shape).astype(np.int64) - num_empty
    return ids_N[num_empty:], torch.from_numpy(slots_BCK)


def _delayed(ids: Ids, num_chunks: int) -> Ids:
    """Return ids (B, C, ...) as seen `num_chunks` chunks later, with empty slots before."""
    delayed = np.full_like(ids, -1)
    delayed[:, num_chunks:] = ids[:, : max(0, ids.shape[1] - num_chunks)]
    return delayed


def _once_each(ids_BCK: Ids) -> Ids:
    """Return the slots with every later repetition within a chunk emptied."""
    equal_BCKK = ids_BCK[..., :, None] == ids_BCK[..., None, :]
    repeated_BCK = np.tril(equal_BCKK, k=-1).any(axis=-1)
    return np.where(repeated_BCK, -1, ids_BCK)

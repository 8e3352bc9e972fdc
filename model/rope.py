"""Rotary positions as pure functions.

A head's first and second halves form the pairs that are turned ("rotate half"). Tables are computed in
float32 whatever the model's dtype, because a bfloat16 position is no position.
Not here: which token stands where (``model/transformer.py``).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Rotation(NamedTuple):
    """Tables (..., T, 1, E) in the dtype of what is turned."""

    cos: Tensor
    """Cosine of every position's angles, once for each half of a head."""
    sin: Tensor
    """Sine of them, negative for the first half."""


def rotation(positions_T: Tensor, *, head_size: int, base: float, dtype: torch.dtype) -> Rotation:
    """Return the turn of each position; `positions_T` may have leading dimensions (a row each)."""
    pairs = torch.arange(0, head_size, 2, device=positions_T.device, dtype=torch.float32)
    angles = positions_T.to(torch.float32).unsqueeze(-1) * base ** (-pairs / head_size)
    cos, sin = angles.cos(), angles.sin()
    return Rotation(
        torch.cat([cos, cos], dim=-1).to(dtype).unsqueeze(-2),
        torch.cat([-sin, sin], dim=-1).to(dtype).unsqueeze(-2),
    )


def rotate(x_BTHE: Tensor, turn: Rotation) -> Tensor:
    """Return `x_BTHE` turned to its positions."""
    turned: Tensor = _Rotate.apply(x_BTHE, turn.cos, turn.sin)  # type: ignore[no-untyped-call]
    return turned


class _Rotate(torch.autograd.Function):
    """Saves the tables alone; the gradient is turned back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, direction=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, sin, direction=-1), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, *, direction: int) -> Tensor:
    """Return ``x * cos + (-second half, first half) * sin`` in three passes over whole heads."""
    swapped = x.roll(x.shape[-1] // 2, dims=-1)
    return (x * cos).addcmul_(swapped, sin, value=direction)

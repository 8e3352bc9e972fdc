"""The parts of a block that look at one token at a time: RMSNorm and the gated feed-forward network.

Statistics are taken in float32 (float64 for a float64 model); nothing has a bias.
Not here: attention.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class RMSNorm(nn.Module):
    """Scale each token to a root mean square of one, then by a learned weight."""

    def __init__(self, width: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = _RMSNorm.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return normed


class FeedForward(nn.Module):
    """``down(silu(gate(x)) * up(x))``; gate and up are one matrix."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(nn.functional.silu(gate) * up)  # type: ignore[no-any-return]


class _RMSNorm(torch.autograd.Function):
    """Half the passes over memory of the composite operator, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        stats = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=stats)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_().to(x.dtype)
        normed = x * scale
        ctx.save_for_backward(normed, weight, scale)
        scaled: Tensor = normed * weight
        return scaled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        normed, weight, scale = ctx.saved_tensors
        product = grad * normed
        grad_weight = product.sum(dim=tuple(range(product.dim() - 1)))
        projection = torch.mv(product.view(-1, product.shape[-1]), weight).div_(product.shape[-1])
        grad_x = (grad * weight).addcmul_(normed, projection.view(scale.shape), value=-1).mul_(scale)
        return grad_x, grad_weight, None

"""The next-token loss, as a sum and a count, without ever holding the logits of a whole batch.

``chunked_next_token_loss`` computes the gradients of hidden states and head along with the loss: the
logits of a few hundred tokens exist at a time and are never computed twice. Tokens whose target is
``IGNORE`` are left out before the head is applied. Softmax statistics are float32. On a GPU softmax and gradient are
two fused passes over the logits, and ignored tokens are computed with the others and masked: to count them, the CPU
would have to wait for the device.
Not here: the mean over tokens, which is the caller's, since it spans micro-batches and ranks.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE = -100
"""Target of a token that carries no loss."""

TOKENS_AT_A_TIME = 512
"""Tokens whose logits exist at once on a CPU, in the model's dtype."""

TOKENS_AT_A_TIME_BESIDE = 4096
"""The same on any other device, where each further piece reads and writes the head's gradient in float32."""

LOGITS_IN_CACHE = 1 << 18
"""Of them, logits that are float32 at once on a CPU: 1 MiB, which stays in a core's own cache."""


class LossSum(NamedTuple):
    """Nats summed over tokens, and the number of tokens; both scalars on the model's device."""

    sum: Tensor
    """float32, differentiable."""
    count: Tensor  # type: ignore[assignment]
    """int64."""


def chunked_next_token_loss(hidden_BTD: Tensor, head_VD: Tensor, targets_BT: Tensor) -> LossSum:
    """Return the summed negative log-likelihood of `targets_BT` under ``hidden_BTD @ head_VD.T``."""
    hidden, targets, _ = _counted(hidden_BTD, targets_BT)
    total: Tensor = _SummedLoss.apply(hidden, head_VD, targets)  # type: ignore[no-untyped-call]
    return LossSum(total, (targets != IGNORE).sum())


@torch.no_grad()
def token_losses(hidden_BTD: Tensor, head_VD: Tensor, targets_BT: Tensor) -> Tensor:
    """Return ``nll_BT``, the nats of each target in float32; 0 where it is ignored. No gradient."""
    hidden, targets, counted = _counted(hidden_BTD, targets_BT)
    losses = [
        _negative_log_likelihood(some_hidden @ head_VD.T, some_targets, gradient=False)
        for some_hidden, some_targets in _pieces(hidden, targets)
    ]
    nll_BT = torch.zeros(targets_BT.shape, dtype=torch.float32, device=targets_BT.device)
    if losses:
        nll_BT.view(-1)[slice(None) if counted is None else counted] = torch.cat(losses).float()
    return nll_BT


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head_VD: Tensor, targets: Tensor) -> Tensor:
        wants_hidden, wants_head, _ = ctx.needs_input_grad
        stats = torch.promote_types(head_VD.dtype, torch.float32)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        grads_hidden: list[Tensor] = []
        grad_head: Tensor | None = None
        for some_hidden, some_targets in _pieces(hidden, targets):
            logits = some_hidden @ head_VD.T
            gradient = wants_hidden or wants_head
            nll = _negative_log_likelihood(logits, some_targets, gradient=gradient)
            total += nll.sum(dtype=torch.float64)
            if wants_hidden:
                grads_hidden.append(logits @ head_VD)
            if wants_head:
                product = logits.T @ some_hidden
                if len(hidden) > len(some_hidden):
                    grad_head = torch.zeros_like(head_VD, dtype=stats) if grad_head is None else grad_head
                    product = grad_head.add_(product)
                grad_head = product
        if grad_head is None and wants_head:
            grad_head = torch.zeros_like(head_VD)
        ctx.save_for_backward(
            torch.cat([hidden[:0], *grads_hidden]) if wants_hidden else None,
            None if grad_head is None else grad_head.to(head_VD.dtype),
        )
        return total.to(torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad_hidden, grad_head = (None if saved is None else saved * grad for saved in ctx.saved_tensors)
        return grad_hidden, grad_head, None


def _counted(hidden_BTD: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return hidden states and targets of the tokens that carry loss, flat, and where they stood."""
    hidden, targets = hidden_BTD.reshape(-1, hidden_BTD.shape[-1]), targets_BT.reshape(-1)
    if hidden.device.type != "cpu":
        return hidden, targets, None
    counted = (targets != IGNORE).nonzero().squeeze(1)
    if len(counted) == len(targets):
        return hidden, targets, None
    return hidden.index_select(0, counted), targets.index_select(0, counted), counted


def _pieces(hidden: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    at_a_time = TOKENS_AT_A_TIME if targets.device.type == "cpu" else TOKENS_AT_A_TIME_BESIDE
    for start in range(0, len(targets), at_a_time):
        piece = slice(start, start + at_a_time)
        yield hidden[piece], targets[piece]


def _negative_log_likelihood(logits: Tensor, targets: Tensor, *, gradient: bool) -> Tensor:
    """Return each target's nats, at least float32; if `gradient`, overwrite the logits with it."""
    if logits.device.type != "cpu":
        return _fused()(logits, targets, gradient=gradient)
    stats = torch.promote_types(logits.dtype, torch.float32)
    rows = max(1, LOGITS_IN_CACHE // logits.shape[1])
    losses = []
    for start in range(0, len(logits), rows):
        some_logits = logits[start : start + rows]
        some_targets = targets[start : start + rows, None]
        exact = some_logits.to(stats)
        probabilities = exact.softmax(-1)
        # log sum exp = max logit - log(max probability): the largest probability never underflows.
        log_normaliser = exact.amax(-1, keepdim=True) - probabilities.amax(-1, keepdim=True).log()
        losses.append(log_normaliser - exact.gather(1, some_targets))
        if gradient:
            probabilities.scatter_add_(1, some_targets, probabilities.new_full(some_targets.shape, -1.0))
            some_logits.copy_(probabilities)
    return torch.cat(losses).squeeze(1)


def nll_and_gradient(logits: Tensor, targets: Tensor, *, gradient: bool) -> Tensor:
    """Return what `_negative_log_likelihood` returns, with zeros for ignored targets; made to be fused."""
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    counted = targets != IGNORE
    target = targets.clamp(min=0)[:, None]
    log_normaliser = exact.logsumexp(-1, keepdim=True)
    nll = torch.where(counted, (log_normaliser - exact.gather(1, target)).squeeze(1), 0.0)
    if gradient:
        chosen = torch.arange(logits.shape[1], device=logits.device) == target
        probabilities = (exact - log_normaliser).exp()
        logits.copy_(torch.where(counted[:, None], probabilities - chosen.to(exact.dtype), 0.0))
    return nll


@cache
def _fused() -> Callable[..., Tensor]:
    return torch.compile(nll_and_gradient)

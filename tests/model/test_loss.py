import pytest
import torch
from torch.nn import functional

from model import loss
from model.loss import IGNORE, chunked_next_token_loss, token_losses


def problem(tokens: int = 23, vocab_size: int = 11) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(1, tokens, 5, dtype=torch.float64, requires_grad=True)
    head = torch.randn(vocab_size, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, vocab_size, (1, tokens))
    targets[0, ::3] = IGNORE
    return hidden, head, targets


@pytest.mark.parametrize(("tokens_at_a_time", "in_cache"), [(512, 1 << 18), (4, 22), (5, 1)])
def test_loss_and_gradients_equal_cross_entropy(
    monkeypatch: pytest.MonkeyPatch, tokens_at_a_time: int, in_cache: int
) -> None:
    monkeypatch.setattr(loss, "TOKENS_AT_A_TIME", tokens_at_a_time)
    monkeypatch.setattr(loss, "LOGITS_IN_CACHE", in_cache)
    hidden, head, targets = problem()
    ours = chunked_next_token_loss(hidden, head, targets)
    theirs = functional.cross_entropy(hidden[0] @ head.T, targets[0], ignore_index=IGNORE, reduction="sum")
    torch.testing.assert_close(ours.sum, theirs.float())
    assert ours.sum.dtype == torch.float32
    assert ours.count == (targets != IGNORE).sum()
    ours_grads = torch.autograd.grad(ours.sum / ours.count, (hidden, head))
    theirs_grads = torch.autograd.grad(theirs / ours.count, (hidden, head))
    for left, right in zip(ours_grads, theirs_grads, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-9)


def test_what_a_gpu_computes_equals_cross_entropy_and_ignores_what_is_ignored() -> None:
    """The function that is fused there, as it stands."""
    hidden, head, targets = problem()
    logits = (hidden[0] @ head.T).detach().requires_grad_()
    nll = functional.cross_entropy(logits, targets[0], ignore_index=IGNORE, reduction="none")
    (gradient,) = torch.autograd.grad(nll.sum(), logits)
    overwritten = logits.detach().clone()
    torch.testing.assert_close(loss.nll_and_gradient(overwritten, targets[0], gradient=True), nll.detach())
    torch.testing.assert_close(overwritten, gradient)
    untouched = logits.detach().clone()
    loss.nll_and_gradient(untouched, targets[0], gradient=False)
    assert torch.equal(untouched, logits.detach())


def test_losses_per_token_are_zero_where_ignored() -> None:
    hidden, head, targets = problem()
    nll = token_losses(hidden, head, targets)
    theirs = functional.cross_entropy(hidden[0] @ head.T, targets[0], ignore_index=IGNORE, reduction="none")
    torch.testing.assert_close(nll[0], theirs.detach().float())
    assert not nll[targets == IGNORE].any()
    assert nll.dtype == torch.float32


def test_nothing_to_count_is_zero_with_zero_gradient() -> None:
    hidden, head, targets = problem()
    total = chunked_next_token_loss(hidden, head, torch.full_like(targets, IGNORE))
    assert (total.sum, total.count) == (0, 0)
    grads = torch.autograd.grad(total.sum, (hidden, head))
    assert not any(grad.any() for grad in grads)
    assert not token_losses(hidden, head, torch.full_like(targets, IGNORE)).any()


def test_ignored_tokens_are_never_multiplied_with_the_head() -> None:
    hidden, head, targets = problem()
    with torch.no_grad():
        hidden[targets == IGNORE] = torch.nan
    total = chunked_next_token_loss(hidden, head, targets)
    assert total.sum.isfinite()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(total.sum, (hidden, head)))


def test_an_impossible_target_costs_much_but_not_infinity() -> None:
    hidden = torch.tensor([[[1000.0]]])
    head = torch.tensor([[1.0], [-1.0]])
    assert token_losses(hidden, head, torch.tensor([[1]])).item() == pytest.approx(2000.0)

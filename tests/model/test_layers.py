import torch

from model.layers import FeedForward, RMSNorm


def test_norm_equals_the_library() -> None:
    torch.manual_seed(0)
    norm = RMSNorm(6, eps=1e-3).double()
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    ours = norm(x)
    theirs = torch.nn.functional.rms_norm(x, (6,), norm.weight, 1e-3)
    torch.testing.assert_close(ours, theirs)
    grad = torch.randn_like(x)
    for left, right in zip(
        torch.autograd.grad(ours, (x, norm.weight), grad),
        torch.autograd.grad(theirs, (x, norm.weight), grad),
        strict=True,
    ):
        torch.testing.assert_close(left, right)


def test_norm_of_bfloat16_has_float32_statistics() -> None:
    x = torch.full((1, 4096), 300.0, dtype=torch.bfloat16)  # the sum of squares overflows nothing, nor rounds
    assert RMSNorm(4096, eps=1e-5).bfloat16()(x).float().sub(1).abs().max() < 2**-7


def test_feed_forward_is_gated() -> None:
    torch.manual_seed(0)
    ffn = FeedForward(4, 6)
    x = torch.randn(3, 4)
    gate, up = ffn.gate_up.weight.chunk(2)
    expected = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ ffn.down.weight.T
    torch.testing.assert_close(ffn(x), expected)

import torch

from model.rope import rotate, rotation


def turn(start: int, tokens: int):  # type: ignore[no-untyped-def]
    return rotation(torch.arange(start, start + tokens), head_size=8, base=100.0, dtype=torch.float64)


def test_scores_depend_on_the_distance_alone() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 3, 8, dtype=torch.float64).unbind(0)
    near = rotate(q, turn(9, 1)), rotate(k, turn(4, 1))
    far = rotate(q, turn(109, 1)), rotate(k, turn(104, 1))
    torch.testing.assert_close((near[0] * near[1]).sum(-1), (far[0] * far[1]).sum(-1), rtol=1e-4, atol=1e-4)


def test_halves_turn_together_and_position_zero_stays() -> None:
    x = torch.randn(2, 3, 2, 8, dtype=torch.float64)
    turned = rotate(x, turn(0, 3))
    torch.testing.assert_close(turned[:, 0], x[:, 0])
    angle = torch.tensor(2.0) * 100.0 ** (-2 / 8)  # second pair of the third token
    expected = x[:, 2, :, 1] * angle.cos() - x[:, 2, :, 5] * angle.sin()
    torch.testing.assert_close(turned[:, 2, :, 1], expected, rtol=1e-6, atol=1e-6)


def test_gradient() -> None:
    x = torch.randn(2, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: rotate(y, turn(5, 3)), x)


def test_rows_may_stand_at_different_places() -> None:
    x = torch.randn(2, 1, 2, 8, dtype=torch.float64)
    positions = torch.tensor([[4], [7]])
    turned = rotate(x, rotation(positions, head_size=8, base=100.0, dtype=torch.float64))
    torch.testing.assert_close(turned[:1], rotate(x[:1], turn(4, 1)))
    torch.testing.assert_close(turned[1:], rotate(x[1:], turn(7, 1)))

"""Initial weights: their spread, and heads that look up from the first step."""

import math

import pytest
import torch
from torch import Tensor

from model.config import Init, ModelConfig
from model.memory import ReferenceBatch
from model.transformer import Memory3LM
from tests.support.model import tiny_config, tiny_model

ROWS, SAID = 8, 60


def _model(**changes: object) -> Memory3LM:
    torch.manual_seed(0)
    return Memory3LM(ModelConfig(init_std=0.0625, prefix_ids=[1, 5, 7], **changes))  # type: ignore[arg-type]


def _tokens(length: int) -> Tensor:
    return torch.randint(300, 4000, (ROWS, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def _loss(model: Memory3LM, tokens: Tensor, *, begin: int = 0, memory: ReferenceBatch | None = None) -> float:
    targets = tokens[:, 1:].clone()
    targets[:, :begin] = -100
    total = model(tokens[:, :-1], targets_BT=targets, memory=memory)
    return float(total.sum / total.count)


def test_normal_weights_have_their_spread() -> None:
    model = tiny_model(init_std=0.1, width=64, ffn_width=64, dtype=torch.float32)
    into_residual = 0.1 / math.sqrt(2 * 3)
    for name, expected in [
        ("qkv", 0.1),
        ("out", into_residual),
        ("ffn.gate_up", 0.1),
        ("ffn.down", into_residual),
    ]:
        weight = model.get_parameter(f"blocks.1.{name}.weight")
        assert weight.std().item() == pytest.approx(expected, rel=0.05), name


def test_induction_heads_copy_what_was_said_before() -> None:
    said = _tokens(SAID)
    twice = torch.cat([said, said], dim=1)
    plain, heads = _model(), _model(init=Init.induction)
    assert _loss(plain, twice, begin=SAID) > 8
    assert _loss(heads, twice, begin=SAID) < 4  # nats; guessing costs 8.3
    assert _loss(heads, _tokens(2 * SAID)) > 8  # nothing to copy


def test_induction_heads_read_memories() -> None:
    model = _model(init=Init.induction, tokens_kept=128)
    told = _tokens(128)
    asked = told[:, 20:84]
    lengths, titles = torch.full((ROWS,), 128), torch.zeros(ROWS, dtype=torch.long)
    slots = torch.arange(ROWS).view(ROWS, 1, 1)
    own = ReferenceBatch(told, lengths, titles, slots)
    others = ReferenceBatch(told, lengths, titles, slots.roll(1, 0))
    closed_book = _loss(model, asked)
    assert _loss(model, asked, memory=own) < closed_book - 4
    assert abs(_loss(model, asked, memory=others) - closed_book) < 0.5


def test_induction_heads_need_width() -> None:
    with pytest.raises(ValueError, match=r"model\.init=induction: .*above 20"):
        tiny_config(init=Init.induction).check()
    tiny_model(init=Init.induction, width=24)


def test_induction_heads_need_heads_of_whole_quarters() -> None:
    with pytest.raises(
        ValueError, match=r"model\.init=induction: .*model\.head_size \(now 6\) that 4 divides"
    ):
        tiny_config(init=Init.induction, width=24, head_size=6).check()

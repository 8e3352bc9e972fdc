import pytest
import torch

from model.config import ModelConfig
from model.flops import count_parameters, knowledge_cost, step_flops, text_token_flops
from model.transformer import Memory3LM
from tests.support.model import tiny_config

PAPER = ModelConfig(
    vocab_size=60416,
    num_layers=44,
    width=3200,
    num_heads=40,
    num_kv_heads=8,
    head_size=80,
    ffn_width=3200,
    num_memory_layers=22,
    row_tokens=2048,
)
SMALL = ModelConfig(
    vocab_size=60416,
    num_layers=40,
    width=2048,
    num_heads=32,
    num_kv_heads=8,
    head_size=64,
    ffn_width=2048,
    num_memory_layers=20,
    row_tokens=2048,
)


@pytest.mark.parametrize(
    ("config", "billions"),
    [(PAPER, 2.433), (SMALL, 0.9227), (ModelConfig(), 0.00315)],
    ids=["2.4B", "0.9B", "nano"],
)
def test_parameters_are_counted_exactly(config: ModelConfig, billions: float) -> None:
    with torch.device("meta"):
        model = Memory3LM(config)
    count = count_parameters(config)
    assert count.total == sum(parameter.numel() for parameter in model.parameters())
    assert count.embedding == model.embedding.weight.numel()
    assert count.head == model.head.weight.numel()
    assert count.non_embedding / 1e9 == pytest.approx(billions, rel=3e-4)


@pytest.mark.parametrize(("config", "billions"), [(PAPER, 2.43302), (SMALL, 0.92275)], ids=["2.4B", "0.9B"])
def test_matrices_have_the_papers_sizes(config: ModelConfig, billions: float) -> None:
    norms = (2 * config.num_layers + 1) * config.width
    assert (count_parameters(config).non_embedding - norms) / 1e9 == pytest.approx(billions, rel=1e-5)


def test_the_papers_cost_constants() -> None:
    cost = knowledge_cost(PAPER)
    assert cost.implicit_write == pytest.approx(2.2385e12, rel=1e-4)
    assert cost.explicit_write == pytest.approx(0.30818e12, rel=1e-4)
    assert cost.explicit_read == pytest.approx(1.4418e-4 * 1e12, rel=1e-4)
    assert cost.text_read == pytest.approx(0.62422e12, rel=1e-4)
    assert cost.best_uses == pytest.approx((0.4938, 13388), rel=1e-4)


def test_a_step_costs_what_the_paper_suggests() -> None:
    warmup = step_flops(PAPER, rows=1)
    assert warmup.total == pytest.approx(16 * knowledge_cost(PAPER).implicit_write)
    bank = step_flops(PAPER, rows=1, slots_filled=150, references_encoded=32)
    online = step_flops(PAPER, rows=1, slots_filled=150, references_encoded=32, encode_gradient=True)
    assert bank.total / warmup.total == pytest.approx(1.28, abs=0.01)
    assert online.total / warmup.total == pytest.approx(1.83, abs=0.01)
    assert bank.memory_read / bank.total < 0.002


def test_a_steps_parts_are_its_whole() -> None:
    step = step_flops(PAPER, rows=2, slots_filled=7, references_encoded=3)
    assert step.text + step.head == pytest.approx(2 * 2048 * text_token_flops(PAPER).causal, rel=1e-3)
    assert step.head == 6 * 2 * 2048 * 60416 * 3200
    assert step.total == step.text + step.head + step.memory_read + step.encode


def test_the_selection_has_no_gradient() -> None:
    forward = step_flops(PAPER, rows=0, references_encoded=1).encode
    both = step_flops(PAPER, rows=0, references_encoded=1, encode_gradient=True).encode
    assert 3 * forward - both == 2 * 22 * 2 * 128**2 * 3200


def test_causal_attention_halves_the_scores() -> None:
    flops = text_token_flops(PAPER)
    assert flops.palm - flops.causal == 6 * 44 * 3200 * 2048


def test_no_memory_layers_write_nothing() -> None:
    assert step_flops(tiny_config(num_memory_layers=0), rows=1, references_encoded=5).encode == 0

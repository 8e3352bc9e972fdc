from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from model.attention import AttentionFunction, blocked_attention, reference_attention
from model.memory import ExplicitMemory, MemoryBatch, ReferenceBatch
from model.transformer import Memory3LM
from tests.support.merged import merged_attention
from tests.support.model import random_references, random_tokens, tiny_model

EACH_ATTENTION = pytest.mark.parametrize(
    "attention", [blocked_attention, merged_attention, reference_attention]
)


def encoded(model: Memory3LM, references: ReferenceBatch) -> MemoryBatch:
    pool = model.encode(references.tokens_NR, references.lengths_N, references.titles_N)
    return MemoryBatch(pool, references.slots_BCK)


def emptied(references: ReferenceBatch) -> ReferenceBatch:
    return replace(references, slots_BCK=torch.full_like(references.slots_BCK, -1))


@pytest.mark.parametrize(
    ("attention", "dtype"),
    [
        (blocked_attention, torch.float32),
        (blocked_attention, torch.bfloat16),
        (merged_attention, torch.float32),
        (reference_attention, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("tokens", [32, 27, 5])
def test_live_memory_equals_stored_memory_bitwise(
    attention: AttentionFunction, dtype: torch.dtype, tokens: int
) -> None:
    model = tiny_model(attention=attention, dtype=dtype)
    rows = random_tokens(2, tokens)
    references = random_references(2, -(-tokens // 8))
    live = model(rows, memory=references)
    assert torch.equal(live, model(rows, memory=encoded(model, references)))
    assert not torch.equal(live, model(rows))


@EACH_ATTENTION
def test_no_memory_empty_slots_and_no_memory_layers_agree(attention: AttentionFunction) -> None:
    rows, references = random_tokens(2, 32), random_references(2, 4)
    model = tiny_model(attention=attention)
    plain = tiny_model(attention=attention, num_memory_layers=0)
    without = model(rows)
    torch.testing.assert_close(without, plain(rows), rtol=0, atol=0)
    torch.testing.assert_close(plain(rows, memory=references), without, rtol=0, atol=0)
    for empty in (emptied(references), encoded(model, emptied(references))):
        torch.testing.assert_close(model(rows, memory=empty), without, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens", [32, 21])
def test_fast_models_equal_the_reference_with_all_gradients(tokens: int) -> None:
    rows, references = random_tokens(2, tokens), random_references(2, -(-tokens // 8))
    gradients: list[dict[str, Tensor]] = []
    for attention in (reference_attention, blocked_attention, merged_attention):
        model = tiny_model(attention=attention)
        total = model(rows, targets_BT=rows.roll(-1, 1), memory=references)
        total.sum.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for fast in gradients[1:]:
        torch.testing.assert_close(fast, gradients[0], rtol=1e-9, atol=1e-9)


def test_gradient_reaches_what_only_references_say() -> None:
    model = tiny_model()
    references = random_references(2, 4)
    rows = torch.full((2, 32), 3)
    references = replace(references, tokens_NR=torch.full_like(references.tokens_NR, 40))
    model(rows, targets_BT=rows, memory=references).sum.backward()
    assert model.embedding.weight.grad[40].any()
    assert model.embedding.weight.grad[7].any()  # a token of the prefix
    assert not model.embedding.weight.grad[41].any()


@EACH_ATTENTION
def test_a_chunk_changes_no_logit_before_it(attention: AttentionFunction) -> None:
    model = tiny_model(attention=attention)
    rows, references = random_tokens(2, 32), random_references(2, 4)
    before = model(rows, memory=references)
    for chunk in range(1, 4):
        changed = rows.clone()
        changed[:, 8 * chunk :] = random_tokens(2, 32, seed=9)[:, 8 * chunk :]
        slots = references.slots_BCK.clone()
        slots[:, chunk:] = references.slots_BCK.flip(1)[:, chunk:]
        after = model(changed, memory=replace(references, slots_BCK=slots))
        torch.testing.assert_close(after[:, : 8 * chunk], before[:, : 8 * chunk], rtol=1e-12, atol=1e-12)
        assert not torch.equal(after[:, 8 * chunk :], before[:, 8 * chunk :])


def test_every_chunk_reads_its_own_slots_alone() -> None:
    model = tiny_model()
    rows, references = random_tokens(1, 32), emptied(random_references(1, 4))
    without = model(rows)
    references.slots_BCK[0, 2, 1] = 4
    read = model(rows, memory=references)
    torch.testing.assert_close(read[:, :16], without[:, :16], rtol=1e-12, atol=1e-12)
    assert (read[0, 16:24] - without[0, 16:24]).abs().amax(-1).min() > 1e-6


def test_padding_of_references_is_inert() -> None:
    model = tiny_model()
    rows, references = random_tokens(2, 32), random_references(2, 4)
    padded = references.tokens_NR.clone()
    beyond = torch.arange(12) >= references.lengths_N[:, None]
    padded[beyond] = 0
    before = model(rows, memory=references)
    assert torch.equal(model(rows, memory=replace(references, tokens_NR=padded)), before)
    index = model.encode(padded, references.lengths_N).index_NLGS
    assert (index < references.lengths_N[:, None, None, None]).all()
    assert ((index >= 0).sum(-1) == references.lengths_N.clamp(max=3)[:, None, None]).all()


def test_a_narrower_batch_of_references_is_the_same_memory() -> None:
    model = tiny_model()
    tokens, lengths = random_tokens(2, 12), torch.tensor([5, 7])
    wide, narrow = model.encode(tokens, lengths), model.encode(tokens[:, :7], lengths)
    assert torch.equal(wide.index_NLGS, narrow.index_NLGS)
    torch.testing.assert_close(wide.v_NLGSE, narrow.v_NLGSE, rtol=1e-12, atol=1e-12)


def test_the_order_of_slots_is_irrelevant() -> None:
    model = tiny_model()
    rows, references = random_tokens(2, 32), random_references(2, 4, places=4)
    flipped = replace(references, slots_BCK=references.slots_BCK.flip(2))
    torch.testing.assert_close(
        model(rows, memory=flipped), model(rows, memory=references), rtol=1e-12, atol=1e-12
    )


def test_the_context_stands_at_the_same_place_with_and_without_memory_layers_or_prefix() -> None:
    with_prefix, without = tiny_model(), tiny_model(prefix_ids=[])
    assert (with_prefix.config.context_start, without.config.context_start) == (15, 12)
    rows = random_tokens(1, 8)
    assert not torch.allclose(with_prefix(rows), without(rows))


def test_memories_have_the_papers_shape_and_ragged_references_fewer_tokens() -> None:
    model = tiny_model()
    references = random_references(1, 4)
    memory = model.encode(references.tokens_NR, references.lengths_N)
    assert memory.k_NLGSE.shape == memory.v_NLGSE.shape == (6, 2, 2, 3, 8)
    assert memory.index_NLGS.shape == (6, 2, 2, 3)
    assert memory.index_NLGS.dtype == torch.int64


@pytest.mark.parametrize("memory", [None, random_references(2, 4)], ids=["alone", "reading"])
def test_losses_and_logits_tell_the_same(memory: ReferenceBatch | None) -> None:
    model = tiny_model()
    rows = random_tokens(2, 32)
    targets = rows.roll(-1, 1).clone()
    targets[:, ::5] = -100
    total = model(rows, targets_BT=targets, memory=memory)
    per_token = model(rows, targets_BT=targets, memory=memory, per_token=True)
    logits = model(rows, memory=memory)
    plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(total.sum, plain.float())
    torch.testing.assert_close(per_token.sum(), total.sum)
    assert total.count == (targets != -100).sum()


def test_documents_do_not_see_each_other_but_memory_and_prefix() -> None:
    model = tiny_model()
    rows, references = random_tokens(1, 32), random_references(1, 4)
    documents = torch.tensor([[0] * 10 + [1] * 22])
    changed = rows.clone()
    changed[:, :10] = 5
    before, after = (model(row, memory=references, documents_BT=documents) for row in (rows, changed))
    torch.testing.assert_close(before[:, 10:], after[:, 10:], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(before, model(rows, documents_BT=documents))


def test_attention_shares_are_measured_at_every_memory_layer() -> None:
    model = tiny_model()
    rows, references = random_tokens(2, 32), random_references(2, 4)
    prefix, memory, context = model.attention_shares(rows, references)
    assert memory.shape == (2, 2, 32, 2)
    torch.testing.assert_close(prefix + memory.sum(-1) + context, torch.ones(2, 2, 32))
    filled = (references.slots_BCK >= 0).repeat_interleave(8, dim=1)
    assert (memory[:, filled] > 0).all()
    assert not memory[:, ~filled].any()
    assert (prefix > 0).all()
    assert model.attention_shares(rows, None).memory_BTK.shape == (2, 2, 32, 0)


def test_looking_at_attention_compiles_nothing() -> None:
    """What looks on would be another function at every layer, and a block may not be compiled that often."""
    rows, references = random_tokens(2, 32), random_references(2, 4)
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = tiny_model(compile=True).attention_shares(rows, references)
    assert not counters["stats"]
    torch.testing.assert_close(compiled, tiny_model().attention_shares(rows, references), rtol=0, atol=0)


@pytest.mark.parametrize(
    "change",
    [{"activation_checkpointing": True}, pytest.param({"compile": True}, marks=pytest.mark.slow)],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_switches_change_nothing_but_cost(change: dict[str, Any]) -> None:
    rows, references = random_tokens(2, 32), random_references(2, 4)
    gradients = []
    for model in (tiny_model(), tiny_model(**change)):
        model(rows, targets_BT=rows, memory=references).sum.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-12)


def test_bfloat16_training_stays_near_float32() -> None:
    rows, references = random_tokens(2, 32), random_references(2, 4)
    exact, rough = (
        tiny_model(dtype=torch.float32, init_std=0.1),
        tiny_model(dtype=torch.bfloat16, init_std=0.1),
    )
    losses = [model(rows, targets_BT=rows, memory=references) for model in (exact, rough)]
    for loss in losses:
        loss.sum.backward()
    torch.testing.assert_close(losses[0].sum, losses[1].sum, rtol=1e-2, atol=0)
    for ours, theirs in zip(rough.parameters(), exact.parameters(), strict=True):
        assert (ours.grad.float() - theirs.grad).norm() < 0.06 * theirs.grad.norm() + 1e-3


def test_title_tokens_are_left_out_when_asked() -> None:
    model = tiny_model(select_title=False)
    tokens, lengths = random_tokens(2, 12), torch.tensor([12, 6])
    memory = model.encode(tokens, lengths, torch.tensor([4, 5]))
    assert memory.index_NLGS[0].min() >= 4
    assert (memory.index_NLGS[1] == torch.tensor([5, -1, -1])).all()
    with pytest.raises(ValueError, match="titles_N"):
        model.encode(tokens, lengths)


def test_what_does_not_fit_is_refused_with_advice() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=r"model\.reference_tokens=12"):
        model.encode(random_tokens(1, 13), torch.tensor([13]))
    with pytest.raises(ValueError, match="slots_BCK is for 3 chunks, but 32 tokens make 4"):
        model(random_tokens(1, 32), memory=random_references(1, 3))


def test_equal_seeds_give_equal_models_and_residual_projections_are_smaller() -> None:
    first, second = tiny_model(seed=3, init_std=0.02), tiny_model(seed=3, init_std=0.02)
    assert all(torch.equal(x, y) for x, y in zip(first.parameters(), second.parameters(), strict=True))
    assert first.head.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert first.blocks[0].out.weight.std().item() == pytest.approx(0.02 / 6**0.5, rel=0.15)
    assert (first.norm.weight == 1).all()


def test_memory_moves_with_its_batch() -> None:
    model = tiny_model()
    references = random_references(2, 4)
    assert references.to("meta").lengths_N.device.type == "meta"
    moved = encoded(model, references).to("meta")
    assert isinstance(moved.pool, ExplicitMemory)
    assert moved.pool.index_NLGS.device.type == moved.slots_BCK.device.type == "meta"

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from model.attention import (
    AttentionFunction,
    MemoryKeys,
    PrefixKeys,
    attention_shares,
    blocked_attention,
    reference_attention,
)
from tests.support.merged import merged_attention

FAST = pytest.mark.parametrize("fast", [blocked_attention, merged_attention])


class Problem:
    """Random tensors of one shape; every one of them asks for its gradient."""

    def __init__(
        self,
        *,
        rows: int = 2,
        tokens: int = 32,
        heads: int = 4,
        kv_heads: int = 2,
        head_size: int = 8,
        chunk: int = 8,
        places: int = 3,
        kept: int = 2,
        prefix: int = 3,
        pool: int = 5,
        filled: bool = True,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def leaf(*shape: int) -> Tensor:
            values = torch.randn(*shape, generator=generator, dtype=torch.float64)
            return values.to(dtype).requires_grad_()

        self.context = [leaf(rows, tokens, count, head_size) for count in (heads, kv_heads, kv_heads)]
        self.prefix = PrefixKeys(leaf(prefix, kv_heads, head_size), leaf(prefix, kv_heads, head_size))
        slots = torch.randint(-1, pool, (rows, -(-tokens // chunk), places), generator=generator)
        self.memory = MemoryKeys(
            leaf(pool, kv_heads, kept, head_size),
            leaf(pool, kv_heads, kept, head_size),
            torch.rand(pool, kv_heads, kept, generator=generator) < 0.7,
            slots if filled else torch.full_like(slots, -1),
            chunk,
        )
        self.grad = torch.randn(rows, tokens, heads, head_size, generator=generator, dtype=torch.float64).to(
            dtype
        )

    @property
    def tensors(self) -> list[Tensor]:
        """All there is but slots."""
        return [*self.context, *self.prefix, self.memory.k_NGSE, self.memory.v_NGSE, self.grad]

    def solve(
        self, attention: AttentionFunction, *, prefix: bool = True, memory: bool = True
    ) -> list[Tensor]:
        """Output, then the gradients of context, prefix and memory."""
        out = attention(
            *self.context, prefix=self.prefix if prefix else None, memory=self.memory if memory else None
        )
        leaves = [*self.context, *(self.prefix if prefix else ())]
        leaves += [self.memory.k_NGSE, self.memory.v_NGSE] if memory else []
        return [out, *torch.autograd.grad(out, leaves, self.grad)]


def assert_equal(left: list[Tensor], right: list[Tensor], tolerance: float) -> None:
    assert len(left) == len(right)
    for ours, theirs in zip(left, right, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@FAST
@pytest.mark.parametrize(("prefix", "memory"), [*itertools.product([True, False], repeat=2)])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"tokens": 29},  # the last chunk is partial
        {"tokens": 5},  # a single, partial chunk
        {"tokens": 150, "chunk": 64, "rows": 1},  # more than two blocks of queries
        {"tokens": 200, "chunk": 130, "rows": 1},  # chunks of more than two tiles
        {"heads": 3, "kv_heads": 3},
        {"heads": 4, "kv_heads": 1},
        {"filled": False},
        {
            "kept": 90,
            "rows": 1,
            "tokens": 9,
            "prefix": 5,
            "head_size": 80,
        },  # more keys than are read at a time
    ],
    ids=str,
)
def test_fast_attention_and_its_gradients_equal_the_reference(
    fast: AttentionFunction, shape: dict[str, int], prefix: bool, memory: bool
) -> None:
    problem = Problem(**shape)  # type: ignore[arg-type]
    solutions = [
        problem.solve(attention, prefix=prefix, memory=memory) for attention in (fast, reference_attention)
    ]
    assert_equal(*solutions, tolerance=1e-11)


ANY_SHAPE = {
    "rows": st.integers(1, 2),
    "tokens": st.integers(1, 21),
    "group": st.integers(1, 3),
    "kv_heads": st.integers(1, 2),
    "chunk": st.integers(1, 9),
    "places": st.integers(1, 3),
    "kept": st.integers(1, 3),
    "prefix": st.integers(0, 3),
    "pool": st.integers(1, 4),
    "seed": st.integers(0, 1000),
}


def assert_equals_the_reference(
    fast: AttentionFunction, group: int, kv_heads: int, seed: int, **shape: int
) -> None:
    problem = Problem(heads=group * kv_heads, kv_heads=kv_heads, head_size=4, seed=seed, **shape)
    assert_equal(problem.solve(fast), problem.solve(reference_attention), tolerance=1e-11)


@settings(max_examples=30, deadline=None)
@given(**ANY_SHAPE)
def test_blocked_attention_equals_the_reference_for_any_shape(**shape: int) -> None:
    assert_equals_the_reference(blocked_attention, **shape)


@settings(max_examples=12, deadline=None)
@given(**ANY_SHAPE)
def test_merged_attention_equals_the_reference_for_any_shape(**shape: int) -> None:
    assert_equals_the_reference(merged_attention, **shape)


LARGER_SHAPE = {
    "tokens": st.integers(1, 100),
    "group": st.integers(1, 3),
    "kv_heads": st.integers(1, 2),
    "chunk": st.integers(1, 70),
    "places": st.integers(1, 3),
    "prefix": st.integers(0, 3),
    "seed": st.integers(0, 1000),
}


def assert_near_float64(
    fast: AttentionFunction, dtype: torch.dtype, tolerance: float, *, group: int, kv_heads: int, **shape: int
) -> None:
    """Output and every gradient, beside the reference's of the same, rounded, inputs."""
    rough, exact = (
        Problem(heads=group * kv_heads, kv_heads=kv_heads, head_size=32, dtype=each, **shape)
        for each in (dtype, torch.float64)
    )
    with torch.no_grad():
        for target, source in zip(exact.tensors, rough.tensors, strict=True):
            target.copy_(source)
    for ours, theirs in zip(rough.solve(fast), exact.solve(reference_attention), strict=True):
        # What a softmax over one key lets through is 0, up to the rounding of what cancels.
        scale = max(theirs.norm().item(), theirs.numel() ** 0.5)
        assert (ours.double() - theirs).norm() <= tolerance * scale


# Limits in units of the type's rounding (2^-24, 2^-8; 2^-11): 300 random shapes gave at most 7 of float32's and 2 of
# bfloat16's (gradients of the prefix, sums over all tokens), merged ones 1 of float16's.
@settings(max_examples=30, deadline=None)
@given(precision=st.sampled_from([(torch.float32, 20 * 2**-24), (torch.bfloat16, 4 * 2**-8)]), **LARGER_SHAPE)
def test_float32_and_bfloat16_stay_near_float64_for_any_shape(
    precision: tuple[torch.dtype, float], **shape: int
) -> None:
    assert_near_float64(blocked_attention, *precision, **shape)


@settings(max_examples=8, deadline=None)
@given(**LARGER_SHAPE)
def test_merged_attention_in_half_precision_stays_near_float64_for_any_shape(**shape: int) -> None:
    """In place of bfloat16, which Triton's interpreter gets wrong: it is rounded where bfloat16 is (a GPU: gpu.py)."""
    assert_near_float64(merged_attention, torch.float16, 4 * 2**-11, **shape)


@pytest.mark.parametrize(
    ("fast", "dtype", "tolerance"),
    [
        (blocked_attention, torch.float32, 1e-5),
        (blocked_attention, torch.bfloat16, 3e-2),
        (merged_attention, torch.float32, 1e-5),
        (merged_attention, torch.float16, 3e-3),
    ],
)
def test_less_precise_numbers_stay_near_float64(
    fast: AttentionFunction, dtype: torch.dtype, tolerance: float
) -> None:
    shape = {"tokens": 128, "chunk": 64, "head_size": 64}
    rough, exact = Problem(**shape, dtype=dtype), Problem(**shape)  # type: ignore[arg-type]
    with torch.no_grad():  # the same, rounded, inputs
        for target, source in zip(exact.tensors, rough.tensors, strict=True):
            target.copy_(source)
    for ours, theirs in zip(rough.solve(fast), exact.solve(reference_attention), strict=True):
        assert (ours.double() - theirs).norm() / theirs.norm() < tolerance


def test_large_scores_cost_what_their_rounding_costs() -> None:
    """On a CPU products of bfloat16 are bfloat16: scores of 40 are off by an eighth before the softmax."""
    shape = {"tokens": 128, "chunk": 64, "head_size": 64}
    rough, exact = Problem(**shape, dtype=torch.bfloat16), Problem(**shape)  # type: ignore[arg-type]
    with torch.no_grad():
        rough.context[0] *= 10
        for target, source in zip(exact.tensors, rough.tensors, strict=True):
            target.copy_(source)
    ours, theirs = (
        blocked_attention(*rough.context, memory=rough.memory),
        reference_attention(*exact.context, memory=exact.memory),
    )
    assert (ours.double() - theirs).norm() / theirs.norm() < 2.5e-2


@pytest.mark.parametrize(("prefix", "memory"), [*itertools.product([True, False], repeat=2)])
def test_the_operator_keeps_what_it_promises_to_the_compiler(prefix: bool, memory: bool) -> None:
    """Shapes, strides, gradients and no aliases, as torch.compile is told."""
    problem = Problem(tokens=16, dtype=torch.float32)
    read = problem.memory
    pool = (read.k_NGSE, read.v_NGSE, read.kept_NGS, read.slots_BCK) if memory else (None,) * 4
    given = (*problem.context, *(problem.prefix if prefix else (None, None)), *pool, 8)
    opcheck(torch.ops.memory3.merged_attention.default, given)
    out, lse = torch.ops.memory3.merged_attention(*given)
    opcheck(
        torch.ops.memory3.merged_attention_backward.default,
        tuple(x.detach() if isinstance(x, Tensor) else x for x in (problem.grad, out, lse, *given, memory)),
    )


@FAST
def test_inputs_are_left_as_they_were(fast: AttentionFunction) -> None:
    problem = Problem(kv_heads=1, heads=1, rows=1)
    before = [x.detach().clone() for x in problem.context]
    problem.solve(fast)
    assert all(torch.equal(x, y) for x, y in zip(problem.context, before, strict=True))


@FAST
def test_empty_slots_read_nothing_not_even_the_last_memory(fast: AttentionFunction) -> None:
    problem = Problem(filled=False)
    out, *grads = problem.solve(fast)
    without, *_ = problem.solve(fast, memory=False)
    torch.testing.assert_close(out, without, rtol=1e-12, atol=1e-12)
    assert not grads[-1].any()
    assert not grads[-2].any()


@FAST
def test_nothing_to_read_is_no_nan(fast: AttentionFunction) -> None:
    problem = Problem(filled=False)
    for solution in (problem.solve(fast, prefix=False), problem.solve(fast, prefix=False, memory=False)):
        assert all(x.isfinite().all() for x in solution)


@FAST
def test_the_order_of_slots_is_irrelevant(fast: AttentionFunction) -> None:
    problem = Problem()
    slots = problem.memory.slots_BCK
    out = problem.solve(fast)[0]
    slots.copy_(slots.flip(-1))
    torch.testing.assert_close(problem.solve(fast)[0], out, rtol=1e-12, atol=1e-12)


@FAST
def test_an_empty_pool_is_no_memory(fast: AttentionFunction) -> None:
    problem = Problem(filled=False)
    nothing = MemoryKeys(
        problem.memory.k_NGSE[:0],
        problem.memory.v_NGSE[:0],
        problem.memory.kept_NGS[:0],
        problem.memory.slots_BCK,
        8,
    )
    out = fast(*problem.context, memory=nothing)
    assert torch.equal(out, fast(*problem.context))


@pytest.mark.parametrize("attention", [blocked_attention, merged_attention, reference_attention])
def test_documents_keep_attention_inside_them(attention: Callable[..., Tensor]) -> None:
    problem = Problem(rows=1, tokens=16)
    documents = torch.tensor([[4] * 6 + [9] * 10])
    both = attention(*problem.context, prefix=problem.prefix, documents_BT=documents)
    parts = [
        attention(*(x[:, cut] for x in problem.context), prefix=problem.prefix)
        for cut in (slice(0, 6), slice(6, 16))
    ]
    torch.testing.assert_close(both, torch.cat(parts, dim=1), rtol=1e-12, atol=1e-12)


def test_the_shares_of_attention_are_what_values_of_one_measure() -> None:
    """Where every value is one, what is read from a part is the attention on it."""
    problem = Problem()
    q, k, v = problem.context
    prefix, memory = problem.prefix, problem.memory
    shares = attention_shares(q, k, prefix=prefix, memory=memory)
    on_memory = replace(memory, v_NGSE=torch.ones_like(memory.v_NGSE))
    read = reference_attention(
        q,
        k,
        torch.zeros_like(v),
        prefix=prefix._replace(v_PGE=torch.zeros_like(prefix.v_PGE)),
        memory=on_memory,
    )
    torch.testing.assert_close(shares.memory_BTK.sum(-1), read[..., 0].mean(2).float())
    total = shares.prefix_BT + shares.memory_BTK.sum(-1) + shares.context_BT
    torch.testing.assert_close(total, torch.ones_like(total))
    empty = Problem(filled=False)
    assert not attention_shares(*empty.context[:2], prefix=None, memory=empty.memory).memory_BTK.any()

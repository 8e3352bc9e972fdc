from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from model.generate import Decoder, FixedMemory, generate
from model.memory import ExplicitMemory, MemoryBatch
from model.transformer import Memory3LM
from tests.support.model import random_references, random_tokens, tiny_model

PROMPT_LENGTHS = (5, 16, 11, 1, 24)


class TextMemory:
    """Retrieves by the chunk's tokens, remembers every question, and sometimes finds nothing."""

    def __init__(self, model: Memory3LM) -> None:
        references = random_references(1, 1)
        self.pool: ExplicitMemory = model.encode(references.tokens_NR, references.lengths_N)
        self.questions: list[tuple[int, tuple[int, ...]]] = []

    def slots(self, chunk: Sequence[int]) -> list[int]:
        first, second = sum(chunk) % 7 - 1, sum(chunk) % 5
        return [first, second if second != first else -1]

    def read(self, rows: Sequence[int], chunks: Sequence[Sequence[int]]) -> MemoryBatch:
        self.questions += [(row, tuple(chunk)) for row, chunk in zip(rows, chunks, strict=True)]
        return MemoryBatch(self.pool, torch.tensor([[self.slots(chunk)] for chunk in chunks]))


def prompts() -> list[list[int]]:
    return [random_tokens(length, seed=length).tolist() for length in PROMPT_LENGTHS]


def forward_slots(source: TextMemory, prompt: list[int], tokens: list[int], chunk: int = 8) -> Tensor:
    """Slots by the definition: own text within the prompt, the chunk before's text after it."""
    slots = []
    for start in range(0, len(tokens), chunk):
        own = prompt[start : start + chunk]
        slots.append(source.slots(own or tokens[start - chunk : start]))
    return torch.tensor([slots])


@pytest.mark.parametrize("prefix_ids", [[1, 7, 9], []], ids=["prefix", "no prefix"])
def test_generation_equals_forward(prefix_ids: list[int]) -> None:
    model = tiny_model(prefix_ids=prefix_ids)
    source = TextMemory(model)
    for memory in (source, None):
        new = generate(model, prompts(), max_new_tokens=20, memory=memory)
        for prompt, generated in zip(prompts(), new, strict=True):
            assert len(generated) == 20
            tokens = (prompt + generated)[:-1]
            slots = forward_slots(source, prompt, tokens)
            read = MemoryBatch(source.pool, slots) if memory else None
            logits = model(torch.tensor([tokens]), memory=read)
            assert logits[0, len(prompt) - 1 :].argmax(-1).tolist() == generated


def test_the_cache_gives_the_logits_of_forward() -> None:
    model = tiny_model()
    references = random_references(2, 3)
    pool = model.encode(references.tokens_NR, references.lengths_N)
    rows = random_tokens(2, 20)
    expected = model(rows, memory=MemoryBatch(pool, references.slots_BCK))
    decoder = Decoder(model, rows=2, capacity=20)
    hidden = []
    for start, end in ((0, 8), (8, 16), (16, 17), (17, 18), (18, 20)):
        if start % 8 == 0:
            chunk = start // 8
            decoder.read([0, 1], MemoryBatch(pool, references.slots_BCK[:, chunk : chunk + 1]))
        hidden.append(decoder.advance(rows[:, start:end], torch.tensor([start, start])))
    logits = model.head(model.norm(torch.cat(hidden, dim=1)))
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)


def test_chunks_ask_in_the_order_of_the_paper() -> None:
    model = tiny_model()
    source = TextMemory(model)
    prompt = random_tokens(16).tolist()
    (new,) = generate(model, [prompt], max_new_tokens=16, memory=source)
    assert source.questions == [(0, tuple(prompt[:8])), (0, tuple(prompt[8:])), (0, tuple(new[:8]))]

    source = TextMemory(model)
    (new,) = generate(model, [prompt[:5]], max_new_tokens=5, memory=source)
    assert source.questions == [(0, tuple(prompt[:5])), (0, tuple(prompt[:5] + new[:3]))]


def test_the_paper_retrieves_three_times_for_128_tokens_in_and_128_out() -> None:
    model = tiny_model(chunk_tokens=64, row_tokens=64)
    source = TextMemory(model)
    generate(model, [random_tokens(128).tolist()], max_new_tokens=128, memory=source)
    assert len(source.questions) == 3


def test_fixed_memory_is_read_by_all_chunks() -> None:
    model = tiny_model()
    references = random_references(2, 1)
    pool = model.encode(references.tokens_NR, references.lengths_N)
    fixed = FixedMemory(pool, torch.tensor([[2, 4], [0, -1]]))
    two = [random_tokens(10, seed=row).tolist() for row in range(2)]
    new = generate(model, two, max_new_tokens=12, memory=fixed)
    for row, (prompt, generated) in enumerate(zip(two, new, strict=True)):
        tokens = torch.tensor([prompt + generated[:-1]])
        slots = fixed.slots_BK[row].expand(1, -(-tokens.shape[1] // 8), -1)
        logits = model(tokens, memory=MemoryBatch(pool, slots))
        assert logits[0, len(prompt) - 1 :].argmax(-1).tolist() == generated


def test_more_places_may_come_later_and_nothing_may_be_found() -> None:
    model = tiny_model()
    references = random_references(1, 1)
    pool = model.encode(references.tokens_NR, references.lengths_N)

    class Growing:
        slots = (None, [0], [2, 4, 5], None)

        def __init__(self) -> None:
            self.calls = 0

        def read(self, rows: Sequence[int], chunks: Sequence[Sequence[int]]) -> MemoryBatch | None:
            slots = self.slots[self.calls]
            self.calls += 1
            return None if slots is None else MemoryBatch(pool, torch.tensor([[slots]]))

    prompt = random_tokens(20).tolist()
    (new,) = generate(model, [prompt], max_new_tokens=10, memory=Growing())
    slots = torch.tensor([[[-1, -1, -1], [0, -1, -1], [2, 4, 5], [-1, -1, -1]]])
    logits = model(torch.tensor([prompt + new[:-1]]), memory=MemoryBatch(pool, slots))
    assert logits[0, 19:].argmax(-1).tolist() == new


def test_the_stop_token_ends_a_row_and_is_left_out() -> None:
    model = tiny_model()
    free = generate(model, prompts(), max_new_tokens=12)
    stop = free[0][3]
    for row, stopped in zip(free, generate(model, prompts(), max_new_tokens=12, stop_id=stop), strict=True):
        assert stopped == (row[: row.index(stop)] if stop in row else row)


def test_sampling_is_seeded_and_top_p_narrows_it() -> None:
    model = tiny_model()
    draw = [generate(model, prompts(), max_new_tokens=8, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert draw[0] == draw[1] != draw[2]
    greedy = generate(model, prompts(), max_new_tokens=8)
    assert generate(model, prompts(), max_new_tokens=8, temperature=1.0, top_p=1e-6) == greedy


def test_impossible_requests_are_refused() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="begin it with <s>"):
        generate(model, [[4], []], max_new_tokens=1)
    with pytest.raises(ValueError, match="top_p=0"):
        generate(model, [[4]], max_new_tokens=1, temperature=1.0, top_p=0)

import threading
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from model import generate as generation
from model.generate import FixedMemory, generate, stream
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
        def __init__(self) -> None:
            self.slots = iter((None, [[0, -1]], [[2, 4, 5]], None))

        def read(self, rows: Sequence[int], chunks: Sequence[Sequence[int]]) -> MemoryBatch | None:
            slots = next(self.slots)
            return None if slots is None else MemoryBatch(pool, torch.tensor([slots]))

    prompt = random_tokens(8).tolist()
    (new,) = generate(model, [prompt], max_new_tokens=32, memory=Growing())
    slots = torch.full((1, 5, 3), -1)  # of the prompt, of what follows it, and of what asks from then on
    slots[0, 2, :2] = torch.tensor([0, -1])
    slots[0, 3] = torch.tensor([2, 4, 5])
    logits = model(torch.tensor([prompt + new[:-1]]), memory=MemoryBatch(pool, slots))
    assert logits[0, 7:].argmax(-1).tolist() == new


def test_the_stop_token_ends_a_row_and_is_left_out() -> None:
    model = tiny_model()
    free = generate(model, prompts(), max_new_tokens=12)
    stop = free[0][3]
    for row, stopped in zip(free, generate(model, prompts(), max_new_tokens=12, stop_id=stop), strict=True):
        assert stopped == (row[: row.index(stop)] if stop in row else row)


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("ahead", [False, True], ids=["in turn", "ahead"])
def test_a_prompt_becomes_the_same_alone_and_in_any_batch(batch: int, ahead: bool) -> None:
    model = tiny_model(dtype=torch.float32)
    sources = [TextMemory(model) for _ in range(2)]
    alone = [
        generate(model, [prompt], max_new_tokens=21, stop_id=11, memory=sources[0])[0] for prompt in prompts()
    ]
    assert len({len(new) for new in alone}) > 1  # some rows end before others
    new: list[list[int]] = [[] for _ in alone]
    ended = []
    events = stream(
        model, prompts(), max_new_tokens=21, batch=batch, stop_id=11, memory=sources[1], ahead=ahead
    )
    for number, token in events:
        assert number not in ended
        if token is None:
            ended.append(number)
        else:
            new[number].append(token)
        assert len({*ended, number}) <= len(ended) + batch
    assert new == alone
    assert sorted(ended) == list(range(5))
    questions = [[chunk for _, chunk in sources[0].questions], [chunk for _, chunk in sources[1].questions]]
    assert sorted(questions[0]) == sorted(questions[1])


def test_no_more_prompts_are_begun_than_a_batch_has_places_and_a_free_place_is_taken_at_once() -> None:
    model = tiny_model()
    source = TextMemory(model)
    first_asked, seen = {}, []
    for step, (number, _) in enumerate(stream(model, prompts(), max_new_tokens=4, batch=2, memory=source)):
        seen.append(number)
        for row, _ in source.questions:
            first_asked.setdefault(row, step)
    assert first_asked == {0: 0, 1: 0, 2: 10, 3: 10, 4: 20}  # two rows of four tokens and their ends
    assert seen == [0, 1] * 3 + [0, 0, 1, 1] + [2, 3] * 3 + [2, 2, 3, 3] + [4] * 5


def test_sampling_depends_on_the_seed_and_not_on_the_batch() -> None:
    model = tiny_model()
    settings = {"max_new_tokens": 8, "temperature": 1.0}
    drawn = [generate(model, prompts(), seed=seed, **settings) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert generate(model, prompts(), seed=1, batch=2, **settings) == drawn[0]
    twice = [prompts()[0]] * 2
    one, other = generate(model, twice, seed=1, **settings)
    assert one != other


def test_what_is_drawn_follows_the_probabilities_and_top_p_cuts_the_rest_off() -> None:
    logits_BV = torch.tensor([0.1, 0.4, 0.2, 0.3]).log().expand(1000, -1)
    draws_B = torch.linspace(0, 1 - 2**-24, 1000)
    counts = torch.bincount(generation._drawn(logits_BV, draws_B, 1.0), minlength=4)
    assert counts.tolist() == pytest.approx([100, 400, 200, 300], abs=1)
    counts = torch.bincount(generation._drawn(logits_BV, draws_B, 0.6), minlength=4)
    assert counts.tolist() == pytest.approx([0, 1000 * 4 / 7, 0, 1000 * 3 / 7], abs=1)
    assert generation._drawn(logits_BV, draws_B, 1e-6).eq(1).all()


@pytest.mark.parametrize("top_p", [0.02, 0.7])
def test_a_large_vocabulary_is_cut_where_a_whole_sort_cuts_it(
    top_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits_BV = torch.randn(8, 3000, generator=torch.Generator().manual_seed(0))
    draws_B = torch.rand(8, generator=torch.Generator().manual_seed(1))
    found = generation._drawn(logits_BV, draws_B, top_p)
    monkeypatch.setattr(generation, "SORTED", 3000)
    assert found.equal(generation._drawn(logits_BV, draws_B, top_p))


def test_a_stream_that_is_left_ends_its_thread() -> None:
    model = tiny_model()
    events = stream(model, prompts(), max_new_tokens=20, memory=TextMemory(model), ahead=True)
    assert next(events)[0] == 0
    events.close()
    assert not any(thread.name.startswith("ThreadPoolExecutor") for thread in threading.enumerate())


def test_impossible_requests_are_refused() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="begin it with <s>"):
        generate(model, [[4], []], max_new_tokens=1)
    with pytest.raises(ValueError, match="top_p=0"):
        generate(model, [[4]], max_new_tokens=1, temperature=1.0, top_p=0)
    with pytest.raises(ValueError, match="batch=0: set 1 or more"):
        generate(model, [[4]], max_new_tokens=1, batch=0)
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        generate(model, [[4]], max_new_tokens=0)

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from model import decoder as module
from model.decoder import Decoder
from model.memory import ExplicitMemory, MemoryBatch
from model.transformer import Memory3LM
from tests.support.model import random_references, random_tokens, tiny_model


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model() -> Memory3LM:
    return tiny_model()


def pool_of(model: Memory3LM) -> ExplicitMemory:
    references = random_references(1, 1)
    return model.encode(references.tokens_NR, references.lengths_N)


def of_chunk(memory: MemoryBatch, row: int, chunk: int) -> MemoryBatch:
    return MemoryBatch(memory.pool, memory.slots_BCK[row : row + 1, chunk : chunk + 1])


def appended(decoder: Decoder, model: Memory3LM, tokens: list[int]) -> Tensor:
    return model.head(model.norm(decoder.advance(torch.tensor(tokens))))  # type: ignore[no-any-return]


@pytest.mark.parametrize("block", [4, 8, 64])
@pytest.mark.parametrize("prefix_ids", [[1, 7, 9], []], ids=["prefix", "no prefix"])
def test_rows_of_any_length_get_the_logits_of_forward(
    block: int, prefix_ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    model = tiny_model(prefix_ids=prefix_ids)
    memory = MemoryBatch(pool_of(model), random_references(4, 3).slots_BCK)
    rows = random_tokens(4, 20)
    expected = model(rows, memory=memory)
    lengths = [1, 9, 13, 16]
    decoder = Decoder(model, rows=4, capacity=20)
    decoder.put(range(4), [rows[n, :length].tolist() for n, length in enumerate(lengths)], memory)
    for step in range(4):
        at = [length - 1 + step for length in lengths]
        for row, place in enumerate(at):
            if place % 8 == 0 and step:
                decoder.read([row], of_chunk(memory, row, place // 8))
        logits = appended(decoder, model, rows[range(4), at].tolist())
        torch.testing.assert_close(logits, expected[range(4), at], rtol=1e-9, atol=1e-9)


def test_a_place_is_taken_again_and_a_dropped_row_leaves_nothing_behind(model: Memory3LM) -> None:
    memory = MemoryBatch(pool_of(model), random_references(3, 3).slots_BCK)
    rows = random_tokens(3, 20)
    decoder = Decoder(model, rows=3, capacity=20)
    decoder.put([0, 1, 2], random_tokens(3, 18, seed=1).tolist(), memory)
    appended(decoder, model, [5, 6, 7])
    decoder.put([0, 2], rows[1:, :4].tolist(), MemoryBatch(memory.pool, memory.slots_BCK[1:, :1]))
    decoder.drop(1)
    assert len(decoder) == 2
    expected = model(rows[1:, :5], memory=MemoryBatch(memory.pool, memory.slots_BCK[1:, :1]))
    for place in (3, 4):
        logits = appended(decoder, model, rows[1:, place].tolist())
        torch.testing.assert_close(logits, expected[:, place], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("slots", [None, [[[-1, -1]]]], ids=["none", "empty"])
def test_what_a_place_read_before_is_forgotten(model: Memory3LM, slots: list[list[list[int]]] | None) -> None:
    pool = pool_of(model)
    rows = random_tokens(1, 6)
    expected = model(rows)[:, -1]
    nothing = None if slots is None else MemoryBatch(pool, torch.tensor(slots))
    decoder = Decoder(model, rows=1, capacity=6)
    decoder.put([0], rows[:, :6].tolist(), MemoryBatch(pool, torch.tensor([[[0, 4]]])))
    decoder.put([0], rows[:, :6].tolist(), nothing)
    torch.testing.assert_close(appended(decoder, model, rows[:, 5].tolist()), expected)


def test_nothing_is_allocated_while_decoding(model: Memory3LM) -> None:
    memory = MemoryBatch(pool_of(model), random_references(2, 1).slots_BCK)
    decoder = Decoder(model, rows=2, capacity=40)
    decoder.put([0, 1], random_tokens(2, 8).tolist(), memory)
    tensors = [value for value in vars(decoder).values() if isinstance(value, Tensor)]
    before = [value.data_ptr() for value in tensors]
    for _ in range(20):
        decoder.advance(torch.tensor([4, 5]))
        decoder.read([1], memory and of_chunk(memory, 1, 0))
    assert before == [value.data_ptr() for value in vars(decoder).values() if isinstance(value, Tensor)]


def test_a_model_without_memory_layers_decodes() -> None:
    model = tiny_model(num_memory_layers=0)
    rows = random_tokens(2, 10)
    memory = MemoryBatch(pool_of(tiny_model()), torch.tensor([[[0, 1]], [[2, -1]]]))
    decoder = Decoder(model, rows=2, capacity=10)
    decoder.put([0, 1], rows[:, :4].tolist(), memory)
    logits = appended(decoder, model, rows[:, 3].tolist())
    torch.testing.assert_close(logits, model(rows)[:, 3], rtol=1e-9, atol=1e-9)

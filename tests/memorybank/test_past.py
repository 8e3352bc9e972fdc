"""A text's own past: cut, compiled, searched, and read beside a bank."""

import numpy as np
import pytest
import torch

from data.references import References
from memorybank.bank import BankReader
from memorybank.cold import ColdStart
from memorybank.past import Past, PastReferences, WithPast, compile_past
from memorybank.retriever import RetrievedMemory, Retriever
from model.generate import generate
from model.transformer import Memory3LM
from tests.support.memorybank import codec, embedder, index_of, model, tokenizer

WINDOW = 256


@pytest.fixture(scope="module")
def text(passages: References) -> str:
    """Some thousand tokens."""
    return "\n".join(passages.text(id) for id in range(12))


def cut(text: str) -> PastReferences:
    return PastReferences(tokenizer().encode(text), tokenizer(), reference_tokens=128)


def compiled(text: str, network: Memory3LM) -> Past:
    return compile_past(cut(text), network.encode, codec(), embedder(), window_tokens=WINDOW)


@pytest.fixture(scope="module")
def past(text: str, network: Memory3LM) -> Past:
    return compiled(text, network)


@pytest.fixture
def bank(passages: References, network: Memory3LM) -> tuple[Retriever, ColdStart]:
    retriever = Retriever(embedder(), index_of(passages), passages, k=3)
    return retriever, ColdStart(None, network.encode, passages, codec())


def test_the_pieces_are_the_text_and_say_where_they_stand(text: str) -> None:
    pieces = cut(text)
    ids = np.arange(len(pieces))
    tokens, lengths, titles = pieces.tokens(ids)
    assert lengths.max() <= 128
    assert not titles.any()
    whole = [token for row, length in zip(tokens, lengths, strict=True) for token in row[:length].tolist()]
    assert whole == tokenizer().encode(text)
    for id in ids.tolist():
        citation = pieces.describe(id)
        assert text[citation.begin : citation.end] == pieces.text(id)


def test_later_text_changes_no_earlier_memory(text: str) -> None:
    network, floats = model(torch.float32), codec(torch.float32)
    with torch.no_grad():
        for block in network.blocks:  # attention so sharp that rounding does not decide which tokens are kept
            block.qkv.weight.mul_(5)
    old, new = (
        compile_past(cut(some), network.encode, floats, embedder(), window_tokens=WINDOW)
        for some in (text, text + " And then something else. " * 30)
    )
    kept = len(old.references) - 1  # the last piece may be cut elsewhere
    before, after = (floats.decode(some.records[:kept]) for some in (old, new))
    torch.testing.assert_close(before.k_NLGSE, after.k_NLGSE, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(before.v_NLGSE, after.v_NLGSE, rtol=1e-4, atol=1e-5)


def test_a_text_finds_its_own_piece_and_reads_its_record(past: Past) -> None:
    source = WithPast(past, embedder(), k=3, first_id=100)
    ids = source.search([past.references.text(4), ""])
    assert ids[0, 0] == 104
    assert ids[1].tolist() == [-1, -1, -1]
    assert torch.equal(source.read(ids[0]), past.records[torch.from_numpy(ids[0] - 100)])


def test_past_and_bank_are_searched_together_and_the_best_of_both_are_read(
    past: Past, passages: References, bank: tuple[Retriever, ColdStart]
) -> None:
    first = len(passages)
    both = WithPast(past, embedder(), k=3, first_id=first, bank=bank)
    elsewhere = passages.text(len(passages) - 1)
    ids = both.search([elsewhere, past.references.text(7)])
    assert ids[0, 0] == len(passages) - 1
    assert ids[1, 0] == first + 7
    mixed = np.array([2, first + 1, 5, first])
    records = both.read(mixed)
    assert torch.equal(records[[1, 3]], past.records[[1, 0]])
    assert torch.equal(records[[0, 2]], bank[1].read(np.array([2, 5])))


def test_a_past_of_few_pieces_is_read_whole(
    network: Memory3LM, passages: References, bank: tuple[Retriever, ColdStart]
) -> None:
    short = compiled("The harbour of the island. " * 20, network)
    assert 1 < len(short.references) < 3
    first = len(passages)
    both = WithPast(short, embedder(), k=3, first_id=first, bank=bank)
    (ids,) = both.search([passages.text(9)])
    assert sorted(ids.tolist()) == [9, first, first + 1]


def test_generation_reads_the_past(network: Memory3LM, past: Past) -> None:
    source = WithPast(past, embedder(), k=3)
    memory = RetrievedMemory(source, tokenizer(), BankReader(source, codec()))
    prompt = past.references.passage(6, 6).tolist()[:64]
    generate(network, [prompt], max_new_tokens=2, memory=memory)
    assert 6 in memory.references_read[0][0]

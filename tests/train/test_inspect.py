"""`train.inspect`: queries as they were asked, gains against ablations by hand, and what was kept."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from memorybank.bank import BankReader
from memorybank.cold import ColdStart
from memorybank.config import QueryMode
from memorybank.neighbours import Neighbours
from memorybank.retriever import Retriever
from model.generate import generate
from model.memory import MemoryBatch
from tests.support.memorybank import codec, embedder, index_of, model, prepared, references, tokenizer
from train.engine import InferenceEngine, ModelInput
from train.inspect import Inspection, generation_queries, inspect_row, text_queries

CHUNK = 64
ENGINE = InferenceEngine(model(torch.float32))
READER = BankReader(ColdStart(None, ENGINE.encode, references(), codec(torch.float32)), codec(torch.float32))


def row_of(tokens: int) -> list[int]:
    text = prepared().shards.corpus.document(3).text
    return [tokenizer().bos_id, *tokenizer().encode(text)][:tokens]


def search(row: Sequence[int], mode: QueryMode) -> Neighbours:
    retriever = Retriever(embedder(), index_of(references()), references(), k=3)
    queries = text_queries(row, mode, chunk_tokens=CHUNK)
    return retriever.neighbours([tokenizer().decode(query.tokens) for query in queries])


@pytest.fixture(scope="module")
def row() -> list[int]:
    return row_of(150)


@pytest.fixture(scope="module")
def found(row: list[int]) -> Neighbours:
    return search(row, QueryMode.previous)


@pytest.fixture(scope="module")
def inspection(row: list[int], found: Neighbours) -> Inspection:
    queries = text_queries(row, QueryMode.previous, chunk_tokens=CHUNK)
    return inspect_row(
        ENGINE, row, queries, found, READER, tokenizer=tokenizer(), references=references(), prompt_tokens=140
    )


def test_a_text_searches_with_its_own_chunks_or_with_those_before() -> None:
    row = list(range(130))
    own = text_queries(row, QueryMode.own, chunk_tokens=CHUNK)
    assert [list(query.tokens) for query in own] == [row[:64], row[64:128], row[128:129]]
    previous = text_queries(row, QueryMode.previous, chunk_tokens=CHUNK)
    assert [list(query.tokens) for query in previous] == [[], row[:64], row[64:128]]


@pytest.mark.parametrize("prompt_tokens", [1, 64, 65, 130])
def test_a_generation_is_read_as_it_was_generated(prompt_tokens: int) -> None:
    class Recorder:
        asked: list[list[int]] = []  # noqa: RUF012

        def read(self, rows: Sequence[int], chunks: Sequence[Sequence[int]]) -> None:
            self.asked.extend(map(list, chunks))

    recorder = Recorder()
    recorder.asked = []
    prompt = row_of(prompt_tokens)
    (new,) = generate(ENGINE.model, [prompt], max_new_tokens=70, memory=recorder)
    queries = generation_queries([*prompt, *new], prompt_tokens=prompt_tokens, chunk_tokens=CHUNK)
    asked = [list(query.tokens) for query in queries]
    if prompt_tokens % CHUNK == 0:  # the next chunk goes on with what the prompt's last one found
        assert asked.pop(prompt_tokens // CHUNK) == prompt[-CHUNK:]
    assert asked == recorder.asked
    modes = [query.mode for query in queries]
    assert modes == sorted(modes, key=lambda mode: mode is QueryMode.previous)
    assert modes.count(QueryMode.own) == -(-prompt_tokens // CHUNK)


def test_gains_are_ablations(row: list[int], found: Neighbours, inspection: Inspection) -> None:
    tokens, targets = torch.tensor([row[:-1]]), torch.tensor([row[1:]])
    memory = READER.batch(found.ids_MCk[:, 0][None])

    def losses(slots: torch.Tensor | None) -> torch.Tensor:
        read = None if slots is None else MemoryBatch(memory.pool, slots)
        return ENGINE.token_losses(ModelInput(tokens, targets, read))[0]

    whole, nothing = losses(memory.slots_BCK), losses(None)
    predictions = inspection.predictions
    np.testing.assert_allclose([p.loss for p in predictions], whole, atol=1e-4)
    np.testing.assert_allclose([p.loss_without for p in predictions], nothing, atol=1e-4)
    assert inspection.gain == pytest.approx(float((nothing - whole).sum()), abs=1e-3)
    for number in (1, 2):
        here = slice(number * CHUNK, (number + 1) * CHUNK)
        for slot, read in enumerate(inspection.chunks[number].reads):
            emptied = memory.slots_BCK.clone()
            emptied[0, number, slot] = -1
            by_hand = float((losses(emptied) - whole)[here].sum())
            assert read.gain == pytest.approx(by_hand, abs=1e-3)
            assert read.gain != 0


def test_predictions_are_the_text_and_say_what_was_generated(row: list[int], inspection: Inspection) -> None:
    assert "".join(p.text for p in inspection.predictions) == tokenizer().decode(row[1:])
    assert [len(chunk.predictions) for chunk in inspection.chunks] == [64, 64, 21]
    assert [p.generated for p in inspection.predictions] == [False] * 139 + [True] * 10


def test_reads_have_number_score_and_attention(found: Neighbours, inspection: Inspection) -> None:
    assert not inspection.chunks[0].reads  # nothing stands before it
    for number, chunk in enumerate(inspection.chunks):
        ids = found.ids_MCk[number, 0]
        assert [read.reference for read in chunk.reads] == ids[ids >= 0].tolist()
        assert [read.score for read in chunk.reads] == pytest.approx(
            found.scores_MCk[number, 0][ids >= 0].tolist()
        )
        memory_L = chunk.memory_L or (0.0, 0.0)
        total = np.array(memory_L) + chunk.prefix_L + chunk.context_L
        np.testing.assert_allclose(total, [1, 1], atol=1e-5)
        assert all(share > 0 for read in chunk.reads for share in read.attention_L)
    weights = np.array([64, 64, 21]) / 149
    shares = np.array([chunk.memory_L or (0.0, 0.0) for chunk in inspection.chunks])
    np.testing.assert_allclose(inspection.memory_L, weights @ shares, atol=1e-6)


def test_sources_hold_the_text_and_what_each_head_kept(inspection: Inspection) -> None:
    assert set(inspection.sources) == {read.reference for chunk in inspection.chunks for read in chunk.reads}
    for number, source in inspection.sources.items():
        assert "".join(source.tokens) == references().text(number)
        title = references().describe(number).title
        assert "".join(source.tokens[: source.title]) == f"{title}\n"
        tokens, lengths, titles = (torch.from_numpy(part) for part in references().tokens([number]))
        kept = ENGINE.encode(tokens, lengths, titles).index_NLGS[0].numpy()
        np.testing.assert_array_equal(source.index_LGS, kept)
        assert source.num_heads == 4
        by_hand = [int((kept == place).any(-1).sum()) for place in range(len(source.tokens))]
        assert source.keeping == by_hand


def test_a_row_that_reads_nothing_gains_nothing() -> None:
    row = row_of(40)
    queries = text_queries(row, QueryMode.previous, chunk_tokens=CHUNK)
    looked = inspect_row(
        ENGINE,
        row,
        queries,
        search(row, QueryMode.previous),
        READER,
        tokenizer=tokenizer(),
        references=references(),
    )
    assert looked.gain == pytest.approx(0, abs=1e-4)
    assert not looked.sources
    assert looked.memory_L == (0.0, 0.0)
    assert not any(p.generated for p in looked.predictions)

from pathlib import Path

import numpy as np
import pytest
import torch

from data.references import References
from memorybank.bank import BankReader
from memorybank.cold import ColdStart
from memorybank.retriever import RetrievedMemory, Retriever
from memorybank.store import Generation
from memorybank.writer import compile_generation
from model.generate import generate
from tests.support.memorybank import codec, embedder, index_of, model, settings, tokenizer


@pytest.fixture(scope="module")
def retriever(passages: References) -> Retriever:
    return Retriever(embedder(), index_of(passages), passages, k=3)


def test_a_reference_s_own_text_finds_it_first(retriever: Retriever, passages: References) -> None:
    ids = [3, 17, 40]
    found = retriever.search([passages.text(id) for id in ids])
    assert found.shape == (3, 3)
    assert found[:, 0].tolist() == ids


def test_what_is_excluded_or_overlaps_is_not_found(retriever: Retriever, passages: References) -> None:
    text = passages.text(17)
    document = passages.document_of[[17]]
    (without,) = retriever.search([text], exclude_documents=[document], k=5)
    assert not np.isin(passages.document_of[without], document).any()
    strict = Retriever(embedder(), index_of(passages), passages, limit=2 / 3)
    (filtered,) = strict.search([text], tokens=[passages.content_tokens(17)])
    assert 17 not in filtered
    assert (filtered >= 0).all()


def test_a_blank_query_finds_nothing(retriever: Retriever) -> None:
    assert (retriever.search([" "]) == -1).all()


def test_generation_reads_what_each_chunk_retrieves_warm_and_cold_alike(
    retriever: Retriever, passages: References, tmp_path: Path
) -> None:
    network = model(torch.float32)
    floats = codec(torch.float32)
    prompts = [tokenizer().encode(passages.text(id))[:90] for id in (8, 25)]
    compile_generation(
        network.encode,
        passages,
        np.arange(len(passages)),
        floats,
        tmp_path / "g",
        settings=settings(),
        batch=4,
    )
    warm = BankReader(Generation.open(tmp_path / "g"), floats)
    cold = BankReader(ColdStart(None, network.encode, passages, floats), floats)
    outputs, read = [], []
    for reader in (warm, cold):
        source = RetrievedMemory(retriever, tokenizer(), reader)
        outputs.append(generate(network, prompts, max_new_tokens=45, stop_id=None, memory=source))
        read.append(source.references_read)
    assert outputs[0] == outputs[1]
    assert read[0] == read[1]
    # 90 tokens of prompt, a whole and a partial chunk; 38 new tokens complete the latter: the third query
    assert [len(queries) for queries in read[0].values()] == [3, 3]
    for row, prompt in enumerate(prompts):
        expected = retriever.search([tokenizer().decode(prompt[:64])])[0].tolist()
        assert read[0][row][0] == expected


def test_neighbours_say_what_was_refused_and_how_near_the_others_are(passages: References) -> None:
    strict = Retriever(embedder(), index_of(passages), passages, k=2, limit=2 / 3)
    text, tokens = passages.text(17), passages.content_tokens(17)
    found = strict.neighbours([text, "", text], tokens=[tokens, tokens, []])
    assert found.refused_overlap_MC[:, 0].tolist() == [1, 0, 0]
    assert found.ids_MCk[1, 0].tolist() == [-1, -1]
    assert found.ids_MCk[2, 0, 0] == 17
    assert found.scores_MCk[2, 0, 0] == pytest.approx(1, abs=1e-4)
    query, best = embedder().embed([text, passages.text(int(found.ids_MCk[0, 0, 0]))])
    assert found.scores_MCk[0, 0, 0] == pytest.approx(float(query @ best), abs=1e-4)

"""Probes of held-out territories, looked up by their questions alone."""

from dataclasses import replace

import numpy as np
import pytest

from data.documents import Probe, Split
from memorybank.config import RetrievalConfig
from memorybank.embedder import StaticEmbedder
from memorybank.index import ExactIndex
from memorybank.overlap import exceeds
from tests.support.train import prepared
from train.arms import fold
from train.probes import FoundProbes, question_text, search_probes

PREPARED = prepared()
REFERENCES = PREPARED.references
PROBES = [probe for probe in PREPARED.probes if probe.split is Split.validation]
EMBED = StaticEmbedder().embed


def search(probes: list[Probe], ids: np.ndarray | None = None, *, limit: float = 1.0) -> FoundProbes:
    ids = np.arange(len(REFERENCES)) if ids is None else ids
    vectors = EMBED([REFERENCES.text(int(id)) for id in ids])
    index = ExactIndex(vectors.shape[1])
    index.add(ids, vectors)
    retrieval = RetrievalConfig(candidates=32, overlap_evaluation=limit)
    return search_probes(
        probes, PREPARED.tokenizer, PREPARED.shards.corpus, REFERENCES, EMBED, index, retrieval
    )


@pytest.fixture(scope="module")
def found() -> FoundProbes:
    return search(PROBES)


def test_a_probe_is_found_with_the_line_of_its_question() -> None:
    assert question_text(PROBES[0]).startswith("Question: ")
    assert "Answer" not in question_text(PROBES[0])


def test_the_references_that_hold_an_answer_are_of_its_country_and_contain_it(found: FoundProbes) -> None:
    corpus = PREPARED.shards.corpus
    holding = 0
    for probe, ids in zip(PROBES, found.probe_set.holding, strict=True):
        for id in ids.tolist():
            holding += 1
            assert corpus.document(int(REFERENCES.document_of[id])).group == probe.group
            assert fold(probe.answer) in fold(REFERENCES.text(id))
    assert holding > 0


def test_what_a_question_finds_does_not_depend_on_the_answer(found: FoundProbes) -> None:
    blind = search([replace(probe, answer=" nobody knows") for probe in PROBES])
    np.testing.assert_array_equal(blind.ids_Mk, found.ids_Mk)
    assert found.ids_Mk.shape == (len(PROBES), 5)


def test_what_overlaps_question_and_answer_is_refused_and_its_slot_stays_empty(found: FoundProbes) -> None:
    strict = search(PROBES, limit=0.0)
    assert (strict.ids_Mk == -1).sum() > (found.ids_Mk == -1).sum()
    asked = zip(strict.probe_set.question_ids, strict.probe_set.answer_ids, strict=True)
    for (question, answer), ids in zip(asked, strict.ids_Mk, strict=True):
        for id in ids[ids >= 0].tolist():
            assert not exceeds([*question, *answer], REFERENCES.content_tokens(id), 0.0)
        assert (ids[(ids >= 0).sum() :] == -1).all()
    assert {share for _, *shares in strict.hit_shares().values() for share in shares} == {0.0}


def test_hit_shares_count_probes_by_relation(found: FoundProbes) -> None:
    shares = found.hit_shares()
    assert sum(count for count, _, _ in shares.values()) == len(PROBES)
    assert shares.keys() == {probe.relation for probe in PROBES}
    assert all(0 <= first <= any_of <= 1 for _, first, any_of in shares.values())
    # With nothing but what holds the answers in the bank, the first reference of a lone probe always does.
    probe, holding = next(
        (probe, ids) for probe, ids in zip(PROBES, found.probe_set.holding, strict=True) if len(ids)
    )
    assert search([probe], holding).hit_shares() == {probe.relation: (1, 1.0, 1.0)}


def test_each_probe_names_the_document_it_asks_about(found: FoundProbes) -> None:
    numbers = [int(number[0]) for number in found.documents]
    assert [PREPARED.shards.corpus.document(number).id for number in numbers] == [p.document for p in PROBES]

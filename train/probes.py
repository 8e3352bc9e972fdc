"""Probes looked up before anything is trained: what a question alone finds, and which references hold its answer.

A reference holds an answer when it belongs to the probe's group (country) and its text contains the answer, after
folding case and spaces.
Not here: asking a model (`evaluate`), what each arm reads (`arms`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.documents import Probe
from data.references import References
from data.tokenizer import Tokenizer
from memorybank.config import RetrievalConfig
from memorybank.index import SearchIndex
from memorybank.neighbours import find
from memorybank.search import Embed
from train.arms import hits, holders
from train.evaluate import ProbeSet

Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class FoundProbes:
    """Probes with what their questions found.

    Attributes:
        probe_set: The probes, encoded, with the references that hold their answers.
        ids_Mk: References found with the question alone, best first, after the overlap filter; -1 is empty.
        documents: For each probe, the number of the document that it asks about, (1,).
    """

    probe_set: ProbeSet
    ids_Mk: Ids
    documents: list[Ids]

    def hit_shares(self) -> dict[str, tuple[int, float, float]]:
        """By relation: probes, share whose first reference holds the answer, share of which one of all found does."""
        hit1, hit_any = (
            hits(self.ids_Mk, self.probe_set.holding, first=first) for first in (1, self.ids_Mk.shape[1])
        )
        relations = np.asarray([probe.relation for probe in self.probe_set.probes])
        return {
            str(relation): (
                int((relations == relation).sum()),
                float(hit1[relations == relation].mean()),
                float(hit_any[relations == relation].mean()),
            )
            for relation in np.unique(relations)
        }


def search_probes(
    probes: Sequence[Probe],
    tokenizer: Tokenizer,
    references: References,
    embed: Embed,
    index: SearchIndex,
    retrieval: RetrievalConfig,
) -> FoundProbes:
    """Find references for probes with their questions alone; what overlaps question and answer is refused."""
    corpus = references.shards.corpus
    documents = [corpus.number(probe.document) for probe in probes]
    group_of = corpus.table["group"]
    candidates = {
        group: references.of_documents(np.flatnonzero(group_of == group))
        for group in {int(group_of[document]) for document in documents}
    }
    holding = holders(
        [probe.answer for probe in probes],
        [candidates[int(group_of[document])] for document in documents],
        references.text,
    )
    probe_set = ProbeSet.encode(
        probes, tokenizer, holding=holding, majority={probe.relation: probe.majority for probe in probes}
    )
    found = find(
        embed([question_text(probe) for probe in probes])[:, None, :],
        [np.zeros(0, np.int64)] * len(probes),
        [
            [*question, *answer]
            for question, answer in zip(probe_set.question_ids, probe_set.answer_ids, strict=True)
        ],
        index,
        references,
        k=retrieval.fresh,
        candidates=retrieval.candidates,
        limit=retrieval.overlap_evaluation,
    )
    return FoundProbes(probe_set, found.ids_MCk[:, 0], [np.asarray([d], np.int64) for d in documents])


def question_text(probe: Probe) -> str:
    """The text that searches for a probe: its question line."""
    return probe.question.split("\n")[0]

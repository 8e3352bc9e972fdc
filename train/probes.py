"""Probes looked up before anything is trained: what a question alone finds, and which references hold its answer.

A reference holds an answer when it belongs to the probe's group (country) and its text contains the answer, after
folding case and spaces.
Not here: asking a model (`evaluate`), what each arm reads (`arms`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.corpus import Corpus
from data.documents import Probe
from data.references import ReferenceSource
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
    corpus: Corpus,
    references: ReferenceSource,
    embed: Embed,
    index: SearchIndex,
    retrieval: RetrievalConfig,
) -> FoundProbes:
    """Find references for probes with their questions alone; what overlaps question and answer is refused.

    Args:
        probes: Questions about documents of the corpus.
        tokenizer: Encodes questions and answers.
        corpus: Says which documents belong to a probe's group.
        references: What is searched; not every document of the corpus need be among them.
        embed: Texts to unit vectors.
        index: Over the references that may be read.
        retrieval: Candidates and filters.
    """
    group_of = corpus.table["group"]
    groups = [int(group_of[corpus.number(probe.document)]) for probe in probes]
    candidates = {
        group: references.of_documents(
            references.document_numbers(
                [corpus.document(int(n)).id for n in np.flatnonzero(group_of == group)]
            )
        )
        for group in set(groups)
    }
    holding = holders(
        [probe.answer for probe in probes], [candidates[group] for group in groups], references.text
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
    documents = references.document_numbers([probe.document for probe in probes])
    return FoundProbes(probe_set, found.ids_MCk[:, 0], list(documents[:, None]))


def question_text(probe: Probe) -> str:
    """The text that searches for a probe: its question line."""
    return probe.question.split("\n")[0]

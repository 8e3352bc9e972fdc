"""Which references each arm of the evaluation reads: pure functions on reference ids.

An arm other than *memory* replaces what was retrieved and leaves the slots alone: it reads where the memory
arm reads and nowhere else (the same slot mask), and never a reference of the reading row's own documents. In
text the retrieved ids are replaced first and shared by a window, or not, afterwards. A seed decides it all.

    retrieved ids --text_readings / probe_readings--> Reading --reference_ids--> what the bank must hold

Invariants: -1 is an empty slot and stays one; a slot is empty too when the bank has no other reference left.

Not here: retrieval and its filters (`memorybank.neighbours`), running the model (`evaluate`).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from memorybank.config import QueryMode
from memorybank.pool import fresh_slots, window_slots

Ids = NDArray[np.int64]
Flags = NDArray[np.bool_]

_RESTARTS = 20


class Arm(Enum):
    """What is read instead of, or as, memory."""

    none = "no memory"
    memory = "memory"
    shuffled = "shuffled"
    random = "random"
    oracle = "oracle"
    rag = "RAG"


class Pattern(Enum):
    """How references become slots: one per chunk, shared by a window, or fresh ones for every chunk."""

    training = "training"
    inference = "inference"


@dataclass(frozen=True, slots=True)
class Bank:
    """The references that may be read.

    Attributes:
        ids: (n,) their numbers: replacements are drawn from them, uniformly.
        document_of: (N,) the document of every reference of the corpus, by its number.
    """

    ids: Ids
    document_of: Ids


@dataclass(frozen=True, slots=True)
class Reading:
    """What one arm reads.

    Attributes:
        arm: The arm.
        ids_MCK: References by row, chunk and slot, -1 is empty; C = 1: all chunks of a row read the same.
            None: nothing is read.
        query: Whose text retrieved, None where query modes do not apply.
        pattern: How slots were made, None where patterns do not apply.
        note: What a reader of the numbers must know, or empty.
    """

    arm: Arm
    ids_MCK: Ids | None = None
    query: QueryMode | None = None
    pattern: Pattern | None = None
    note: str = ""


def text_readings(
    ids_MCk: Ids,
    row_documents: Sequence[Ids],
    bank: Bank,
    *,
    seed: int,
    window: int,
    queries: Sequence[QueryMode] = tuple(QueryMode),
    patterns: Sequence[Pattern] = tuple(Pattern),
    random_query: QueryMode | None = None,
) -> list[Reading]:
    """Return the arms of held-out text: no memory once; memory and shuffled in each query mode and pattern.

    Args:
        ids_MCk: What each chunk's own text retrieved, best first, after the filters.
        row_documents: For each row, the documents of which it holds a token.
        bank: What replacements are drawn from.
        seed: Decides donors and draws.
        window: Chunks whose references a chunk reads in the training pattern.
        queries: Query modes.
        patterns: Patterns.
        random_query: The one query mode of the random arm; None leaves the arm out.
    """
    donors = derangement(_disjoint(row_documents), seed=seed)
    note = _donor_note(donors, "rows")
    shuffled_MCk = shuffled(ids_MCk, donors, row_documents, bank, seed=seed)
    random_MCk = randomised(ids_MCk, row_documents, bank, seed=seed)
    readings = [Reading(Arm.none)]
    for query in queries:
        for pattern in patterns:
            memory_MCK = _slots(ids_MCk, query, pattern, window)
            # A window reads a repeated reference once, and the two rows repeat theirs in different places.
            swapped_MCK = _like(
                _slots(shuffled_MCk, query, pattern, window), memory_MCK, row_documents, bank, seed=seed
            )
            readings.append(Reading(Arm.memory, memory_MCK, query, pattern))
            readings.append(Reading(Arm.shuffled, swapped_MCK, query, pattern, note))
            if query is random_query:
                random_MCK = _slots(random_MCk, query, pattern, window)
                readings.append(Reading(Arm.random, random_MCK, query, pattern))
    return readings


def probe_readings(
    ids_Mk: Ids,
    probe_documents: Sequence[Ids],
    bank: Bank,
    *,
    relations: Sequence[str],
    groups: Sequence[str],
    holding: Sequence[Ids],
    seed: int,
    rag_references: int = 3,
) -> list[Reading]:
    """Return all arms of probes; every chunk of a probe reads the same references.

    Args:
        ids_Mk: What each question alone retrieved, best first.
        probe_documents: For each probe, the document it asks about: shuffled and random may not read it.
        bank: What replacements are drawn from.
        relations: Relation of each probe; shuffled stays within it.
        groups: Group (country) of each probe; shuffled leaves it.
        holding: For each probe, the references that hold its answer (`holders`). The oracle reads the first
            of them that belongs to `probe_documents`, alone, or nothing.
        seed: Decides donors and draws.
        rag_references: References that RAG puts before the question.
    """
    relation, group = np.asarray(relations), np.asarray(groups)
    donors = derangement((relation[:, None] == relation[None]) & (group[:, None] != group[None]), seed=seed)
    ids_MCK = ids_Mk[:, None]
    return [
        Reading(Arm.none),
        Reading(Arm.memory, ids_MCK),
        Reading(
            Arm.shuffled,
            shuffled(ids_MCK, donors, probe_documents, bank, seed=seed),
            note=_donor_note(donors, "probes"),
        ),
        Reading(Arm.random, randomised(ids_MCK, probe_documents, bank, seed=seed)),
        Reading(Arm.oracle, _oracle(holding, probe_documents, bank)),
        Reading(Arm.rag, ids_MCK[:, :, :rag_references], note="references as text, zero-shot: a lower bound"),
    ]


def reference_ids(readings: Iterable[Reading]) -> Ids:
    """Return the distinct references, ascending, that a bank must hold for these readings (not for RAG)."""
    parts = [r.ids_MCK.ravel() for r in readings if r.ids_MCK is not None and r.arm is not Arm.rag]
    ids = np.unique(np.concatenate(parts)) if parts else np.empty(0, np.int64)
    return ids[ids >= 0]


def derangement(allowed_MM: Flags, *, seed: int) -> Ids:
    """Return for each row another that it may take from, each taken from at most once; -1 where none is left.

    A random order, repaired by swaps; the best of a few, which misses rows only when the choice is scarce.

    Args:
        allowed_MM: Whether row i may take from row j. The diagonal is ignored.
        seed: Decides the order.
    """
    num_rows = len(allowed_MM)
    allowed = allowed_MM & ~np.eye(num_rows, dtype=bool)
    rng = np.random.default_rng(seed)
    best = np.full(num_rows, -1, np.int64)
    for _ in range(_RESTARTS):
        donors = rng.permutation(num_rows)
        for row in np.flatnonzero(~allowed[np.arange(num_rows), donors]):
            partners = np.flatnonzero(allowed[row, donors] & allowed[:, donors[row]])
            if not allowed[row, donors[row]] and partners.size:
                partner = rng.choice(partners)
                donors[[row, partner]] = donors[[partner, row]]
        donors[~allowed[np.arange(num_rows), donors]] = -1
        if (donors >= 0).sum() > (best >= 0).sum():
            best = donors
        if (best >= 0).all():
            break
    return best


def shuffled(ids_MCK: Ids, donors: Ids, row_documents: Sequence[Ids], bank: Bank, *, seed: int) -> Ids:
    """Return, slot by slot, the ids of each row's donor (-1: it has none), under the row's own slot mask.

    Where the donor's slot is empty, or holds a reference of the row's documents, a random one stands in.
    """
    return _like(
        np.where(donors[:, None, None] >= 0, ids_MCK[donors], -1), ids_MCK, row_documents, bank, seed=seed
    )


def randomised(ids_MCK: Ids, row_documents: Sequence[Ids], bank: Bank, *, seed: int) -> Ids:
    """Return ids in which every reference of a row gave way to another one, drawn uniformly from the bank.

    The same one wherever it stood in the row: repetitions, and with them the masks of either pattern, stay.
    """
    rng = np.random.default_rng([seed, 1])
    ids = ids_MCK.copy()
    for row, own in enumerate(row_documents):
        present, of = np.unique(ids[row], return_inverse=True)
        substitutes = np.full(len(present), -1, np.int64)
        substitutes[present >= 0] = _draw(bank, own, present, int((present >= 0).sum()), rng)
        ids[row] = substitutes[of].reshape(ids[row].shape)
    return ids


def holders(answers: Sequence[str], candidates: Sequence[Ids], text: Callable[[int], str]) -> list[Ids]:
    """Return for each probe the references that hold its answer: their text contains it after folding.

    Args:
        answers: Answer of each probe.
        candidates: For each probe, the references of its group (country).
        text: Text of a reference.
    """
    folded: dict[int, str] = {}
    for ids in candidates:
        for id in ids.tolist():
            if id not in folded:
                folded[id] = fold(text(id))
    return [
        np.asarray([id for id in ids.tolist() if fold(answer) in folded[id]], np.int64)
        for answer, ids in zip(answers, candidates, strict=True)
    ]


def hits(ids_Mk: Ids, holding: Sequence[Ids], *, first: int) -> Flags:
    """Return for each probe whether one of its first `first` references holds the answer."""
    return np.asarray(
        [bool(np.isin(ids[:first], held).any()) for ids, held in zip(ids_Mk, holding, strict=True)], bool
    )


def fold(text: str) -> str:
    """Fold case and white space: what counts as the same answer."""
    return " ".join(text.casefold().split())


def _slots(ids_MCk: Ids, query: QueryMode, pattern: Pattern, window: int) -> Ids:
    if pattern is Pattern.inference:
        return fresh_slots(ids_MCk, query)
    return window_slots(ids_MCk[:, :, 0], query, window=window)


def _like(wanted_MCK: Ids, memory_MCK: Ids, row_documents: Sequence[Ids], bank: Bank, *, seed: int) -> Ids:
    """Return the wanted ids under the memory arm's slot mask; gaps and own documents filled at random."""
    rng = np.random.default_rng([seed, 2])
    ids = np.where(memory_MCK >= 0, wanted_MCK, -1)
    for row, own in enumerate(row_documents):
        ids[row][(ids[row] >= 0) & np.isin(bank.document_of[ids[row]], own)] = -1
        gaps = (memory_MCK[row] >= 0) & (ids[row] < 0)
        ids[row][gaps] = _draw(bank, own, ids[row], int(gaps.sum()), rng)
    return ids


def _draw(bank: Bank, own_documents: Ids, taken: Ids, count: int, rng: np.random.Generator) -> Ids:
    """Draw `count` distinct references, none taken, none of the row's documents; -1 when none is left."""
    if count == 0:
        return np.empty(0, np.int64)
    free = bank.ids[~np.isin(bank.document_of[bank.ids], own_documents) & ~np.isin(bank.ids, taken)]
    drawn = np.full(count, -1, np.int64)
    drawn[: len(free)] = rng.choice(free, size=min(count, len(free)), replace=False)
    return drawn


def _oracle(holding: Sequence[Ids], probe_documents: Sequence[Ids], bank: Bank) -> Ids:
    ids_MCK = np.full((len(holding), 1, 1), -1, np.int64)
    for probe, (held, own) in enumerate(zip(holding, probe_documents, strict=True)):
        in_document = held[np.isin(bank.document_of[held], own)]
        if in_document.size:
            ids_MCK[probe] = in_document.min()
    return ids_MCK


def _disjoint(row_documents: Sequence[Ids]) -> Flags:
    """Return whether two rows share no document, (M, M)."""
    documents, of = np.unique(np.concatenate(row_documents), return_inverse=True)
    holds = np.zeros((len(row_documents), len(documents)), np.float32)
    holds[np.repeat(np.arange(len(row_documents)), [len(own) for own in row_documents]), of] = 1
    disjoint: Flags = holds @ holds.T == 0
    return disjoint


def _donor_note(donors: Ids, what: str) -> str:
    missing = int((donors < 0).sum())
    return (
        f"{missing} of {len(donors)} {what} had none to take from and read random references"
        if missing
        else ""
    )

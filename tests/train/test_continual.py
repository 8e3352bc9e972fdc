"""What the bank may hold, what rows find in it, and which generation an epoch accepts."""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.documents import Use
from data.loader import read_rows
from data.packing import RowPlan
from memorybank.config import (
    BankConfig,
    BankContext,
    CodecConfig,
    CodecKind,
    EmbedderConfig,
    EmbedderKind,
    RetrievalConfig,
)
from memorybank.embedder import StaticEmbedder, VectorCache
from memorybank.search import RowSearch
from memorybank.store import Generation
from memorybank.vectors import Vectors, compile_vectors
from model.transformer import Memory3LM
from tests.support.train import continual_config, model_config, prepared
from train.config import MemorySource
from train.continual import BankEpochs
from train.distributed import Ranks
from train.engine import InferenceEngine
from train.history import History
from train.neighbours import (
    EpochNeighbours,
    EpochSearch,
    epoch_search,
    is_published,
    published_size,
    readable,
)
from train.rows import plan_epoch

PREPARED = prepared()
REFERENCES, CORPUS = PREPARED.references, PREPARED.shards.corpus
DOCUMENTS = [CORPUS.document(number) for number in range(CORPUS.num_documents)]
INPUTS = {"shards": "s", "references": "r", "tokenizer": "t"}
CONFIG = model_config(prefix_ids=list(PREPARED.tokenizer.prefix_ids))
RETRIEVAL = RetrievalConfig(embedder=EmbedderConfig(kind=EmbedderKind.static), candidates=16)
SECTIONS = [number for number, document in enumerate(DOCUMENTS) if document.use is Use.both]


def vectors(folder: Path, embedder: StaticEmbedder) -> Vectors:
    """Search vectors of all references."""
    compile_vectors(embedder, REFERENCES, folder)
    return Vectors.open(folder)


def epochs(run: Path, **changes: Any) -> BankEpochs:
    settings: dict[str, Any] = {
        "references": REFERENCES,
        "search": RowSearch(
            PREPARED.tokenizer,
            REFERENCES,
            StaticEmbedder().embed,
            partial(vectors, run / "vectors", StaticEmbedder()),
            RETRIEVAL,
            chunk_tokens=CONFIG.chunk_tokens,
            folder=run / "indexes",
        ),
        "retrieval": RETRIEVAL,
        "inputs": INPUTS,
        "model": CONFIG,
        "codec": CodecConfig(),
        "dtype": torch.bfloat16,
        "bank": BankConfig(),
        "keep_generations": 2,
        "ranks": Ranks(0, 1, torch.device("cpu")),
    }
    return BankEpochs(run, **(settings | changes))


def read(*numbers: int) -> History:
    history = History.empty(CORPUS.num_documents)
    history.finished[list(numbers)] = True
    return history


def planned(history: History, *, steps: int) -> RowPlan:
    """The rows of a first bank epoch of so many steps."""
    return plan_epoch(
        PREPARED.shards,
        "continual",
        continual_config(epoch_steps=str(steps)),
        history,
        source_weights={},
        row_tokens=128,
        epoch=0,
        epoch_step=0,
        seed=0,
    ).plan


def asked(history: History, plan: RowPlan, *, epoch: int = 0) -> EpochSearch:
    return epoch_search(REFERENCES, "continual", epoch, history, plan, validation_rows=4)


Searched = tuple[Path, EpochSearch, EpochNeighbours]


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Searched:
    """An epoch after most sections were read: its run folder, what it asks for and finds."""
    run = tmp_path_factory.mktemp("run")
    history = read(*SECTIONS[:-3])
    search = asked(history, planned(history, steps=5))
    return run, search, epochs(run).neighbours(search)


def test_the_bank_grows_with_what_was_finished_and_always_holds_reference_only_documents(
    tmp_path: Path,
) -> None:
    held_out = {number for number, document in enumerate(DOCUMENTS) if document.use is Use.reference}
    for finished in ((), SECTIONS[:2], SECTIONS):
        ids = readable(REFERENCES, read(*finished))
        assert set(REFERENCES.document_of[ids]) == held_out | set(finished)
        # Whole documents: all of their references.
        assert len(ids) == np.isin(REFERENCES.document_of, [*held_out, *finished]).sum()
        assert (np.diff(ids) > 0).all()


def test_fact_documents_have_no_references() -> None:
    facts = {number for number, document in enumerate(DOCUMENTS) if document.use is Use.training}
    assert not facts & set(REFERENCES.document_of.tolist())


def test_rows_never_read_references_of_their_own_documents(
    searched: Searched,
) -> None:
    _, search, found = searched
    pairs = [(search.rows.documents_of_row(row), ids) for row, ids in enumerate(found.training_MC)]
    pairs += [(search.validation.documents_of_row(row), ids) for row, ids in enumerate(found.validation_MC)]
    assert len(pairs) == search.rows.num_rows + 4
    read_ids = 0
    for documents, ids in pairs:
        filled = ids[ids >= 0]
        read_ids += len(filled)
        assert not set(REFERENCES.document_of[filled]) & set(documents.tolist())
    assert read_ids > 0.8 * (found.training_MC.size + found.validation_MC.size)
    assert found.report["refused_own_document"] > 0  # the filter had something to refuse


def test_rows_find_only_what_the_bank_may_hold(
    searched: Searched,
) -> None:
    _, _, found = searched
    allowed = readable(REFERENCES, read(*SECTIONS[:-3]))
    assert set(found.read_ids(MemorySource.bank)) <= set(allowed)
    unread = set(SECTIONS[-3:])
    assert not unread & set(REFERENCES.document_of[found.read_ids(MemorySource.bank)].tolist())


def test_own_documents_may_be_read_only_when_asked_for(tmp_path: Path) -> None:
    history = read(*SECTIONS)
    plan = planned(history, steps=1)
    paper = replace(RETRIEVAL, allow_own_document=True, overlap_training=1.0)
    search = RowSearch(
        PREPARED.tokenizer,
        REFERENCES,
        StaticEmbedder().embed,
        partial(vectors, tmp_path / "vectors", StaticEmbedder()),
        paper,
        chunk_tokens=CONFIG.chunk_tokens,
        folder=tmp_path / "indexes",
    )
    found = epochs(tmp_path, retrieval=paper, search=search).neighbours(asked(history, plan))
    own = [
        set(REFERENCES.document_of[ids[ids >= 0]]) & set(plan.documents_of_row(row).tolist())
        for row, ids in enumerate(found.training_MC)
    ]
    assert any(own)


def test_neighbours_keep_their_scores(searched: Searched) -> None:
    """The cosine of chunk and reference; empty slots have none."""
    _, search, found = searched
    rows = read_rows(PREPARED.shards, search.rows, tuple(range(search.rows.num_rows)))
    tokens_MT, embedder = rows.inputs.numpy(), StaticEmbedder()
    assert np.isneginf(found.scores_MC[found.training_MC < 0]).all()
    for row, chunk in np.argwhere(found.training_MC >= 0)[::7]:
        begin = chunk * CONFIG.chunk_tokens
        text = PREPARED.tokenizer.decode(tokens_MT[row, begin : begin + CONFIG.chunk_tokens].tolist())
        pair = embedder.embed([text, REFERENCES.text(int(found.training_MC[row, chunk]))])
        assert found.scores_MC[row, chunk] == pytest.approx(float(pair[0] @ pair[1]), abs=1e-5)


def test_neighbours_are_searched_once(searched: Searched) -> None:
    run, search, found = searched
    again = epochs(run, search=None).neighbours(search)
    np.testing.assert_array_equal(again.training_MC, found.training_MC)
    np.testing.assert_array_equal(again.scores_MC, found.scores_MC)
    np.testing.assert_array_equal(again.validation_MC, found.validation_MC)
    assert again.report == found.report


@pytest.mark.parametrize("name", ["training", "scores", "validation"])
def test_neighbours_that_are_damaged_are_refused(name: str, searched: Searched, tmp_path: Path) -> None:
    run, search, _ = searched
    copy = Path(shutil.copytree(run, tmp_path / run.name))
    path = copy / "neighbours" / "continual-0000" / f"{name}.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}.npy: block 0 .* is damaged"):
        epochs(copy, search=None).neighbours(search)


def test_a_search_is_another_one_with_other_rows_references_or_settings(searched: Searched) -> None:
    run, search, found = searched
    folder = search.folder(run)

    def size(
        of: EpochSearch, retrieval: RetrievalConfig = RETRIEVAL, chunk_tokens: int = CONFIG.chunk_tokens
    ) -> Any:
        settings = of.settings(retrieval, chunk_tokens=chunk_tokens)
        return published_size(folder, MemorySource.bank, settings=settings, inputs=INPUTS)

    assert size(search) == len(found.read_ids(MemorySource.bank))
    assert size(replace(search, rows=search.rows.again(3))) is None
    assert size(replace(search, validation=search.validation.again(3))) is None
    assert size(replace(search, ids=search.ids[1:])) is None
    assert size(search, chunk_tokens=CONFIG.chunk_tokens // 2) is None
    assert size(search, replace(RETRIEVAL, embedder=EmbedderConfig())) is None
    assert size(search, replace(RETRIEVAL, candidates=17)) is None
    settings = search.settings(RETRIEVAL, chunk_tokens=CONFIG.chunk_tokens)
    assert not is_published(folder, settings=settings, inputs=INPUTS | {"shards": "other"})


@pytest.mark.parametrize("found_by_validation", [0, 1])
def test_a_generation_holds_what_is_read_of_it(found_by_validation: int) -> None:
    """Where training encodes online, what validation reads; all where that found nothing."""
    found = EpochNeighbours(
        np.array([[5, 3]]),
        np.zeros((1, 2), np.float32),
        np.array([[7 if found_by_validation else -1, -1]]),
        {"found_by_validation": found_by_validation},
    )
    assert found.read_ids(MemorySource.online).tolist() == ([7] if found_by_validation else [3, 5])
    assert found.read_ids(MemorySource.mixed).tolist() == ([3, 5, 7] if found_by_validation else [3, 5])


class CountingEmbedder(StaticEmbedder):
    """Notes which texts are embedded."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def embed(self, texts: Sequence[str]) -> Any:
        self.texts += texts
        return super().embed(texts)


def test_references_keep_their_search_vectors_from_epoch_to_epoch(tmp_path: Path) -> None:
    """New weights, a grown bank, even another process: only texts that are new are embedded."""
    embedded = []
    for epoch, history in enumerate((read(*SECTIONS[:-3]), read(*SECTIONS))):
        embedder = CountingEmbedder()
        search = RowSearch(
            PREPARED.tokenizer,
            REFERENCES,
            VectorCache(tmp_path / "queries", embedder).vectors,
            partial(vectors, tmp_path / "vectors", embedder),
            RETRIEVAL,
            chunk_tokens=CONFIG.chunk_tokens,
            folder=tmp_path / "indexes",
        )
        bank = epochs(tmp_path, search=search)
        bank.neighbours(asked(history, planned(history, steps=1), epoch=epoch))
        embedded.append(set(embedder.texts))
    first, second = embedded
    assert {REFERENCES.text(id) for id in range(len(REFERENCES))} <= first
    assert not first & second


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Generation]:
    run = tmp_path_factory.mktemp("run")
    return run, epochs(run).compile(engine(), np.arange(5), read(), name="generation-continual-0000", step=4)


def engine(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return InferenceEngine(Memory3LM(CONFIG).to(torch.bfloat16))


def test_a_generation_says_what_it_was_compiled_from(compiled: tuple[Path, Generation]) -> None:
    run, generation = compiled
    assert asdict(generation.settings) == {
        "layout": CONFIG.layout(),
        "weights": engine().weights_hash(),
        "lineage": run.name,
        "step": 4,
        "references": "r",
        "tokenizer": "t",
        "context": "reference",
        "window_tokens": None,
    }


def test_documents_are_encoded_first_where_the_bank_says_so(tmp_path: Path) -> None:
    prefix = list(PREPARED.tokenizer.prefix_ids)
    wide = model_config(
        prefix_ids=prefix, row_tokens=256, num_memory_layers=2
    )  # the first layer sees no context
    writes = InferenceEngine(Memory3LM(wide).to(torch.bfloat16))
    plain, documents = (
        epochs(tmp_path, model=wide, bank=BankConfig(context=context)) for context in BankContext
    )
    ids = readable(REFERENCES, read(*SECTIONS[:2]))
    generation = documents.compile(writes, ids, read(*SECTIONS[:2]), name="generation-continual-0000", step=4)
    assert (generation.settings.context, generation.settings.window_tokens) == ("document", 256)
    alone = plain.compile(writes, ids, read(*SECTIONS[:2]), name="generation-continual-0001", step=4)
    differs = (generation.read(ids) != alone.read(ids)).any(dim=1).numpy()
    first = np.searchsorted(REFERENCES.document_of, REFERENCES.document_of[ids])
    assert (ids != first).sum() > 10
    assert differs[ids != first].mean() > 0.9  # some windows hold no more than one
    with pytest.raises(ValueError, match="context is document, but reference is expected"):
        plain.reopen("generation-continual-0000", generation.fingerprint)
    reopened = documents.reopen("generation-continual-0000", generation.fingerprint)
    assert reopened.fingerprint == generation.fingerprint


def test_the_generation_that_the_checkpoint_names_is_reopened(compiled: tuple[Path, Generation]) -> None:
    run, generation = compiled
    reopened = epochs(run).reopen("generation-continual-0000", generation.fingerprint)
    assert reopened.fingerprint == generation.fingerprint


def test_a_generation_that_the_checkpoint_does_not_name_is_refused(compiled: tuple[Path, Generation]) -> None:
    run, generation = compiled
    with pytest.raises(ValueError, match=rf"{generation.fingerprint}, but the checkpoint names 0123"):
        epochs(run).reopen("generation-continual-0000", "0123")
    with pytest.raises(
        ValueError, match=r"there is no generation in .*generation-continual-0007.*restore it from a copy"
    ):
        epochs(run).reopen("generation-continual-0007", generation.fingerprint)
    with pytest.raises(ValueError, match=r"names the generation '../../etc', which is no folder's name"):
        epochs(run).reopen("../../etc", generation.fingerprint)


@pytest.mark.parametrize(
    ("key", "value"),
    [("prefix_ids", [1, 2]), ("rope_base", 5e3), ("tokens_kept", 4), ("reference_tokens", 64)],
)
def test_another_layout_is_refused_by_name(key: str, value: Any, compiled: tuple[Path, Generation]) -> None:
    run, generation = compiled
    other = model_config(**{"prefix_ids": list(PREPARED.tokenizer.prefix_ids), key: value})
    with pytest.raises(ValueError, match=rf"layout\.({key}|context_start)"):
        epochs(run, model=other).reopen("generation-continual-0000", generation.fingerprint)


def test_other_weights_make_another_generation(compiled: tuple[Path, Generation], tmp_path: Path) -> None:
    _, generation = compiled
    other = epochs(tmp_path).compile(
        engine(1), np.arange(5), read(), name="generation-continual-0000", step=4
    )
    assert other.fingerprint != generation.fingerprint
    assert other.settings.weights != generation.settings.weights


def test_an_epoch_is_compiled_and_read_with_the_codec_that_was_asked_for(
    compiled: tuple[Path, Generation], tmp_path: Path
) -> None:
    _, exact = compiled
    bank = epochs(tmp_path, codec=CodecConfig(kind=CodecKind.int8))
    generation = bank.compile(engine(), np.arange(5), read(), name="generation-continual-0000", step=4)
    assert generation.codec == "int8"
    assert generation.record_bytes < exact.record_bytes
    ids = np.arange(5).reshape(1, 1, 5)
    # A run that was restarted with another codec still reads what was written with this one.
    read_back = epochs(tmp_path).reader(generation).batch(ids).pool
    before = epochs(tmp_path).reader(exact).batch(ids).pool
    assert torch.equal(read_back.index_NLGS, before.index_NLGS)
    difference = read_back.k_NLGSE - before.k_NLGSE.float()
    assert 0 < difference.abs().max() < before.k_NLGSE.abs().max() / 127


def test_too_few_references_for_the_quantiser_are_refused_with_the_number_needed(tmp_path: Path) -> None:
    bank = epochs(tmp_path, codec=CodecConfig(kind=CodecKind.residual2x14_pq8x10))
    with pytest.raises(ValueError, match=r"needs 16,384 vectors .* references; the .* sampled ones give"):
        bank.compile(engine(), np.arange(5), read(), name="generation-continual-0000", step=4)

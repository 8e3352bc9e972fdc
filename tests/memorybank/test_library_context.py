"""A library whose references were encoded with their document before them: compiled, edited, verified."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data.files import MANIFEST
from memorybank.config import BankContext
from memorybank.edits import Compiler, Documents, Editor
from memorybank.library import Library
from memorybank.soundness import repair, verify
from memorybank.writer import encode_records
from tests.support.memorybank import codec, compiler, hashes, model, on_ranks, references, rewritten, texts

NETWORK = model(torch.float32)
FLOATS = codec(torch.float32)
WINDOW = 256


def in_context(context: BankContext | None, **changes: object) -> Compiler:
    given = {"encode": NETWORK.encode, "dtype": torch.float32, "context": context, "records_per_shard": 32}
    return compiler(**(given | changes))


def editor(folder: Path, context: BankContext | None = None, **changes: object) -> Editor:
    given = {"folder": folder, "compiler": in_context(context), "references_per_segment": 40}
    return Editor(**(given | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "library"
    editor(folder, BankContext.document).build(texts(0, 5))
    return folder


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    return shutil.copytree(built, tmp_path / "library")


def keys(records: torch.Tensor) -> torch.Tensor:
    return FLOATS.decode(records).k_NLGSE


def encoded(ids: np.ndarray, window_tokens: int | None) -> torch.Tensor:
    """What the corpus's references give, in windows or by themselves."""
    return keys(
        encode_records(NETWORK.encode, references(), ids, FLOATS, batch=4, window_tokens=window_tokens)
    )


def test_records_are_those_of_whole_documents(built: Path) -> None:
    library, ids = Library.open(built), references().of_documents(np.arange(5))
    assert (library.settings.context, library.settings.window_tokens) == ("document", WINDOW)
    kept = keys(library.read(library.live_ids()))
    torch.testing.assert_close(kept, encoded(ids, WINDOW), rtol=1e-4, atol=1e-5)
    plain = encoded(ids, None)
    documents = references().documents_of(ids)
    firsts = np.flatnonzero(np.diff(documents, prepend=-1))
    torch.testing.assert_close(kept[firsts], plain[firsts], rtol=1e-4, atol=1e-5)
    later = np.setdiff1d(np.arange(len(ids)), firsts)
    assert not torch.isclose(kept[later], plain[later], atol=1e-2).flatten(1).all(1).any()
    assert verify(built, in_context(None), sample=8) == []


def test_documents_of_one_piece_give_the_memories_of_plain_mode(tmp_path: Path) -> None:
    found = []
    for context in BankContext:
        folder = tmp_path / context.name
        editor(folder, context).build(some_of_one_piece())
        library = Library.open(folder)
        assert len(library) == library.num_documents == 3
        found.append(keys(library.read(library.live_ids())))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def some_of_one_piece() -> Documents:
    """Three documents that fit into a reference."""
    short = [
        replace(document, text=document.text[:100])
        for document in map(references().shards.document, range(3))
    ]
    cutter = in_context(None).cutter
    return Documents({"origin": "short"}, lambda: map(cutter.cut, short))


def test_every_edit_keeps_the_context_and_no_other_is_mixed_in(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"context is document, but .* is reference; .*memory3 bank refresh"):
        editor(folder, BankContext.reference).add(texts(6, 7))
    counts = np.bincount(references().document_of)
    number = 6 + int(counts[6:].argmax())
    editor(folder).add(texts(number, number + 1))
    library = Library.open(folder)
    ids = references().of_documents(np.array([number]))
    added = library.of_documents(library.document_numbers([references().describe(int(ids[0])).document]))
    assert len(added) == len(ids) > 1
    torch.testing.assert_close(keys(library.read(added)), encoded(ids, WINDOW), rtol=1e-4, atol=1e-5)
    library.close()
    editor(folder).replace(texts(number, number + 1))
    editor(folder, compiler=None).remove(Library.open(folder).live_ids()[:1])
    editor(folder, compiler=None).compact()
    assert {records.settings.context for records in map(Library.open(folder).generation, range(2))} == {
        "document"
    }
    assert verify(folder, in_context(None), sample=16) == []


def test_refresh_keeps_the_context_or_takes_another(folder: Path) -> None:
    assert editor(folder).refresh() == 1
    before = Library.open(folder).parts
    assert editor(folder, BankContext.reference).refresh() == 2
    library = Library.open(folder)
    assert (library.settings.context, library.settings.window_tokens) == ("reference", None)
    assert [part.vectors for part in library.parts] == [part.vectors for part in before]
    ids = references().of_documents(np.arange(5))
    kept = keys(library.read(library.live_ids()))
    torch.testing.assert_close(kept, encoded(ids, None), rtol=1e-4, atol=1e-5)
    newer = in_context(None, encode=model(torch.float32, seed=1).encode, weights="w1")
    assert Editor(folder=folder, compiler=newer).refresh() == 3
    assert Library.open(folder).settings.context == "reference"


def test_a_damaged_record_is_made_again_in_its_context(folder: Path) -> None:
    before = hashes(folder)
    (folder / "records-000001-0000" / "records-00000.bin").unlink()
    assert repair(editor(folder), verify(folder)) == ["records-000001-0000"]
    assert hashes(folder) == before


def test_records_of_the_other_context_are_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "library"
    editor(folder, BankContext.reference).build(texts(0, 5))

    def claim(stored: dict[str, object]) -> None:
        stored["settings"].update(context="document", window_tokens=WINDOW)  # type: ignore[attr-defined]

    rewritten(folder / "state-000001" / MANIFEST, claim)
    with pytest.raises(
        ValueError, match="records-000001-0000: its context is reference, but document is that of"
    ):
        Library.open(folder)


def test_libraries_that_state_no_context_are_of_plain_references(tmp_path: Path) -> None:
    folder = tmp_path / "library"
    editor(folder, BankContext.reference).build(texts(0, 2))

    def older(stored: dict[str, object]) -> None:
        for key in ("context", "window_tokens"):
            del stored["settings"][key]  # type: ignore[attr-defined]

    rewritten(folder / "state-000001" / MANIFEST, older)
    assert Library.open(folder).settings.context == "reference"
    assert verify(folder, in_context(None), sample=4) == []
    assert editor(folder).add(texts(2, 3)) == 2


def test_bytes_do_not_depend_on_the_number_of_ranks(built: Path, tmp_path: Path) -> None:
    made = tmp_path / "library"
    on_ranks(2, lambda team: editor(made, BankContext.document, team=team).build(texts(0, 5)) and None)
    assert hashes(made) == hashes(built)

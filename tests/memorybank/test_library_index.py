"""A library whose vectors are in lists: what is found, when the lists are built anew, what is left after a removal."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from data import files
from data.files import MANIFEST
from memorybank import index_plan
from memorybank.config import IndexConfig, IndexKind
from memorybank.edits import Compiler, Editor, Known
from memorybank.index_store import queries_of
from memorybank.library import Library
from memorybank.soundness import fetch, repair, verify
from memorybank.vectors import Vectors, compile_vectors
from tests.support.memorybank import compiler, embedder, references, rewritten, texts

INDEX = IndexConfig(kind=IndexKind.ivf_flat, recall=0.9)


@cache
def listing() -> Compiler:
    return compiler(index=INDEX, batch=32, records_per_shard=64)


def editor(folder: Path, **changes: object) -> Editor:
    given = {"folder": folder, "compiler": listing(), "references_per_segment": 40}
    return Editor(**(given | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """Lists are built when more than ten vectors are in none, and are short."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_plan, "EXACT_UP_TO", 10)
        patch.setattr(index_plan, "_TRAINING_PER_LIST", 8)
        yield


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "library"
    editor(folder).build(texts(0, 12))
    return folder


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    return shutil.copytree(built, tmp_path / "library")


def exact(library: Library, queries: np.ndarray, k: int) -> np.ndarray:
    ids = library.live_ids()
    return ids[np.argsort(-(queries @ library.read_vectors(ids).T), axis=1, kind="stable")[:, :k]]


def asked(library: Library) -> np.ndarray:
    return embedder().embed([library.text(int(id))[60:] for id in library.live_ids()[::7]])


def share(library: Library, k: int = 5) -> float:
    queries = asked(library)
    found, best = library.search(queries, k)[1], exact(library, queries, k)
    return float(
        np.mean([len(set(a) & set(b)) / k for a, b in zip(found.tolist(), best.tolist(), strict=True)])
    )


def test_the_lists_are_a_piece_whose_recall_was_measured(built: Path) -> None:
    library = Library.open(built)
    (index,) = library.indexes
    assert index.folder.name in library.piece_names()
    assert library.num_listed == [len(library)]
    assert len(library) > 90
    assert index.inputs == {part.vectors: library.manifest.inputs[part.vectors] for part in library.parts}
    stated = index.extra
    assert stated["recall_at_5"] >= 0.9
    assert stated["lists_read"] < index.settings["lists"]
    assert share(library) >= 0.85
    assert verify(built, listing(), sample=8) == []
    ids, queries = queries_of(index)
    assert len(ids) == len(queries) > 90


def test_few_vectors_are_added_beside_the_lists_and_many_get_lists_of_their_own(folder: Path) -> None:
    before = Library.open(folder)
    editor(folder).add(texts(12, 13, text="Zanzibarquartz is the word of the day, and of every day."))
    library = Library.open(folder)
    assert library.shared == before.shared
    found = library.search(embedder().embed(["the word of the day Zanzibarquartz"]), 3)[1]
    assert found[0, 0] == before.next_reference
    editor(folder).add(texts(13, 16))
    library = Library.open(folder)
    assert library.shared.indexes == ("index-000001-0000", "index-000003-0000")
    assert library.num_listed == [len(before), len(library) - len(before)]
    assert library.unlisted == []
    assert library.search(embedder().embed(["the word of the day Zanzibarquartz"]), 3)[1][0, 0] == found[0, 0]
    assert share(library) >= 0.85
    assert verify(folder, listing(), sample=8) == []
    editor(folder).add(texts(16, 20))
    library = Library.open(folder)
    assert library.shared.indexes == ("index-000004-0000",), "it takes in what is at most twice as large"
    assert library.num_listed == [len(library)]
    assert share(library) >= 0.85


def test_indexes_stay_few_and_what_is_searched_exactly_stays_small(built: Path, tmp_path: Path) -> None:
    rng, exact, largest = np.random.default_rng(0), index_plan.EXACT_UP_TO, 0
    listed: list[int] = []
    unlisted = total = coded = 0
    for _ in range(4000):
        put = int(rng.integers(1, 2 * exact))
        unlisted, total = unlisted + put, total + put
        places = index_plan.folded(listed, unlisted)
        if places is not None:
            made = unlisted + sum(listed[place] for place in places)
            listed = [*(size for place, size in enumerate(listed) if place not in places), made]
            unlisted, coded = 0, coded + made
        assert unlisted <= exact
        assert sum(listed) + unlisted == total
        ordered = sorted(listed)
        assert all(2 * small < large for small, large in pairwise(ordered))
        largest = max(largest, len(listed))
    doublings = np.log2(total / exact)
    assert largest <= doublings + 1
    assert coded / total <= np.log(total / exact) / np.log(1.5) + 1


def test_lists_over_removed_documents_find_none_of_them_and_compact_leaves_no_vector(folder: Path) -> None:
    library = Library.open(folder)
    numbers = library.live_documents(0)[:2]
    chosen = library.segments[0].document_numbers[numbers]
    last = library.segments[-1].document_numbers  # all of a part: the state drops it, the lists know it
    gone = library.of_documents(np.concatenate([chosen, last]))
    vectors = library.read_vectors(gone)
    library.close()
    editor(folder, compiler=None).remove(np.concatenate([chosen, last]))
    library = Library.open(folder)
    assert len(library.parts) == len(Library.open(folder, number=1).parts) - 1
    assert not np.isin(library.search(vectors, 50)[1], gone).any()
    assert share(library) >= 0.8
    library.close()

    def holds() -> set[str]:
        needles = [vector.tobytes() for vector in vectors if vector.any()]
        return {
            path.parent.name.split("-")[0]
            for path in folder.rglob("*")
            if path.is_file() and any(needle in path.read_bytes() for needle in needles)
        }

    assert {"vectors", "index"} <= holds()
    editor(folder, compiler=None).compact()
    assert holds() == set()
    library = Library.open(folder)
    assert library.num_listed == [len(library)]
    assert share(library) >= 0.85
    assert not np.isin(queries_of(library.indexes[0])[0], gone).any()
    assert verify(folder) == []


def test_compact_builds_lists_again_that_know_a_part_that_is_gone(folder: Path) -> None:
    library = Library.open(folder)
    last = library.segments[-1].document_numbers
    library.close()
    editor(folder, compiler=None).remove(last)
    assert len(Library.open(folder).removed) == 0
    editor(folder, compiler=None).compact()
    library = Library.open(folder)
    assert library.shared.indexes == ("index-000003-0000",)
    assert library.num_listed == [len(library)]
    assert editor(folder, compiler=None).compact() == 3, "nothing to do"


def test_compact_builds_only_the_index_anew_that_lists_what_was_removed(folder: Path) -> None:
    editor(folder).add(texts(15, 18))
    library = Library.open(folder)
    removed = library.segments[-1].document_numbers[:1]
    gone = library.of_documents(removed)
    library.close()
    editor(folder, compiler=None, references_per_segment=30).remove(removed)
    editor(folder, compiler=None, references_per_segment=30).compact()
    library = Library.open(folder)
    assert library.shared.indexes == ("index-000001-0000", "index-000004-0000")
    assert library.num_listed[1] == sum(part.references for part in library.parts[-1:])
    assert not np.isin(queries_of(library.indexes[1])[0], gone).any()
    assert share(library) >= 0.85
    assert verify(folder) == []


def test_a_library_with_the_one_index_of_earlier_states_opens(folder: Path) -> None:
    def older(stored: dict[str, object]) -> None:
        stored["settings"]["shared"] = {"index": "index-000001-0000", "codec": None}  # type: ignore[index]

    rewritten(folder / "state-000001" / MANIFEST, older)
    library = Library.open(folder)
    assert library.shared.indexes == ("index-000001-0000",)
    assert share(library) >= 0.85


@pytest.mark.parametrize("name", ["lists.bin", "index.faiss", "manifest.json", ""])
def test_a_damaged_index_is_named_and_built_again(name: str, folder: Path) -> None:
    piece = folder / "index-000001-0000"
    whole = {path.name: path.read_bytes() for path in piece.iterdir()}
    if name:
        content = bytearray((piece / name).read_bytes())
        content[len(content) // 2] ^= 16
        (piece / name).write_bytes(bytes(content))
    else:
        shutil.rmtree(piece)
    problems = verify(folder)
    assert {problem.piece for problem in problems} == {piece.name}
    assert repair(editor(folder), problems) == [piece.name]
    assert verify(folder) == []
    assert {path.name: path.read_bytes() for path in piece.iterdir()} == whole
    assert Library.open(folder).number == 1


def test_an_index_of_other_vectors_is_refused(folder: Path, tmp_path: Path) -> None:
    editor(tmp_path / "other").build(texts(5, 17))
    shutil.rmtree(folder / "index-000001-0000")
    shutil.copytree(tmp_path / "other" / "index-000001-0000", folder / "index-000001-0000")
    with pytest.raises(ValueError, match="index-000001-0000 is not the piece that state 1 names"):
        Library.open(folder)


def test_fetch_brings_the_index(folder: Path, tmp_path: Path) -> None:
    fetch(folder, tmp_path / "there", told=lambda *_: None)
    assert share(Library.open(tmp_path / "there")) >= 0.85


def test_an_edit_that_is_killed_while_the_lists_are_built_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = shutil.copytree(folder, tmp_path / "whole")
    editor(whole).add(texts(12, 15))
    move, before = files.Path.rename, Library.open(folder).fingerprint

    def dies(path: Path, target: Path) -> Path:
        if path.name.startswith("index-"):
            raise KeyboardInterrupt
        return move(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(files.Path, "rename", dies)
        with pytest.raises(KeyboardInterrupt):
            editor(folder).add(texts(12, 15))
    assert Library.open(folder).fingerprint == before
    editor(folder).add(texts(12, 15))
    assert Library.open(folder).fingerprint == Library.open(whole).fingerprint


def test_vectors_that_stand_elsewhere_are_copied(tmp_path: Path) -> None:
    compile_vectors(embedder(), references(), tmp_path / "prepared")
    prepared = Vectors.open(tmp_path / "prepared")
    rows = references().of_documents(np.arange(3, 9))

    class Never:
        name, size = embedder().name, embedder().size

        def embed(self, _: object) -> np.ndarray:
            raise AssertionError("embedded again")

    plain = compiler(embedder=Never(), index=IndexConfig(kind=IndexKind.exact))
    known = replace(texts(3, 9), known=Known(prepared, rows))
    Editor(folder=tmp_path / "library", compiler=plain, references_per_segment=20).build(known)
    library = Library.open(tmp_path / "library")
    assert len(library.parts) > 1
    assert np.array_equal(library.read_vectors(library.live_ids()), prepared.read(rows))
    assert np.array_equal(
        prepared.read(rows), embedder().embed([references().text(int(row)) for row in rows])
    )

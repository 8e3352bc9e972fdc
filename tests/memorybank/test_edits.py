"""Edits of a library: what is in it afterwards, byte by byte, and what is left when an edit does not end."""

import fcntl
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data import files
from data.files import is_held, only_writer
from memorybank import edits
from memorybank.edits import KEPT_STATES, Editor, sweep
from memorybank.library import Library, state_folder, state_numbers
from memorybank.team import Team
from memorybank.writer import encode_records
from tests.support.memorybank import (
    codec,
    compiler,
    embedder,
    hashes,
    model,
    on_ranks,
    references,
    texts,
)


def editor(folder: Path, **changes: object) -> Editor:
    given = {"folder": folder, "compiler": compiler(), "references_per_segment": 20}
    return Editor(**(given | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library of ten documents in several segments."""
    folder = tmp_path_factory.mktemp("built") / "library"
    editor(folder).build(texts(0, 10))
    return folder


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    return shutil.copytree(built, tmp_path / "library")


def ids_of(first: int, last: int) -> list[str]:
    return [references().shards.document(number).id for number in range(first, last)]


def test_a_built_library_holds_what_the_corpus_holds_and_needs_nothing_of_it(built: Path) -> None:
    library, corpus = Library.open(built), references()
    ids = corpus.of_documents(np.arange(10))
    assert len(library.parts) > 1
    assert (len(library), library.num_documents) == (len(ids), 10)
    assert np.array_equal(library.live_ids(), np.arange(len(ids)))
    for ours, theirs in zip(library.tokens(library.live_ids()), corpus.tokens(ids), strict=True):
        assert np.array_equal(ours, theirs)
    for number in (0, 7, len(ids) - 1):
        assert library.text(number) == corpus.text(ids[number])
        assert library.describe(number) == corpus.describe(ids[number])
        assert library.content_tokens(number) == corpus.content_tokens(ids[number])
    first, last = library.segments[0].numbers[[0, -1]]
    made = encode_records(model().encode, corpus, ids[first : last + 1], codec(), batch=4)
    assert torch.equal(library.read(np.arange(first, last + 1)), made)
    of = library.documents_of(np.array([[0, 7, -1]]))
    assert of.shape == (1, 3)
    assert of[0, 2] == -1
    assert library.describe(int(of[0, 1])).document == library.describe(7).document
    assert str(corpus.shards.corpus.manifest.folder).encode() not in b"".join(
        path.read_bytes() for path in built.rglob("*") if path.is_file()
    )


def test_a_documents_own_words_find_it(built: Path) -> None:
    library = Library.open(built)
    for number in (3, 20):
        scores, ids = library.search(embedder().embed([library.text(number)]), 3)
        assert ids[0, 0] == number
        assert scores[0, 0] == pytest.approx(1, abs=1e-4)
    everything = library.search(embedder().embed(["x"]), len(library) + 2)[1]
    assert everything[0, -2:].tolist() == [-1, -1]
    assert np.array_equal(np.sort(everything[0, :-2]), library.live_ids())


@pytest.mark.parametrize("world_size", [2, 3])
def test_build_is_byte_identical_for_any_number_of_ranks(
    world_size: int, built: Path, tmp_path: Path
) -> None:
    shared = compiler()  # weights are drawn with the process's one generator

    def run(team: Team) -> None:
        editor(tmp_path / "library", team=team, compiler=shared).build(texts(0, 10))

    on_ranks(world_size, run)
    assert hashes(tmp_path / "library") == hashes(built)


def test_added_documents_are_found_beside_the_others_whose_pieces_do_not_change(folder: Path) -> None:
    before = hashes(folder)
    assert editor(folder).add(texts(10, 12)) == 2
    library = Library.open(folder)
    assert library.num_documents == 12
    numbers = library.document_numbers(ids_of(9, 13))
    assert (numbers >= 0).tolist() == [True, True, True, False]
    assert numbers[1] == Library.open(folder, number=1).next_reference
    assert library.search(embedder().embed([library.text(int(numbers[2]))]), 1)[1][0, 0] == numbers[2]
    after = hashes(folder)
    assert {name: after[name] for name in before} == before


def test_a_document_that_is_there_is_refused_and_replace_named(folder: Path) -> None:
    before = hashes(folder / "state-000001")
    with pytest.raises(
        ValueError, match=f"'{ids_of(9, 10)[0]}' is in the bank already.*memory3 bank replace"
    ):
        editor(folder).add(texts(9, 11))
    assert Library.open(folder).number == 1
    assert hashes(folder / "state-000001") == before
    editor(folder).add(texts(11, 12))
    assert Library.open(folder).num_documents == 11, "what the refused edit left behind is not taken over"


def test_replacing_what_is_not_there_is_refused_and_add_named(folder: Path) -> None:
    with pytest.raises(ValueError, match=f"'{ids_of(10, 11)[0]}' is not in the bank.*memory3 bank add"):
        editor(folder).replace(texts(9, 11))


def test_two_documents_of_one_id_are_refused(tmp_path: Path) -> None:
    for last in (2, 4):  # in one segment, and in different ones
        with pytest.raises(ValueError, match="two of the documents have the id 'same'"):
            editor(tmp_path / f"{last}", references_per_segment=6).build(texts(0, last, id="same"))


def test_other_weights_are_refused_until_refreshed(folder: Path) -> None:
    newer = replace(editor(folder), compiler=compiler(seed=1))
    with pytest.raises(ValueError, match=r"weights is w0, but the run's newest is w1.*memory3 bank refresh"):
        newer.add(texts(10, 11))
    old = Library.open(folder)
    assert newer.refresh() == 2
    new = Library.open(folder, expect={"weights": "w1"})
    with pytest.raises(ValueError, match=r"weights is w1, but w0 is expected.*memory3 bank refresh"):
        Library.open(folder, expect={"weights": "w0"})
    with pytest.raises(
        ValueError, match=r"tokenizer is .*, but other is expected; .*memory3 bank build RUN --bank"
    ):
        Library.open(folder, expect={"layout": {"prefix_ids": [1]}, "tokenizer": "other"})
    assert [part.vectors for part in new.parts] == [part.vectors for part in old.parts]
    assert [part.text for part in new.parts] == [part.text for part in old.parts]
    ids = new.segments[0].numbers
    made = encode_records(model(seed=1).encode, new, ids, codec(), batch=4)
    assert torch.equal(new.read(ids), made)
    assert not torch.equal(new.read(ids), old.read(ids))
    old.close()
    assert newer.refresh() == 2, "nothing to do"


def test_a_removed_document_is_found_by_no_search_and_read_by_no_chunk(folder: Path) -> None:
    library = Library.open(folder)
    (number,) = library.document_numbers(ids_of(4, 5))
    gone = library.of_documents(np.array([number]))
    vector = embedder().embed([library.text(int(gone[0]))])
    assert editor(folder, compiler=None).remove(np.array([number])) == 2
    after = Library.open(folder)
    assert not np.isin(after.search(vector, len(library))[1], gone).any()
    assert not np.isin(after.live_ids(), gone).any()
    assert (len(after), after.num_documents) == (len(library) - len(gone), 9)
    assert after.document_numbers(ids_of(4, 5))[0] == -1
    assert not after.is_live(gone).any()
    assert len(after.of_documents(np.array([number]))) == 0
    for read in (after.read, after.tokens, after.read_vectors):
        with pytest.raises(ValueError, match=f"were removed \\(first: {gone[0]}\\)"):
            read(gone[:1])
    with pytest.raises(ValueError, match="were removed"):
        after.text(int(gone[0]))
    assert torch.equal(library.read(gone), Library.open(folder, number=1).read(gone)), (
        "a reader keeps its state"
    )


def test_what_was_removed_is_looked_up_and_not_gone_through(folder: Path) -> None:
    library = Library.open(folder)
    library.removed = np.unique(np.random.default_rng(0).integers(0, 10**8, 10**6))
    asked = np.concatenate([library.removed[:3], library.removed[-2:] + 1, [0, 10**9, -1]]).reshape(2, -1)
    assert np.array_equal(library.were_removed(asked), np.isin(asked, library.removed))

    def seconds(look: Callable[[], object]) -> float:
        begin = time.perf_counter()
        look()
        return time.perf_counter() - begin

    through = min(seconds(lambda: np.isin(asked, library.removed)) for _ in range(3))
    assert min(seconds(lambda: library.were_removed(asked)) for _ in range(3)) < through / 10


def test_a_source_can_be_removed(folder: Path) -> None:
    editor(folder).add(texts(10, 12, source="mine"))
    library = Library.open(folder)
    assert library.sources() == ["mine", "sections"]
    mine = library.of_source("mine")
    assert np.array_equal(mine, library.document_numbers(ids_of(10, 12)))
    editor(folder).remove(mine)
    assert Library.open(folder).num_documents == 10
    assert len(Library.open(folder).parts) == len(library.parts) - 1, "a segment of nothing is not kept"
    assert len(Library.open(folder).removed) == 0


def test_replace_is_one_state(folder: Path) -> None:
    word = "Zanzibarquartz"
    old = Library.open(folder)
    (id,) = ids_of(4, 5)
    assert editor(folder).replace(texts(4, 5, text=f"The capital is {word}.")) == 2
    new = Library.open(folder)
    assert new.num_documents == old.num_documents
    (number,) = new.document_numbers([id])
    assert number == old.next_reference, "numbers are not given twice"
    assert word in new.text(int(number))
    assert new.describe(int(number)).document == id
    assert word not in "".join(old.text(int(ref)) for ref in old.live_ids())
    assert not new.is_live(old.of_documents(old.document_numbers([id]))).any()


def test_nothing_of_a_removed_document_is_left_after_compact(folder: Path) -> None:
    word = "Zanzibarquartz"
    editor(folder).add(texts(10, 11, id="secret", title="", text=f"{word} is the word. " * 9))
    library = Library.open(folder)
    gone = library.of_documents(library.document_numbers(["secret"]))
    tokens, length, _ = library.tokens(gone[:1])
    needles = {
        "text": word.encode(),
        "tokens": tokens[0, : length[0]].astype("<u2").tobytes(),
        "record": library.read(gone[:1])[0, :64].numpy().tobytes(),
        "vector": library.read_vectors(gone[:1])[0].tobytes(),
    }
    library.close()

    def found() -> set[str]:
        content = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
        return {name for name, needle in needles.items() if needle in content}

    assert found() == set(needles)
    others = library.document_numbers(ids_of(2, 3))
    editor(folder).remove(np.union1d(library.document_numbers(["secret"]), others))
    assert found() == set(needles), "compact is what deletes"
    before = Library.open(folder)
    kept = before.live_ids()
    records, vectors = before.read(kept), before.read_vectors(kept)
    described = [before.describe(int(number)) for number in kept]
    before.close()
    editor(folder, compiler=None).compact()
    assert found() == set()
    after = Library.open(folder)
    assert np.array_equal(after.live_ids(), kept), "references keep their numbers"
    assert torch.equal(after.read(kept), records)
    assert np.array_equal(after.read_vectors(kept), vectors)
    assert [after.describe(int(number)) for number in kept] == described
    assert sorted(path.name for path in folder.iterdir()) == sorted([*after.piece_names(), "state-000004"])


def test_compact_joins_small_segments_and_leaves_full_ones(folder: Path) -> None:
    for number in range(10, 13):
        editor(folder).add(texts(number, number + 1))
    before = Library.open(folder)
    kept = before.live_ids()
    records = before.read(kept)
    before.close()
    editor(folder, references_per_segment=1000).compact()
    after = Library.open(folder)
    assert len(after.parts) == 1
    assert np.array_equal(after.live_ids(), kept)
    assert torch.equal(after.read(kept), records)
    assert editor(folder, references_per_segment=1000).compact() == after.number, "nothing to do"
    assert Library.open(folder).fingerprint == after.fingerprint


def test_a_reader_keeps_its_state_while_compact_says_that_it_must_wait(folder: Path) -> None:
    reader = Library.open(folder)
    (number,) = reader.document_numbers(ids_of(4, 5))
    gone = reader.of_documents(np.array([number]))
    editor(folder).remove(np.array([number]))
    for _ in range(3):  # edits that would sweep state 1 by the rule
        editor(folder).remove(Library.open(folder).live_ids()[:1])
    with pytest.raises(ValueError, match=r"state-000001 is being read.*`memory3 bank compact` again"):
        editor(folder).compact()
    assert len(reader.read(gone)) == len(gone)
    assert reader.text(int(gone[0]))
    reader.close()
    editor(folder).compact()
    assert not state_folder(folder, 1).exists()


def test_a_state_that_is_swept_while_it_is_opened_gives_way_to_the_newest(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader has found state 1 and its folder; before it holds it, state 4 stands and state 1 is gone."""
    real = fcntl.flock

    def late(descriptor: int, operation: int) -> None:
        if operation == fcntl.LOCK_SH:
            monkeypatch.setattr(fcntl, "flock", real)
            for _ in range(3):
                editor(folder).remove(Library.open(folder).live_ids()[:1])
        real(descriptor, operation)

    for number in (None, 4):
        monkeypatch.setattr(fcntl, "flock", late)
        if number is None:
            assert Library.open(folder).number == 4
        else:
            with pytest.raises(ValueError, match="there is no state 4 of a bank"):
                Library.open(folder, number=4)


def test_a_state_that_is_opened_while_it_is_swept_stays(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer has seen that nobody reads state 1; before it deletes it, somebody does."""
    opened: list[Library] = []

    def looked(state: Path) -> bool:
        found = is_held(state)
        if not opened:
            opened.append(Library.open(folder, number=1))
        return found

    monkeypatch.setattr(edits, "is_held", looked)
    for _ in range(3):
        editor(folder).remove(Library.open(folder).live_ids()[:1])
    (reader,) = opened
    assert reader.number == 1
    assert len(reader.read(reader.live_ids())) == len(reader)
    assert state_numbers(folder) == [1, 3, 4]


def test_old_states_are_swept_by_number_not_by_time(folder: Path) -> None:
    for _ in range(3):
        editor(folder).remove(Library.open(folder).live_ids()[:1])
        for path in folder.glob("state-*"):
            os.utime(path, (0, 0))
    assert sorted(path.name for path in folder.glob("state-*")) == ["state-000003", "state-000004"]
    assert Library.open(folder).number == 4


def test_removing_everything_is_refused(folder: Path) -> None:
    library = Library.open(folder)
    with pytest.raises(ValueError, match="nothing would be left"):
        editor(folder).remove(library.document_numbers(ids_of(0, 10)))


def test_building_over_a_library_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"there is a bank in .* already"):
        editor(folder).build(texts(0, 1))
    with pytest.raises(ValueError, match="no documents"):
        editor(folder.parent / "other").build(texts(0, 0))


def test_two_writers_at_once_are_refused(folder: Path) -> None:
    with only_writer(folder), pytest.raises(ValueError, match=f"another process is writing {folder}"):
        editor(folder).remove(Library.open(folder).live_ids()[:1])


class Stopped(BaseException):
    """The end of a process, as far as the code under it can see."""


def stopping(monkeypatch: pytest.MonkeyPatch, at: int, error: BaseException) -> list[int]:
    """Raise at the n-th write, rename, fsync or deletion that data.files makes, and at every later one."""
    calls = [0]

    def counted(function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            calls[0] += 1
            if calls[0] > at:
                raise error
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(files.os, "fsync", counted(os.fsync))
    monkeypatch.setattr(files.Path, "rename", counted(Path.rename))
    monkeypatch.setattr(files.Path, "replace", counted(Path.replace))
    monkeypatch.setattr(files.Path, "mkdir", counted(Path.mkdir))
    monkeypatch.setattr(files.shutil, "rmtree", counted(shutil.rmtree))
    return calls


EDITS: dict[str, Callable[[Editor], int]] = {
    "build": lambda editor: editor.build(texts(0, 5)),
    "add": lambda editor: editor.add(texts(10, 12)),
    "replace": lambda editor: editor.replace(texts(3, 4, text="A new text.")),
    "refresh": lambda editor: replace(editor, compiler=compiler(seed=1)).refresh(),
    "compact": lambda editor: editor.compact(),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_that_is_killed_changes_nothing_and_goes_on_when_repeated(
    name: str, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit, start = EDITS[name], tmp_path / "start"
    if name != "build":
        shutil.copytree(built, start)
        if name == "compact":
            editor(start).remove(Library.open(start).live_ids()[:1])
    else:
        start.mkdir()

    def attempt(where: Path, at: int, error: BaseException) -> int:
        shutil.copytree(start, where)
        with monkeypatch.context() as patch:
            calls = stopping(patch, at, error)
            with suppress(type(error)):
                edit(editor(where))
            return calls[0]

    whole = tmp_path / "whole"
    total = attempt(whole, 10_000, Stopped())
    before = None if name == "build" else Library.open(start).fingerprint
    after = Library.open(whole).fingerprint
    full_disk = OSError(28, "No space left on device")
    for at in range(0, total, max(1, total // 4)):
        where = tmp_path / f"at-{at}"
        attempt(where, at, full_disk if at % 2 else Stopped())
        found = Library.open(where).fingerprint if list(where.glob("state-*[0-9]/manifest.json")) else None
        assert found in (before, after)
        if found == before:
            edit(editor(where))
        sweep(where, kept=1 if name == "compact" else KEPT_STATES)  # the next edit's first deed, otherwise
        assert hashes(where) == hashes(whole)
        shutil.rmtree(where)

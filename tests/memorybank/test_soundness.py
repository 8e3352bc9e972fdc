"""Damage is named, repaired where the rest allows it, and refused when read; copies reach other folders."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data.files import MANIFEST, hold
from memorybank.edits import Editor
from memorybank.library import Library
from memorybank.soundness import fetch, find_document, repair, verify
from tests.support.memorybank import compiler, hashes, rewritten, texts


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "library"
    editor(folder).build(texts(0, 5))
    return folder


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    return shutil.copytree(built, tmp_path / "library")


def editor(folder: Path) -> Editor:
    return Editor(folder=folder, compiler=compiler(), references_per_segment=20)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(bytes(content))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def empty(path: Path) -> None:
    path.write_bytes(b"")


VECTORS, RECORDS = "vectors-000001-0000", "records-000001-0000"
DAMAGE: dict[str, tuple[str, Callable[[Path], None]]] = {
    "flipped record": (f"{RECORDS}/records-00001.bin", flip),
    "cut record": (f"{RECORDS}/records-00000.bin", truncate),
    "no record": (f"{RECORDS}/records-00000.bin", Path.unlink),
    "flipped vectors": (f"{VECTORS}/vectors-00000.bin", flip),
    "empty ids": (f"{RECORDS}/ids.npy", empty),
    "no manifest": (f"{RECORDS}/{MANIFEST}", Path.unlink),
    "cut manifest": (f"{VECTORS}/{MANIFEST}", truncate),
    "no folder": (RECORDS, shutil.rmtree),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named_and_repaired_and_nothing_else_is_touched(case: str, folder: Path) -> None:
    name, damage = DAMAGE[case]
    before, times = hashes(folder), {path: path.stat().st_mtime_ns for path in folder.rglob("*.bin")}
    damage(folder / name)
    problems = verify(folder, compiler())
    assert problems
    assert all(problem.piece == name.split("/")[0] for problem in problems)
    assert any(str(problem).startswith(str(folder / name)) for problem in problems)
    assert repair(editor(folder), problems) == [name.split("/")[0]]
    assert hashes(folder) == before
    piece = name.split("/")[0]
    for path, time in times.items():
        if path.parent.name != piece:
            assert path.stat().st_mtime_ns == time
    assert verify(folder, compiler()) == []


@pytest.mark.parametrize("case", ["flipped record", "flipped vectors"])
def test_a_damaged_block_is_refused_when_read(case: str, folder: Path) -> None:
    name, damage = DAMAGE[case]
    damage(folder / name)
    library = Library.open(folder)
    queries = np.ones((1, library.vectors(0).size), np.float32)
    with pytest.raises(ValueError, match=f"{folder / name}: block 0 .* is damaged"):
        library.search(queries, 1) if "vectors" in case else library.read(library.live_ids())


@pytest.mark.parametrize(
    "case", ["cut record", "no record", "empty ids", "no manifest", "cut manifest", "no folder"]
)
def test_a_piece_that_is_not_whole_is_refused_at_once(case: str, folder: Path) -> None:
    name, damage = DAMAGE[case]
    damage(folder / name)
    with pytest.raises(ValueError, match=rf"{folder / name.split('/')[0]}.*memory3 bank verify --fix"):
        Library.open(folder)


@pytest.mark.parametrize("name", ["documents.jsonl", "tokens.bin", "hashes.bin"])
def test_a_damaged_text_is_named_and_only_a_copy_restores_it(name: str, folder: Path, built: Path) -> None:
    file = folder / "text-000001-0000" / name
    flip(file)
    problems = verify(folder)
    assert [problem.path for problem in problems] == [file]
    with pytest.raises(
        ValueError, match=rf"{file}.*restore it from a copy with `memory3 bank fetch COPY {folder}`"
    ):
        repair(editor(folder), problems)
    with pytest.raises(ValueError, match=f"{file}: block 0 .* is damaged"):
        Library.open(folder).document_numbers(["x"]) if name == "hashes.bin" else [
            (Library.open(folder).text(n), Library.open(folder).tokens([n])) for n in range(8)
        ]
    assert fetch(built, folder, told=lambda *_: None) == (1, 1)
    assert hashes(folder) == hashes(built)


def test_a_damaged_state_is_refused_and_an_older_one_not_taken_silently(folder: Path) -> None:
    editor(folder).remove(Library.open(folder).live_ids()[:1])
    flip(folder / "state-000002" / MANIFEST)
    with pytest.raises(ValueError, match=f"{folder / 'state-000002' / MANIFEST}"):
        Library.open(folder)
    assert [problem.path for problem in verify(folder)] == [folder / "state-000002"]


def test_older_states_that_are_damaged_are_given_up_and_the_newest_is_repaired(folder: Path) -> None:
    newer = Editor(folder=folder, compiler=compiler(seed=1), references_per_segment=20)
    newer.refresh()
    whole = hashes(folder / "records-000002-0000")
    for piece in (RECORDS, "records-000002-0000"):
        (folder / piece / "records-00000.bin").unlink()
    reader = hold(folder / "state-000001")
    with pytest.raises(ValueError, match="state-000001 is damaged, and is being read"):
        repair(newer, verify(folder))
    os.close(reader)
    assert repair(newer, verify(folder)) == ["records-000002-0000"]
    assert verify(folder, newer.compiler) == []
    assert hashes(folder / "records-000002-0000") == whole
    assert [path.name for path in folder.glob("state-*")] == ["state-000002"]
    assert not (folder / RECORDS).exists()


def lose_manifest(state: Path) -> None:
    (state / MANIFEST).unlink()


def flip_removed(state: Path) -> None:
    flip(state / "removed.bin")


def cut_removed(state: Path) -> None:
    truncate(state / "removed.bin")


@pytest.mark.parametrize("damage", [lose_manifest, flip_removed, cut_removed])
def test_a_damaged_state_is_to_be_restored_and_not_to_be_deleted(
    damage: Callable[[Path], None], folder: Path, tmp_path: Path
) -> None:
    gone = Library.open(folder).live_ids()[:1]
    editor(folder).remove(gone)
    copy = shutil.copytree(folder, tmp_path / "copy")
    damage(folder / "state-000002")
    for opened in (lambda: Library.open(folder), lambda: editor(folder).add(texts(5, 6))):
        with pytest.raises(
            ValueError, match=rf"{folder / 'state-000002'}.*restore it .* `memory3 bank fetch COPY {folder}`"
        ):
            opened()
    assert verify(folder)
    fetch(copy, folder, told=lambda *_: None)
    assert hashes(folder) == hashes(copy)
    assert not Library.open(folder).is_live(gone).any()


def test_what_a_sweep_left_half_done_is_swept_and_links_lead_nowhere(folder: Path, tmp_path: Path) -> None:
    elsewhere = shutil.copytree(folder / RECORDS, tmp_path / "elsewhere")
    (folder / "records-000000-0000").symlink_to(elsewhere)
    editor(folder).remove(Library.open(folder).live_ids()[:1])
    lose_manifest(folder / "state-000001")
    assert Library.open(folder).number == 2
    editor(folder).add(texts(5, 6))
    assert sorted(path.name for path in folder.glob("state-*")) == ["state-000002", "state-000003"]
    assert not (folder / "records-000000-0000").is_symlink()
    assert (elsewhere / MANIFEST).is_file()


def test_foreign_files_are_named_and_left_alone(folder: Path) -> None:
    for path in (folder / "notes.txt", folder / "text-000001-0000/more.bin"):
        path.write_bytes(b"1")
    problems = verify(folder)
    assert [str(problem.path) for problem in problems] == [
        str(folder / "text-000001-0000/more.bin"),
        str(folder / "notes.txt"),
    ]
    assert repair(editor(folder), problems) == []
    assert (folder / "notes.txt").exists()


@pytest.mark.parametrize("name", ["../text-000001-0000", "/etc", "text-000001-0000/../../x"])
def test_pieces_that_lead_out_of_the_folder_are_refused(name: str, folder: Path) -> None:
    def change(stored: dict[str, object]) -> None:
        stored["settings"]["parts"][0]["text"] = name  # type: ignore[index]

    rewritten(folder / "state-000001" / MANIFEST, change)
    with pytest.raises(ValueError, match="which is no piece's name"):
        Library.open(folder)


def test_files_and_links_that_lead_out_of_a_piece_are_refused(folder: Path, tmp_path: Path) -> None:
    linked = folder / RECORDS
    shutil.move(linked, tmp_path / "elsewhere")
    linked.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"{linked} is a symbolic link"):
        Library.open(folder)
    assert "symbolic link" in str(verify(folder)[0])
    linked.unlink()
    shutil.move(tmp_path / "elsewhere", linked)

    def change(stored: dict[str, object]) -> None:
        stored["files"]["../x"] = stored["files"].pop("ids.npy")  # type: ignore[index, attr-defined]

    rewritten(linked / MANIFEST, change)
    with pytest.raises(ValueError, match="leads out of its folder"):
        Library.open(folder)


def test_a_piece_of_another_library_is_refused(folder: Path, tmp_path: Path) -> None:
    editor(tmp_path / "other").build(texts(5, 10))
    shutil.rmtree(folder / RECORDS)
    shutil.copytree(tmp_path / "other" / RECORDS, folder / RECORDS)
    with pytest.raises(ValueError, match=f"{folder / RECORDS} is not the piece that state 1 names"):
        Library.open(folder)
    (problem,) = verify(folder)
    assert "another piece" in problem.what


def test_records_that_another_model_would_make_are_noticed(folder: Path) -> None:
    problems = verify(folder, compiler(seed=1, weights="w0"), sample=6)
    assert problems
    assert all("is not what the model makes of it" in problem.what for problem in problems)


def test_a_stale_library_is_sound_and_not_compared(folder: Path) -> None:
    newer = compiler(seed=1)
    with pytest.raises(
        ValueError, match=rf"{folder}: weights is w0, but .* is w1; .*bank refresh.*its bytes are sound"
    ):
        verify(folder, newer)
    assert verify(folder, newer, sample=0) == []
    flip(folder / RECORDS / "records-00001.bin")
    assert [problem.piece for problem in verify(folder, newer)] == [RECORDS]


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        (
            RECORDS,
            lambda stored: stored["settings"].update(num_records=7),
            "7 records of .* are stated, but .* ids",
        ),
        (
            "state-000001",
            lambda stored: stored["settings"]["parts"][0].update(documents=4),
            "do not belong together",
        ),
        (
            "state-000001",
            lambda stored: stored["settings"]["parts"][0].update(references=4),
            "do not belong together",
        ),
    ],
)
def test_counts_that_differ_from_the_manifest_are_refused(
    name: str, change: Callable[[dict[str, object]], None], said: str, folder: Path
) -> None:
    rewritten(folder / name / MANIFEST, change)
    if name == RECORDS:  # named by its state, with the fingerprint that it has now
        made = json.loads((folder / name / MANIFEST).read_text())["fingerprint"]
        rewritten(folder / "state-000001" / MANIFEST, lambda stored: stored["inputs"].update({name: made}))  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=said):
        Library.open(folder)


def test_what_compact_copied_is_repaired_in_a_new_state(folder: Path) -> None:
    library = Library.open(folder)
    editor(folder).remove(library.document_numbers([library.describe(0).document]))
    library.close()
    editor(folder).compact()
    flip(next(folder.glob("records-000003-*")) / "records-00000.bin")
    problems = verify(folder)
    repair(editor(folder), problems)
    assert verify(folder, compiler()) == []
    repaired = Library.open(folder)
    assert repaired.read(repaired.live_ids()).shape[0] == len(repaired)


def test_absence_is_told_from_every_byte(folder: Path) -> None:
    word = "Zanzibarquartz"
    editor(folder).add(texts(10, 11, id='a "quoted" id', text=f"{word} is the word."))
    assert len(find_document(folder, 'a "quoted" id', text=word)) == 3
    library = Library.open(folder)
    editor(folder).remove(library.document_numbers(['a "quoted" id']))
    library.close()
    editor(folder).compact()
    assert find_document(folder, 'a "quoted" id', text=word) == []
    assert verify(folder) == []
    half = folder / "records-000009-0000.partial"
    half.mkdir()
    (half / "left").write_bytes(b"x" * 5_000_000 + word.encode())
    assert find_document(folder, "other", text=word) == [
        f"{half / 'left'}: the text given stands at byte 5000000"
    ]


def test_fetch_copies_only_what_is_missing_and_goes_on_after_an_interruption(
    folder: Path, tmp_path: Path
) -> None:
    there = tmp_path / "there"
    copied = []

    def stop(what: str, total: int, done: int, size: int) -> None:
        copied.append(size)
        if len(copied) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(folder, there, told=stop)
    with pytest.raises(ValueError, match="there is no bank"):
        Library.open(there)
    number_of_pieces = len(Library.open(folder).piece_names())
    assert fetch(folder, there, told=lambda *_: None) == (1, number_of_pieces - 2)
    assert hashes(there) == hashes(folder)
    reader = Library.open(there)
    editor(folder).add(texts(10, 11))
    assert fetch(folder, there, told=lambda *_: None) == (2, 3)
    assert reader.number == 1
    assert len(reader.read(reader.live_ids())) == len(reader)
    assert Library.open(there).fingerprint == Library.open(folder).fingerprint
    editor(there).remove(Library.open(there).live_ids()[:1])
    with pytest.raises(ValueError, match=f"{there} went on by itself: its state 3 is not one of {folder}"):
        fetch(folder, there, told=lambda *_: None)


def test_fetch_refuses_a_source_that_is_not_there_or_the_target_itself(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"there is no bank in {tmp_path / 'nowhere'}"):
        fetch(tmp_path / "nowhere", tmp_path / "there", told=lambda *_: None)
    assert not (tmp_path / "there").exists()
    flip(folder / "text-000001-0000" / "documents.jsonl")
    before = hashes(folder)
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(ValueError, match=f"{tmp_path / 'link'} would be its own source"):
        fetch(folder, tmp_path / "link", told=lambda *_: None)
    assert hashes(folder) == before


def test_fetch_refuses_a_damaged_source(folder: Path, tmp_path: Path) -> None:
    flip(folder / RECORDS / "records-00000.bin")
    with pytest.raises(
        ValueError, match=f"{folder / RECORDS / 'records-00000.bin'} differs from its manifest"
    ):
        fetch(folder, tmp_path / "there", told=lambda *_: None)
    with pytest.raises(ValueError, match="there is no bank"):
        Library.open(tmp_path / "there")

"""`memory3 bank`: the life of a bank on the command line, on the Python documentation."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.progress import Progress

from launch import bank as launched
from launch.opened import open_run
from memorybank.cold import stores
from memorybank.library import Library
from memorybank.store import Generation
from memorybank.writer import encode_records
from tests.support.launch import Finished, memory3, trained, within
from tests.support.memorybank import hashes

WORD = "Zanzibarquartz"
TEXT = f"The word of the day is {WORD}, which nobody said before. " * 3


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A bank of all that run `m` may read, in a folder of its own."""
    folder = tmp_path_factory.mktemp("bank") / "library"
    done = bank("build", folder=folder)
    assert done.code == 0, done.err
    assert f"{folder}: state 1, " in done.out
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    return shutil.copytree(built, tmp_path / "library")


def bank(action: str, *arguments: str, folder: Path, run: str = "m") -> Finished:
    return within("bank", action, run, *arguments, "--root", str(trained().root), "--bank", str(folder))


def said(done: Finished) -> str:
    assert done.code == 0, done.err
    return done.out


def lines(path: Path, *records: dict[str, str]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def test_build_compiles_all_that_may_be_read_with_the_newest_weights(built: Path) -> None:
    opened = open_run("m", str(trained().root))
    library = Library.open(built)
    corpus, ids = opened.context.prepared.references, opened.bank_ids
    assert len(library) == len(ids)
    prepared = opened.context.reference_vectors(opened.context.embedder())
    assert np.array_equal(library.read_vectors(np.arange(len(ids))), prepared.read(ids))
    assert [library.describe(number) for number in range(20)] == [corpus.describe(int(n)) for n in ids[:20]]
    assert library.settings.weights == opened.engine.weights_hash()
    assert library.settings.step == 4
    made = encode_records(opened.engine.encode, corpus, ids[:32], opened.codec(), batch=32)
    assert torch.equal(library.read(np.arange(32)), made)
    assert f"\n{len(ids):,} of {len(corpus):,} references of the corpus; " in said(
        bank("build", "--dry-run", folder=built.with_name("none"))
    )
    refused = bank("build", folder=built)
    assert refused.code == 2
    assert f"there is a bank in {built} already" in refused.err


def test_ranks_write_the_bytes_of_one_process_and_one_speaks_for_them(built: Path, tmp_path: Path) -> None:
    folder, library = tmp_path / "library", Library.open(built)
    where = ("--root", str(trained().root), "--bank", str(folder), "--ranks", "2")
    done = memory3("bank", "build", "m", *where)
    assert f"{folder}: state 1, {library.num_documents:,} documents" in said(done)
    assert done.out.count("state 1") == 1
    assert hashes(folder) == hashes(built)
    new = lines(tmp_path / "new.jsonl", {"id": library.describe(0).document, "title": "A day", "text": TEXT})
    refused = memory3("bank", "add", "m", new, *where)
    assert refused.code == 2
    assert refused.err.splitlines()[-1].startswith("memory3 bank add: rank 0: document ")
    assert "Traceback" not in refused.err
    assert Library.open(folder).number == 1


def test_documents_are_encoded_before_their_references_where_asked_for(folder: Path) -> None:
    said(bank("refresh", "--context", "document", folder=folder))
    library = Library.open(folder)
    assert f"document, in windows of {library.settings.window_tokens} tokens" in said(
        bank("stat", folder=folder)
    )
    assert said(bank("verify", folder=folder)) == f"{folder}: sound\n"
    reading = ("--bank", str(folder), "--max-new-tokens", "2", "--root", str(trained().root))
    assert said(within("generate", "m", "--prompt", "The word of the day", *reading))


def test_a_text_that_replaces_another_keeps_its_source_and_licence(folder: Path, tmp_path: Path) -> None:
    def described() -> tuple[str, str]:
        library = Library.open(folder)
        cited = library.describe(int(library.document_numbers(["mine"])[0]))
        return cited.source, cited.licence

    new = lines(tmp_path / "new.jsonl", {"id": "mine", "title": "A day", "text": TEXT})
    said(bank("add", new, "--source", "notes", "--licence", "CC0", folder=folder))
    said(bank("replace", new, folder=folder))
    assert described() == ("notes", "CC0")
    said(bank("replace", new, "--licence", "", folder=folder))
    assert described() == ("notes", "")
    said(bank("replace", new, "--source", "letters", folder=folder))
    assert described() == ("letters", "")
    said(bank("remove", "--source", "letters", folder=folder))


def test_add_search_replace_remove_compact(folder: Path, tmp_path: Path) -> None:
    new = lines(tmp_path / "new.jsonl", {"id": "mine", "title": "A day", "text": TEXT})
    out = said(bank("add", new, "--licence", "CC0", folder=folder))
    assert "state 2, " in out
    found = said(bank("search", f"the word of the day {WORD}", folder=folder))
    assert "A day [mine, characters 0 to " in found.splitlines()[0]
    assert WORD in found.splitlines()[1]
    again = bank("add", new, folder=folder)
    assert again.code == 2
    assert again.err.endswith(
        "document 'mine' is in the bank already; put a new text in its place with `memory3 bank replace`\n"
    )
    other = lines(
        tmp_path / "other.jsonl", {"id": "mine", "title": "A day", "text": "The word is Fluorspar."}
    )
    said(bank("replace", other, folder=folder))
    found = said(bank("search", f"the word of the day {WORD}", folder=folder))
    assert WORD not in found
    assert "Fluorspar" in found
    out = said(bank("remove", "mine", folder=folder))
    assert "removed 1 document of 1 reference: " in out
    assert f"`memory3 bank compact m --root {trained().root} --bank {folder}`" in out
    assert "what the model learnt from them in training, and the prepared corpus, are not the bank's" in out
    assert "Fluorspar" not in said(bank("search", "The word is Fluorspar.", folder=folder))
    there = bank("verify", "--absent", "mine", "--text", "Fluorspar", folder=folder)
    assert there.code == 1
    assert "has the id 'mine'" in there.out
    assert "the text given stands at byte" in there.out
    said(bank("compact", folder=folder))
    gone = said(bank("verify", "--absent", "mine", "--text", "Fluorspar", folder=folder))
    assert f"{folder}: document 'mine' is in none of its files" in gone
    assert said(bank("verify", "--sample", "8", folder=folder)) == f"{folder}: sound\n"
    assert WORD.encode() not in b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_what_training_still_holds_of_a_removed_document_is_named(folder: Path) -> None:
    generation = Generation.open(sorted((trained().main / "bank").glob("generation-continual-*"))[-1])
    opened = open_run("m", str(trained().root))
    opened.cold_start()[0].compile(generation.ids[:1])
    document = opened.context.prepared.references.describe(int(generation.ids[0])).document
    said(bank("remove", document, folder=folder))
    out = said(bank("compact", folder=folder))
    assert f"the prepared corpus {opened.context.prepared.folder} " in out
    assert ", holds 1 of these documents\n" in out
    (line,) = (line for line in out.splitlines() if line.startswith(f"{generation.folder}, a generation of "))
    assert "; training resumes with it at continual-" in line
    assert "delete" not in line
    (kept,) = stores(trained().main / "bank")
    (line,) = (line for line in out.splitlines() if line.startswith(f"{kept}, kept by cold start, holds "))
    assert line.endswith("delete it if it is not needed")


def test_remove_takes_a_source_and_refuses_what_is_not_there(folder: Path, tmp_path: Path) -> None:
    new = lines(tmp_path / "new.jsonl", *({"id": f"mine{n}", "text": TEXT} for n in range(3)))
    said(bank("add", new, "--source", "diary", folder=folder))
    before = Library.open(folder).num_documents
    for arguments, problem in (
        (["mine1", "nope"], "holds no document 'nope'; nothing was removed"),
        (["--source", "dairy"], "holds nothing of source 'dairy'; it has diary, documents"),
        ([], "name the documents to remove by their ids, or all of a source by --source LABEL"),
    ):
        done = bank("remove", *arguments, folder=folder)
        assert done.code == 2
        assert problem in done.err
    assert Library.open(folder).num_documents == before
    assert "removed 3 documents" in said(bank("remove", "--source", "diary", folder=folder))
    assert Library.open(folder).num_documents == before - 3


def test_a_document_that_is_named_twice_is_removed_once(folder: Path) -> None:
    document = Library.open(folder).describe(0).document
    assert "removed 1 document of " in said(bank("remove", document, document, folder=folder))


def lose_everything(folder: Path) -> None:
    shutil.rmtree(folder)


def half_write(folder: Path) -> None:
    (folder / "state-000001").rename(folder / "state-000001.partial")


def lose_records(folder: Path) -> None:
    shutil.rmtree(folder / "records-000001-0000")


def cut_vectors(folder: Path) -> None:
    shard = folder / "vectors-000001-0000" / "vectors-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-1])


def flip_state(folder: Path) -> None:
    manifest = folder / "state-000001" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b"reference", b"refereNce", 1))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lose_everything, "there is no bank in {folder}; make one with `memory3 bank build"),
        (half_write, "there is no bank in {folder}; make one with `memory3 bank build"),
        (lose_records, "{folder}/records-000001-0000"),
        (cut_vectors, "{folder}/vectors-000001-0000/vectors-00000.bin"),
        (flip_state, "{folder}/state-000001/manifest.json"),
    ],
)
def test_what_is_not_whole_is_refused_by_name_by_every_command(
    folder: Path, tmp_path: Path, damage: Callable[[Path], None], named: str
) -> None:
    damage(folder)
    for command in (
        ("search", "the harbour"),
        ("remove", "anything"),
        ("compact",),
        ("compact", "--dry-run"),
        ("stat",),
        ("verify", "--sample", "0"),
        ("fetch",),
    ):
        if command == ("fetch",):
            done = within("bank", "fetch", str(folder), str(tmp_path / "there"))
        else:
            done = bank(*command, folder=folder)
        assert done.code == (
            1 if command[0] == "verify" and damage not in (lose_everything, half_write) else 2
        ), command
        assert named.format(folder=folder) in done.out + done.err, command
    assert not (tmp_path / "there").exists() or not list((tmp_path / "there").glob("state-*"))


@pytest.mark.parametrize(
    "command", [("stat",), ("verify",), ("verify", "--absent", "a"), ("refresh", "--dry-run")]
)
def test_a_folder_that_is_not_there_is_named(tmp_path: Path, command: tuple[str, ...]) -> None:
    done = bank(*command, folder=tmp_path / "nowhere")
    assert done.code == 2
    assert f"there is no bank in {tmp_path / 'nowhere'}" in done.err
    assert not (tmp_path / "nowhere").exists()


def test_a_damaged_record_is_refused_when_generation_reads_it_and_the_remedy_named(folder: Path) -> None:
    shard = folder / "records-000001-0000" / "records-00000.bin"
    content = np.frombuffer(shard.read_bytes(), np.uint8).copy()
    content[:: 1 << 16] ^= 1
    shard.write_bytes(content.tobytes())
    reading = ("--bank", str(folder), "--max-new-tokens", "2", "--root", str(trained().root))
    done = within("generate", "m", "--prompt", "The word of the day", *reading)
    assert done.code == 2
    assert f"{shard}: block " in done.err
    assert "`memory3 bank verify --fix` mends it" in done.err


def test_a_bank_of_other_weights_is_refused_by_name_until_refreshed(folder: Path, tmp_path: Path) -> None:
    new = lines(tmp_path / "new.jsonl", {"id": "mine", "title": "A day", "text": TEXT})
    ours, others = (open_run(run, str(trained().root)).engine.weights_hash() for run in ("m", "c"))
    for command in (("add", new), ("replace", new), ("verify",), ("verify", "--fix")):
        done = bank(*command, folder=folder, run="c")
        assert done.code == 2, command
        assert f"{folder}: weights is {ours}, but the run's newest is {others}" in done.err
        assert "`memory3 bank refresh`" in done.err
    assert Library.open(folder).number == 1
    said(bank("refresh", folder=folder, run="c"))
    assert said(bank("verify", folder=folder, run="c")) == f"{folder}: sound\n"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (
            ("verify", "--text", "word"),
            "--text is searched for beside a document; name that too, by --absent DOC",
        ),
        (("verify", "--sample", "-1"), "--sample -1 is below 0"),
        (("search", " "), "the text to search for is empty"),
        (("search", "words", "-k", "0"), "-k 0 is below 1"),
        (("add", "nowhere.jsonl"), "nowhere.jsonl does not exist"),
        (("refresh", "--ranks", "0"), "--ranks 0 is below 1"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    built: Path, arguments: tuple[str, ...], problem: str
) -> None:
    done = bank(*arguments, folder=built)
    assert done.code == 2
    assert problem in done.err


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"id": "a"}', "line 1: a document without text"),
        (
            '{"id": "a", "text": " "}',
            "bad.jsonl:1: a document without text (field 'text'); give it text, or take its",
        ),
        ('{"text": "words"}', "bad.jsonl:1: a document without id (field 'id'); give it one"),
        ("words", "line 1 is no JSON"),
        ("", "there are no documents to put in"),
    ],
)
def test_files_that_cannot_be_added_are_refused(
    folder: Path, tmp_path: Path, line: str, problem: str
) -> None:
    (tmp_path / "bad.jsonl").write_text(line + "\n")
    done = bank("add", str(tmp_path / "bad.jsonl"), folder=folder)
    assert done.code == 2
    assert problem in done.err
    assert done.err.startswith("memory3 bank: ")  # no empty line before it
    assert Library.open(folder).number == 1


@pytest.mark.parametrize(
    ("size", "said"), [(1, "1.5 kB/s"), (2056, "1,500/s 9.3 MB")], ids=["bytes", "references"]
)
def test_a_rate_is_of_what_is_counted(size: int, said: str) -> None:
    now = 0.0
    progress = Progress(get_time=lambda: now)
    task = progress.add_task("compiling", total=9000, size=0)
    for done in (1500, 3000, 4500):
        now += 1
        progress.update(task, advance=1500, size=done * size)
    assert launched._Rate().render(progress.tasks[0]).plain == said


def test_a_full_disk_leaves_the_bank_as_it_was(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = lines(tmp_path / "new.jsonl", {"id": "mine", "title": "A day", "text": TEXT})
    before = Library.open(folder).fingerprint

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        done = bank("add", new, folder=folder)
    assert done.code == 2
    assert "No space left on device; the bank is as it was before" in done.err
    assert Library.open(folder).fingerprint == before
    assert "state 2, " in said(bank("add", new, folder=folder))


def test_dry_runs_say_bytes_and_time_and_write_nothing(folder: Path, tmp_path: Path) -> None:
    new = lines(tmp_path / "new.jsonl", *({"id": f"mine{n}", "text": TEXT} for n in range(3)))
    there = sorted(folder.rglob("*"))
    library = Library.open(folder)
    out = said(bank("add", new, "--dry-run", folder=folder))
    assert "documents                   3\n" in out
    for name in (
        "search vectors",
        "records",
        "time, about",
        "codec                       bfloat16",
        "index",
        "free",
    ):
        assert name in out
    assert f"{len(library):,}" in said(bank("refresh", "--dry-run", folder=folder))
    assert "0.0% of the references were removed" in said(bank("compact", "--dry-run", folder=folder))
    assert f"{len(library):,}" in said(bank("build", "--dry-run", folder=tmp_path / "nowhere"))
    assert sorted(folder.rglob("*")) == there
    assert not (tmp_path / "nowhere").exists()


def test_verify_names_damage_and_fix_makes_it_anew(folder: Path) -> None:
    (piece,) = folder.glob("records-*")
    shard = piece / "records-00000.bin"
    content = bytearray(shard.read_bytes())
    content[7] ^= 1
    shard.write_bytes(bytes(content))
    done = bank("verify", folder=folder)
    assert done.code == 1
    assert f"{shard}: is missing, or its bytes differ from the manifest" in done.out
    out = said(bank("verify", "--fix", folder=folder))
    assert f"made anew: {piece.name}" in out
    assert out.endswith(f"{folder}: sound\n")
    assert Library.open(folder).number == 1


def test_fetch_brings_a_bank_into_another_folder(folder: Path, tmp_path: Path) -> None:
    done = within("bank", "fetch", str(folder), str(tmp_path / "there"))
    assert "state 1; 3 missing pieces copied" in said(done)
    shutil.rmtree(folder)
    assert "sound" in said(bank("verify", folder=tmp_path / "there"))


def test_stat_describes_the_bank_and_lists_every_generation_of_training(built: Path) -> None:
    done = bank("stat", folder=built)
    library = Library.open(built)
    for words in (f"{library.num_documents:,}", f"{len(library):,}", library.settings.weights, "m, step 4"):
        assert words in said(done)
    for path in (trained().main / "bank").glob("generation-*"):
        generation = Generation.open(path)
        (line,) = [line for line in done.out.splitlines() if path.name in line and "│" in line]
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        assert cells[1:4] == [
            str(generation.settings.step), f"{len(generation):,}", f"{generation.record_bytes:,}",
        ]  # fmt: skip
        assert cells[-1] == generation.settings.weights


def test_a_run_without_a_bank_is_refused_with_the_command() -> None:
    done = within("bank", "stat", "c", "--root", str(trained().root))
    assert done.code == 2
    assert done.err == (
        f"memory3 bank: {trained().control}/bank holds no bank; make one with `memory3 bank build c`\n"
    )
    done = within("bank", "stat", "nope", "--root", str(trained().root))
    assert done.code == 2
    assert f"{trained().root}/nope is not a run folder" in done.err


def test_another_codec_is_kept_by_later_edits_and_read(folder: Path, tmp_path: Path) -> None:
    exact = Library.open(folder).record_bytes
    said(bank("refresh", "--codec", "int8", folder=folder))
    library = Library.open(folder)
    assert (library.settings.codec, library.record_bytes) == ("int8", 8 * (2 * (64 + 2) + 1))
    assert library.record_bytes < exact
    new = lines(tmp_path / "new.jsonl", {"id": "mine", "title": "A day", "text": TEXT})
    said(bank("add", new, folder=folder))
    reading = ("--bank", str(folder), "--max-new-tokens", "4", "--root", str(trained().root))
    done = within("generate", "m", "--prompt", f"The word of the day is {WORD}", *reading)
    assert done.code == 0, done.err
    assert "A day [mine, " in done.out


def test_a_quantiser_is_fitted_by_refresh_and_used_by_later_edits(folder: Path, tmp_path: Path) -> None:
    out = said(bank("refresh", "--codec", "pq16x8", "--dry-run", folder=folder))
    assert "codec                       OPQ16_64,PQ16x8, fitted first\n" in out
    said(bank("refresh", "--codec", "pq16x8", folder=folder))
    library = Library.open(folder)
    assert library.settings.codec.startswith("OPQ16_64,PQ16x8:")
    assert library.record_bytes == 8 * (2 * 16 + 1)
    new = lines(tmp_path / "new.jsonl", {"id": "mine", "title": "A day", "text": TEXT})
    said(bank("add", new, folder=folder))
    assert "OPQ16_64,PQ16x8:" in said(bank("stat", folder=folder))
    reading = ("--bank", str(folder), "--max-new-tokens", "4", "--root", str(trained().root))
    done = within("generate", "m", "--prompt", f"The word of the day is {WORD}", *reading)
    assert done.code == 0, done.err
    assert "A day [mine, " in done.out
    assert said(bank("verify", "--sample", "8", folder=folder)) == f"{folder}: sound\n"

"""From files to everything that training reads: repeatable, resumable, refused when it is something else."""

import hashlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.progress import Progress

from data import prepare as module
from data.config import DataConfig, SourceConfig, SourceKind
from data.documents import Split
from data.files import MANIFEST, verify
from data.prepare import open_prepared, prepare
from data.tokenizer import train
from tests.support.data import data_config, jsonl_source, prepare_sections, sections, write_lines

ARTEFACTS = ("corpus", "tokenizer", "shards", "references")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "sections.jsonl", sections())


def digests(folder: Path) -> dict[str, str]:
    """Of every file of every artefact, its hash."""
    files = (file for name in ARTEFACTS for file in (folder / name).rglob("*") if file.is_file())
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files
    }


def test_one_command_makes_everything(path: Path, tmp_path: Path) -> None:
    with Progress(disable=True) as progress:
        prepared = prepare(data_config(path), tmp_path / "root", progress=progress)
        assert [task.description for task in progress.tasks] == ["documents", "tokens", "references"]
        assert all(task.finished for task in progress.tasks)
    records = sections()
    assert prepared.shards.num_documents == len(records)
    assert [prepared.shards.document(i).id for i in range(len(records))] == [
        record["id"] for record in records
    ]
    assert prepared.tokenizer.vocab_size == 600
    assert len(prepared.references) > len(records) // 2
    assert prepared.probes == []
    for name in ARTEFACTS:
        assert verify(prepared.folder / name) == []
        assert not list(prepared.folder.glob("*.partial"))


def test_workers_change_no_byte(path: Path, tmp_path: Path) -> None:
    one = prepare(data_config(path, num_workers=1), tmp_path / "one")
    two = prepare(data_config(path, num_workers=2), tmp_path / "two")
    assert digests(one.folder) == digests(two.folder)


def test_finished_artefacts_are_reused(path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    prepare(data_config(path), tmp_path)
    before = digests(tmp_path / "small")
    for vocab_size, first_change in ((600, 4), (500, 1), (600, 1)):
        caplog.clear()
        prepare(data_config(path, vocab_size=vocab_size), tmp_path)
        said = [record.getMessage().split(" /")[0] for record in caplog.records]
        assert said == [
            f"{name}: {'reused' if i < first_change else 'made'}" for i, name in enumerate(ARTEFACTS)
        ]
        assert (digests(tmp_path / "small") == before) is (vocab_size == 600)


def test_changed_source_makes_everything_anew(
    path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prepare(data_config(path), tmp_path)
    write_lines(path, [*sections(), {"id": "new", "title": "New", "text": "A new document."}])
    caplog.set_level(logging.INFO)
    prepared = prepare(data_config(path), tmp_path)
    assert [record.getMessage().split(":")[1].split()[0] for record in caplog.records] == ["made"] * 4
    assert prepared.shards.document(prepared.shards.number("new")).text == "A new document."


def test_prepared_corpus_needs_no_source(path: Path, tmp_path: Path) -> None:
    config = data_config(path)
    prepare(config, tmp_path)
    path.unlink()
    assert open_prepared(config, tmp_path).shards.num_documents == len(sections())


def test_what_is_not_prepared_so_is_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"corpus is not prepared; run `memory3 prepare` with all settings"):
        open_prepared(data_config(path), tmp_path)
    prepare(data_config(path), tmp_path)
    with pytest.raises(
        ValueError, match="references was prepared with other settings; run `memory3 prepare` with"
    ):
        open_prepared(data_config(path, reference_tokens=64), tmp_path)
    with pytest.raises(ValueError, match="tokenizer was prepared with other settings"):
        open_prepared(data_config(path, vocab_size=700), tmp_path)
    # A tokenizer that was not the one the shards were made with.
    prepare(data_config(path, vocab_size=700), tmp_path / "other")
    (tmp_path / "small/tokenizer").rename(tmp_path / "gone")
    (tmp_path / "other/small/tokenizer").rename(tmp_path / "small/tokenizer")
    with pytest.raises(ValueError, match=r"shards was made with the tokenizer .* but the one beside it is"):
        open_prepared(data_config(path, vocab_size=700), tmp_path)


def test_existing_tokenizer_is_used(path: Path, tmp_path: Path) -> None:
    first = prepare(data_config(path), tmp_path / "a")
    model = tmp_path / "mine.model"
    model.write_bytes(first.tokenizer.path.read_bytes())
    second = prepare(data_config(path, tokenizer_model=str(model), vocab_size=9999), tmp_path / "b")
    assert second.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert (second.shards.tokens(3) == first.shards.tokens(3)).all()


def test_tokenizer_never_sees_held_out_text(tmp_path: Path) -> None:
    lines = [
        {"id": str(i), "title": "", "text": f"{text['text']}\nzqx{i}zqx"} for i, text in enumerate(sections())
    ]
    seen: list[str] = []

    def spy(texts: Any, *arguments: Any, **options: Any) -> bytes:
        seen.extend(texts)
        return train(seen, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.prepare.train", spy)
        prepared = prepare(data_config(write_lines(tmp_path / "x.jsonl", lines)), tmp_path)
    held_out = set(prepared.shards.corpus.select(split=Split.validation).tolist())
    held_out |= set(prepared.shards.corpus.select(split=Split.test).tolist())
    assert held_out
    text = "\n".join(seen)
    assert {i for i in range(len(lines)) if f"zqx{i}zqx" not in text} == held_out


def test_bad_input_stops_before_anything_is_made(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", [{"id": "1", "title": "t", "text": "a few words"}])
    with pytest.raises(ValueError, match=r"data\.vocab_size=600 is larger than the text allows: at most \d+"):
        prepare(data_config(path, validation_fraction=0.0, test_fraction=0.0), tmp_path)
    with pytest.raises(ValueError, match="the corpus is empty"):
        prepare(data_config(path, sources={"a": jsonl_source(path, min_chars=1000)}), tmp_path)
    with pytest.raises(ValueError, match=r"missing\.jsonl does not exist"):
        prepare(data_config(tmp_path / "missing.jsonl"), tmp_path)
    write_lines(path, [{"id": "1", "title": "t", "text": "twice"}] * 2)
    with pytest.raises(ValueError, match="two documents have the id '1'"):
        prepare(data_config(path), tmp_path)
    assert not (tmp_path / "small/shards").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from data import corpus, references, shards
from data.prepare import prepare
from tests.support.data import data_config

module = {"corpus": corpus, "shards": shards, "references": references}[sys.argv[1]]
write = module.write_shard

def write_or_die(work, shard, *rest):
    if shard == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    write(work, shard, *rest)

module.write_shard = write_or_die
prepare(data_config(Path(sys.argv[2])), Path(sys.argv[3]))
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A corpus and what an uninterrupted preparation makes of it."""
    folder = tmp_path_factory.mktemp("whole")
    path = write_lines(folder / "sections.jsonl", sections())
    return path, digests(prepare(data_config(path), folder).folder)


@pytest.mark.parametrize("stage", ["corpus", "shards", "references"])
def test_killed_preparation_goes_on_where_it_stopped(
    whole: tuple[Path, dict[str, str]], tmp_path: Path, stage: str, caplog: pytest.LogCaptureFixture
) -> None:
    path, uninterrupted = whole
    command = [sys.executable, "-c", KILLED, stage, str(path), str(tmp_path / "killed")]
    killed = subprocess.run(command, env={**os.environ, "PYTHONPATH": os.getcwd()}, check=False)
    assert killed.returncode == -signal.SIGKILL
    work = tmp_path / "killed/small" / f"{stage}.partial"
    assert len(list(work.glob("part-*"))) == 2
    with pytest.raises(ValueError, match="is not prepared"):
        open_prepared(data_config(path), tmp_path / "killed")

    caplog.set_level(logging.INFO)
    resumed = prepare(data_config(path), tmp_path / "killed")
    label = {"corpus": "documents", "shards": "tokens", "references": "references"}[stage]
    assert any(
        record.getMessage().startswith(f"{label}: going on after 2 of") for record in caplog.records
    ), caplog.text
    assert digests(resumed.folder) == uninterrupted


def _die(shard: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _refuse(shard: int) -> None:
    raise ValueError(f"shard {shard} is bad")


def _linger(folder: Path, shard: int) -> None:
    (folder / str(os.getpid())).touch()
    time.sleep(60)


def _factory(task: Callable[[int], None]) -> Callable[[int], None]:
    return task


def test_what_was_made_is_said_in_words(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="data.prepare")
    prepared = prepare_sections(tmp_path, num_countries=3)
    said = dict(each.getMessage().split(": made ") for each in caplog.records if "made" in each.getMessage())
    count, tokens = prepared.shards.num_documents, int(prepared.shards.lengths().sum())
    assert said == {
        "corpus": f"{prepared.folder}/corpus: {count} records, {count} documents, 0 probes",
        "tokenizer": f"{prepared.folder}/tokenizer",
        "shards": f"{prepared.folder}/shards: 600 pieces in the vocabulary, {tokens:,} tokens",
        "references": f"{prepared.folder}/references: {len(prepared.references):,} references",
    }


def test_worker_that_dies_is_reported() -> None:
    with pytest.raises(RuntimeError, match=r"a worker process died, .* data\.num_workers"):
        module._run(partial(_factory, _die), range(4), 2, lambda: None)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_refusal_in_a_worker_is_raised_here(num_workers: int) -> None:
    with pytest.raises(ValueError, match=r"shard \d is bad"):
        module._run(partial(_factory, _refuse), range(4), num_workers, lambda: None)


ORPHANS = """
import sys
from functools import partial
from pathlib import Path
from data.prepare import _run
from tests.data.test_prepare import _factory, _linger

if __name__ == "__main__":
    _run(partial(_factory, partial(_linger, Path(sys.argv[1]))), range(4), 2, lambda: None)
"""


def test_workers_die_with_their_parent(tmp_path: Path) -> None:
    script = tmp_path / "orphans.py"
    script.write_text(ORPHANS)
    folder = tmp_path / "pids"
    folder.mkdir()
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    with subprocess.Popen([sys.executable, str(script), str(folder)], env=environment) as parent:
        wait_until(lambda: len(list(folder.iterdir())) == 2)
        parent.kill()
    workers = [int(file.name) for file in folder.iterdir()]
    wait_until(lambda: not any(alive(worker) for worker in workers))


def wait_until(condition: Callable[[], bool], timeout_seconds: float = 30) -> None:
    end = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def alive(process: int) -> bool:
    """Whether the process runs; one that waits to be buried does not."""
    try:
        status = Path(f"/proc/{process}/stat").read_text().rsplit(") ", 1)[1]
    except FileNotFoundError:
        return False
    return status[0] != "Z"


def test_factbook_brings_its_split_and_its_probes(tmp_path: Path) -> None:
    config = DataConfig(
        name="factbook", sources={"factbook": SourceConfig(kind=SourceKind.factbook)}, num_workers=1
    )
    prepared = prepare(config, tmp_path)
    corpus = prepared.shards.corpus
    assert corpus.sources == ("factbook", "factbook-facts")
    assert prepared.probes
    referred = set(prepared.references.document_of.tolist())
    for probe in prepared.probes:
        section = corpus.number(probe.document)
        assert corpus.document(section).split is probe.split
        assert section in referred, "a held-out section is a reference"
        assert section not in corpus.select(trains=True), "and never training text"
    facts = corpus.select(source="factbook-facts")
    assert not referred & set(facts.tolist()), "facts are training text alone"
    waiting = facts[corpus.table["requires"][facts] >= 0]
    assert len(waiting) > 100
    assert not (tmp_path / ".datasets").exists(), "the factbook does not need `datasets`"
    assert (prepared.folder / "corpus" / MANIFEST).exists()

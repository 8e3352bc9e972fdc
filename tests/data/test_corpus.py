from dataclasses import replace
from pathlib import Path

import pytest

from data import corpus
from data.corpus import Corpus
from data.documents import Document, Probe, Split, Use
from data.files import publishing
from tests.support.data import sections

DOCUMENTS = [
    Document(**record, source="sections", split=Split.train, use=Use.both, group=record["id"][:2])
    for record in sections(2)
]
FACT = Document(
    id="fact",
    text="A fact.",
    source="facts",
    split=Split.train,
    use=Use.training,
    stage="continual",
    requires=DOCUMENTS[3].id,
)
HELD_OUT = Document(id="held", text="Held out.", source="facts", split=Split.validation, use=Use.reference)
PROBE = Probe(
    id="p",
    question="Question: what is \u2028 held out?\nAnswer:",
    answer=" Held",
    relation="r",
    group="g",
    split=Split.validation,
    document="held",
    section="s",
)


def make(folder: Path, shards: list[tuple[str, list[Document]]], probes: tuple[Probe, ...] = ()) -> Corpus:
    identity = {"kind": corpus.KIND, "version": corpus.VERSION, "settings": {}, "inputs": {}}
    with publishing(folder, **identity) as work:  # type: ignore[arg-type]
        for shard, (_, documents) in enumerate(shards):
            assert not corpus.has_shard(work, shard)
            corpus.write_shard(work, shard, documents)
            assert corpus.has_shard(work, shard)
        corpus.finish(work, shards=[source for source, _ in shards], probes=probes)
    return Corpus.open(folder)


def test_documents_come_back_by_number_and_by_id(tmp_path: Path) -> None:
    shards = [("sections", DOCUMENTS[:5]), ("sections", DOCUMENTS[5:]), ("facts", [FACT, HELD_OUT])]
    stored = make(tmp_path / "corpus", shards, (PROBE,))
    everything = [*DOCUMENTS, FACT, HELD_OUT]
    assert stored.num_documents == len(everything)
    assert stored.num_shards == 3
    assert [stored.document(number) for number in range(len(everything))] == everything
    assert [document for shard in range(3) for document in stored.documents(shard)] == everything
    assert [stored.number(document.id) for document in everything] == list(range(len(everything)))
    assert stored.probes() == [PROBE]
    assert stored.sources == ("sections", "facts")
    assert [stored.groups[group] for group in stored.table["group"][: len(DOCUMENTS)]] == [
        document.group for document in DOCUMENTS
    ]
    assert stored.table["group"][stored.number("fact")] == -1
    assert stored.table["requires"][stored.number("fact")] == 3
    assert stored.table["requires"][0] == -1
    with pytest.raises(ValueError, match="no document 'nowhere'"):
        stored.number("nowhere")


def test_select_meets_every_condition(tmp_path: Path) -> None:
    warmup = replace(FACT, id="w", stage="warmup", requires="")
    stored = make(tmp_path / "corpus", [("sections", DOCUMENTS), ("facts", [FACT, warmup, HELD_OUT])])
    n = len(DOCUMENTS)
    assert stored.select().tolist() == list(range(n + 3))
    assert stored.select(split=Split.train, trains=True).tolist() == list(range(n + 2))
    assert stored.select(trains=True, stage="warmup").tolist() == [*range(n), n + 1]
    assert stored.select(trains=True, stage="continual", source="facts").tolist() == [n]
    assert stored.select(refers=True).tolist() == [*range(n), n + 2]
    assert stored.select(uses=[Use.reference]).tolist() == [n + 2]
    assert stored.select(split=Split.validation).tolist() == [n + 2]
    assert stored.select(split=Split.test).tolist() == []


def test_two_documents_with_one_id_are_refused(tmp_path: Path) -> None:
    other = replace(DOCUMENTS[2], text="Another text.", source="facts")
    with pytest.raises(
        ValueError, match=rf"two documents have the id '{other.id}' \(sources 'sections' and 'facts'\)"
    ):
        make(tmp_path / "corpus", [("sections", DOCUMENTS), ("facts", [FACT, other])])


def test_two_documents_with_one_text_are_allowed(tmp_path: Path) -> None:
    stored = make(tmp_path / "corpus", [("sections", [DOCUMENTS[0], replace(DOCUMENTS[0], id="twin")])])
    assert stored.document(0).text == stored.document(1).text


def test_missing_documents_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=rf"fact needs the document '{FACT.requires}', which is not in the corpus"
    ):
        make(tmp_path / "corpus", [("facts", [FACT])])
    with pytest.raises(ValueError, match="the probe 'p' needs the document 'held'"):
        make(tmp_path / "probed", [("sections", DOCUMENTS)], (PROBE,))
    with pytest.raises(ValueError, match="its stage 'later' is none of"):
        make(tmp_path / "other", [("facts", [replace(FACT, stage="later")])])


def test_empty_corpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the corpus is empty: no record is left"):
        make(tmp_path / "corpus", [("sections", []), ("facts", [])])


def test_empty_shard_between_others_does_no_harm(tmp_path: Path) -> None:
    stored = make(tmp_path / "corpus", [("a", DOCUMENTS[:2]), ("b", []), ("c", DOCUMENTS[2:4])])
    assert [list(stored.numbers(shard)) for shard in range(3)] == [[0, 1], [], [2, 3]]
    assert [stored.sources[i] for i in stored.table["source"]] == ["a", "a", "c", "c"]

"""Documents from files of every kind, and what is refused, with the file and the line."""

import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data.config import DataConfig, SourceConfig, SourceKind
from data.documents import Document, Split, Use
from data.sources import content_fingerprints, open_sources, read_json_lines
from tests.support.data import data_config, jsonl_source, sections, write_lines


def read(config: DataConfig, cache: Path) -> list[Document]:
    sources, _ = open_sources(config, cache, content_fingerprints(config))
    return [document for source in sources for document in source.documents(0, source.num_records)]


def read_lines(tmp_path: Path, records: list[Any], **changes: Any) -> list[Document]:
    path = write_lines(tmp_path / "x.jsonl", records)
    fields = {"title_field": None, "id_field": None, **changes}
    return read(data_config(path, sources={"a": jsonl_source(path, **fields)}), tmp_path / "cache")


def write_parquet(path: Path, **columns: list[Any]) -> None:
    import datasets

    datasets.Dataset.from_dict(columns).to_parquet(str(path))


def test_json_lines_become_documents(tmp_path: Path) -> None:
    records = [
        {**record, "other": [1, {"mixed": "types"}] if i % 2 else 7} for i, record in enumerate(sections(2))
    ]
    documents = read_lines(tmp_path, records, title_field="title", id_field="id", licence="public domain")
    assert [(d.id, d.title, d.text) for d in documents] == [(r["id"], r["title"], r["text"]) for r in records]
    assert {(d.source, d.licence, d.stage, d.requires) for d in documents} == {("a", "public domain", "", "")}


def test_records_without_id_are_numbered_by_line(tmp_path: Path) -> None:
    documents = read_lines(tmp_path, [{"text": "one"}, "", {"text": "one"}])
    assert [d.id for d in documents] == ["a:x.jsonl:1", "a:x.jsonl:3"]


def test_values_keep_what_they_are(tmp_path: Path) -> None:
    texts = ["2020-01-01", "12", "true", "  spaces\u00a0\u2028kept \r\n", "\u2581", "\U0001f600"]
    records = [{"text": text, "n": i, "t": i or None} for i, text in enumerate(texts)]
    documents = read_lines(tmp_path, records, id_field="n", title_field="t")
    assert [d.text for d in documents] == texts
    assert [d.id for d in documents] == ["0", "1", "2", "3", "4", "5"]
    assert [d.title for d in documents] == ["", "1", "2", "3", "4", "5"]


def test_title_is_one_line(tmp_path: Path) -> None:
    (document,) = read_lines(tmp_path, [{"text": "x", "t": " a\nb  c "}], title_field="t")
    assert document.training_text == "a b c\nx"


def test_folder_of_files_is_read_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "b").mkdir(parents=True)
    write_lines(folder / "z.jsonl", [{"text": "last"}])
    write_lines(folder / "b/y.jsonl", [{"text": "middle"}])
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "first"}\n'))
    (folder / "notes.txt").write_text("not this")
    (folder / ".ipynb_checkpoints").mkdir()
    write_lines(folder / ".ipynb_checkpoints/z-checkpoint.jsonl", [{"text": "nor this"}])
    (folder / "b/._y.jsonl").write_bytes(b"\x00\x05\x16\x07")  # macOS writes such files beside others
    config = data_config(folder, sources={"a": SourceConfig(kind=SourceKind.jsonl)})
    config.path = str(folder)
    assert [(d.id, d.text) for d in read(config, tmp_path / "cache")] == [
        ("a:a.jsonl.gz:1", "first"),
        ("a:b/y.jsonl:1", "middle"),
        ("a:z.jsonl:1", "last"),
    ]


def test_changed_file_is_read_again(tmp_path: Path) -> None:
    assert [d.text for d in read_lines(tmp_path, [{"text": "old"}])] == ["old"]
    assert [d.text for d in read_lines(tmp_path, [{"text": "new"}])] == ["new"]


def test_parquet_and_text_folders(tmp_path: Path) -> None:
    texts = [record["text"] for record in sections(1)]
    write_parquet(tmp_path / "x.parquet", body=texts, n=list(range(len(texts))))
    folder = tmp_path / "texts"
    folder.mkdir()
    for i, text in enumerate(texts):
        (folder / f"{i:02}.txt").write_bytes(text.encode())
    source = SourceConfig(
        kind=SourceKind.parquet, path=str(tmp_path / "x.parquet"), text_field="body", id_field="n"
    )
    parquet = read(data_config(tmp_path, sources={"p": source}), tmp_path / "cache")
    assert [(d.id, d.text) for d in parquet] == [(str(i), text) for i, text in enumerate(texts)]
    source = SourceConfig(kind=SourceKind.text, path=str(folder))
    folder_texts = read(data_config(tmp_path, sources={"t": source}), tmp_path / "cache")
    assert [(d.id, d.text) for d in folder_texts] == [(f"t:{i:02}.txt", text) for i, text in enumerate(texts)]


def test_hub_layout_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    write_lines(tmp_path / "set/train.jsonl", [{"text": "one"}, {"text": "two"}])
    source = SourceConfig(kind=SourceKind.hub, name=str(tmp_path / "set"))
    documents = read(data_config(tmp_path, sources={"h": source}), tmp_path / "cache")
    assert [(d.id, d.text) for d in documents] == [("h:0", "one"), ("h:1", "two")]
    before = content_fingerprints(data_config(tmp_path, sources={"h": source}))
    write_lines(tmp_path / "set/train.jsonl", [{"text": "other"}])
    assert content_fingerprints(data_config(tmp_path, sources={"h": source})) != before, (
        "made anew when it changes"
    )


def test_a_saved_dataset_is_refused_with_what_to_write(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"text": ["one"]}).save_to_disk(str(tmp_path / "set"))
    source = SourceConfig(kind=SourceKind.hub, name=str(tmp_path / "set"))
    with pytest.raises(
        ValueError, match=r"set was written by save_to_disk; .*to_parquet.*sources\.h\.kind=parquet"
    ):
        read(data_config(tmp_path, sources={"h": source}), tmp_path / "cache")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"text": "x"}, "", "not json"], r"x\.jsonl, line 3 is no JSON: Expecting value"),
        ([{"text": "x"}, '{"text": "cut'], r"x\.jsonl, line 2 is no JSON: Unterminated string"),
        (['{"text": "a"} {"text": "b"}'], r"x\.jsonl, line 1 is no JSON: Extra data"),
        ([{"text": "x"}, '["text"]'], r"x\.jsonl, line 2 is no JSON object"),
        (
            [{"text": "x"}, {"body": "y"}],
            r"line 2: a document without text: it has no field 'text', but \['body'\]; set text_field",
        ),
        ([{"text": None}], r"record x\.jsonl:1: a document without text \(field 'text'\).*min_chars=1"),
        ([{"text": 7}], r"x\.jsonl, line 1: .*: its field 'text' holds a number, not a text"),
        (['[{"text": "x"}]'], r"x\.jsonl is one JSON array; .*: jq -c '\.\[\]' .*x\.jsonl > FILE\.jsonl"),
        (["[", '  {"text": "x"}', "]"], r"x\.jsonl is one JSON array"),
        ([{"text": "x"}, {"text": " \n"}], r"data\.sources\.a, record x\.jsonl:2: a document without text"),
        (['{"text": "half \\ud800"}'], r"line 1 holds half a character"),
        ([], r"x\.jsonl holds no documents"),
    ],
)
def test_lines_that_are_no_documents_are_refused(tmp_path: Path, lines: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_lines(tmp_path, lines)


@pytest.mark.parametrize("content", [b"plain text", gzip.compress(b'{"text": "x"}\n' * 9)[:-12]])
def test_a_file_that_is_no_whole_gzip_file_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.jsonl.gz").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.jsonl\.gz is no whole gzip file: .*; compress it again"):
        list(read_json_lines([tmp_path / "x.jsonl.gz"], "x", SourceConfig(kind=SourceKind.jsonl)))


@pytest.mark.parametrize(
    ("key", "name", "remedy"),
    [
        ("title_field", "titel", "title_field=title"),
        ("id_field", "number", "id_field to one of them, or to null"),
    ],
)
def test_a_field_that_no_record_has_is_refused_with_the_nearest(
    tmp_path: Path, key: str, name: str, remedy: str
) -> None:
    records = [{"text": "x"}, {"text": "y", "title": "t"}]
    message = rf"x\.jsonl has no field '{name}', but \['text', 'title'\]; set data\.sources\.a\.{remedy}$"
    with pytest.raises(ValueError, match=message):
        read_lines(tmp_path, records, **{key: name})
    write_parquet(tmp_path / "x.parquet", text=["x"], title=["t"])
    source = SourceConfig(kind=SourceKind.parquet, path=str(tmp_path / "x.parquet"), **{key: name})
    with pytest.raises(ValueError, match=message.replace("jsonl", "parquet")):
        read(data_config(tmp_path, sources={"a": source}), tmp_path / "cache")


def test_a_title_that_some_records_have_may_be_absent_elsewhere(tmp_path: Path) -> None:
    documents = read_lines(tmp_path, [{"text": "x"}, {"text": "y", "title": None}], title_field="title")
    assert [d.title for d in documents] == ["", ""]


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "ok"}\n{"text": "\xff"}\n')
    with pytest.raises(ValueError, match=r"line 2 is not UTF-8 \(invalid start byte at byte 10\); .*iconv"):
        read(data_config(path), tmp_path / "cache")
    path.write_bytes('{"text": "ok"}\n'.encode("utf-16"))
    with pytest.raises(ValueError, match="line 1 is not UTF-8"):
        read(data_config(path), tmp_path / "cache")


def test_a_mark_of_utf_8_is_no_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes('{"text": "a"}\r\n{"text": "b\\r\\n"}\r\n'.encode("utf-8-sig"))
    documents = read_json_lines([tmp_path / "x.jsonl"], "x", SourceConfig(kind=SourceKind.jsonl))
    assert [d.text for d in documents] == ["a", "b\r\n"]


def test_a_text_file_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"fine")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    config = data_config(tmp_path, sources={"t": SourceConfig(kind=SourceKind.text, path=str(tmp_path))})
    with pytest.raises(ValueError, match=r"b\.txt is not UTF-8 \(.* at byte 3\); convert"):
        read(config, tmp_path / "cache")


def test_document_without_id_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"record x\.jsonl:2: a document without id \(field 'id'\)"):
        read_lines(tmp_path, [{"text": "x", "id": 0}, {"text": "y"}], id_field="id")


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    missing = data_config(tmp_path / "missing.jsonl")
    with pytest.raises(ValueError, match=r"missing\.jsonl does not exist; set data\.path"):
        content_fingerprints(missing)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no file ending in \.jsonl"):
        content_fingerprints(data_config(tmp_path / "empty"))
    write_parquet(tmp_path / "x.parquet", body=["x"])
    source = SourceConfig(kind=SourceKind.parquet, path=str(tmp_path / "x.parquet"))
    with pytest.raises(ValueError, match=r"x\.parquet has no field 'text', but \['body'\]"):
        read(data_config(tmp_path, sources={"p": source}), tmp_path / "cache")
    (tmp_path / "y.parquet").write_bytes(b"no parquet")
    source = SourceConfig(kind=SourceKind.parquet, path=str(tmp_path / "y.parquet"))
    with pytest.raises(ValueError, match=r"y\.parquet cannot be read as parquet"):
        read(data_config(tmp_path, sources={"p": source}), tmp_path / "cache")


def test_short_texts_are_dropped_when_asked(tmp_path: Path) -> None:
    lines = [{"text": text} for text in ("", "ab", "abc", " ")]
    assert [d.text for d in read_lines(tmp_path, lines, min_chars=1)] == ["ab", "abc"]
    assert [d.text for d in read_lines(tmp_path, lines, min_chars=3)] == ["abc"]
    assert [d.text for d in read_lines(tmp_path, lines[1:], max_documents=2)] == ["ab", "abc"]


def test_null_is_no_text_and_dropped_like_it(tmp_path: Path) -> None:
    assert [d.text for d in read_lines(tmp_path, [{"text": None}, {"text": "ab"}], min_chars=1)] == ["ab"]
    write_parquet(tmp_path / "x.parquet", text=[None, "ab"])
    source = SourceConfig(kind=SourceKind.parquet, path=str(tmp_path / "x.parquet"), min_chars=1)
    config = data_config(tmp_path, sources={"a": source})
    assert [d.text for d in read(config, tmp_path / "cache")] == ["ab"]


def test_a_column_of_numbers_is_no_text(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x.parquet", text=[1, 2])
    source = SourceConfig(kind=SourceKind.parquet, path=str(tmp_path / "x.parquet"))
    with pytest.raises(
        ValueError, match=r"field 'text' holds int, not a text; set data\.sources\.a\.text_field"
    ):
        read(data_config(tmp_path, sources={"a": source}), tmp_path / "cache")


def test_held_out_documents_are_neither_training_text_nor_references(tmp_path: Path) -> None:
    lines = [{"text": f"text {i}", "id": f"{i}"} for i in range(1000)]
    documents = read_lines(tmp_path, lines, id_field="id")
    assert 50 < sum(d.split is Split.validation for d in documents) < 150
    assert 50 < sum(d.split is Split.test for d in documents) < 150
    for document in documents:
        assert document.use is (Use.both if document.split is Split.train else Use.training)
    again = read_lines(tmp_path, [*lines[500:], *lines[:100]], id_field="id")
    split_of = {d.id: d.split for d in documents}
    assert all(d.split is split_of[d.id] for d in again), "the split hangs on the id alone"


def test_reference_only_source_holds_nothing_out(tmp_path: Path) -> None:
    lines = [{"text": f"text {i}"} for i in range(200)]
    documents = read_lines(tmp_path, lines, use=Use.reference)
    assert Counter((d.split, d.use) for d in documents) == {(Split.train, Use.reference): 200}


def test_factbook_has_sections_and_facts(tmp_path: Path) -> None:
    config = DataConfig(name="f", sources={"world": SourceConfig(kind=SourceKind.factbook)})
    sources, probes = open_sources(config, tmp_path, content_fingerprints(config))
    assert [source.label for source in sources] == ["world", "world-facts"]
    assert {d.use for d in sources[1].documents(0, 50)} == {Use.training}
    assert {d.source for d in sources[0].documents(0, 50)} == {"world"}
    assert probes


def test_cache_stays_in_its_folder_and_no_network_is_needed(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", [{"text": "one"}])
    script = """
import sys
from pathlib import Path
from data.sources import content_fingerprints, open_sources
from tests.support.data import data_config, jsonl_source
path, cache = map(Path, sys.argv[1:])
config = data_config(path, sources={"a": jsonl_source(path, title_field=None, id_field=None)})
sources, _ = open_sources(config, cache, content_fingerprints(config))
print(sources[0].num_records)
"""
    home = tmp_path / "home"
    home.mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))}
    environment = {**kept, "HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, "-c", script, str(path), str(tmp_path / "cache")],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "1\n"
    assert done.stderr == ""
    assert list(home.rglob("*")) == []
    assert any((tmp_path / "cache").rglob("*.arrow"))


def test_unreachable_hub_dataset_is_named(tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
from data.config import SourceConfig, SourceKind
from data.sources import open_sources
from tests.support.data import data_config
config = data_config(Path(), sources={"h": SourceConfig(kind=SourceKind.hub, name="nobody/nothing")})
try:
    open_sources(config, Path(sys.argv[1]), {})
except ValueError as error:
    print(error)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "data.sources.h: nobody/nothing cannot be read as hub" in done.stdout


def test_content_fingerprint_follows_bytes_and_names_not_places(tmp_path: Path) -> None:
    def fingerprint_of(folder: str, name: str, text: str) -> str:
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / name
        path.write_text(json.dumps({"text": text}))
        return content_fingerprints(data_config(path))["sections"]

    first = fingerprint_of("a", "x.jsonl", "one")
    assert fingerprint_of("b", "x.jsonl", "one") == first
    assert fingerprint_of("c", "y.jsonl", "one") != first
    assert fingerprint_of("d", "x.jsonl", "two") != first

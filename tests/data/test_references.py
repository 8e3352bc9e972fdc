"""References: whole documents in contiguous pieces, each below its title."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.documents import Split, Use
from data.prepare import Prepared, prepare
from data.references import Cutter
from data.tokenizer import Tokenizer
from tests.support.data import data_config, jsonl_source, prepare_sections, sections, write_lines


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare_sections(tmp_path_factory.mktemp("prepared"))


def by_document(prepared: Prepared) -> Iterator[tuple[int, list[int]]]:
    document_of = prepared.references.document_of
    for document in np.unique(document_of):
        yield int(document), np.flatnonzero(document_of == document).tolist()


def test_pieces_of_a_document_are_its_whole_text(prepared: Prepared) -> None:
    references = prepared.references
    for number, ids in by_document(prepared):
        document = prepared.shards.document(number)
        head = f"{document.title}\n"
        assert "".join(references.text(i).removeprefix(head) for i in ids) == document.text
        places = [references.describe(i) for i in ids]
        assert [place.begin for place in places] == [0, *(place.end for place in places[:-1])]
        assert places[-1].end == len(document.text)
        assert {(p.document, p.title, p.source) for p in places} == {
            (document.id, document.title, "sections")
        }
        content = [token for i in ids for token in references.content_tokens(i)]
        title = prepared.shards.title_length(number)
        assert content == prepared.shards.tokens(number)[1 + title :].tolist()


def test_tokens_say_what_the_text_says(prepared: Prepared) -> None:
    references = prepared.references
    tokens_NR, lengths_N, titles_N = references.tokens(range(len(references)))
    assert tokens_NR.shape == (len(references), 128)
    assert tokens_NR.dtype == lengths_N.dtype == titles_N.dtype == np.int64
    assert lengths_N.max() <= 128
    for i, (tokens, length, title) in enumerate(zip(tokens_NR, lengths_N, titles_N, strict=True)):
        assert prepared.tokenizer.decode(tokens[:length]) == references.text(i)
        assert (tokens[length:] == prepared.tokenizer.pad_id).all()
        assert references.text(i).startswith(prepared.tokenizer.decode(tokens[:title]))
        assert tokens[title - 1] == prepared.tokenizer.newline_id
        assert tokens[title:length].tolist() == references.content_tokens(i)
    few = references.tokens(np.array([5, 0, 5]))[0]
    assert (few == tokens_NR[[5, 0, 5]]).all()


def test_pieces_are_nearly_full_and_end_before_lines_and_words(prepared: Prepared) -> None:
    references = prepared.references
    _, lengths_N, _ = references.tokens(range(len(references)))
    inner = [i for _, ids in by_document(prepared) for i in ids[:-1]]
    assert lengths_N[inner].min() >= 128 - 32
    starts = []
    for i in inner:
        text, place = prepared.shards.document(int(references.document_of[i])).text, references.describe(i)
        starts.append(text[place.end - 1 : place.end + 1])
    assert np.mean([start[0] == "\n" or start[1] == " " for start in starts]) > 0.95
    assert np.mean([start[0] == "\n" for start in starts]) > 0.3


def test_only_documents_that_may_be_references_are(prepared: Prepared) -> None:
    documents = {number for number, _ in by_document(prepared)}
    assert documents == set(prepared.shards.corpus.select(refers=True).tolist())
    held_out = prepared.shards.corpus.select(split=Split.validation)
    assert len(held_out)
    assert not documents & set(held_out.tolist())
    chosen = prepared.references.of_documents(np.array([3, 1]))
    assert set(prepared.references.document_of[chosen].tolist()) == {1, 3} & documents


def test_each_use_gets_its_references(tmp_path: Path) -> None:
    records = sections(3)
    uses = dict(zip(Use, (records[:5], records[5:10], records[10:15]), strict=True))
    config = data_config(
        tmp_path,
        sources={
            use.value: jsonl_source(write_lines(tmp_path / f"{use.value}.jsonl", lines), use=use)
            for use, lines in uses.items()
        },
        validation_fraction=0.0,
        test_fraction=0.0,
    )
    prepared = prepare(config, tmp_path)
    found = {prepared.references.describe(i).source for i in range(len(prepared.references))}
    assert found == {"both", "reference"}


def test_documents_without_title_and_with_a_very_long_one(tmp_path: Path) -> None:
    records = [
        {"id": "0", "title": "", "text": sections(1)[0]["text"]},
        {"id": "1", "title": sections(1)[1]["text"][:2000], "text": sections(1)[1]["text"]},
        *sections(2)[3:],
    ]
    config = data_config(
        write_lines(tmp_path / "x.jsonl", records), validation_fraction=0.0, test_fraction=0.0, vocab_size=400
    )
    references = prepare(config, tmp_path).references
    tokens, lengths, titles = references.tokens(range(len(references)))
    untitled, titled = references.of_documents(np.array([0])), references.of_documents(np.array([1]))
    assert set(titles[untitled]) == {0}
    assert references.text(0) == records[0]["text"][: references.describe(0).end]
    assert set(titles[titled]) == {64}
    assert (tokens[titled, 63] == references.shards.tokens(2)[0] * 0 + 3).all(), "a cut title ends its line"
    assert lengths.max() <= 128


@pytest.fixture(scope="module")
def tokenizer(prepared: Prepared) -> Tokenizer:
    return prepared.tokenizer


@given(
    text=st.text(st.sampled_from("ab \n\u4e2d\U0001f600\u2581\u00e9"), min_size=1, max_size=200),
    size=st.integers(16, 40),
    title=st.text(st.sampled_from("ab \u00e9"), max_size=30),
)
def test_cuts_never_split_a_character(tokenizer: Tokenizer, text: str, size: int, title: str) -> None:
    head = tokenizer.encode(f"{title}\n")
    tokens = np.array([tokenizer.bos_id, *head, *tokenizer.encode(text)], dtype=np.uint16)
    rows = Cutter(tokenizer, size).cut(tokens, len(head))
    assert "".join(tokenizer.decode(tokens[row["begin"] : row["end"]]) for row in rows) == text
    for row in rows:
        assert text[row["char_begin"] : row["char_end"]] == tokenizer.decode(
            tokens[row["begin"] : row["end"]]
        )
        assert 1 <= row["end"] - row["begin"] <= size - row["title"]

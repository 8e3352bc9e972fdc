"""Text to ids and back, exactly; models that cannot do it are refused."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from data.tokenizer import Tokenizer, train
from tests.support.data import sections

TEXTS = [record["text"] for record in sections(8)]


def write(path: Path, model: bytes) -> Tokenizer:
    path.write_bytes(model)
    return Tokenizer(path)


def foreign(path: Path, **changes: Any) -> Path:
    """A model such as others train, with their habits."""
    model = io.BytesIO()
    options = {
        "model_type": "bpe",
        "vocab_size": 600,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "minloglevel": 2,
        **changes,
    }
    sentences = (line for text in TEXTS for line in text.split("\n"))
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=sentences, model_writer=model, **options)
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return write(tmp_path_factory.mktemp("tokenizer") / "x.model", train(TEXTS, 800))


@pytest.fixture(scope="module")
def llama_like(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A space before every text, no pad, newline spelt as a byte: the habits of the LLaMA-2 model."""
    return Tokenizer(foreign(tmp_path_factory.mktemp("tokenizer") / "y.model"))


text_of_any_kind = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from("\u2581 \n\t\r\x00<s>0123ab\u4e2d\U0001f600"),
    ),
    max_size=60,
)


@settings(deadline=None)  # a loaded machine is slow, not wrong
@given(text=text_of_any_kind)
def test_round_trip_is_exact(tokenizer: Tokenizer, llama_like: Tokenizer, text: str) -> None:
    for model in (tokenizer, llama_like):
        ids = model.encode(text)
        assert model.decode(ids) == text
        assert model.characters()[ids].sum() == len(text)
        assert model.bos_id not in ids


@pytest.mark.parametrize(("blank", "coverage"), [([], 1.0), (["a b"], 0.999)])
def test_a_text_of_hardly_a_blank_makes_a_tokenizer(
    tmp_path: Path, blank: list[str], coverage: float
) -> None:
    texts = ["".join(chr(0x4E00 + (7 * i * i + line) % 400) for i in range(500)) for line in range(20)]
    tokenizer = write(tmp_path / "x.model", train([*texts, *blank], 800, character_coverage=coverage))
    assert tokenizer.decode(tokenizer.encode(" x  y")) == " x  y"


def test_real_text_round_trips_in_a_batch(tokenizer: Tokenizer) -> None:
    encoded = tokenizer.encode_batch([*TEXTS, "", "a\u2581b"])
    assert [tokenizer.decode(ids) for ids in encoded] == [*TEXTS, "", "a\u2581b"]
    assert encoded == [tokenizer.encode(text) for text in [*TEXTS, "", "a\u2581b"]]


def test_text_can_be_encoded_line_by_line(tokenizer: Tokenizer, llama_like: Tokenizer) -> None:
    for model in (tokenizer, llama_like):
        assert model.encode("a line\n") + model.encode("and a line") == model.encode("a line\nand a line")
        assert model.encode("Answer:") + model.encode(" Paris\n") == model.encode("Answer: Paris\n")


def test_special_tokens(tokenizer: Tokenizer) -> None:
    assert (tokenizer.bos_id, tokenizer.pad_id, tokenizer.newline_id) == (1, 2, 3)
    assert tokenizer.vocab_size == 800
    assert tokenizer.encode("\n\n") == [3, 3]
    assert tokenizer.prefix_ids[0] == tokenizer.bos_id
    assert tokenizer.decode(tokenizer.prefix_ids) == "Reference:"
    assert tokenizer.decode([tokenizer.bos_id, tokenizer.pad_id]) == ""
    assert tokenizer.decode(tokenizer.encode("<s>")) == "<s>", "text cannot spell a special token"
    assert tokenizer.bos_id not in tokenizer.encode("<s>")
    assert [tokenizer.piece(token) for token in tokenizer.encode("2024")] == ["2", "0", "2", "4"]


def test_words_begin_with_their_space(tokenizer: Tokenizer) -> None:
    ids = np.array(tokenizer.encode("the population of the"))
    begins = tokenizer.begins_word()[ids]
    assert begins.sum() == 3
    assert not begins[0]


def test_same_texts_give_the_same_bytes() -> None:
    assert train(TEXTS, 400) == train(iter(TEXTS), 400)


def test_vocabulary_larger_than_the_text_allows(tmp_path: Path) -> None:
    text = ["the quick brown fox jumps over the lazy dog"]
    with pytest.raises(
        ValueError, match=r"data\.vocab_size=4096 is larger than the text allows: at most (\d+)"
    ) as refused:
        train(text, 4096)
    largest = int(str(refused.value).split("at most ")[1].split()[0])
    assert write(tmp_path / "x.model", train(text, largest)).vocab_size == largest


def test_vocabulary_too_small_for_the_characters() -> None:
    text = ["".join(map(chr, range(0x4E00, 0x4F00)))]
    with pytest.raises(ValueError, match=r"data\.vocab_size=300 is too small .* at least 5\d\d"):
        train(text, 300)


@pytest.mark.parametrize("texts", [[], [""], ["\n\n", ""]])
def test_no_text_at_all(texts: list[str]) -> None:
    with pytest.raises(ValueError, match="hold no text"):
        train(texts, 400)


def test_llama_like_model_is_used_without_its_space(llama_like: Tokenizer) -> None:
    assert not llama_like.begins_word()[llama_like.encode("Paris")[0]]
    assert llama_like.pad_id == 2
    assert llama_like.encode("\n") == [llama_like.newline_id]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalization_rule_name": "nmt_nfkc"}, "does not give .* back as it was"),
        ({"remove_extra_whitespaces": True}, "does not give .* back as it was"),
        ({"byte_fallback": False}, "has no byte fallback"),
        ({"bos_id": -1}, "has no <s>"),
    ],
)
def test_models_that_lose_text_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = foreign(tmp_path / "z.model", **changes)
    with pytest.raises(ValueError, match=rf"z\.model: the tokenizer {message}"):
        Tokenizer(path)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "z.model").write_text("nothing")
    with pytest.raises(ValueError, match=r"z\.model is no sentencepiece model"):
        Tokenizer(tmp_path / "z.model")
    with pytest.raises(ValueError, match=r"missing\.model is no sentencepiece model"):
        Tokenizer(tmp_path / "missing.model")


@settings(deadline=None)  # a loaded machine is slow, not wrong
@given(text=text_of_any_kind)
def test_the_texts_of_the_tokens_are_the_text(tokenizer: Tokenizer, llama_like: Tokenizer, text: str) -> None:
    for model in (tokenizer, llama_like):
        ids = model.encode(text)
        parts = model.split([model.bos_id, *ids])
        assert len(parts) == 1 + len(ids)
        assert parts[0] == ""
        assert "".join(parts) == text


def test_bytes_that_spell_no_character_are_decoded_apart(tokenizer: Tokenizer) -> None:
    (*whole, last) = tokenizer.encode("\U0001f600")
    assert tokenizer.split([*tokenizer.encode("a"), last, whole[0]]) == ["a", "\ufffd", "\ufffd"]
    assert tokenizer.split([]) == []

import shutil
from pathlib import Path

import numpy as np
import pytest

from data.files import BLOCK_BYTES
from data.prepare import Prepared
from data.shards import TokenShards, token_dtype
from tests.support.data import prepare_sections


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare_sections(tmp_path_factory.mktemp("prepared"))


def test_tokens_are_those_of_the_documents(prepared: Prepared) -> None:
    shards, tokenizer = prepared.shards, prepared.tokenizer
    assert shards.corpus.num_shards > 1
    for number in range(shards.num_documents):
        document = shards.document(number)
        tokens = shards.tokens(number)
        assert tokens[0] == tokenizer.bos_id
        assert tokenizer.decode(tokens) == document.training_text
        assert len(tokens) == shards.lengths()[number]
        title = shards.title_length(number)
        assert tokenizer.decode(tokens[1 : 1 + title]) == f"{document.title}\n"
        assert shards.number(document.id) == number


def test_spans_are_views(prepared: Prepared) -> None:
    shards = prepared.shards
    tokens = shards.tokens(0, 3, 9)
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == shards.tokens(0).tolist()[3:9]
    assert shards.tokens(0, 5, 5).tolist() == []
    assert not tokens.flags.writeable
    with pytest.raises(ValueError, match=r"document 0 has \d+ tokens, not 0 to 99999"):
        shards.tokens(0, 0, 99_999)


def test_large_vocabularies_take_four_bytes() -> None:
    assert token_dtype(65_536) == np.uint16
    assert token_dtype(65_537) == np.uint32


def test_damage_is_refused(prepared: Prepared, tmp_path: Path) -> None:
    shutil.copytree(prepared.folder, tmp_path / "small")
    path = tmp_path / "small/shards/tokens-00001.bin"
    content = bytearray(path.read_bytes())
    assert len(content) < BLOCK_BYTES
    content[10] ^= 1
    path.write_bytes(content)
    shards = TokenShards.open(tmp_path / "small/shards")
    first, second = (shards.corpus.numbers(shard)[0] for shard in (0, 1))
    shards.tokens(first)
    with pytest.raises(ValueError, match=r"tokens-00001\.bin: block 0 .* is damaged"):
        shards.tokens(second)


def test_another_corpus_beside_it_is_refused(prepared: Prepared, tmp_path: Path) -> None:
    other = prepare_sections(tmp_path, num_countries=3, vocab_size=500)
    shutil.rmtree(other.folder / "shards")
    shutil.copytree(prepared.folder / "shards", other.folder / "shards")
    with pytest.raises(ValueError, match=r"the shards was made from corpus .* but corpus is now"):
        TokenShards.open(other.folder / "shards")

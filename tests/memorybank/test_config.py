from pathlib import Path

import pytest

from memorybank.config import (
    BankConfig,
    BankContext,
    EmbedderConfig,
    EmbedderKind,
    IndexConfig,
    IndexKind,
    RetrievalConfig,
    check_bank,
    check_retrieval,
)
from model.config import ModelConfig


def test_defaults_are_fit_for_use() -> None:
    check_retrieval(RetrievalConfig())


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (RetrievalConfig(candidates=3), r"retrieval\.candidates=3.*retrieval\.fresh=5"),
        (RetrievalConfig(window=0), r"retrieval\.window=0"),
        (RetrievalConfig(overlap_training=90), r"retrieval\.overlap_training=90"),
        (RetrievalConfig(overlap_evaluation=-0.1), r"retrieval\.overlap_evaluation=-0\.1"),
        (RetrievalConfig(embedder=EmbedderConfig(kind=EmbedderKind.folder)), r"embedder\.path is missing"),
        (RetrievalConfig(embedder=EmbedderConfig(path="x")), r"embedder\.path=x.*kind=folder"),
        (RetrievalConfig(embedder=EmbedderConfig(batch_size=0)), r"embedder\.batch_size=0"),
        (RetrievalConfig(index=IndexConfig(recall=95)), r"retrieval\.index\.recall=95"),
        (RetrievalConfig(index=IndexConfig(code_bytes=0)), r"index\.code_bytes=0"),
        (
            RetrievalConfig(index=IndexConfig(kind=IndexKind.exact, code_bytes=8)),
            r"index\.code_bytes=8 is not read by retrieval\.index\.kind=exact",
        ),
    ],
)
def test_each_rule_names_its_key(config: RetrievalConfig, key: str) -> None:
    with pytest.raises(ValueError, match=key):
        check_retrieval(config)


def test_codes_divide_the_embedders_vectors_where_their_size_is_known(tmp_path: Path) -> None:
    def asked(embedder: EmbedderConfig, code_bytes: int) -> RetrievalConfig:
        return RetrievalConfig(
            embedder=embedder, index=IndexConfig(kind=IndexKind.ivf_pq, code_bytes=code_bytes)
        )

    folder = EmbedderConfig(kind=EmbedderKind.folder, path=str(tmp_path))
    check_retrieval(asked(folder, 7))  # nobody knows yet
    (tmp_path / "config.json").write_text('{"hidden_size": 1024}')
    static, minilm = EmbedderConfig(kind=EmbedderKind.static), EmbedderConfig()
    for embedder, size, divisor in ((static, 256, 64), (minilm, 384, 96), (folder, 1024, 256)):
        check_retrieval(asked(embedder, divisor))
        with pytest.raises(ValueError, match=rf"index\.code_bytes=7 does not divide the embedder's {size} "):
            check_retrieval(asked(embedder, 7))


def test_a_recall_below_the_target_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    check_retrieval(RetrievalConfig())
    assert not caplog.records
    check_retrieval(RetrievalConfig(index=IndexConfig(recall=0.9)))
    assert "retrieval.index.recall=0.9 is below 0.95" in caplog.text


def test_documents_are_read_in_windows_of_a_row() -> None:
    model = ModelConfig(row_tokens=256)
    assert BankConfig().window_tokens(model) is None
    assert BankConfig(context=BankContext.document).window_tokens(model) == 256


def test_a_row_that_holds_no_reference_is_no_window() -> None:
    short = ModelConfig(row_tokens=64)
    check_bank(BankConfig(), short)
    check_bank(BankConfig(context=BankContext.document), ModelConfig(row_tokens=128))
    with pytest.raises(
        ValueError, match=r"bank\.context=document .* model\.row_tokens=64.*set bank\.context=reference"
    ):
        check_bank(BankConfig(context=BankContext.document), short)

"""Which codec a bank gets, and that it is found again: real references through a small model."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.references import References
from memorybank import codecs, quantizer
from memorybank.bank import BankReader
from memorybank.codec import Codec, relative_errors
from memorybank.config import STAGES, CodecConfig, CodecKind
from memorybank.record import MemoryShape
from memorybank.store import Generation
from memorybank.team import Team
from memorybank.writer import compile_generation
from tests.support.memorybank import few_rounds, late_on_rank_1, model, model_config, on_ranks, settings

SHAPE = MemoryShape.of(model_config())
SMALL = CodecConfig(kind=CodecKind.residual2x8_pq8x8)


@pytest.fixture(scope="module", autouse=True)
def quickly() -> Iterator[None]:
    with few_rounds():
        yield


def obtained(bank: Path, passages: References, config: CodecConfig = SMALL, **changes: Any) -> Codec:
    given: dict[str, Any] = {
        "encode": model().encode,
        "references": passages,
        "ids": np.arange(20),
        "settings": settings(),
    }
    return codecs.obtain(config, SHAPE, torch.bfloat16, bank, **(given | changes))


@pytest.fixture(scope="module")
def fitted(passages: References, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Codec]:
    bank = tmp_path_factory.mktemp("run") / "bank"
    return bank, obtained(bank, passages)


@pytest.mark.parametrize(
    ("kind", "name", "vector_bytes"),
    [
        (CodecKind.model, "bfloat16", 128),
        (CodecKind.float16, "float16", 128),
        (CodecKind.float8, "float8_e4m3fn", 64),
        (CodecKind.int8, "int8", 66),
        (CodecKind.int4, "int4", 34),
    ],
)
def test_codecs_that_learn_nothing_are_found_by_name(
    kind: CodecKind, name: str, vector_bytes: int, passages: References, tmp_path: Path
) -> None:
    codec = obtained(tmp_path, passages, CodecConfig(kind=kind))
    assert codec.name == codecs.named(name, SHAPE, []).name == name
    assert codec.vector_bytes == vector_bytes
    assert not list(tmp_path.iterdir())
    assert codecs.of_kind(CodecKind.model, SHAPE, torch.float32).name == "float32"


def test_every_kind_has_its_bytes_documented() -> None:
    stated = {kind: sum(-(-parts * bits // 8) for parts, bits in stages) for kind, stages in STAGES.items()}
    assert stated == {
        CodecKind.pq16x8: 16,
        CodecKind.residual2x8_pq8x8: 10,
        CodecKind.residual2x14_pq8x10: 14,
    }


def test_a_generation_is_written_and_read_through_its_quantiser(
    fitted: tuple[Path, Codec], passages: References
) -> None:
    bank, codec = fitted
    folder, ids = bank / "generation-0", np.arange(100, 130)
    compile_generation(model().encode, passages, ids, codec, folder, settings=settings())
    generation = Generation.open(folder)
    assert generation.codec == codec.name
    assert generation.record_bytes == SHAPE.record_bytes(10)
    again = codecs.named(generation.codec, SHAPE, codecs.folders_of(generation.settings.weights, bank))
    batch = BankReader(generation, again).batch(ids.reshape(2, 5, 3))
    tokens_NR, lengths_N, titles_N = (torch.from_numpy(part) for part in passages.tokens(ids))
    with torch.no_grad():
        live = model().encode(tokens_NR, lengths_N, titles_N)
    assert torch.equal(batch.pool.index_NLGS, live.index_NLGS)
    keys, values = relative_errors(again, live)
    difference = batch.pool.k_NLGSE - live.k_NLGSE.float()
    share = difference[:, 0].square().sum() / live.k_NLGSE[:, 0].float().square().sum()
    assert float(share) == pytest.approx(keys[0], rel=0.05)
    assert (
        max(keys + values) < 0.6
    )  # an untrained model's vectors have little structure, and these were not seen


def test_the_same_weights_have_one_quantiser_and_other_weights_another(
    fitted: tuple[Path, Codec], passages: References
) -> None:
    bank, codec = fitted

    def never(*_: object) -> Any:
        raise AssertionError("encoded again")

    assert obtained(bank, passages, encode=never, ids=np.arange(10)).name == codec.name
    other = obtained(bank, passages, encode=model(seed=1).encode, settings=settings(weights="w1"))
    assert other.name != codec.name
    assert codecs.named(codec.name, SHAPE, codecs.folders_of("w0", bank)).name == codec.name


def test_a_quantiser_that_this_host_does_not_list_yet_is_opened_by_its_name(
    fitted: tuple[Path, Codec], monkeypatch: pytest.MonkeyPatch
) -> None:
    bank, codec = fitted
    for lists in ("listdir", "scandir"):
        monkeypatch.setattr(os, lists, lambda *_: pytest.fail("a listing may lag"))
    assert codecs.named(codec.name, SHAPE, codecs.folders_of("w0", bank)).name == codec.name


def test_a_missing_or_another_codec_is_refused_by_name(fitted: tuple[Path, Codec], tmp_path: Path) -> None:
    bank, codec = fitted
    with pytest.raises(
        ValueError, match=rf"{codec.name}, which is not there \(found: none\).*memory3 bank refresh"
    ):
        codecs.named(codec.name, SHAPE, codecs.folders_of("w0", tmp_path))
    with pytest.raises(
        ValueError, match=rf"codec {codec.name[:-1]}!, which is not there \(found: .*{codec.name}"
    ):
        codecs.named(f"{codec.name[:-1]}!", SHAPE, codecs.folders_of("w0", bank))


def test_too_few_references_are_refused_on_every_rank(passages: References, tmp_path: Path) -> None:
    """20 references, 2 of them held out, of at most 2 * 2 * 2 * 8 vectors."""
    refused = []

    def run(team: Team) -> None:
        paper = CodecConfig(kind=CodecKind.residual2x14_pq8x10)
        try:
            obtained(tmp_path, passages, paper, ids=np.arange(20), team=team)
        except ValueError as problem:
            refused.append(str(problem))

    on_ranks(2, run)
    assert len(refused) == 2
    assert refused[0] == refused[1]
    assert (
        "needs 16,384 vectors to be trained, some 256 references; the 18 sampled ones give 1,152"
        in refused[0]
    )
    assert not list(tmp_path.iterdir())


def test_one_rank_trains_and_all_use_it(
    passages: References, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = []

    def run(team: Team) -> None:
        names.append(obtained(tmp_path, passages, team=team).name)

    on_ranks(2, run)
    late_on_rank_1(monkeypatch, codecs, "is_finished")
    monkeypatch.setattr(codecs, "encode_records", None)
    on_ranks(2, run)  # it stands there, whether the other host lists it yet or not
    assert names == [names[0]] * 4
    assert len(list(tmp_path.iterdir())) == 1


def test_the_sample_is_uniform_repeatable_and_apart_from_what_is_held_out() -> None:
    held_out, sample = codecs.draw(SMALL, SHAPE, 5000)
    assert len(held_out) == codecs.MOST_HELD_OUT
    assert len(sample) == codecs.LEAST_SAMPLED  # 156 references would have vectors enough
    assert not np.isin(sample, held_out).any()
    assert len(np.unique(sample)) == len(sample)
    assert sample.max() < 5000
    assert abs(np.mean(sample) / 2500 - 1) < 0.1
    assert np.array_equal(codecs.draw(SMALL, SHAPE, 5000)[1], sample)
    paper = CodecConfig(kind=CodecKind.residual2x14_pq8x10)
    _, sample = codecs.draw(paper, SHAPE, 100_000)
    assert 1.11 * 39 * 2**14 > len(sample) * 2 * SHAPE.num_kept >= 1.1 * 39 * 2**14
    assert quantizer.advised_vectors(paper.kind) == 638_976
    assert [len(part) for part in codecs.draw(SMALL, SHAPE, 1)] == [0, 1]

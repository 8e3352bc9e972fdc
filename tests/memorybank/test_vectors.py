"""Search vectors on disk: read by map, in any order, never held."""

from pathlib import Path

import numpy as np
import pytest

from data.files import open_manifest
from memorybank import vectors as formats
from memorybank.index import Blocks
from memorybank.vectors import Vectors, compile_vectors
from tests.support.memorybank import embedder, hashes, late_on_rank_1, on_ranks, references


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Vectors:
    """Vectors of all references, in shards of 16."""
    compile_vectors(embedder(), references(), tmp_path / "vectors", vectors_per_shard=16)
    return Vectors.open(tmp_path / "vectors")


def expected() -> np.ndarray:
    return embedder().embed([references().text(number) for number in range(len(references()))])


def test_a_host_that_lists_late_does_as_the_first_one_sees(
    compiled: Vectors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late_on_rank_1(monkeypatch, Path, "exists", "is_file")
    for folder in (compiled.folder, tmp_path / "others"):  # the first has been published
        on_ranks(
            2,
            lambda team, folder=folder: compile_vectors(
                embedder(), references(), folder, vectors_per_shard=16, team=team
            ),
        )
        assert hashes(folder) == hashes(compiled.folder)


def test_rows_shards_and_subsets_are_what_the_embedder_makes(compiled: Vectors) -> None:
    everything, rng = expected(), np.random.default_rng(0)
    assert len(compiled) == len(references()) > 64
    rows = rng.permutation(len(compiled))[:40]
    assert np.array_equal(compiled.read(rows), everything[rows])
    assert np.array_equal(np.concatenate([block[:] for _, block in compiled.blocks()]), everything)
    some = np.sort(rows)
    blocks = compiled.blocks_of(some)
    assert [len(ids) for ids, _ in blocks] == np.bincount(some // 16)[np.unique(some // 16)].tolist()
    assert np.array_equal(Blocks(blocks).of(rows), everything[rows])
    assert compiled.blocks_of(some[:0]) == []


def test_consecutive_vectors_are_views_of_the_map(compiled: Vectors) -> None:
    (rows, block), *_ = compiled.blocks()
    assert rows == slice(0, 16)
    found = block[4:9]
    assert not found.flags.owndata
    assert not found.flags.writeable
    assert np.array_equal(found, expected()[4:9])
    assert np.array_equal(block[np.array([9, 2])], expected()[[9, 2]])


def test_a_damaged_block_is_refused_when_it_is_read(compiled: Vectors) -> None:
    path = compiled.folder / formats.vectors_file(1)
    path.write_bytes(bytes(path.stat().st_size))
    damaged = Vectors(open_manifest(compiled.folder, kind=formats.KIND, version=formats.VERSION))
    damaged.read(np.array([3, 40]))
    for read in (
        lambda: damaged.read(np.array([20])),
        lambda: Blocks(damaged.blocks_of(np.array([2, 20]))).at(np.array([1])),
    ):
        with pytest.raises(ValueError, match=f"{path}: block 0 .* is damaged"):
            read()

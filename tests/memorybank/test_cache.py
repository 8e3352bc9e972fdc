import numpy as np
import pytest
import torch

from memorybank.cache import CachedRecords, ReadCounts
from memorybank.store import Generation
from memorybank.writer import compile_generation
from tests.support.memorybank import codec, model, references, settings


@pytest.fixture(scope="module")
def generation(tmp_path_factory: pytest.TempPathFactory) -> Generation:
    folder = tmp_path_factory.mktemp("bank") / "generation-0"
    compile_generation(
        model().encode, references(), np.arange(0, 24, 2), codec(), folder, settings=settings(), batch=12
    )
    return Generation.open(folder)


class Watched:
    """A generation that notes which records are read."""

    def __init__(self, generation: Generation) -> None:
        self.record_bytes = generation.record_bytes
        self.asked: list[list[int]] = []
        self._generation = generation

    def __len__(self) -> int:
        return len(self._generation)

    def read(self, ids_N: np.ndarray) -> torch.Tensor:
        self.asked.append(ids_N.tolist())
        return self._generation.read(ids_N)


def cache(generation: Generation, records: int) -> tuple[CachedRecords, Watched]:
    watched = Watched(generation)
    cached = CachedRecords(watched, max_bytes=records * generation.record_bytes + 1)  # type: ignore[arg-type]
    return cached, watched


def test_the_least_recently_read_records_go_first(generation: Generation) -> None:
    cached, source = cache(generation, 3)
    for ids in ([0, 2, 4], [0], [6], [0, 2, 4, 6]):
        cached.read(np.array(ids))
    # 6 took the place of 2; then 2, of which the cache is not told that it comes back in the same breath.
    assert source.asked == [[0, 2, 4], [6], [2]]
    assert cached.counts == ReadCounts(4, 5, 5 * generation.record_bytes)
    cached.read(np.array([2, 6]))
    assert cached.counts.since(ReadCounts(4, 5, 5 * generation.record_bytes)) == ReadCounts(2, 0, 0)


@pytest.mark.parametrize("records", [0, 1, 3, 7, 100])
def test_what_is_read_is_what_the_bank_holds_whatever_was_read_before(
    records: int, generation: Generation
) -> None:
    cached, _ = cache(generation, records)
    rng = np.random.default_rng(records)
    for _ in range(60):
        ids = rng.permutation(generation.ids)[: rng.integers(0, 9)]
        assert torch.equal(cached.read(ids), generation.read(ids))
    assert len(cached._place_of) <= records
    assert cached._kept.nbytes <= records * generation.record_bytes + 1
    assert (cached.counts.held > 0) == (records > 0)


def test_what_is_not_in_the_bank_is_refused_and_not_kept(generation: Generation) -> None:
    cached, _ = cache(generation, 3)
    with pytest.raises(ValueError, match="no memory of 1 of 2"):
        cached.read(np.array([0, 1]))
    assert cached.counts == ReadCounts()
    assert torch.equal(cached.read(np.array([0])), generation.read(np.array([0])))

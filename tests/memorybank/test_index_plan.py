import pytest

from memorybank.config import IndexConfig, IndexKind
from memorybank.index_plan import plan_index


@pytest.mark.parametrize(
    ("num_vectors", "factory", "training", "disk_gb", "memory_gb"),
    [
        (10_000, "Flat", 0, 0, 0),
        (1_000_000, "IVF4096,Flat", 163_840, 1.544, 0.0063),
        (10_000_000, "IVF65536_HNSW32,Flat", 2_621_440, 15.44, 0.118),
        (100_000_000, "IVF262144_HNSW32,PQ96", 10_485_760, 10.4, 0.472),
    ],
)
def test_auto_chooses_by_size(
    num_vectors: int, factory: str, training: int, disk_gb: float, memory_gb: float
) -> None:
    plan = plan_index(num_vectors, 384, IndexConfig())
    assert plan.factory == factory
    assert plan.training_vectors == training
    assert plan.disk_bytes / 1e9 == pytest.approx(disk_gb, rel=0.01)
    assert plan.memory_bytes / 1e9 == pytest.approx(memory_gb, rel=0.01)
    assert plan.build_bytes <= 17e9
    assert f"{num_vectors:,} vectors" in plan.describe()


@pytest.mark.parametrize("num_vectors", [40, 10_240, 250_001, 1_000_001, 10_000_001, 123_456_789])
@pytest.mark.parametrize("kind", [IndexKind.ivf_flat, IndexKind.ivf_pq])
def test_every_list_has_enough_to_be_trained_on(num_vectors: int, kind: IndexKind) -> None:
    if kind is IndexKind.ivf_pq and num_vectors < 10_240:
        with pytest.raises(ValueError, match=r"index\.kind=ivf_pq needs at least 10,240.*there are 40"):
            plan_index(num_vectors, 256, IndexConfig(kind=kind))
        return
    plan = plan_index(num_vectors, 256, IndexConfig(kind=kind))
    assert 40 * plan.lists <= plan.training_vectors <= num_vectors
    assert plan.shard_vectors * (plan.code_bytes + 8) <= 512 << 20


def test_what_cannot_be_built_is_refused() -> None:
    with pytest.raises(ValueError, match=r"retrieval\.index\.code_bytes=7 does not divide .* 256"):
        plan_index(20_000, 256, IndexConfig(kind=IndexKind.ivf_pq, code_bytes=7))
    with pytest.raises(ValueError, match=r"ivf_flat needs at least 40"):
        plan_index(39, 256, IndexConfig(kind=IndexKind.ivf_flat))

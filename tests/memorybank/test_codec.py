import pytest
import torch

from memorybank.codec import DtypeCodec
from memorybank.record import MemoryShape
from model.memory import ExplicitMemory

SHAPE = MemoryShape(num_layers=3, num_kv_heads=1, tokens_kept=3, head_size=5)


def memory(n: int, dtype: torch.dtype) -> ExplicitMemory:
    generator = torch.Generator().manual_seed(0)
    size = (n, 3, 1, 3, 5)
    return ExplicitMemory(
        k_NLGSE=torch.randn(size, generator=generator).to(dtype),
        v_NLGSE=torch.randn(size, generator=generator).to(dtype),
        index_NLGS=torch.randint(-1, 128, size[:4], generator=generator),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("n", [0, 1, 7])
def test_round_trip_is_exact_in_the_model_s_own_type(dtype: torch.dtype, n: int) -> None:
    codec = DtypeCodec(SHAPE, dtype)
    before = memory(n, dtype)
    records = codec.encode(before)
    assert records.dtype == torch.uint8
    assert records.shape == (n, codec.record_bytes)
    after = codec.decode(records)
    for name in ("k_NLGSE", "v_NLGSE", "index_NLGS"):
        assert torch.equal(getattr(after, name), getattr(before, name))
        assert getattr(after, name).dtype == getattr(before, name).dtype


def test_a_wider_model_loses_no_more_than_the_type_s_precision() -> None:
    codec = DtypeCodec(SHAPE, torch.bfloat16)
    before = memory(9, torch.float32)
    after = codec.decode(codec.encode(before))
    torch.testing.assert_close(after.k_NLGSE.float(), before.k_NLGSE, rtol=2**-8, atol=0)
    assert codec.name == "bfloat16"


def test_strange_values_survive() -> None:
    codec = DtypeCodec(SHAPE)
    before = memory(1, torch.bfloat16)
    before.k_NLGSE.view(-1)[:4] = torch.tensor([float("inf"), -0.0, 1e-40, float("nan")])
    after = codec.decode(codec.encode(before))
    assert torch.equal(after.k_NLGSE.view(torch.int16), before.k_NLGSE.view(torch.int16))


def test_records_of_another_length_are_refused() -> None:
    codec = DtypeCodec(SHAPE)
    with pytest.raises(ValueError, match="another model or codec"):
        codec.decode(torch.zeros(2, codec.record_bytes + 2, dtype=torch.uint8))

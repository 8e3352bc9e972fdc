import pytest
import torch

from memorybank.codec import Codec, Floats, Integers, VectorCoder, relative_errors
from memorybank.record import MemoryShape
from model.memory import ExplicitMemory

SHAPE = MemoryShape(num_layers=3, num_kv_heads=1, tokens_kept=3, head_size=6)


def memory(n: int, dtype: torch.dtype) -> ExplicitMemory:
    generator = torch.Generator().manual_seed(0)
    size = (n, 3, 1, 3, 6)
    return ExplicitMemory(
        k_NLGSE=torch.randn(size, generator=generator).to(dtype),
        v_NLGSE=torch.randn(size, generator=generator).to(dtype),
        index_NLGS=torch.randint(-1, 128, size[:4], generator=generator),
    )


def floats(dtype: torch.dtype) -> Codec:
    return Codec(SHAPE, Floats(dtype, SHAPE.head_size))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("n", [0, 1, 7])
def test_round_trip_is_exact_in_the_model_s_own_type(dtype: torch.dtype, n: int) -> None:
    codec = floats(dtype)
    before = memory(n, dtype)
    records = codec.encode(before)
    assert records.dtype == torch.uint8
    assert records.shape == (n, codec.record_bytes)
    after = codec.decode(records)
    for name in ("k_NLGSE", "v_NLGSE", "index_NLGS"):
        assert torch.equal(getattr(after, name), getattr(before, name))
        assert getattr(after, name).dtype == getattr(before, name).dtype


def test_strange_values_survive() -> None:
    codec = floats(torch.bfloat16)
    before = memory(1, torch.bfloat16)
    before.k_NLGSE.view(-1)[:4] = torch.tensor([float("inf"), -0.0, 1e-40, float("nan")])
    after = codec.decode(codec.encode(before))
    assert torch.equal(after.k_NLGSE.view(torch.int16), before.k_NLGSE.view(torch.int16))


@pytest.mark.parametrize(
    ("coder", "vector_bytes", "step"),
    [
        # The largest relative error of a number.
        (Floats(torch.bfloat16, 6), 12, 2**-8),
        (Floats(torch.float16, 6), 12, 2**-11),
        (Floats(torch.float8_e4m3fn, 6), 6, 2**-4),
    ],
)
def test_narrower_types_lose_no_more_than_their_precision(
    coder: VectorCoder, vector_bytes: int, step: float
) -> None:
    codec, before = Codec(SHAPE, coder), memory(50, torch.float32)
    assert codec.record_bytes == 2 * 9 * vector_bytes + 9
    assert codec.name == coder.name
    after = codec.decode(codec.encode(before))
    torch.testing.assert_close(after.k_NLGSE.float(), before.k_NLGSE, rtol=step, atol=2**-10)
    torch.testing.assert_close(after.v_NLGSE.float(), before.v_NLGSE, rtol=step, atol=2**-10)
    assert torch.equal(after.index_NLGS, before.index_NLGS)


def test_float8_keeps_what_is_too_large_as_its_largest() -> None:
    coder = Floats(torch.float8_e4m3fn, 4)
    decoded = coder.decode(coder.encode(torch.tensor([[1e4, -1e4, 448.0, 0.0]])))
    assert decoded.float().tolist() == [[448.0, -448.0, 448.0, 0.0]]


@pytest.mark.parametrize(("bits", "vector_bytes"), [(8, 8), (4, 5)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_integers_lose_no_more_than_half_a_step_of_their_vector_s_scale(
    bits: int, vector_bytes: int, dtype: torch.dtype
) -> None:
    codec, before = Codec(SHAPE, Integers(bits, 6)), memory(50, dtype)
    # Scales of their own: a vector of tiny numbers keeps its precision beside one of large ones.
    before.k_NLGSE[1] *= 1e-6
    before.k_NLGSE[2] *= 1e6
    before.v_NLGSE[3] = 0
    assert codec.record_bytes == 2 * 9 * vector_bytes + 9
    after = codec.decode(codec.encode(before))
    for x, y in ((before.k_NLGSE.float(), after.k_NLGSE), (before.v_NLGSE.float(), after.v_NLGSE)):
        half_step = x.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1) / 2
        assert ((x - y).abs() <= half_step * 1.01).all()
    assert not after.v_NLGSE[3].any()


def test_integers_stand_as_the_docstring_says() -> None:
    x = torch.tensor([[-7.0, 7.0, 0.0, 3.0]])
    assert Integers(4, 4).encode(x).tolist() == [[1 | 15 << 4, 8 | 11 << 4, 0x80, 0x3F]]  # 1.0 in bfloat16
    assert Integers(8, 4).encode(x * 127 / 7)[0, :4].view(torch.int8).tolist() == [-127, 127, 0, 54]


def test_errors_are_told_by_layer_and_leave_empty_places_out() -> None:
    before = memory(20, torch.float32)
    before.k_NLGSE[:, 1] = (
        before.k_NLGSE[:, 1].sign() * 3.0
    )  # one magnitude: integers lose nothing but the scale's bits
    before.v_NLGSE[before.index_NLGS < 0] = 1e9
    keys, values = relative_errors(Codec(SHAPE, Integers(4, 6)), before)
    assert len(keys) == len(values) == 3
    assert keys[1] < 1e-4
    assert all(1e-3 < error < 2e-2 for error in (keys[0], keys[2], *values))
    kept = before.index_NLGS[:, 0] >= 0
    x = before.v_NLGSE[:, 0][kept]
    coder = Integers(4, 6)
    expected = (coder.decode(coder.encode(x)) - x).square().sum() / x.square().sum()
    assert values[0] == pytest.approx(float(expected), rel=1e-5)


def test_keys_and_values_may_have_a_coder_each() -> None:
    codec = Codec(SHAPE, Floats(torch.float16, 6), Floats(torch.bfloat16, 6), name="both")
    before = memory(4, torch.float32)
    after = codec.decode(codec.encode(before))
    assert torch.equal(after.k_NLGSE, before.k_NLGSE.half())
    assert torch.equal(after.v_NLGSE, before.v_NLGSE.bfloat16())
    assert codec.name == "both"


def test_records_of_another_length_are_refused() -> None:
    codec = floats(torch.bfloat16)
    with pytest.raises(ValueError, match="another model or codec"):
        codec.decode(torch.zeros(2, codec.record_bytes + 2, dtype=torch.uint8))

import pytest
import torch

from memorybank.codec import Codec, Floats
from memorybank.record import MemoryShape
from model.config import ModelConfig
from model.memory import ExplicitMemory


def test_positions_that_do_not_fit_a_byte_are_refused() -> None:
    assert MemoryShape.of(ModelConfig(reference_tokens=255)).num_kept == 64
    with pytest.raises(ValueError, match=r"model\.reference_tokens=256: .*set at most 255"):
        MemoryShape.of(ModelConfig(reference_tokens=256))


def test_bytes_stand_where_the_docstring_draws_them() -> None:
    shape = MemoryShape(num_layers=2, num_kv_heads=1, tokens_kept=2, head_size=2)
    memory = ExplicitMemory(
        k_NLGSE=torch.arange(8, dtype=torch.bfloat16).view(1, 2, 1, 2, 2),
        v_NLGSE=torch.arange(8, 16, dtype=torch.bfloat16).view(1, 2, 1, 2, 2),
        index_NLGS=torch.tensor([5, -1, 0, 254]).view(1, 2, 1, 2),
    )
    (record,) = Codec(shape, Floats(torch.bfloat16, 2)).encode(memory)
    assert record[:16].view(torch.bfloat16).tolist() == list(range(8))
    assert record[16:32].view(torch.bfloat16).tolist() == list(range(8, 16))
    assert record[32:].tolist() == [5, 255, 0, 254]
    assert len(record) == shape.record_bytes(4) == shape.memory_bytes(4) + 4

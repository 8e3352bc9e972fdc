import torch

from memorybank.codec import DtypeCodec
from memorybank.record import MemoryShape, record_bytes
from model.config import ModelConfig
from model.memory import ExplicitMemory


def test_the_paper_s_memory_takes_the_paper_s_bytes() -> None:
    """225,280 numbers, 450,560 bytes in bfloat16 (paper, section 3.1), and where the kept tokens stood."""
    paper = ModelConfig(
        num_layers=44,
        width=3200,
        num_heads=40,
        num_kv_heads=8,
        head_size=80,
        ffn_width=3200,
        num_memory_layers=22,
    )
    assert record_bytes(paper) == 450_560 + 2 * 22 * 8 * 8


def test_bytes_stand_where_the_docstring_draws_them() -> None:
    shape = MemoryShape(num_layers=2, num_kv_heads=1, tokens_kept=2, head_size=2)
    memory = ExplicitMemory(
        k_NLGSE=torch.arange(8, dtype=torch.bfloat16).view(1, 2, 1, 2, 2),
        v_NLGSE=torch.arange(8, 16, dtype=torch.bfloat16).view(1, 2, 1, 2, 2),
        index_NLGS=torch.tensor([5, -1, 0, 127]).view(1, 2, 1, 2),
    )
    (record,) = DtypeCodec(shape).encode(memory)
    assert record[:16].view(torch.bfloat16).tolist() == list(range(8))
    assert record[16:32].view(torch.bfloat16).tolist() == list(range(8, 16))
    assert record[32:].view(torch.int16).tolist() == [5, -1, 0, 127]
    assert len(record) == shape.record_bytes(2)

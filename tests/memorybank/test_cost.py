"""`memorybank.cost`: the paper's bytes, and figures that follow from the code they describe."""

import math
from dataclasses import replace

import pytest
from safetensors import safe_open

from launch.compose import compose_config
from memorybank.codecs import of_kind
from memorybank.config import STAGES, CodecKind
from memorybank.cost import (
    CODECS,
    EMBEDDERS,
    Hardware,
    chunk_work,
    default_lists,
    in_codecs,
    memory_bytes,
    position_bytes,
    sparsification,
    writing,
)
from memorybank.embedder import StaticEmbedder, minilm_folder
from memorybank.record import MemoryShape
from model.config import ModelConfig
from model.flops import knowledge_cost

PAPER = compose_config(["model=paper_2b4"]).model
REFERENCES = 112_000_000


def three(value: float) -> float:
    return float(f"{value:.3g}")


def work(**changes):
    settings = {"references": REFERENCES, "codec": "bfloat16", "embedder": "bge-m3", "fresh": 5}
    parts = chunk_work(PAPER, **{**settings, "hardware": Hardware(), **changes})
    return {part.name: part for part in parts}


def test_the_papers_storage_to_three_digits() -> None:
    everything, layers, heads, memory = (step.bytes_per_reference for step in sparsification(PAPER))
    assert (everything / layers, layers / heads, heads / memory) == (2, 5, 16)
    assert three(everything * REFERENCES / 2**50) == 7.17
    assert three(memory * REFERENCES / 2**40) == 45.9
    assert three(memory_bytes(PAPER, "residual2x14_pq8x10") * REFERENCES / 2**40) == 4.02
    assert (memory, memory_bytes(PAPER, "residual2x14_pq8x10")) == (450_560, 39_424)


@pytest.mark.parametrize("config", [PAPER, ModelConfig(), ModelConfig(head_size=80, tokens_kept=3)])
def test_bytes_are_those_of_the_codec_that_writes_them(config: ModelConfig) -> None:
    kinds = [kind for kind in CodecKind if kind not in STAGES]
    for codec in [of_kind(kind, MemoryShape.of(config)) for kind in kinds]:
        name = codec.name.removesuffix("_e4m3fn")
        assert memory_bytes(config, name) + position_bytes(config) == codec.record_bytes


def test_codecs_are_listed_with_their_bytes() -> None:
    assert {stored.name: stored.bytes_per_reference for stored in in_codecs(PAPER)} == {
        codec: 2 * 22 * 8 * 8 * bytes_of(80) for codec, bytes_of in CODECS.items()
    }
    assert [CODECS[codec](80) for codec in CODECS] == [160, 160, 80, 82, 42, 16, 10, 14]


def test_memories_of_the_papers_speed_test_weigh_72_megabytes() -> None:
    """Batch 32, five memories each (paper, section 7.4); positions are ours."""
    moved = work(fresh=5 * 32)["160 memories from disk"].bytes - 160 * position_bytes(PAPER)
    assert moved == pytest.approx(72e6, rel=2e-3)


def test_reading_overhead_is_the_papers() -> None:
    """Twenty reads in 256 tokens cost 0.228 % of their forward pass without the output head (Remark 8)."""
    parts = work()
    head = 2 * PAPER.vocab_size * PAPER.width * 256
    forward = 4 * parts["the model on the chunk as a prompt"].flops - head
    # Our forward pass attends in rows of 2048, the paper's speed test in 256 tokens.
    forward -= 2 * 256 * PAPER.num_layers * PAPER.width * (PAPER.row_tokens - 256)
    assert 4 * parts["attending to 5 memories"].flops / forward == pytest.approx(0.00228, rel=0.01)


def test_times_are_work_divided_by_rates() -> None:
    slow = Hardware(disk_gb_per_second=1, bus_gb_per_second=2, memory_gb_per_second=4, device_tflops=8)
    for part in work(hardware=slow).values():
        rate = 8e12 if not part.bytes else {"from disk": 1e9, "to the device": 2e9}.get(part.name[11:], 4e9)
        assert part.seconds == pytest.approx((part.bytes or part.flops) / rate)


def test_an_exact_search_reads_every_vector_and_lists_a_part() -> None:
    parts = work()
    exact = parts["search, exact"]
    assert exact.flops == 2 * 1024 * REFERENCES
    assert exact.bytes == 4 * 1024 * REFERENCES
    lists = parts["search, 64 of 131,072 lists"]
    assert lists.bytes == pytest.approx(4 * 1024 * (131_072 + 64 * REFERENCES / 131_072))
    assert work(references=20)["search, 1 of 1 lists"].bytes == 4 * 1024 * 21


@pytest.mark.parametrize(("references", "lists"), [(1, 1), (256, 1), (10**4, 2048), (10**6, 16384)])
def test_lists_are_a_power_of_two_near_16_roots(references: int, lists: int) -> None:
    assert default_lists(references) == lists


def test_embedders_have_the_sizes_of_their_files() -> None:
    (file,) = minilm_folder().glob("*.safetensors")
    with safe_open(file, "pt") as weights:
        shapes = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
    matrices = [shape for name, shape in shapes.items() if ".layer." in name and len(shape) == 2]
    assert EMBEDDERS["minilm"].weights == sum(map(math.prod, matrices))
    assert EMBEDDERS["minilm"].vector_size == shapes["embeddings.word_embeddings.weight"][1]
    assert EMBEDDERS["static"].vector_size == StaticEmbedder().size


def test_writing_a_bank_is_writing_each_reference() -> None:
    cost = writing(
        PAPER,
        references=10,
        codec="residual2x14_pq8x10",
        hardware=Hardware(disk_gb_per_second=1, device_tflops=1),
    )
    assert cost.flops == 10 * knowledge_cost(PAPER).explicit_write
    assert cost.bytes == 10 * (39_424 + 1_408)
    assert (cost.compute_seconds, cost.disk_seconds) == (cost.flops / 1e12, cost.bytes / 1e9)


def test_unknown_names_and_impossible_rates_are_refused() -> None:
    with pytest.raises(ValueError, match=r"codec=zip is unknown; choose one of bfloat16, "):
        memory_bytes(PAPER, "zip")
    with pytest.raises(ValueError, match=r"embedder=bert is unknown; choose one of static, "):
        work(embedder="bert")
    with pytest.raises(ValueError, match=r"bus_gb_per_second=0 is not above 0"):
        replace(Hardware(), bus_gb_per_second=0).check()

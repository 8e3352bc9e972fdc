"""Fault 14: what is said before and after memory runs out, with the largest contributors and what to set."""

import logging
from pathlib import Path

import pytest

from launch import rank_memory
from launch.compose import compose_config, save_config
from launch.config import RunConfig

SUGGESTED = r"set warmup.micro_rows=\d+ \(now \d+\): the same rows in the same order, and .*iB"


@pytest.fixture
def config() -> RunConfig:
    return compose_config(["experiment=demo", "warmup.micro_rows=8", "warmup.rows_per_step=16"])


@pytest.mark.parametrize(
    "problem",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: 4 GB"),
        type("OutOfMemoryError", (RuntimeError,), {})(
            "CUDA out of memory. Tried to allocate 2.00 GiB.\nMore."
        ),
        MemoryError(),
    ],
    ids=["cpu", "cuda", "python"],
)
def test_out_of_memory_names_the_largest_and_a_smaller_micro_batch(
    problem: Exception, config: RunConfig
) -> None:
    with (
        pytest.raises(ValueError, match=rf"out of memory in the warmup stage: .*iB\); {SUGGESTED}") as said,
        rank_memory.explained(config, "warmup"),
    ):
        raise problem
    assert "optimizer" in str(said.value)
    assert "warmup.micro_rows=4 (now 8)" in str(said.value)
    assert "\n" not in str(said.value)


def test_the_allocators_of_torch_say_what_is_looked_for(config: RunConfig) -> None:
    import torch

    with pytest.raises(ValueError, match="out of memory"), rank_memory.explained(config, "warmup"):
        torch.empty(1 << 60, dtype=torch.uint8)


def test_other_errors_stay_what_they_are(config: RunConfig) -> None:
    with pytest.raises(RuntimeError, match="lost a peer"), rank_memory.explained(config, "warmup"):
        raise RuntimeError("lost a peer")


def test_a_micro_batch_of_one_row_has_other_remedies(config: RunConfig) -> None:
    config.warmup.micro_rows = 1  # type: ignore[union-attr]
    assert "set model.activation_checkpointing=true" in rank_memory.suggestion(config, "warmup")


def test_a_suggestion_fits_the_limit(config: RunConfig) -> None:
    from launch.planning import stage_memory

    assert config.warmup is not None
    taken = stage_memory(config, config.warmup, zero_stage=1, cpu=True, micro_rows=2).resident
    assert "micro_rows=2 " in rank_memory.suggestion(config, "warmup", taken)
    assert "micro_rows=1 " in rank_memory.suggestion(config, "warmup", taken - 1)


def test_a_state_that_cannot_fit_is_refused_and_the_rest_is_a_warning(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rank_memory, "memory_here", lambda: 1 << 40)
    monkeypatch.setattr(rank_memory, "available_here", lambda: 1 << 40)
    with caplog.at_level(logging.WARNING):
        rank_memory.check(config)
        assert caplog.text == ""
        monkeypatch.setattr(rank_memory, "available_here", lambda: 64 << 20)
        rank_memory.check(config)
    assert "warmup: a rank may take" in caplog.text
    assert "warmup.micro_rows=" in caplog.text
    monkeypatch.setattr(rank_memory, "memory_here", lambda: 16 << 20)
    with pytest.raises(ValueError, match=r"warmup: weights and optimizer .* raise engine.zero_stage"):
        rank_memory.check(config)


@pytest.mark.parametrize(
    ("by_kernel", "said"), [(True, "the kernel has ended processes"), (False, "if nobody sent that")]
)
def test_a_kill_says_whether_the_kernel_ended_processes(
    by_kernel: bool, said: str, config: RunConfig, tmp_path: Path
) -> None:
    save_config(config, tmp_path / "config.yaml")
    assert said in rank_memory.explain_kill(tmp_path, by_kernel=by_kernel)


def test_the_kernels_counter_is_read(tmp_path: Path) -> None:
    counters = tmp_path / "vmstat"
    counters.write_text("nr_free_pages 12\noom_kill 3\n")
    assert rank_memory.kernel_kills(counters) == 3
    assert rank_memory.kernel_kills(tmp_path / "none") == 0

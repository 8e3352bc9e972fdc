"""The script for a GPU runs in its smallest form, on whatever is here."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from launch.compose import compose_config, laid_over
from tests.support.spawn import spawn
from train import engine
from train.engine import deepspeed_settings


def one_part(**_: object) -> list[gpu.Part]:
    return [part for part in ALL if part.subject == "compile"]


ALL = gpu.parts(smallest=True, peak_tflops=None)


def test_a_part_is_run_and_stands_in_the_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "parts", one_part)
    assert gpu.main(["--smallest", "--output", str(tmp_path)]) == 0
    table = (tmp_path / "gpu.md").read_text()
    assert "forward pass / compiling" in table
    assert table.count("correct") == 14
    assert "attention and its gradients: 389 tokens, head size 80, 32 kept, bfloat16" in table
    assert (tmp_path / "tiny" / "bench_compile.json").exists()


def _timed(*given: Any, **named: Any) -> dict[str, Any]:
    return deepspeed_settings(*given, **named) | {"timers": {"throughput": {"enabled": True}}}


def test_deepspeeds_timers_would_wait_before_and_after_each_micro_batch() -> None:
    assert spawn(_waits_with_timers, world_size=1) == [4.0]


def _waits_with_timers() -> float:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "deepspeed_settings", _timed)
        return gpu.waits_of_a_step()


@pytest.mark.slow
def test_all_of_it(tmp_path: Path) -> None:
    assert gpu.main(["--smallest", "--output", str(tmp_path)]) == 0
    assert {path.name for path in (tmp_path / "tiny").glob("*.json")} == {
        f"bench_{part.subject}.json" for part in ALL
    }


def test_the_parts_fit_into_ten_minutes_and_their_settings_are_known() -> None:
    parts = gpu.parts(smallest=False, peak_tflops=989.0)
    assert gpu._CORRECT_SECONDS + sum(part.seconds for part in parts) <= gpu._SECONDS < 600
    assert {part.subject for part in parts} == {part.subject for part in ALL}
    for part in parts:
        defaults = importlib.import_module(f"launch.bench_{part.subject}").DEFAULTS
        assert compose_config(laid_over(defaults, part.settings)).model.row_tokens == 2048, part


def test_a_slow_part_takes_its_own_share_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock = iter([0.0, 60.0, 300.0])  # begun; the first part; the second
    parts = [gpu.Part("a", "compile", [], 100), gpu.Part("b", "compile", [], 50)]
    given = []

    def run(part: gpu.Part, folder: Path, *, seconds: float) -> str:
        given.append(seconds)
        return "late"

    monkeypatch.setattr(gpu, "correctness", lambda _: [])
    monkeypatch.setattr(gpu, "parts", lambda **_: parts)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(gpu, "_run", run)
    assert gpu.main(["--smallest", "--output", str(tmp_path)]) == 1
    assert given == [100.0]  # until second 160, and the other until 210
    assert "no time left" in (tmp_path / "gpu.md").read_text()


def test_what_fails_or_is_late_is_named(tmp_path: Path) -> None:
    assert "there is no key model.sizes" in str(
        gpu._run(gpu.Part("x", "compile", ["model.sizes=1"], 300), tmp_path, seconds=300)
    )
    assert gpu._run(ALL[0], tmp_path, seconds=0.01) == "no time left"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 2
    assert "--smallest" in capsys.readouterr().err

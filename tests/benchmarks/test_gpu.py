"""The script for a GPU runs in its smallest form, on whatever is here."""

from pathlib import Path

import pytest
import torch

from benchmarks import gpu


def one_part(**_: object) -> list[gpu.Part]:
    return [part for part in ALL if part.subject == "compile"]


ALL = gpu.parts(smallest=True, peak_tflops=None)


def test_a_part_is_run_and_stands_in_the_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "parts", one_part)
    assert gpu.main(["--smallest", "--output", str(tmp_path)]) == 0
    table = (tmp_path / "gpu.md").read_text()
    assert "forward pass / compiling" in table
    assert table.count("correct") == 9
    assert (tmp_path / "tiny" / "bench_compile.json").exists()


@pytest.mark.slow
def test_all_of_it(tmp_path: Path) -> None:
    assert gpu.main(["--smallest", "--output", str(tmp_path)]) == 0
    assert {path.name for path in (tmp_path / "tiny").glob("*.json")} == {
        f"bench_{part.subject}.json" for part in ALL
    }


def test_what_fails_or_is_late_is_named(tmp_path: Path) -> None:
    assert "there is no key model.sizes" in str(
        gpu._run(gpu.Part("x", "compile", ["model.sizes=1"]), tmp_path, seconds=300)
    )
    assert gpu._run(ALL[0], tmp_path, seconds=0.01) == "no time left"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 2
    assert "--smallest" in capsys.readouterr().err

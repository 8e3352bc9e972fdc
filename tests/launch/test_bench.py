"""`memory3 bench`: how figures are counted, and every subject once at a tiny size."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import gate
from launch.bench_attention import Problem, peak_bytes
from launch.timing import Conditions, Figure, Times, interleaved, rate, ratio
from model.attention import fast_attention
from model.config import ModelConfig
from tests.support.launch import Finished, memory3, within

TINY = (
    "model=micro", "model.num_layers=2", "model.num_memory_layers=1", "model.width=64", "model.ffn_width=64",
    "model.num_heads=2", "model.head_size=32", "model.row_tokens=128", "model.vocab_size=128",
)  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def bench(subject: str, folder: Path, *settings: str, threads: int = 1) -> Finished:
    """Run a subject; what it prints and writes names its threads."""
    given = ("bench", subject, "--rounds", "5", "--threads", str(threads), "--output", str(folder), *TINY)
    # What starts an engine has a process of its own: DeepSpeed knows one process group in a process's life.
    done = (memory3 if subject in ("step", "loader") else within)(*given, *settings)
    if done.code == 0:
        found = json.loads((folder / f"bench_{subject}.json").read_text())
        said = f", {threads} thread{'s' if threads > 1 else ''} on "
        assert found["threads"] == threads
        assert said in found["machine"]
        assert said in " ".join(done.out.split())
        assert f" --threads {threads} " in (folder / f"bench_{subject}.md").read_text()
    return done


def test_sides_take_turns_and_the_order_alternates() -> None:
    ran: list[str] = []
    sides = {name: lambda name=name: ran.append(name) for name in "ab"}  # type: ignore[misc]
    times = interleaved(sides, Conditions(3, CPU))
    assert "".join(ran) == "ab" + "ab" + "ba" + "ab"
    assert [len(side.wall) for side in times.values()] == [3, 3]


def test_a_ratio_is_the_median_of_the_rounds_own_ratios() -> None:
    ours = Times("ours", (2.0, 30.0, 4.4), (1.0, 1.0, 1.0))
    other = Times("other", (1.0, 10.0, 2.0), (1.0, 1.0, 1.0))
    figure = ratio("both", ours, other, scale=0.5, target=1.2)
    assert figure.rounds == pytest.approx((1.0, 1.5, 1.1))
    assert (figure.value, figure.met) == (pytest.approx(1.1), True)
    assert ratio("both", ours.plus(other, share=0.5), other).rounds == pytest.approx((2.5, 3.5, 2.7))
    assert rate("speed", other, amount=4.0, unit="rows/s", target=2.0).value == 2.0


def test_a_target_is_met_from_its_own_side() -> None:
    assert Figure("share", (0.5,), target=0.6, at_least=True).met is False
    assert Figure("share", (0.5,), target=0.6).met is True
    assert Figure("share", (0.5,)).met is None


def test_room_is_what_lives_at_the_same_time() -> None:
    x = torch.ones(1000)

    def run() -> None:
        y = x + 1
        z = y.view(10, 100) * 2
        del y
        _ = z + 1

    assert peak_bytes(run, CPU) == 2 * x.nbytes


def test_attention_is_measured_and_written(tmp_path: Path) -> None:
    done = bench("attention", tmp_path, threads=2)
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "bench_attention.json").read_text())
    figures = {figure["what"]: figure for figure in found["figures"]}
    first = figures["ours with memory / library's kernel without"]
    assert len(first["rounds"]) == 5
    assert first["target"] == 1.15
    assert figures["room of ours, twice as long a row with twice as many memories"]["value"] < 2.1
    assert "commit" in found
    assert first["what"] in (tmp_path / "bench_attention.md").read_text()
    assert first["what"][:20] in done.out
    assert (tmp_path / "bench_attention.png").read_bytes().startswith(b"\x89PNG")


def test_generation_is_measured_with_and_without_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.bench_generate.REFERENCES", 800)
    monkeypatch.setattr("launch.bench_generate.ROWS", 3)
    done = bench(
        "generate", tmp_path, "model.chunk_tokens=8", "model.reference_tokens=16", "data.reference_tokens=16"
    )
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "bench_generate.json").read_text())
    figures = {figure["what"]: figure for figure in found["figures"]}
    assert figures["tokens/s with memory / without"]["target"] == 0.90
    assert {
        "tokens/s with memory, records in the cache / without",
        "tokens/s with references as text / without",
    } < {*figures}
    assert found["shape"]["rows"] == "3 of 16 tokens in and 16 out"


@pytest.mark.parametrize(
    ("given", "said"), [(("--rounds", "2"), "give 5 or more"), (("--threads", "0"), "give 1 or more")]
)
def test_what_makes_no_figure_is_refused(tmp_path: Path, given: tuple[str, str], said: str) -> None:
    done = within("bench", "attention", *given, "--output", str(tmp_path))
    assert done.code == 2
    assert said in done.err


def test_steps_are_compared_with_what_their_operations_allow(tmp_path: Path) -> None:
    done = bench("step", tmp_path, "warmup.rows_per_step=2", "warmup.micro_rows=1", "engine.zero_stage=1")
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "bench_step.json").read_text())
    figures = {figure["what"]: figure for figure in found["figures"]}
    assert {figure["target"] for figure in found["figures"]} >= {1.1, 1.15, 0.6, 1.05}
    online = figures["online step / warmup step / ideal"]
    assert float(online["note"].split()[-1]) > 1.2
    assert "4 distinct of 128 tokens" in found["shape"]["references"]
    assert any("matrix products" in line for line in found["findings"])


def test_compiling_is_compared_with_the_forward_pass(tmp_path: Path) -> None:
    done = bench("compile", tmp_path)
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "bench_compile.json").read_text())
    assert found["shape"]["shards"] == "4 of 64 records"  # the overlap of writing and encoding is part of it
    figures = {figure["what"]: figure for figure in found["figures"]}
    assert figures["forward pass / compiling"]["at_least"]
    assert 0 < figures["forward pass / compiling"]["value"] < 2
    assert figures["its files alone / compiling"]["value"] > 0


def test_reading_is_compared_with_a_step(tmp_path: Path) -> None:
    done = bench("loader", tmp_path, "warmup.rows_per_step=2", "warmup.micro_rows=1")
    assert done.code == 0, done.err
    figures = {
        figure["what"]: figure
        for figure in json.loads((tmp_path / "bench_loader.json").read_text())["figures"]
    }
    assert len(figures["time that a step waits for its memories / step"]["rounds"]) == 5
    assert figures["rows"]["value"] > 1e4


def test_masks_and_ours_read_the_same() -> None:
    """What is timed side by side computes the same thing."""
    config = ModelConfig(row_tokens=256, num_heads=4, num_kv_heads=2, head_size=32, prefix_ids=[1, 2])
    problem = Problem.random(config, places=3, dtype=torch.float32, device=CPU)
    for memory in (problem.window, problem.fresh):
        ours, theirs = problem.side(fast_attention, memory)(), problem.dense(memory)()
        assert isinstance(ours, list)
        assert isinstance(theirs, list)
        for left, right in zip(ours, theirs, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


def test_a_gate_is_measured_again_before_it_counts() -> None:
    values = iter([3.0, 2.0, 0.5, 0.1])
    assert gate.measured(lambda: Figure("busy", (next(values),), target=1.0)).value == 0.5
    assert gate.measured(lambda: Figure("dear", (2.0,), target=1.0)).met is False

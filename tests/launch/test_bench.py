"""`memory3 bench`: how figures are counted, and every subject once at a tiny size."""

import json
from pathlib import Path

import pytest
import torch

from launch.bench_attention import peak_bytes
from launch.timing import Conditions, Figure, Times, interleaved, rate, ratio
from tests.support.launch import Finished, within

TINY = (
    "model=micro", "model.num_layers=2", "model.num_memory_layers=1", "model.width=64", "model.ffn_width=64",
    "model.num_heads=2", "model.head_size=32", "model.row_tokens=128", "model.vocab_size=128",
)  # fmt: skip
CPU = torch.device("cpu")


def bench(subject: str, folder: Path, *settings: str) -> Finished:
    return within(
        "bench", subject, "--rounds", "5", "--device", "cpu", "--output", str(folder), *TINY, *settings
    )


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
    done = bench("attention", tmp_path)
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "bench_attention.json").read_text())
    figures = {figure["what"]: figure for figure in found["figures"]}
    first = figures["ours with memory / library's kernel without"]
    assert len(first["rounds"]) == 5
    assert first["target"] == 1.15
    assert figures["room of ours, twice as long a row with twice as many memories"]["value"] < 2.1
    assert "of" in found["machine"]
    assert "commit" in found
    assert first["what"] in (tmp_path / "bench_attention.md").read_text()
    assert first["what"][:20] in done.out
    assert (tmp_path / "bench_attention.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("given", "said"), [(("--rounds", "2"), "give 5 or more"), (("--threads", "0"), "give 1 or more")]
)
def test_what_makes_no_figure_is_refused(tmp_path: Path, given: tuple[str, str], said: str) -> None:
    done = within("bench", "attention", *given, "--output", str(tmp_path))
    assert done.code == 2
    assert said in done.err

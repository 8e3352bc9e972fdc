import math
import re
from pathlib import Path

import pytest

from launch.chart import Chart, Dash, Look, Series, human, mean, picture, render, smoothed, thinned, ticks


def chart(*series: Series, **changes: object) -> Chart:
    return Chart("Loss", "tokens", "nats", series, **changes)  # type: ignore[arg-type]


def heights(page: str) -> list[tuple[float, ...]]:
    """The places of every drawn line, from the top."""
    paths = re.findall(r'<path class="drawn c\d"[^>]* d="(M[^"]+)"', page.split('class="xs"', maxsplit=1)[0])
    return [tuple(float(y) for y in re.findall(r"[ML][\d.]+ ([\d.-]+)", path)) for path in paths]


def test_a_line_rises_to_the_right_when_its_values_do() -> None:
    (line,) = heights(render(chart(Series("m", [(0, 1.0), (10, 2.0), (20, 4.0)]))))
    assert line[0] > line[1] > line[2]
    assert line[0] - line[1] == pytest.approx((line[1] - line[2]) / 2, abs=0.2)


def test_a_logarithmic_line_is_straight_when_it_doubles() -> None:
    (line,) = heights(render(chart(Series("m", [(0, 1.0), (10, 2.0), (20, 4.0)]), is_log=True)))
    assert line[0] - line[1] == pytest.approx(line[1] - line[2], abs=0.2)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_leaves_a_gap(bad: float) -> None:
    page = render(chart(Series("m", [(0, 1.0), (1, 2.0), (2, bad), (3, 2.0), (4, 1.0)])))
    (path,) = re.findall(r'class="drawn c0" d="([^"]+)"', page.split('class="xs"')[0])
    assert path.count("M") == 2
    assert "nan" not in path
    assert "inf" not in path


def test_nothing_to_draw_is_no_chart() -> None:
    assert render(chart()) == ""
    assert render(chart(Series("m", []))) == ""
    assert render(chart(Series("m", [(0, math.nan)]))) == ""


def test_one_point_and_a_constant_line_are_drawn() -> None:
    assert "<figure" in render(chart(Series("m", [(5, 3.0)], look=Look.dots)))
    assert heights(render(chart(Series("m", [(0, 3.0), (9, 3.0)]), has_zero=True)))[0][0] < 500


def test_the_top_cuts_off_what_lies_above_it() -> None:
    (line,) = heights(render(chart(Series("m", [(0, 9.0), (1, 2.0), (2, 1.0)]), top=2.0)))
    assert line[0] < 0 <= line[1]


def test_the_legend_names_series_with_points_and_escapes_them() -> None:
    page = render(chart(Series("<b>&", [(0, 1), (1, 2)], 1, Look.dots, Dash.dashed), Series("unseen", [])))
    assert "&lt;b&gt;&amp;" in page
    assert "<b>" not in page
    assert "unseen" not in page
    assert "<title>&lt;b&gt;&amp;: 2 at 1</title>" in page


def test_a_running_mean_skips_what_is_not_finite() -> None:
    points = [(0, 1.0), (1, math.nan), (2, 3.0), (3, 5.0)]
    assert smoothed(points, 2) == [(0, 1.0), (2, 2.0), (3, 4.0)]


def test_long_lines_are_thinned_and_their_peaks_kept() -> None:
    points = [(float(x), 100.0 if x == 777 else 1.0) for x in range(2001)]
    assert len(thinned(points, mean)) <= 240
    assert max(y for _, y in thinned(points, max)) == 100.0
    assert thinned(points, max)[-1][0] == 2000
    assert thinned([], mean) == []


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (0.2, 0.9, [0.2, 0.4, 0.6, 0.8]), (1.2e6, 2.9e6, [1.5e6, 2e6, 2.5e6])],
)
def test_ticks_are_round_and_inside(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_numbers_for_people() -> None:
    assert [human(value) for value in (0, 0.25, 1500, 20_000, 1.5e6, 2e9)] == [
        "0", "0.25", "1500", "20k", "1.5M", "2B",
    ]  # fmt: skip


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    lines = [
        Series("m", [(0, 1.0), (1, 2.0)], look=Look.dots),
        Series("", [(0, 2.0), (1, 1.0)], look=Look.faint),
    ]
    picture([chart(*lines, marks=[0.5]), chart(*lines, is_log=True)], tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")

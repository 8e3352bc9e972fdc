"""A line chart as data, and its two drawings: part of a page (HTML and SVG, no script), and PNG (matplotlib).

On a page the lines stretch with the chart while type, dots and strokes keep their size, so that the same chart is
readable on a wide screen and on a phone, in the light and in the dark; a dot tells its numbers when pointed at.
Values that are not finite leave a gap.
Not here: which charts there are (`launch.report_page`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from html import escape
from math import ceil, floor, isfinite, log10
from pathlib import Path

Point = tuple[float, float]
_POINTS = 240
"""A line is drawn with at most this many points; each is the mean, or the largest, of its neighbours."""
_COLOURS = ("#2f6fd6", "#d9730d", "#7c4fd0", "#12948a", "#c23a70", "#8a7a1f")
_DARK = ("#6ea4ff", "#ff9d47", "#ab8bff", "#3fc9bb", "#ff7fae", "#cdbb4e")


class Look(Enum):
    """How a series is drawn."""

    line = "line"
    faint = "faint"
    dots = "dots"


class Dash(Enum):
    """Which of several lines of one colour it is; the values are lengths in pixels."""

    solid = ""
    dashed = "6 4"
    dotted = "1 4"


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a chart.

    Attributes:
        label: In the legend; empty: it is not there.
        points: (x, y).
        colour: Number of its colour: the run.
        look: How it is drawn.
        dash: Which of its run's lines it is.
    """

    label: str
    points: Sequence[Point]
    colour: int = 0
    look: Look = Look.line
    dash: Dash = Dash.solid


@dataclass(frozen=True, slots=True)
class Chart:
    """A line chart.

    Attributes:
        title: What it shows.
        x_label: Meaning and unit of x.
        y_label: Meaning and unit of y.
        series: Its lines, the first at the bottom; one without points is left out.
        marks: Places on x where something happened.
        top: Largest y that is shown; None: all.
        is_log: Whether y is logarithmic.
        is_share: Whether y is shown in per cent.
        has_zero: Whether the axis shows 0 in any case.
    """

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    marks: Sequence[float] = ()
    top: float | None = None
    is_log: bool = False
    is_share: bool = False
    has_zero: bool = False

    @property
    def drawn(self) -> list[Series]:
        """The series that have points."""
        return [series for series in self.series if series.points]


def smoothed(points: Sequence[Point], window: int) -> list[Point]:
    """The mean of the last `window` finite values at every point."""
    last: list[float] = []
    found = []
    for x, y in points:
        if isfinite(y):
            last = [*last[-(window - 1) :], y] if window > 1 else [y]
            found.append((x, sum(last) / len(last)))
    return found


def thinned(points: Sequence[Point], pick: Callable[[Sequence[float]], float]) -> list[Point]:
    """At most `_POINTS` points: each stands for as many neighbours, at the last one's place."""
    size = ceil(len(points) / _POINTS) or 1
    groups = [points[begin : begin + size] for begin in range(0, len(points), size)]
    return [(group[-1][0], pick([y for _, y in group])) for group in groups]


def mean(values: Sequence[float]) -> float:
    """The mean; not finite if one of them is not."""
    return sum(values) / len(values)


def human(value: float) -> str:
    """A number for an axis: 1.5M, 20k, 0.25."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.4g}{unit}"
    return f"{value:.4g}"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, about `count` of them."""
    raw = (high - low) / count
    power = 10 ** floor(log10(raw))
    step = next(power * nice for nice in (1, 2, 2.5, 5, 10) if power * nice >= raw * 0.999)
    return [number * step for number in range(ceil(low / step - 1e-9), floor(high / step + 1e-9) + 1)]


@dataclass(frozen=True, slots=True)
class _Frame:
    """Where a chart's values lie, each between 0 and 1."""

    x: tuple[float, float]
    y: tuple[float, float]
    is_log: bool

    def place(self, point: Point) -> Point:
        (left, right), (low, high) = self.x, self.y
        return (point[0] - left) / (right - left), (self._scaled(point[1]) - low) / (high - low)

    def _scaled(self, y: float) -> float:
        return log10(y) if self.is_log else y

    def y_ticks(self) -> list[float]:
        low, high = self.y
        if not self.is_log:
            return ticks(low, high)
        powers = range(floor(low), ceil(high) + 1)
        fine = [m * 10.0**p for p in powers for m in (1, 2, 5) if low <= log10(m * 10.0**p) <= high]
        whole = [y for y in fine if abs(log10(y) - round(log10(y))) < 1e-9]
        return whole if len(whole) > 2 else fine


def _frame(chart: Chart) -> _Frame | None:
    drawn = [point for series in chart.series for point in series.points if _shows(point, chart)]
    if not drawn:
        return None
    left, right = min(x for x, _ in drawn), max(x for x, _ in drawn)
    edge = (right - left) * 0.015 or 0.5  # for the dots at both ends
    values = [log10(y) if chart.is_log else y for _, y in drawn if chart.top is None or y <= chart.top]
    values = values or [chart.top or 0.0]
    low, high = min(values), max(values)
    if chart.has_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    room = (high - low) * 0.06 or abs(high) * 0.05 or 0.5
    low -= 0 if chart.has_zero and low == 0 else room
    high += 0 if chart.has_zero and high == 0 else room
    return _Frame((left - edge, right + edge), (low, high), chart.is_log)


def _shows(point: Point, chart: Chart) -> bool:
    return all(map(isfinite, point)) and (not chart.is_log or point[1] > 0)


def colour(number: int) -> str:
    """The CSS colour of a run, by its number."""
    return f"var(--c{number % len(_COLOURS)})"


def render(chart: Chart) -> str:
    """The chart as a part of a page with `STYLE`; empty if there is nothing to draw."""
    frame = _frame(chart)
    return "" if frame is None else "".join(_figure(chart, frame))


def _figure(chart: Chart, frame: _Frame) -> Iterator[str]:
    yield f'<figure class="chart">\n<figcaption>{escape(chart.title)} <small>{escape(chart.y_label)}</small>'
    yield '</figcaption>\n<div class="plot"><div class="ys">'
    y_ticks = frame.y_ticks()
    for y in y_ticks:
        label = f"{100 * y:.3g} %" if chart.is_share else human(y)
        yield f'<span style="bottom:{frame.place((frame.x[0], y))[1]:.2%}">{label}</span>'
    yield (
        '</div><svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(chart.title)}">'
    )
    for y in y_ticks:
        height = 1000 * (1 - frame.place((frame.x[0], y))[1])
        yield f'<path class="grid{" zero" if y == 0 else ""}" d="M0 {height:.1f}H1000"/>'
    for x in chart.marks:
        if frame.x[0] <= x <= frame.x[1]:
            place = 1000 * (x - frame.x[0]) / (frame.x[1] - frame.x[0])
            yield f'<path class="happened" d="M{place:.1f} 0V1000"/>'
    for series in chart.drawn:
        yield from _lines(series, chart, frame)
    yield '</svg><div class="xs">'
    for x in ticks(*frame.x):
        yield f'<span style="left:{frame.place((x, 1.0))[0]:.2%}">{human(x)}</span>'
    yield f'</div></div>\n<p class="x">{escape(chart.x_label)}</p>\n<p class="series">'
    for series in chart.drawn:
        if series.label:
            dot = (
                f'<path class="dot c{series.colour % len(_COLOURS)}" d="M13 5h0"/>'
                if series.look is Look.dots
                else ""
            )
            yield (
                f'<span><svg class="key" viewBox="0 0 26 10"><path class="{_classes(series)}" '
                f'{_dash(series)}d="M1 5h24"/>{dot}</svg>{escape(series.label)}</span> '
            )
    yield "</p>\n</figure>\n"


def _lines(series: Series, chart: Chart, frame: _Frame) -> Iterator[str]:
    path = ""
    begins = True
    for point in series.points:
        if not _shows(point, chart):
            begins = True
            continue
        x, y = frame.place(point)
        path += f"{'M' if begins else 'L'}{1000 * x:.1f} {1000 * (1 - y):.1f}"
        begins = False
    if path:
        yield f'<path class="{_classes(series)}" {_dash(series)}d="{path}"/>'
    if series.look is Look.dots:
        for point in filter(lambda point: _shows(point, chart), series.points):
            x, y = frame.place(point)
            yield (
                f'<path class="dot c{series.colour % len(_COLOURS)}" d="M{1000 * x:.1f} {1000 * (1 - y):.1f}h0">'
                f"<title>{escape(series.label)}: {point[1]:.4g} at {human(point[0])}</title></path>"
            )


def _classes(series: Series) -> str:
    return f"{'faint' if series.look is Look.faint else 'drawn'} c{series.colour % len(_COLOURS)}"


def _dash(series: Series) -> str:
    return f'stroke-dasharray="{series.dash.value}" ' if series.dash.value else ""


def picture(charts: Sequence[Chart], path: Path) -> None:
    """Draw charts into a PNG, three in a row."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, PercentFormatter

    columns, rows = min(3, len(charts)), ceil(len(charts) / 3)
    size = (5.5 * columns, 5 * rows)
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in grid.flat[len(charts) :]:
        axis.remove()
    styles = {Dash.solid: "-", Dash.dashed: "--", Dash.dotted: ":"}
    for axis, chart in zip(grid.flat, charts, strict=False):
        for series in chart.drawn:
            axis.plot(
                *zip(*series.points, strict=True),
                color=_COLOURS[series.colour % len(_COLOURS)],
                linestyle=styles[series.dash],
                lw=0.8 if series.look is Look.faint else 1.5,
                alpha=0.35 if series.look is Look.faint else 1,
                marker="o" if series.look is Look.dots else None,
                ms=4,
                label=series.label or None,
            )
        for x in chart.marks:
            axis.axvline(x, color="0.7", lw=0.8, ls=":")
        frame = _frame(chart)
        if frame is not None and not chart.is_log:
            axis.set_ylim(*frame.y)
        axis.set(title=chart.title, xlabel=chart.x_label, ylabel=chart.y_label)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: human(x)))
        if chart.is_share:
            axis.yaxis.set_major_formatter(PercentFormatter(1))
        if chart.is_log:
            axis.set_yscale("log")
        axis.grid(alpha=0.25)
        if any(series.label for series in chart.drawn):
            axis.legend(fontsize=8, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    figure.savefig(path, dpi=130)
    plt.close(figure)


STYLE = (
    ":root{"
    + "".join(f"--c{number}:{colour};" for number, colour in enumerate(_COLOURS))
    + "}\n@media (prefers-color-scheme:dark){:root{"
    + "".join(f"--c{number}:{colour};" for number, colour in enumerate(_DARK))
    + "}}\n"
    + "\n".join(f".c{number}{{stroke:var(--c{number})}}" for number in range(len(_COLOURS)))
    + """
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,18rem),1fr));gap:1.6rem 2rem}
.chart{margin:0;min-width:0}
.chart figcaption{font-size:.92rem;font-weight:600;margin-bottom:.5rem}
.chart figcaption small{display:block}
.plot{position:relative;height:13.5rem;margin:0 .3rem 1.35rem 3.1rem}
.plot>svg{position:absolute;inset:0;width:100%;height:100%;border-bottom:1px solid var(--soft)}
.ys span,.xs span{position:absolute;font-size:.74rem;color:var(--soft);font-variant-numeric:tabular-nums;line-height:1}
.ys span{right:100%;margin-right:.45rem;transform:translateY(50%);white-space:nowrap}
.xs span{top:100%;margin-top:.4rem;transform:translateX(-50%)}
.chart path{fill:none;vector-effect:non-scaling-stroke}
.grid{stroke:var(--line);stroke-width:1}
.happened{stroke:var(--soft);stroke-width:1;stroke-dasharray:2 4}
.drawn{stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.faint{stroke-width:1;opacity:.3}
.dot{stroke-width:7;stroke-linecap:round}
.chart .zero{stroke:var(--soft)}
.chart .x{font-size:.74rem;color:var(--soft);text-align:right;margin:-.1rem 0 .35rem}
.series{font-size:.8rem;display:flex;flex-wrap:wrap;gap:.1rem 1rem;padding-left:3.1rem}
.series span{display:flex;align-items:center;gap:.4rem}
.key{width:26px;height:10px;flex:none}
"""
)

"""What a sweep found: a table of its trials, the importance of what was varied, parallel coordinates.

Not here: running it (`launch.sweep`), the importances themselves (`launch.study`).
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.files import write_atomic, writing
from launch.config import RunConfig
from launch.space import Choice, Dimension, Value, quoted
from launch.study import Row, Study

if TYPE_CHECKING:
    from launch.sweep import Sweep

_QUERY = "continual.memory.query"
_MOST_TICKS = 8


def write_report(sweep: "Sweep", config: RunConfig, study: Study, folder: Path) -> str:
    """Write report.md and report.png into the sweep's folder; the text."""
    rows = study.rows()
    importances = study.importances()
    text = render(sweep, config, rows, importances)
    write_atomic(folder / "report.md", text.encode())
    if any(row.state == "finished" for row in rows):
        draw(rows, sweep.space.swept, importances, folder / "report.png", title=objective(sweep, config))
        text += f"\npicture: {folder / 'report.png'}"
    return text


def objective(sweep: "Sweep", config: RunConfig) -> str:
    """What the loss of a trial covers, in words."""
    stage = config.continual or config.warmup
    assert stage is not None
    memory = "without memory"
    if sweep.objective.name == "facts":
        memory = memory if stage.memory is None else "with memory"
        return f"fact probes, validation half, {memory}, nats per answer token, of the trained run"
    if stage.memory is not None:
        memory = f"with memory (query {stage.memory.query.name}, training pattern)"
    rows = config.logging.validation_rows
    return (
        f"held-out text, validation half, {rows * config.model.row_tokens:,} tokens, {memory}, nats per token, at the "
        f"end of the {'continual' if config.continual else 'warmup'} stage"
    )


def render(sweep: "Sweep", config: RunConfig, rows: Sequence[Row], importances: Mapping[str, float]) -> str:
    """The report as Markdown: best first, then what was pruned, failed and still runs."""
    counts = {state: sum(row.state == state for row in rows) for state in _ORDER}
    said = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    lines = [
        f"# Sweep {sweep.name}: {len(rows)} of {sweep.trials} trials ({said or 'none begun'})",
        "",
        f"Loss: {objective(sweep, config)}. One seed; the test half was not read.",
    ]
    if any("text, no memory" in row.beside for row in rows):
        lines += [
            "",
            "Text: held out, nats per token; memory is read by query `previous`, five references a chunk.",
        ]
    if _QUERY in sweep.space.swept and sweep.objective.name == "text":
        lines += [
            "",
            f"Losses of different `{_QUERY}` do not compare: with `own` a chunk's search has seen what is predicted.",
        ]
    lines += ["", *_table(sweep, rows)]
    if importances:
        shares = ", ".join(f"`{key}` {share:.0%}" for key, share in importances.items())
        lines += ["", f"What sets the best quarter of the finished trials apart (PED-ANOVA): {shares}."]
    best = min((row for row in rows if row.state == "finished"), key=_loss, default=None)
    if best is not None:
        lines += [
            "",
            f"Best: trial {best.number}, loss {_loss(best):.4f}; its run is `{sweep.run_name(best.number)}`.",
            "",
            f"    memory3 pretrain {' '.join(map(quoted, sweep.settings(best.number, best.values)))}",
        ]
    return "\n".join(lines) + "\n"


def draw(
    rows: Sequence[Row],
    dimensions: Mapping[str, Dimension],
    importances: Mapping[str, float],
    path: Path,
    *,
    title: str,
) -> None:
    """Draw parallel coordinates, and the importances beside them, into a PNG.

    Args:
        rows: Trials; those that finished are coloured by loss, pruned ones are grey.
        dimensions: The axes, left of that of the loss.
        importances: By key.
        path: The picture.
        title: What the loss covers.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    finished = sorted((row for row in rows if row.state == "finished"), key=_loss, reverse=True)
    pruned = [row for row in rows if row.state == "pruned"]
    losses = [_loss(row) for row in finished]
    keys = [*dimensions, "loss"]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(3.2 + 2.2 * len(keys), 4.6), width_ratios=[2.2 * len(keys), 2.6]
    )
    colour = mpl.cm.ScalarMappable(mpl.colors.Normalize(min(losses), max(losses)), mpl.colormaps["viridis"])
    for row in [*pruned, *finished]:
        places = [_place(row.values[key], dimensions[key]) for key in dimensions]
        if row.state == "finished":
            places.append(_between(_loss(row), min(losses), max(losses)))
        style: dict[str, Any] = {"color": "0.75", "lw": 0.8}
        if row.state == "finished":
            style = {"color": colour.to_rgba(_loss(row)), "lw": 3 if row is finished[-1] else 1.3}
        left.plot(range(len(places)), places, marker="o", ms=3, **style)
    for number, key in enumerate(keys):
        left.axvline(number, color="0.3", lw=0.8, zorder=0)
        ticks = (
            _ticks(dimensions[key]) if key in dimensions else [(f"{loss:.3f}", loss) for loss in losses[:1]]
        )
        for text, at in ticks:
            place = at if key in dimensions else _between(at, min(losses), max(losses))
            left.text(
                number + 0.03,
                place,
                text,
                fontsize=8,
                va="center",
                bbox={"fc": "white", "ec": "none", "pad": 0.5},
            )
    best = f"{losses[-1]:.3f}, trial {finished[-1].number}"
    left.text(len(keys) - 0.97, 0, best, fontsize=8, weight="bold", va="center")
    left.set(xticks=range(len(keys)), yticks=[], ylim=(-0.06, 1.06), xlim=(-0.1, len(keys) - 0.6))
    left.set_xticklabels([key.replace(".", ".\n", key.count(".")) for key in keys], fontsize=8)
    counted = f"{len(finished)} finished trials (thick: the best)"
    left.set_title(f"{counted}, {len(pruned)} pruned (grey)" if pruned else counted, fontsize=9)
    shown = sorted(importances.items(), key=lambda item: item[1])
    bars = right.barh(
        [key.rpartition(".")[2] for key, _ in shown], [share for _, share in shown], color="0.45", height=0.5
    )
    right.bar_label(bars, [f"{share:.0%}" for _, share in shown], fontsize=8, padding=3)
    right.tick_params(labelsize=8, length=0)
    right.set(xlim=(0, 1.15), xticks=[])
    right.set_xlabel("importance: what sets the best\nquarter apart (PED-ANOVA)", fontsize=8)
    right.set_title("" if shown else "importance: four finished\ntrials are needed", fontsize=9)
    left.spines[:].set_visible(False)
    right.spines[["top", "right", "bottom"]].set_visible(False)
    right.set_ylim(-0.6, max(len(shown), 3) - 0.4)
    figure.suptitle(f"loss: {title}", fontsize=8)
    figure.tight_layout()
    with writing(path) as file:
        figure.savefig(file, dpi=130)
    plt.close(figure)


_ORDER = ("finished", "pruned", "failed", "running")


def _table(sweep: "Sweep", rows: Sequence[Row]) -> list[str]:
    keys = list(sweep.space.swept)
    names = list(dict.fromkeys(name for row in rows for name in row.beside))
    heads = ["trial", "loss", *names, *(f"`{key}`" for key in keys), ""]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in sorted(rows, key=lambda row: (_ORDER.index(row.state), _loss(row), row.number)):
        cells = [f"{row.beside[name]:.4f}" if name in row.beside else "" for name in names]
        cells += [value_text(row.values[key]) for key in keys]
        note = " ".join(f"{row.state}{': ' if row.note else ''}{row.note}".split()).replace("|", "/")
        loss = "" if row.loss is None else f"{row.loss:.4f}"
        lines.append(f"| {row.number} | {loss} | {' | '.join(cells)} | {note} |")
    return lines


def _loss(row: Row) -> float:
    return math.inf if row.loss is None else row.loss


def value_text(value: Value) -> str:
    """A drawn value, as the table and the axes show it."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _place(value: Value, dimension: Dimension) -> float:
    """Where an axis of length 1 shows a value."""
    if isinstance(dimension, Choice):
        return dimension.options.index(str(value)) / (len(dimension.options) - 1)
    number, low, high = float(value), dimension.low, dimension.high
    if dimension.log:
        number, low, high = math.log(number), math.log(low), math.log(high)
    return (number - low) / (high - low)


def _between(value: float, low: float, high: float) -> float:
    return (value - low) / (high - low) if high > low else 0.5


def _ticks(dimension: Dimension) -> list[tuple[str, float]]:
    return [(value_text(value), _place(value, dimension)) for value in _marked(dimension)]


def _marked(dimension: Dimension) -> Sequence[Value]:
    """The values that an axis names: all choices, or the ends and some round ones in between."""
    if isinstance(dimension, Choice):
        return dimension.options
    low, high = dimension.low, dimension.high
    if dimension.log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        between = [digit * 10.0**decade for decade in decades for digit in (1, 3)]
        inner: list[float] = [value for value in between if low * 1.5 < value < high / 1.5]
    else:
        step = dimension.step or (1 if dimension.whole else (high - low) / 4)
        step *= math.ceil((high - low) / step / _MOST_TICKS)
        inner = [low + place * step for place in range(1, math.ceil((high - low) / step - 0.5))]
    return [int(value) if dimension.whole else value for value in (low, *inner, high)]

"""One or several runs as one self-contained page: curves, memory, bank, time, stability, evaluation.

The first run is the one that the headline and the tiles speak of. Everything that comes from files is escaped.
Not here: reading the lines (`launch.run_log`), drawing a line (`launch.chart`), evaluating (`launch.evaluate`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from html import escape
from typing import Any

from launch import chart
from launch.chart import Chart, Dash, Look, Series, mean, smoothed, thinned
from launch.page import document, tile
from launch.run_log import OTHER, SECONDS, Line, RunLog, different_settings
from train.config import STAGES
from train.evaluate import HEADER, TableRow, cells

_TOKENS = "tokens trained on"
_ARMS = {
    "none": ("no memory", Dash.solid),
    "memory": ("memory", Dash.dashed),
    "shuffled": ("shuffled", Dash.dotted),
}


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A table of `memory3 evaluate`.

    Attributes:
        title: Which runs it covers.
        rows: Its rows; empty where no arm read memory.
        note: What a reader must know of it.
    """

    title: str
    rows: Sequence[TableRow]
    note: str


def render(logs: Sequence[RunLog], evaluations: Sequence[Evaluation]) -> str:
    """The whole page.

    Args:
        logs: The runs.
        evaluations: Tables of these runs.
    """
    return document(
        title=f"{logs[0].label}: report",
        kicker=f"memory3 report · {' · '.join(log.label for log in logs)}",
        headline=_headline(logs),
        conditions=_conditions(logs),
        body=_body(logs, evaluations),
        footnote=_FOOTNOTE,
        style=chart.STYLE + _STYLE,
    )


def pictures(logs: Sequence[RunLog]) -> dict[str, list[Chart]]:
    """The charts of the page by the name of their picture; those with nothing to draw are left out."""
    groups = {
        "losses": loss_charts(logs),
        "memory": _memory_charts(logs),
        "bank": _bank_charts(logs),
        "throughput": _speed_charts(logs),
        "stability": _stability_charts(logs),
    }
    shown = {name: [each for each in charts if _has_points(each)] for name, charts in groups.items()}
    return {name: charts for name, charts in shown.items() if charts}


def loss_charts(logs: Sequence[RunLog]) -> list[Chart]:
    """Training and held-out losses, a chart for each stage that a run took a step of."""
    return [
        _loss_chart(logs, stage)
        for stage in STAGES
        if any(log.steps(stage) or log.validations(stage) for log in logs)
    ]


def _loss_chart(logs: Sequence[RunLog], stage: str) -> Chart:
    series, tops = [], []
    for number, log in enumerate(logs):
        steps = log.points(log.steps(stage), "loss")
        smooth = smoothed(steps, max(10, len(steps) // 40))
        tops += [y for _, y in smooth[len(smooth) // 12 :]]
        series.append(Series("", thinned(steps, mean), number, Look.faint))
        series.append(Series(f"{log.label}, training", thinned(smooth, mean), number))
    for number, log in enumerate(logs):
        *_, read = [None, *_held_out(log, stage, number, ("none", "memory"))]
        if read is not None:
            tops += [y for _, y in read.points]
            series.append(replace(read, label=read.label.replace(log.label, f"{log.label}, held-out", 1)))
    title = "Warmup" if stage == "warmup" else "Continual stage"
    top = max(tops) * 1.03 if tops else None
    return Chart(title, _TOKENS, "loss, nats per token", series, _epoch_marks(logs, stage), top=top)


def _held_out(log: RunLog, stage: str, number: int, arms: Sequence[str] = tuple(_ARMS)) -> list[Series]:
    """The arms of a run's validations; without memory there is only one."""
    lines = log.validations(stage)
    drawn = []
    for arm in arms:
        name, dash = _ARMS[arm]
        points = log.points(lines, f"validation_{arm}")
        if points:
            drawn.append(Series(f"{log.label}, {name}", points, number, Look.dots, dash))
    return drawn


def _epoch_marks(logs: Sequence[RunLog], stage: str) -> list[float]:
    """Where a bank was refreshed."""
    epochs = [line for line in logs[0].epochs if line["stage"] == stage]
    return [x for x, _ in logs[0].points(epochs, "bank_references")]


def held_out_chart(logs: Sequence[RunLog]) -> Chart:
    """Held-out losses of the continual stage: no memory, memory, shuffled memory, and the control."""
    series = [series for number, log in enumerate(logs) for series in _held_out(log, "continual", number)]
    marks = _epoch_marks(logs, "continual")
    return Chart("Held-out loss, by what is read", _TOKENS, "nats per token", series, marks)


def _memory_charts(logs: Sequence[RunLog]) -> list[Chart]:
    marks = _epoch_marks(logs, "continual")
    gains, shares, filled, scores, distinct = [], [], [], [], []
    for number, log in enumerate(logs):
        checks, steps = log.validations("continual"), log.steps("continual")
        for arm, dash in (("none", Dash.solid), ("shuffled", Dash.dotted)):
            points = [
                (x, other - read)
                for (x, other), (_, read) in zip(
                    log.points([c for c in checks if "validation_memory" in c], f"validation_{arm}"),
                    log.points(checks, "validation_memory"),
                    strict=False,
                )
            ]
            if points:
                name = f"{log.label}, {_ARMS[arm][0]} less memory"
                gains.append(Series(name, points, number, Look.dots, dash))
        shares.append(Series(log.label, log.points(checks, "memory_attention"), number, Look.dots))
        filled.append(_running(log, steps, "empty_slots", number))
        scores.append(_running(log, steps, "retrieval_score", number))
        distinct.append(_running(log, steps, "distinct_references", number))
    reads = [held_out_chart(logs)] if gains else []
    saved = "nats per token; above 0 memory is better"
    attention = "share, mean over memory layers"
    return [
        *reads,
        Chart("What memory saves", _TOKENS, saved, gains, marks, has_zero=True),
        Chart("Attention on memory", _TOKENS, attention, shares, marks, is_share=True, has_zero=True),
        Chart("Score of what was retrieved", _TOKENS, "mean cosine", scores, marks),
        Chart("References read in a step", _TOKENS, "distinct", distinct, marks),
        Chart("Empty slots", _TOKENS, "share of a step's slots", filled, marks, is_share=True, has_zero=True),
    ]


def _bank_charts(logs: Sequence[RunLog]) -> list[Chart]:
    size, compiled, age = [], [], []
    for number, log in enumerate(logs):
        size.append(Series(log.label, log.points(log.epochs, "bank_references"), number, Look.dots))
        compiled.append(Series(log.label, log.points(log.epochs, "bank_compiled"), number, Look.dots))
        steps = log.steps("continual")
        age.append(Series(log.label, thinned(log.points(steps, "generation_age"), max), number))
    marks = _epoch_marks(logs, "continual")
    return [
        Chart("References that may be read", _TOKENS, "at each refresh", size, marks, has_zero=True),
        Chart("Memories compiled at a refresh", _TOKENS, "references", compiled, marks, has_zero=True),
        Chart(
            "Age of the generation that is read",
            _TOKENS,
            "steps since it was compiled",
            age,
            marks,
            has_zero=True,
        ),
    ]


def _speed_charts(logs: Sequence[RunLog]) -> list[Chart]:
    speed = [_running(log, log.lines, "tokens_per_second", number) for number, log in enumerate(logs)]
    used = [_running(log, log.lines, "mfu", number) for number, log in enumerate(logs)]
    return [
        Chart("Speed", _TOKENS, "tokens per second, within steps", speed, has_zero=True),
        Chart("MFU", _TOKENS, f"PaLM formula, of {_peak(logs)}", used, is_share=True, has_zero=True),
    ]


def _peak(logs: Sequence[RunLog]) -> str:
    """The nominal peak that the runs' shares are of, if it is the same for all that tell it."""
    told = {peak for log in logs for line in log.lines if (peak := line.get("peak_tflops")) is not None}
    return f"nominally {told.pop():,g} TFLOP/s" if len(told) == 1 else "each run's nominal peak"


def _running(log: RunLog, lines: Sequence[Line], key: str, number: int) -> Series:
    """The running mean of a key's values."""
    return Series(log.label, thinned(smoothed(log.points(lines, key), 20), mean), number)


def _stability_charts(logs: Sequence[RunLog]) -> list[Chart]:
    norms, rates, skipped = [], [], []
    for number, log in enumerate(logs):
        steps = [line for line in log.lines if "grad_norm" in line]
        points = log.points(steps, "grad_norm")
        norms.append(Series("", thinned(points, max), number, Look.faint))
        norms.append(Series(log.label, thinned(smoothed(points, max(10, len(points) // 40)), mean), number))
        rates.append(Series(log.label, thinned(log.points(steps, "lr"), mean), number))
        skipped += [x for x, _ in log.points([*log.skipped, *log.rollbacks], "step")]
    return [
        Chart(
            "Gradient norm",
            _TOKENS,
            "before clipping; dotted lines: skipped steps, rollbacks",
            norms,
            skipped,
            is_log=True,
        ),
        Chart("Learning rate", _TOKENS, "of each step", rates, has_zero=True),
    ]


def _has_points(drawn: Chart) -> bool:
    return bool(drawn.drawn)


def _headline(logs: Sequence[RunLog]) -> str:
    log, last, checked = logs[0], logs[0].last, logs[0].validation
    if last is None:
        return f"{escape(log.label)}: no step yet"
    where = f"after {last['step']:,} of {last['num_steps']:,} steps of the {last['stage']} stage"
    if checked is None:
        return f"Training loss {last['loss']:.3f} {where}"
    none, read = checked["validation_none"], checked.get("validation_memory")
    if read is None:
        return f"Held-out loss {none:.3f} {where}"
    verdict = "help" if read < none else "hurt"
    others = "".join(
        f", {other.validation['validation_none']:.3f} in {escape(other.label)}"
        for other in logs[1:]
        if other.validation is not None
        and "validation_memory" not in other.validation
        and _position(other.validation) == _position(checked)
    )
    return f'Held-out loss <em class="{verdict}">{read:.3f} with memory</em>, {none:.3f} without{others}'


def _position(line: Line) -> tuple[str, int]:
    return line["stage"], line["step"]


def _conditions(logs: Sequence[RunLog]) -> list[str]:
    log = logs[0]
    last, checked = log.last, log.validation
    if last is None:
        return []
    lines = [
        f"{log.label}: {last['stage']} step {last['step']:,} of {last['num_steps']:,}, "
        f"{chart.human(last['tokens'])} tokens; last line {_when(log.lines[-1])}."
    ]
    if checked is not None:
        said = f"Held-out losses over {checked['validation_tokens']:,} tokens, at step {checked['step']:,}"
        if checked.get("query") is not None:
            said += f"; query {checked['query']}, {checked['pattern']} pattern"
            said += f", references overlapping a row by more than {checked['overlap_limit']:.0%} refused"
        if checked.get("generation_age") is not None:
            said += f"; memories {checked['generation_age']} steps old"
        lines.append(said + ".")
        if checked.get("query") == "own":
            lines.append(
                "Query own: a chunk's search has seen the tokens that it predicts, which flatters memory."
            )
    return lines


def _body(logs: Sequence[RunLog], evaluations: Sequence[Evaluation]) -> Iterator[str]:
    drawn = pictures(logs)
    yield from _tiles(logs[0])
    yield from _section(
        "losses", "Loss", drawn, "Thin: each step; thick: its running mean; dots: held-out text."
    )
    yield from _section(
        "memory",
        "What memory does",
        drawn,
        "Measured inside the training loop, on held-out text. Dotted upright lines: the bank was refreshed.",
    )
    yield from _evaluations(evaluations)
    yield from _section("bank", "The bank", drawn, _bank_note(logs))
    yield from _runs(logs)
    yield from _section("throughput", "Speed", drawn, "", extra=_times(logs))
    yield from _section(
        "stability", "Stability", drawn, "Thin: the largest of a few steps.", extra=_faults(logs)
    )
    yield from _settings(logs)


def _section(
    name: str, title: str, drawn: dict[str, list[Chart]], note: str, *, extra: Iterator[str] | None = None
) -> Iterator[str]:
    charts, more = drawn.get(name, []), "".join(extra or ())
    if charts or more:
        yield f'<section class="card" id="{name}">\n<h2>{escape(title)}</h2>\n'
        yield f'<p class="legend">{escape(note)}</p>\n' if note else ""
        yield '<div class="charts">\n' + "".join(map(chart.render, charts)) + "</div>\n"
        yield f"{more}</section>\n"


def _tiles(log: RunLog) -> Iterator[str]:
    last, checked = log.last, log.validation
    if last is None:
        return
    yield '<section class="tiles">\n'
    if checked is not None and "validation_memory" in checked:
        none, read = checked["validation_none"], checked["validation_memory"]
        shuffled = checked.get("validation_shuffled")
        than = "" if shuffled is None else f"; than shuffled memory by {_signed(shuffled - read)}"
        yield tile("memory is better by", f"{_signed(none - read)} nats", f"a token of held-out text{than}")
    recent = [line["loss"] for line in log.steps(last["stage"])[-50:]]
    yield tile(
        "training loss", f"{mean(recent):.3f}", f"nats per token, mean of the last {len(recent)} steps"
    )
    speeds = [(stage, log.tokens_per_second(stage)) for stage in log.stages]
    known = [(stage, speed) for stage, speed in speeds if speed is not None]
    note = " · ".join(f"{stage} {speed:,.0f}" for stage, speed in known)
    if len(known) == 2:
        note += f"; a continual step takes {known[0][1] / known[1][1]:.2f} of a warmup step's time a token"
    yield tile("tokens per second", f"{known[-1][1]:,.0f}", f"median within steps: {note}")
    if log.epochs:
        newest = log.epochs[-1]
        yield tile(
            "references in the bank",
            f"{newest['bank_references']:,}",
            f"after {len(log.epochs)} refreshes; {newest['bank_compiled']:,} compiled in the last",
        )
    survived = len(log.recoveries) + len(log.rollbacks) + len(log.skipped)
    repeated = sum(event.get("steps_repeated", 0) for event in log.events)
    said = [f"{len(log.recoveries)} crashes or kills, {repeated} steps repeated"]
    if log.rollbacks:
        said.append(f"{len(log.rollbacks)} rollbacks, {len(log.passed_over)} updates passed over")
    said.append(f"{len(log.skipped)} skipped updates")
    if continued := len(log.resumes) - len(log.recoveries):
        said.append(f"beside them, it was stopped and continued {continued} times")
    yield tile("faults survived", str(survived), "; ".join(said))
    yield "</section>\n"


def _bank_note(logs: Sequence[RunLog]) -> str:
    epochs = logs[0].epochs
    if not epochs:
        return ""
    chunks, empty, own, overlap = (
        sum(line[f"bank_{key}"] for line in epochs)
        for key in ("chunks", "empty", "refused_own_document", "refused_overlap")
    )
    return (
        f"{logs[0].label}: {chunks - empty:,} of {chunks:,} chunks found a reference; refused were {own:,} of the "
        f"row's own documents and {overlap:,} that overlap the row."
    )


def _validation_loss(log: RunLog, *, arm: str) -> str:
    return _number((log.validation or {}).get(f"validation_{arm}"), ".3f")


def _runs(logs: Sequence[RunLog]) -> Iterator[str]:
    columns: dict[str, Callable[[RunLog], str]] = {
        "stage": lambda log: "–" if log.last is None else str(log.last["stage"]),
        "steps": lambda log: "0" if log.last is None else f"{log.last['step']:,} / {log.last['num_steps']:,}",
        "tokens": lambda log: "0" if log.last is None else chart.human(log.last["tokens"]),
        **{name: partial(_validation_loss, arm=arm) for arm, (name, _) in _ARMS.items()},
        "attention": lambda log: _number((log.validation or {}).get("memory_attention"), ".1%"),
        "hours": lambda log: f"{log.hours():.2f}",
        "skipped": lambda log: str(len(log.skipped)),
        "rollbacks": lambda log: str(len(log.rollbacks)) if log.rollbacks else "–",
        "crashes": lambda log: str(len(log.recoveries)) if log.recoveries else "–",
        "resumes": lambda log: str(len(log.resumes)),
    }
    rows = [[log.label, *(cell(log) for cell in columns.values())] for log in logs]
    yield '<section class="card" id="runs">\n<h2>The runs</h2>\n'
    yield '<p class="legend">Losses of the last validation, nats per token of held-out text.</p>\n'
    yield _table(*_told(["run", *columns], rows), has_colours=True)
    yield "</section>\n"


def _times(logs: Sequence[RunLog]) -> Iterator[str]:
    split = [(log, stage, log.seconds(stage)) for log in logs for stage in log.stages]
    if not split:
        return
    names = [name for name in (*SECONDS, OTHER) if any(name in seconds for *_, seconds in split)]
    colours = {name: f"k{place}" for place, name in enumerate((*SECONDS, OTHER))}
    yield '<div class="times"><p class="label">where the time went, by run and stage</p>\n'
    for log, stage, seconds in split:
        whole, steps = sum(seconds.values()), len(log.steps(stage))
        parts = "".join(
            f'<i class="{colours[name]}" style="width:{seconds[name] / whole:.2%}" '
            f'title="{name}: {seconds[name]:.1f} s, {seconds[name] / whole:.1%}"></i>'
            for name in names
            if name in seconds
        )
        numbers = " · ".join(f"{name} {seconds[name] / whole:.1%}" for name in names if name in seconds)
        yield (
            f'<div class="time"><b>{escape(log.label)}</b> <small>{stage}: {whole / 60:.1f} minutes, '
            f'{1000 * whole / steps:,.0f} ms a step</small><span class="bar">{parts}</span>'
            f"<small>{escape(numbers)}</small></div>\n"
        )
    keys = "".join(f'<span><i class="{colours[name]}"></i>{name}</span>' for name in names)
    yield f'<p class="keys">{keys}</p></div>\n'


def _faults(logs: Sequence[RunLog]) -> Iterator[str]:
    rows = []
    for log in logs:
        for event in log.events:
            rows.append((event["time"], [log.label, _when(event), _where(event), *_happened(event)]))
        for line in log.skipped:
            what = "update skipped: a gradient was not finite"
            rows.append((line["time"], [log.label, _when(line), _where(line), what, ""]))
    if not rows:
        yield (
            '<p class="note faults">No stop, no crash, no rollback and no skipped update stands in these runs\' '
            "lines.</p>\n"
        )
        return
    rows.sort(key=lambda row: row[0])
    shown = [cell for _, cell in rows[:_FAULTS]]
    yield "<h3>Stops and faults</h3>\n"
    yield _table(["run", "when", "where", "what", "cost"], shown)
    if len(rows) > _FAULTS:
        yield f'<p class="note">and {len(rows) - _FAULTS:,} more</p>\n'


_FAULTS = 30


def _happened(event: Line) -> tuple[str, str]:
    """What an event was, and what it cost."""
    if event["event"] == "stopped":
        return f"stopped: {event['cause']}", ""
    if event["event"] == "crashed":
        return f"crashed: {event['cause']}; {event['reason']}", ""
    if event["event"] == "rollback":
        window = f"updates {event['passed_over_first']:,} to {event['passed_over_last']:,}"
        return (
            f"went back from step {event['diverged_at']:,} to {event['checkpoint']}: {event['reason']}",
            f"{event['steps_undone']:,} steps undone, {event['rows_passed_over']:,} rows passed over ({window})",
        )
    checkpoint, repeated = event.get("checkpoint"), event.get("steps_repeated")
    return (
        event["event"] + ("" if checkpoint is None else f" from {checkpoint}"),
        "" if repeated is None else f"{repeated:,} steps repeated",
    )


def _evaluations(evaluations: Sequence[Evaluation]) -> Iterator[str]:
    if not evaluations:
        return
    yield '<section class="card" id="evaluation">\n<h2>Evaluation</h2>\n'
    for evaluation in evaluations:
        yield f"<h3>{escape(evaluation.title)}</h3>\n"
        for block in dict.fromkeys(row.block for row in evaluation.rows):
            chosen = [row for row in evaluation.rows if row.block == block]
            yield f"<h4>{escape(block)}</h4>\n{_table(*_told(HEADER, [cells(row) for row in chosen]))}"
            for result in (row.result for row in chosen if row.result.note):
                said = f"{result.model} {result.arm.value}: {result.note}."
                yield f'<p class="note">{escape(said)}</p>\n'
        yield f'<p class="note">{escape(evaluation.note)}</p>\n' if evaluation.note else ""
    yield "</section>\n"


def _settings(logs: Sequence[RunLog]) -> Iterator[str]:
    if len(logs) > 1 and (rows := list(different_settings(logs))):
        yield '<section class="card" id="settings">\n<h2>Settings that differ</h2>\n'
        yield _table(
            ["key", *(log.label for log in logs)],
            [[key, *("–" if value is None else str(value) for value in values)] for key, values in rows],
        )
        yield "</section>\n"


def _told(header: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """The columns that say something in one row or another."""
    kept = [place for place in range(len(header)) if any(row[place] != "–" for row in rows)]
    return [header[place] for place in kept], [[row[place] for place in kept] for row in rows]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], *, has_colours: bool = False) -> str:
    """A table that scrolls within itself; the rows of runs show the colours that the runs have in the charts."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = ""
    for number, row in enumerate(rows):
        swatch = f'<i class="swatch" style="background:{chart.colour(number)}"></i>' if has_colours else ""
        first, *rest = (escape(cell) for cell in row)
        body += f"<tr><th>{swatch}{first}</th>" + "".join(f"<td>{cell}</td>" for cell in rest) + "</tr>\n"
    return f'<div class="scroll"><table>\n<tr>{head}</tr>\n{body}</table></div>\n'


def _where(line: Line) -> str:
    return f"{line['stage']} step {line['step']:,}"


def _when(line: Line) -> str:
    return datetime.fromtimestamp(line["time"], UTC).strftime("%Y-%m-%d %H:%M UTC")


def _number(value: Any, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


_FOOTNOTE = (
    "Made from the runs' lines (metrics.jsonl), their frozen settings and their evaluations alone. Speeds count tokens "
    "trained on, by the seconds within steps. Memory is better where a difference is above 0."
)

_STYLE = (
    """
:root{--k0:#8fb8de;--k1:#e2a413;--k2:#4d86c6;--k3:#12948a;--k4:#c46a4a;--k5:#a78bd0;--k6:#7c8a5c;--k7:#c48aa8;--k8:#b9b2a4}
@media (prefers-color-scheme:dark){:root{--k8:#6d6a63}}
"""
    + "\n".join(f"i.k{n}{{background:var(--k{n})}}" for n in range(len(SECONDS) + 1))
    + """
h3{font-size:.95rem;margin:1rem 0 .4rem;font-weight:650}
h4{font-size:.85rem;margin:.8rem 0 .3rem;font-weight:400;color:var(--soft)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.84rem;font-variant-numeric:tabular-nums;width:100%}
th,td{padding:.34rem .6rem .34rem 0;text-align:left;border-bottom:1px solid var(--line);white-space:nowrap;
vertical-align:top}
th{font-weight:600} tr:first-child th{font-weight:400;color:var(--soft)}
.tiles{grid-template-columns:repeat(auto-fit,minmax(12rem,1fr))}
.legend{margin:-.2rem 0 1rem}
.swatch{display:inline-block;width:.7rem;height:.7rem;border-radius:2px;margin-right:.45rem}
.faults{margin-top:1rem}
.times{margin-top:1.4rem}
.time{margin:.5rem 0}
.time b{font-size:.88rem;font-weight:600}
.time .bar{margin:.25rem 0}
.keys{font-size:.8rem;color:var(--soft);display:flex;flex-wrap:wrap;gap:.1rem 1rem}
.keys i{display:inline-block;width:.7rem;height:.7rem;border-radius:2px;margin-right:.35rem}
"""
)

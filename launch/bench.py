"""`memory3 bench`: what memory costs in time, as ratios to what would run without it.

One subject at a time; every figure is counted by `launch.timing`. A subject is a module `launch.bench_<subject>` with
`DEFAULTS`, its settings unless the user gives others, and `measure(config, conditions) -> Bench`. Results are
`<output>/bench_<subject>.json` (every round), `.md` (the table) and `.png` (every round, and the target).
The device is the one that a run would take: a GPU where there is one (hide it with `CUDA_VISIBLE_DEVICES=`).
Not here: what is measured (one module each), operations (`model.flops`).
"""

import argparse
import importlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from textwrap import fill
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from data.files import write_atomic
from launch import build
from launch.chart import Chart, Dash, Look, Series, picture
from launch.compose import compose_config, laid_over
from launch.timing import LEAST_ROUNDS, Bench, Conditions, Figure, machine
from launch.units import duration


def run(arguments: argparse.Namespace) -> int:
    """Measure one subject, print it, and write its files."""
    if arguments.rounds < LEAST_ROUNDS:
        raise ValueError(f"--rounds {arguments.rounds} make no median; give {LEAST_ROUNDS} or more")
    if arguments.threads < 1:
        raise ValueError(f"--threads {arguments.threads} cannot compute; give 1 or more")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(arguments.threads)
    subject = importlib.import_module(f"launch.bench_{arguments.action}")
    overrides = laid_over(subject.DEFAULTS, arguments.overrides)
    config = compose_config(overrides)
    build.quiet_third_parties()
    context = {
        "subject": arguments.action,
        "machine": machine(device),
        "begun": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_average": os.getloadavg()[0],
        "rounds": arguments.rounds,
        "threads": arguments.threads,
        "overrides": overrides,
        **build.code(),
    }
    found: Bench = subject.measure(config, Conditions(arguments.rounds, device))
    if arguments.json:
        print(json.dumps(as_json(found, context), default=str))
    else:
        Console(width=max(Console().width, 110)).print(table(found, context))
        for line in found.findings:
            print(line)
    write(found, context, Path(arguments.output))
    return 0


def as_json(found: Bench, context: dict[str, Any]) -> dict[str, Any]:
    """Everything there is: the context, every round of every side and figure."""
    return {
        **context,
        "shape": dict(found.shape),
        "figures": [
            {**asdict(figure), "value": figure.value, "quartiles": figure.quartiles, "met": figure.met}
            for figure in found.figures
        ],
        "times": [asdict(times) for times in found.times],
        "findings": list(found.findings),
    }


def table(found: Bench, context: dict[str, Any]) -> Table:
    """The figures as a person reads them."""
    drawn = Table(
        "what",
        "median",
        "half of the rounds",
        "CPU time",
        "target",
        title=f"bench {context['subject']}: {context['machine']}; {_told(found.shape)}",
        caption=f"{context['rounds']} rounds, the sides in turn; commit {context.get('commit', 'unknown')}",
        title_justify="left",
        caption_justify="left",
    )
    for figure in found.figures:
        drawn.add_row(*_cells(figure))
    drawn.add_section()
    for times in found.times:
        drawn.add_row(times.name, duration(times.seconds), _between(min(times.wall), max(times.wall)))
    return drawn


def write(found: Bench, context: dict[str, Any], folder: Path) -> None:
    """Write JSON, Markdown and picture into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"bench_{context['subject']}"
    content = json.dumps(as_json(found, context), indent=1, default=str)
    write_atomic(folder / f"{stem}.json", f"{content}\n".encode())
    write_atomic(folder / f"{stem}.md", ("\n".join(_page(found, context)) + "\n").encode())
    charts = [_rounds(figure) for figure in found.figures if not figure.unit]
    picture([*found.charts, *charts], folder / f"{stem}.png")


def _page(found: Bench, context: dict[str, Any]) -> Iterator[str]:
    yield f"# memory3 bench {context['subject']}\n"
    yield f"{context['machine']}; torch {context.get('torch', torch.__version__)}, commit {context.get('commit')}."
    yield f"Begun {context['begun']}, load average {context['load_average']:.1f}; {_told(found.shape)}.\n"
    options = f"--rounds {context['rounds']} --threads {context['threads']}"
    yield f"    memory3 bench {context['subject']} {options} {' '.join(context['overrides'])}\n"
    yield "| what | median | half of the rounds | by CPU time | target | |"
    yield "|---|---|---|---|---|---|"
    for figure in found.figures:
        met = {None: "", True: "met", False: "**missed**"}[figure.met]
        yield f"| {' | '.join(_cells(figure))} | {met} |"
    notes = [figure for figure in found.figures if figure.note]
    if notes:
        yield ""
        yield from (f"- {figure.what}: {figure.note}" for figure in notes)
    yield f"\n| side | median of {context['rounds']} | least and most |"
    yield "|---|---|---|"
    for times in found.times:
        yield f"| {times.name} | {duration(times.seconds)} | {_between(min(times.wall), max(times.wall))} |"
    if found.findings:
        yield ""
        yield from found.findings


def _cells(figure: Figure) -> tuple[str, str, str, str, str]:
    low, high = figure.quartiles
    target = "" if figure.target is None else f"{'≥' if figure.at_least else '≤'} {figure.target:,.4g}"
    unit = f" {figure.unit}" if figure.unit else ""
    return (
        figure.what,
        f"{figure.value:,.4g}{unit}",
        f"{low:,.4g} to {high:,.4g}",
        "" if figure.cpu is None else f"{figure.cpu:,.4g}",
        target,
    )


def _rounds(figure: Figure) -> Chart:
    """A figure round by round, its median, and its target."""
    last = len(figure.rounds)
    lines = [
        Series("", [(n, value) for n, value in enumerate(figure.rounds, start=1)], look=Look.dots),
        Series("median", [(1, figure.value), (last, figure.value)], dash=Dash.dashed),
    ]
    if figure.cpu is not None:
        lines.append(Series("median by CPU time", [(1, figure.cpu), (last, figure.cpu)], 2, dash=Dash.dotted))
    if figure.target is not None:
        lines.append(Series("target", [(1, figure.target), (last, figure.target)], 1))
    return Chart(fill(figure.what, 44), "round", "ratio", lines, has_zero=True)


def _between(least: float, most: float) -> str:
    return f"{duration(least)} to {duration(most)}"


def _told(shape: Any) -> str:
    return ", ".join(f"{name} {value}" for name, value in shape.items())

"""`memory3 report`: one or several runs as a page and as pictures, and one table from their evaluations.

Everything is made from the files of the run folders, JSON lines above all: of a half-finished run as of a finished
one, without the prepared corpus, without a checkpoint.
Not here: what stands on the page (`launch.report_page`), evaluating (`launch.evaluate`), what the table's columns mean
(`train.evaluate`).
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data.files import write_atomic
from launch import chart, report_page
from launch.build import existing_run
from launch.evaluate import (
    banks_evaluated,
    read_headline,
    read_position,
    read_results,
    render_results,
    results_path,
)
from launch.page import refuse_without_folder
from launch.report_page import Evaluation
from launch.run_log import RunLog, are_seeds
from train.evaluate import ArmResult, table


@dataclass(frozen=True, slots=True)
class Pair:
    """A run, and its matched control beside it if one was named (`M=C`)."""

    main: RunLog
    control: RunLog | None

    @property
    def logs(self) -> list[RunLog]:
        """Both, or the one."""
        return [self.main] if self.control is None else [self.main, self.control]

    def results(self, split: str) -> list[ArmResult] | None:
        """The results of both; None if one of them was not evaluated on this split."""
        if not all(results_path(log.folder, split).exists() for log in self.logs):
            return None
        return [result for log in self.logs for result in read_results(log.folder, split)]

    def results_with(self, bank: str, split: str) -> list[ArmResult]:
        """The results of the run with the memories of a bank, and those of its control, if it was evaluated."""
        control = [] if self.control is None else [self.control.folder]
        beside = [folder for folder in control if results_path(folder, split).exists()]
        return [
            *read_results(self.main.folder, split, bank),
            *(result for folder in beside for result in read_results(folder, split)),
        ]


def run(arguments: argparse.Namespace) -> int:
    """Print the tables of the runs, each `M` or `M=C`, and write the page and the pictures."""
    refuse_without_folder(arguments.html)
    pairs = [_pair(text, arguments.root) for text in arguments.runs]
    _refuse_repeated(pairs)
    logs = _named_apart(list({log.folder.resolve(): log for pair in pairs for log in pair.logs}.values()))
    evaluations: list[Evaluation] = []

    def show(title: str, seeds: list[list[ArmResult]], headline: list[str] | None) -> None:
        title += f": {arguments.split} half" + (f", {len(seeds)} seeds" if len(seeds) > 1 else "")
        print(f"{title}\n\n{render_results(seeds, headline=headline)}")
        if any(result.model == "M" for result in seeds[0]):
            evaluations.append(Evaluation(title, table(seeds, headline=headline), _EVALUATION))

    for group in _groups(pairs, arguments.split):
        seeds = [results for pair in group if (results := pair.results(arguments.split)) is not None]
        headline = read_headline(group[0].main.folder, arguments.split)
        show(", ".join(_evaluated(pair.main, arguments.split) for pair in group), seeds, headline)
    for pair in pairs:
        folder = pair.main.folder
        for bank, described in banks_evaluated(folder, arguments.split).items():
            headline = read_headline(folder, arguments.split, bank)
            title = f"{_evaluated(pair.main, arguments.split, bank)} with the memories of bank {bank} ({described})"
            show(title, [pair.results_with(bank, arguments.split)], headline)
    for log in logs:
        if not results_path(log.folder, arguments.split).exists():
            print(
                f"{log.label} has no evaluation on the {arguments.split} half; `memory3 evaluate {log.label} "
                f"--split {arguments.split}` makes one"
            )
    page = Path(arguments.html)
    write_atomic(page, report_page.render(logs, evaluations).encode())
    print(f"page: {page}")
    if arguments.pictures is not None:
        folder = Path(arguments.pictures)
        folder.mkdir(parents=True, exist_ok=True)
        for name, charts in report_page.pictures(logs).items():
            chart.picture(charts, folder / f"{name}.png")
            print(f"picture: {folder / f'{name}.png'}")
    return 0


def draw_losses(runs: Sequence[tuple[str, Path]], path: Path) -> None:
    """Draw the losses of both stages of several runs, over tokens, into a PNG.

    Args:
        runs: Labels and run folders, the one with the warmup first.
        path: The picture.
    """
    logs = [replace(RunLog.read(folder), label=label) for label, folder in runs]
    held_out = report_page.held_out_chart(logs)
    chart.picture([*report_page.loss_charts(logs), *([held_out] if held_out.drawn else [])], path)


def _evaluated(log: RunLog, split: str, bank: str | None = None) -> str:
    """A run's name; where it was trained on since its evaluation, with the step that this is of."""
    position, last = read_position(log.folder, split, bank), log.last
    if position is None or last is None or position == (last["stage"], last["step"]):
        return log.label
    stage, step = position
    return f"{log.label} (as of {stage} step {step:,}; now at {last['stage']} step {last['step']:,})"


def _groups(pairs: Sequence[Pair], split: str) -> list[Sequence[Pair]]:
    """The pairs that were evaluated: in one table if they are seeds of one recipe, else in a table each."""
    evaluated = [pair for pair in pairs if pair.results(split) is not None]
    if evaluated and are_seeds([pair.main for pair in evaluated]):
        return [evaluated]
    return [[pair] for pair in evaluated]


def _pair(text: str, root: str) -> Pair:
    main, _, control = text.partition("=")
    return Pair(_log(main, root), _log(control, root) if control else None)


def _log(run: str, root: str) -> RunLog:
    return RunLog.read(existing_run(run, root))


def _refuse_repeated(pairs: Sequence[Pair]) -> None:
    """A run counts once: named twice it would look like two seeds that agree."""
    folders = [pair.main.folder.resolve() for pair in pairs]
    for pair, folder in zip(pairs, folders, strict=True):
        if folders.count(folder) > 1:
            raise ValueError(f"{pair.main.label} is named more than once; name each run once, M or M=C")


def _named_apart(logs: list[RunLog]) -> list[RunLog]:
    """The same runs; those that share a name have their folder's before it."""
    names = [log.label for log in logs]
    return [
        replace(log, label=f"{log.folder.resolve().parent.name}/{log.label}")
        if names.count(log.label) > 1
        else log
        for log in logs
    ]


_EVALUATION = (
    "Losses in nats, with 95 % intervals over documents (text) and countries (facts). Difference: loss less that of "
    "M's memory arm, paired; positive where memory is better. own*: a chunk's references were found with the very "
    "tokens that it predicts."
)

"""`memory3 pretrain -m`: every combination of listed settings is a run of its own, one after the other or as jobs.

    <root>/RUN-KEY-VALUE.../    the run of a combination (`launch.trial`)
    <root>/RUN-grid/            report.md, and the lock of whoever brings the combinations to their ends

All combinations are composed, checked and compared with what their folders hold before the first one starts. A
combination is known by its name: the same command, or one that lists more, trains none again that has finished; one
that still trains is waited for, and one that ended otherwise goes on at its newest checkpoint.
Not here: values that are drawn (`launch.sweep`), the processes and jobs (`launch.trial`), training (`launch.pretrain`).
"""

import argparse
import logging
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import product
from pathlib import Path

from hydra.core.override_parser.types import Override, RangeSweep

from data.files import write_atomic
from launch import pretrain
from launch.compose import compose_config
from launch.config import RunConfig
from launch.lock import is_in_use, only_user
from launch.slurm import Queue, job_name
from launch.space import parse_overrides, quoted, text_of
from launch.trial import PROGRAM, TrialJob, TrialProcess, TrialRun, interruptible, on_slurm

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.5
_LONGEST_NAME = 100
_LOSSES = {
    "validation_memory": "memory",
    "validation_shuffled": "shuffled memory",
    "validation_none": "no memory",
}


@dataclass(frozen=True, slots=True)
class Combination:
    """A run of a grid.

    Attributes:
        grid: The name that its run would have by itself.
        values: What varies, by key.
        settings: The overrides of its run.
        config: What they come to.
    """

    grid: str
    values: dict[str, str]
    settings: tuple[str, ...]
    config: RunConfig

    @property
    def folder(self) -> Path:
        return Path(self.config.paths.root) / self.config.run

    def __str__(self) -> str:
        return f"{self.config.run} ({', '.join(f'{key}={value}' for key, value in self.values.items())})"


@dataclass(frozen=True, slots=True)
class End:
    """How far a combination has come.

    Attributes:
        state: "finished", "failed", or "waiting" of one that is a job.
        note: More about it.
    """

    state: str
    note: str = ""

    def __str__(self) -> str:
        return ": ".join(filter(None, [self.state, self.note]))


def run(arguments: argparse.Namespace) -> int:
    """Run the combinations that are left, or print their commands; 1 where one failed."""
    grid = combinations(arguments.overrides)
    if arguments.cfg:
        for each in grid:
            print(f"memory3 pretrain {' '.join(map(quoted, each.settings))}")
        return 0
    if not arguments.no_prepare:
        _prepare(grid)
    for each in grid:
        pretrain.check_branch(each.config, each.folder)
        pretrain.fill_in(each.config)
        pretrain.refuse_other_run(each.config, each.folder)
    return control(grid)


def combinations(overrides: Sequence[str]) -> list[Combination]:
    """Every combination of the listed values, in the order of Hydra's own sweeper: the last list varies fastest.

    Raises:
        ValueError: Naming the override, or the combination, and what to write instead.
    """
    parsed = parse_overrides(overrides, varied="a,b or choice(a, b) or range(1, 5)")
    varied = {key: override for key, override in parsed.items() if override.is_sweep_override()}
    if not varied:
        raise ValueError(
            "nothing varies: write at least one setting as KEY=a,b or range(1, 5), or leave -m away"
        )
    if "run" in varied:
        raise ValueError(
            f"{text_of(varied['run'])}: runs are named after what varies; give one run=NAME, or none"
        )
    values = {key: _listed(override) for key, override in varied.items()}
    grid: dict[str, Combination] = {}
    for chosen in product(*values.values()):
        found = _compose(parsed, dict(zip(values, chosen, strict=True)))
        grid.setdefault(found.config.run, found)
    return list(grid.values())


def control(grid: Sequence[Combination], program: Sequence[str] = PROGRAM) -> int:
    """Bring combinations to their ends, or hand them to SLURM; then print and write the report.

    Args:
        grid: What is run, in this order.
        program: What a run is started with (`launch.trial`).

    Returns:
        0, or 1 where one failed.

    Raises:
        ValueError: Another process runs the same grid.
    """
    folder = Path(grid[0].config.paths.root) / f"{grid[0].grid}-grid"
    folder.mkdir(parents=True, exist_ok=True)
    ends = []
    with only_user(folder, other="set run=NAME"), interruptible():
        for number, each in enumerate(grid, start=1):
            log.info("%d of %d: %s", number, len(grid), each)
            end = _submit(each, program) if on_slurm(each.config) else _train(each, program)
            log.info("%s", end)
            ends.append(end)
        text = render(grid, ends)
        write_atomic(folder / "report.md", text.encode())
    print(text, end="")
    return int(any(end.state == "failed" for end in ends))


def render(grid: Sequence[Combination], ends: Sequence[End]) -> str:
    """The combinations as a table in Markdown, with the last validation of those that finished."""
    validations = [
        _validation(each) if end.state == "finished" else {} for each, end in zip(grid, ends, strict=True)
    ]
    losses = [name for name in _LOSSES.values() if any(name in found for found in validations)]
    keys = list(grid[0].values)
    heads = ["run", *(f"`{key}`" for key in keys), *losses, ""]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for each, end, found in zip(grid, ends, validations, strict=True):
        cells = [each.config.run, *(each.values[key] for key in keys)]
        cells += [*(f"{found[name]:.4f}" if name in found else "" for name in losses), str(end)]
        lines.append(f"| {' | '.join(' '.join(cell.split()).replace('|', '/') for cell in cells)} |")
    finished = [each for each, end in zip(grid, ends, strict=True) if end.state == "finished"]
    lines += ["", f"{len(finished)} of {len(grid)} finished."]
    if losses:
        lines[-1] += " Losses: the last validation inside training, held-out text, nats per token."
    if finished:
        lines += ["", f"    memory3 report {' '.join(quoted(str(each.folder)) for each in finished)}"]
    if len(finished) < len(grid):
        lines += ["", "The same command goes on with what is left."]
    return "\n".join(lines) + "\n"


def _listed(override: Override) -> list[str]:
    """The values of an override, each as an override writes it."""
    text, value = text_of(override), override.value()
    if not override.is_discrete_sweep():
        raise ValueError(f"{text}: a grid takes lists; `memory3 sweep` draws from an interval")
    if text.partition("=")[2].lstrip().startswith("glob("):
        raise ValueError(f"{text}: list the choices, choice(a, b)")
    empty = isinstance(value, RangeSweep) and not value.step
    values = [] if empty else list(override.sweep_string_iterator())
    if not values:
        raise ValueError(f"{text}: this range is empty; its end is left out, write for example range(1, 5)")
    return values


def _compose(parsed: Mapping[str, Override], values: dict[str, str]) -> Combination:
    settings = [
        f"{override.get_key_element()}={values[key]}" if key in values else text_of(override)
        for key, override in parsed.items()
        if key != "run"
    ]
    named = [text_of(parsed["run"])] if "run" in parsed else []
    try:
        config = compose_config([*settings, *named])
    except ValueError as refused:
        given = ", ".join(f"{key}={value}" for key, value in values.items())
        raise ValueError(f"{given}: {refused}") from refused
    grid, config.run = config.run, _name(config.run, values)
    return Combination(grid, values, (*settings, f"run={config.run}"), config)


def _name(run: str, values: Mapping[str, str]) -> str:
    """The name of a combination's run; where it would be long, or no name of a folder, it ends in a hash."""
    whole = "-".join([run, *(f"{key}-{value}" for key, value in values.items())])
    name = re.sub(r"[^\w.-]+", "_", whole)[:_LONGEST_NAME]
    return name if name == whole else f"{name}-{sha256(whole.encode()).hexdigest()[:8]}"


def _prepare(grid: Sequence[Combination]) -> None:
    """Prepare every corpus once, here: runs that are jobs would do it at the same time."""
    from launch import prepare

    done: list[object] = []
    for each in grid:
        asked = (each.config.paths.root, each.config.data, each.config.retrieval)
        if asked not in done:
            prepare.ensure(each.config)
            done.append(asked)


def _train(each: Combination, program: Sequence[str]) -> End:
    """Bring a combination to its end on this machine."""
    run = TrialProcess(each.folder, each.config, [*each.settings, "logging.progress=false"], program)
    try:
        _wait(run)  # a controller that was killed has left it to train
        if run.exit_code() == 0:
            return End("finished", "before")
        run.start()
        log.info("it says how it goes in %s", each.folder / "trial.log")
        _wait(run)
    except KeyboardInterrupt:
        run.stop()
        log.info("%s was stopped; the same command goes on with it", each.config.run)
        raise
    return End("finished") if run.exit_code() == 0 else End("failed", _why(run))


def _why(run: TrialRun) -> str:
    """How a run ended that has not finished."""
    return f"{'ended by a signal; ' if run.exit_code() is None else ''}{run.last_words()}"


def _wait(run: TrialRun) -> None:
    while run.is_alive():
        time.sleep(_POLL_SECONDS)


def _submit(each: Combination, program: Sequence[str]) -> End:
    """Hand a combination to SLURM, unless it has finished, waits or trains."""
    settings = [*each.settings, "logging.progress=false", "launcher.slurm.submit=false"]
    queue = Queue(job_name(each.folder))
    run = TrialJob(each.folder, each.config, settings, each.folder, None, queue, program)
    if run.is_alive():
        return End("waiting", f"job {queue.jobs()[None]}, submitted before")
    if run.exit_code() == 0:
        return End("finished", "before")
    if each.folder.exists() and is_in_use(each.folder):
        return End("waiting", "a run that was started otherwise trains there")
    again = ""
    if run.log() is not None:
        again = f", submitted again, for it failed: {_why(run)}"
    elif run.was_submitted:
        again = ", submitted again, for the one before was cancelled before it began"
    return End("waiting", f"job {run.submit()}{again}")


def _validation(each: Combination) -> dict[str, float]:
    """The losses of a run's last validation, by what was read."""
    from launch.run_log import RunLog

    found = RunLog.read(each.folder).validation or {}
    return {name: float(found[key]) for key, name in _LOSSES.items() if key in found}

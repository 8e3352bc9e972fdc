"""`memory3 sweep`: trials of one recipe with drawn settings, one after the other or as jobs, and what they say.

    <root>/NAME/         sweep.json (what is varied), journal.log (`launch.study`), report.md, report.png
    <root>/NAME-000/     the run of the first trial, and so on (`launch.trial`)

The controller holds nothing that is not on disk. Killed at any moment and started again, it counts what is finished,
goes on watching a trial that still trains, and lets one that was killed go on at its newest checkpoint.
The objective is the last validation inside training, held-out text, with memory where memory is read; or, of facts, the
answers to the validation half's probes, for which each trial is evaluated when it is trained. Never the test half.
Not here: drawing (`launch.study`), a trial's processes (`launch.trial`), the report (`launch.sweep_report`).
"""

import argparse
import difflib
import importlib.util
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from hydra.core.override_parser.types import Override

from data.files import write_atomic
from launch.compose import CONF, compose_config, compose_unchecked
from launch.config import RunConfig
from launch.explain import unknown_choice, with_files
from launch.lock import only_user
from launch.origins import Setting
from launch.space import Space, Value, read_overrides, read_space
from launch.trial import EVALUATE, Jobs, Processes, TrialRun, Trials, interruptible, on_slurm, total_steps
from launch.units import duration

if TYPE_CHECKING:
    from launch.study import OpenTrial, Row, Study

log = logging.getLogger(__name__)

DEFAULT_TRIALS = 20
_POLL_SECONDS = 0.5
_MISTAKE = 2
"""The exit code of a run that lacked something: memory, which is the trial's own affair, or room on the disk, which is
that of all."""
_KILLED = 128
"""Greater exit codes are those of processes that a signal ended."""
_MOST_DEATHS = 3
"""So often a signal may end a trial, which is preempted or killed by somebody, before it counts as failed."""
_MOST_FAILURES = 5
"""After so many failed trials, while none has finished, no more are begun, and the sweep ends unless one that trains
finishes: what they share is at fault. Where a trial has finished it is what was drawn for the others.

Where half of a space diverges, that happens to one sweep in 32.
"""
_MOST_CANCELLED = 3
"""So many cancelled jobs in a row end the sweep: somebody wants to be rid of it."""
_SETTLING_SHARE = 1 / 3
"""No trial is pruned in this part of its steps: high learning rates look bad at first."""
_OWN_KEYS = ("run", "resume")
_VERSION = 1


class Objective(Enum):
    """Whose loss is made small."""

    text = "text"
    facts = "facts"


@dataclass(frozen=True, slots=True)
class Sweep:
    """What is tried.

    Attributes:
        name: Its folder below the root, and the beginning of the names of its runs.
        space: What all trials share and what varies.
        trials: How many there will be, failed ones included.
        seed: Decides what is drawn.
        objective: What makes one trial better than another.
    """

    name: str
    space: Space
    trials: int
    seed: int
    objective: Objective = Objective.text

    def settings(self, number: int, values: dict[str, Value]) -> list[str]:
        """The overrides of a trial, as `memory3 pretrain` takes them."""
        return [*self.space.settings(values), f"run={self.run_name(number)}"]

    def run_name(self, number: int) -> str:
        return f"{self.name}-{number:03d}"

    def to_json(self) -> dict[str, Any]:
        """What decides the trials; where they lie or train, and how many they are, does not."""
        fixed = [text for text in self.space.fixed if not text.startswith(("paths.root=", "launcher"))]
        return {
            "version": _VERSION,
            "seed": self.seed,
            "objective": self.objective.name,
            "fixed": fixed,
            "swept": self.space.texts,
        }


def run(arguments: argparse.Namespace) -> int:
    """Run the trials that are left, then print the report."""
    if importlib.util.find_spec("optuna") is None:
        raise ValueError("optuna draws the trials and is not installed; run: pip install 'optuna>=5'")
    sweep = sweep_of(arguments)
    config = _compose_corners(sweep, arguments.overrides)
    folder = Path(config.paths.root) / sweep.name
    if not arguments.report and not (folder / "sweep.json").exists():
        from launch import build, prepare, pretrain

        pretrain.check_branch(config, folder)
        prepare.ensure(config)
        if sweep.objective is Objective.facts and not build.context(config).prepared.probes:
            raise ValueError(f"data.name={config.data.name} has no fact probes; choose --objective text")
    return control(sweep, config, folder, only_report=arguments.report)


def sweep_of(arguments: argparse.Namespace) -> Sweep:
    """The sweep that a command line asks for; a file of conf/sweep/ comes before its own settings.

    Raises:
        ValueError: Naming the setting and what to write instead.
    """
    file, overrides = _chosen(arguments.overrides)
    space = read_space(_without_own(overrides), beneath=file.overrides)
    trials = file.trials if arguments.trials is None else arguments.trials
    if trials < 1:
        raise ValueError(f"--trials {trials}: set 1 or more")
    objective = Objective(arguments.objective or file.objective)
    return Sweep(arguments.name or file.name, space, trials, arguments.seed, objective)


def _compose_corners(sweep: Sweep, overrides: Sequence[str]) -> RunConfig:
    """The configuration of any trial, when all corners can be composed.

    Raises:
        ValueError: Naming the setting, and the file of conf/sweep/ where that has it.
    """
    first, *others = sweep.space.corners()
    try:
        config = compose_config([*first, f"run={sweep.name}"])
        for settings in others:
            compose_unchecked(settings)
    except ValueError as refused:
        file, given = _chosen(overrides)
        replaced = {text.partition("=")[0] for text in given}
        of_file = [Setting(key, None, file.place) for key in file.overrides if key not in replaced]
        raise ValueError(with_files(str(refused), given, CONF, of_file)) from refused
    return config


def _chosen(overrides: Sequence[str]) -> "tuple[_File, list[str]]":
    """The file that `sweep=NAME` chooses, or one that says nothing, and the overrides beside it."""
    chosen = [text for text in overrides if text.startswith("sweep=")]
    left = [text for text in overrides if text not in chosen]
    if len(chosen) > 1:
        raise ValueError(f"{chosen[1]}: write sweep=NAME, once")
    return _read_file(chosen[0].removeprefix("sweep=")) if chosen else _File(), left


def _without_own(overrides: Sequence[str]) -> Sequence[str]:
    """The same overrides.

    Raises:
        ValueError: One sets what a sweep decides.
    """
    for text in overrides:
        if text.lstrip("+").partition("=")[0] in _OWN_KEYS:
            raise ValueError(
                f"{text}: a sweep decides this itself; --name NAME names it, its runs are NAME-000, ..."
            )
    return overrides


@dataclass(frozen=True, slots=True)
class _File:
    """What a file of conf/sweep/ says."""

    name: str = "sweep"
    overrides: Mapping[str, Override] = field(default_factory=dict)
    trials: int = DEFAULT_TRIALS
    objective: str = Objective.text.name

    @property
    def place(self) -> str:
        """Its name in messages."""
        return f"conf/sweep/{self.name}.yaml"


def _read_file(name: str) -> _File:
    path = CONF / "sweep" / f"{name}.yaml"
    if not path.exists():
        raise ValueError(unknown_choice("sweep", name, CONF))
    place = _File(name).place
    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as problem:
        raise ValueError(
            f"{place}: {' '.join(str(problem).split())}; the file must be plain YAML, without tags"
        ) from problem
    try:
        return _checked(read, name)
    except ValueError as refused:
        raise ValueError(f"{place}: {refused}") from refused


def _checked(read: object, name: str) -> _File:
    """What a file of conf/sweep/ says, each key and each of its overrides looked at."""
    if not isinstance(read, dict):
        raise ValueError(f"it has no keys; write trials: {DEFAULT_TRIALS}, and overrides: a list of settings")
    names = ["overrides", "trials", "objective"]
    for key in read:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"keys: {', '.join(names)}"
            raise ValueError(f"there is no key {key}; {hint}")
    trials, overrides = read.get("trials", DEFAULT_TRIALS), read.get("overrides")
    objective = read.get("objective", Objective.text.name)
    if type(trials) is not int or trials < 1:
        raise ValueError(f"trials: {trials} must be a whole number, 1 or more, for example {DEFAULT_TRIALS}")
    if not isinstance(overrides, list) or not all(isinstance(text, str) for text in overrides):
        given = "is missing" if overrides is None else f"{overrides} is not a list of settings"
        raise ValueError(f"overrides {given}; write '- KEY=VALUE' a line below it, and vary one of them")
    known = [each.name for each in Objective]
    if objective not in known:
        near = difflib.get_close_matches(str(objective), known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"objective: {objective} does not exist; {hint}choices: {', '.join(known)}")
    return _File(name, read_overrides(_without_own(overrides)), trials, objective)


def control(
    sweep: Sweep, config: RunConfig, folder: Path, *, only_report: bool = False, trials: Trials | None = None
) -> int:
    """Run what is left of a sweep in its folder, then print and write the report.

    Args:
        sweep: What is tried.
        config: The configuration of any trial: for the root and the number of steps.
        folder: The sweep's folder.
        only_report: Whether nothing is trained.
        trials: Where they are trained; by default where `launcher.kind` says.

    Raises:
        ValueError: The folder is in use or holds another sweep, every trial fails, the disk has no room for one, or
            one job after the other is cancelled.
    """
    from launch.study import Study
    from launch.sweep_report import write_report

    if only_report and not (folder / "sweep.json").exists():
        raise ValueError(f"{folder} is no sweep; leave --report away to begin one")
    folder.mkdir(parents=True, exist_ok=True)
    with only_user(folder, other="choose another --name"):
        _freeze(sweep, folder)
        settle = int(total_steps(config) * _SETTLING_SHARE)
        study = Study(folder, sweep.space.swept, seed=sweep.seed, settle_steps=settle)
        if not only_report:
            where = trials or (Jobs(config, folder) if on_slurm(config) else Processes())
            with interruptible():
                _run_trials(sweep, study, Path(config.paths.root), where)
        print(write_report(sweep, config, study, folder))
        if not only_report and not study.has_finished:
            raise ValueError(
                f"all of {study.num_finished} trials failed, the last one so: {study.rows()[-1].note}\nmend what they "
                "share; the same command with a greater --trials then draws others"
            )
    return 0


def _freeze(sweep: Sweep, folder: Path) -> None:
    path = folder / "sweep.json"
    new = sweep.to_json()
    if not path.exists():
        if (folder / "config.yaml").exists():
            raise ValueError(f"{folder} holds a run; choose another --name")
        write_atomic(path, (json.dumps(new, indent=1) + "\n").encode())
        return
    old = json.loads(path.read_text())
    changed = [f"\n  {key}: {old.get(key)} -> {new[key]}" for key in new if old.get(key) != new[key]]
    if changed:
        raise ValueError(
            f"{folder} holds a sweep of other settings:{''.join(changed)}\nchoose another --name, or give the old "
            "settings to go on"
        )


def _run_trials(sweep: Sweep, study: "Study", root: Path, trials: Trials) -> None:
    """Bring all trials to their ends, wherever they stand."""
    failed = cancelled = 0
    why_last = ""
    watched: dict[int, _Watched] = {}
    pace = _Pace(sweep.trials, study.num_finished)
    try:
        while study.num_finished < sweep.trials:
            ended: dict[int, tuple[str, str]] = {}
            left = sweep.trials - study.num_finished
            hopeless = failed >= _MOST_FAILURES and not study.has_finished
            if hopeless and not watched:
                raise ValueError(
                    f"{failed} trials failed and none has finished, the last one so: {why_last}\nmend what they "
                    f"share; the same command then goes on with the {left} that are left"
                )
            for trial in study.open(0 if hopeless else min(trials.at_once, left)):
                if trial.number not in watched:
                    begun = _begin(sweep, trial, root, trials)
                    if isinstance(begun, tuple):
                        ended[trial.number] = begun
                        break  # what is drawn next may depend on it
                    watched[trial.number] = begun
            ended |= {number: end for number, each in watched.items() if (end := each.look()) is not None}
            watched = {number: each for number, each in watched.items() if each.is_open}
            for number, (state, why) in ended.items():
                log.info("%s %s: %s; %s", sweep.run_name(number), state, why, pace.said(study.rows()))
                if state == "failed":
                    failed, why_last = failed + 1, why
                cancelled = cancelled + 1 if state == "cancelled" else 0
                if cancelled >= _MOST_CANCELLED:
                    raise ValueError(
                        f"{cancelled} jobs were cancelled one after the other; the same command goes on with the "
                        f"{sweep.trials - study.num_finished} trials that are left"
                    )
            waiting = [each.run for each in watched.values() if each.waits]
            if waiting:
                trials.start(waiting)
            elif not ended:
                time.sleep(_POLL_SECONDS)
    except KeyboardInterrupt:
        for number, each in watched.items():
            each.run.stop()
            log.info("%s was stopped; the same command goes on with it", sweep.run_name(number))
        raise


class _Pace:
    """How far a sweep is, and when it will end: as fast as since this command was given."""

    def __init__(self, trials: int, num_finished: int) -> None:
        self._trials = trials
        self._before = num_finished
        self._since = time.monotonic()

    def said(self, rows: Sequence["Row"]) -> str:
        num_finished = sum(row.state != "running" for row in rows)
        losses = [(row.loss, row.number) for row in rows if row.state == "finished" and row.loss is not None]
        parts = ["the best is {:.4f} of trial {}".format(*min(losses))] if losses else []
        left = self._trials - num_finished
        if left > 0:
            seconds = (time.monotonic() - self._since) / max(1, num_finished - self._before) * left
            parts.append(f"{left} left, about {duration(seconds)}")
        return ", ".join(parts) or "none is left"


def _begin(sweep: Sweep, trial: "OpenTrial", root: Path, trials: Trials) -> "_Watched | tuple[str, str]":
    """A trial to be watched; or how it ended, and why, where nothing is to be trained."""
    settings = sweep.settings(trial.number, trial.values)
    try:
        config = compose_config(settings)
    except ValueError as refused:
        return _failed(trial, str(refused))
    folder = root / sweep.run_name(trial.number)
    if not folder.exists():
        known = trial.end_like_known()
        if known is not None:
            return known
    log.info("%s: %s", folder, describe(trial.values))
    settings = [*settings, "logging.progress=false"]
    of_facts = sweep.objective is Objective.facts
    run = trials.run(trial.number, folder, config, [EVALUATE, *settings] if of_facts else settings)
    return _Watched(trial, run, of_facts)


@dataclass(slots=True)
class _Watched:
    """A trial that is not finished.

    Attributes:
        of_facts: Whether it is evaluated for what it knows of facts; no validation inside training then ends it early.
        waits: Whether nothing of it lives and it has to be started.
        is_open: Whether it is to be looked at again.
    """

    trial: "OpenTrial"
    run: TrialRun
    of_facts: bool = False
    waits: bool = False
    is_open: bool = True
    _was_alive: bool = False
    _final: float | None = None

    def look(self) -> tuple[str, str] | None:
        """How it ended, and why; None while it has not."""
        end = self._look()
        self.is_open = end is None
        return end

    def _look(self) -> tuple[str, str] | None:
        self.waits = not self.run.is_alive()  # asked first: what is read afterwards is then all there is
        bad = self._read_losses()
        if bad is not None:
            return bad
        if not self.waits:
            self._was_alive = True
            return None
        code = self.run.exit_code()
        if code == 0 and self._final is not None:
            return self._finish(self._final)
        cancelled = self.run.cancelled()
        if cancelled is not None:
            why = f"job {cancelled} was cancelled before it began; a greater --trials draws another instead"
            self.trial.fail(why)
            return "cancelled", why
        failed = self._why_it_failed(code)
        return None if failed is None else _failed(self.trial, failed)

    def _why_it_failed(self, code: int | None) -> str | None:
        """Why a trial of which nothing lives is not started again; None where it is."""
        trial, run = self.trial, self.run
        if code == _MISTAKE:
            run.check_room()
        if code is not None and (code <= _KILLED or run.took_too_much_memory()):
            return run.last_words()
        if code is not None or self._was_alive:
            trial.died()  # else nobody saw it die: the machine, or this command, was ended as well
        if trial.deaths >= _MOST_DEATHS:
            return f"ended {trial.deaths} times by a signal; {run.last_words()}"
        return None

    def _finish(self, loss: float) -> tuple[str, str]:
        beside: dict[str, float] = {}
        if self.of_facts:
            try:
                beside = self.run.evaluation()
            except ValueError as problem:
                return _failed(self.trial, str(problem))
            loss = beside.pop("facts")
        self.trial.finish(loss, beside)
        return "finished", ", ".join(
            [f"loss {loss:.4f}", *(f"{name} {each:.4f}" for name, each in beside.items())]
        )

    def _read_losses(self) -> tuple[str, str] | None:
        """Report what is new; how the trial ended, and why, where a loss decides it."""
        for each in self.run.new_losses():
            if not math.isfinite(each.loss):
                self.run.stop()
                return _failed(self.trial, f"validation loss is {each.loss} at step {each.step}")
            worse = not self.of_facts and self.trial.report(each.step, each.loss)
            if each.is_last:
                self._final = each.loss
            elif worse:
                self.run.stop()
                self.trial.prune()
                return "pruned", f"its loss of {each.loss:.4f} at step {each.step} is worse than most"
        return None


def _failed(trial: "OpenTrial", why: str) -> tuple[str, str]:
    trial.fail(why)
    return "failed", why


def describe(values: Mapping[str, Value]) -> str:
    """Drawn values, for people."""
    return ", ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in values.items()
    )

"""`memory3 sweep`: trials of one recipe with drawn settings, one after the other, and what they say.

    <root>/NAME/         sweep.json (what is varied), journal.log (`launch.study`), report.md, report.png
    <root>/NAME-000/     the run of the first trial, and so on (`launch.trial`)

The controller holds nothing that is not on disk. Killed at any moment and started again, it counts what is finished,
goes on watching a trial that still trains, and lets one that was killed go on at its newest checkpoint.
The objective is the last validation inside training: held-out text, with memory where memory is read; never the test
half.
Not here: drawing (`launch.study`), a trial's processes (`launch.trial`), the report (`launch.sweep_report`).
"""

import argparse
import importlib.util
import json
import logging
import math
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import yaml

from data.files import write_atomic
from launch.compose import CONF, compose_config, compose_unchecked
from launch.config import RunConfig
from launch.explain import unknown_choice
from launch.lock import only_user
from launch.space import Space, Value, read_space
from launch.trial import TrialRun, total_steps

if TYPE_CHECKING:
    from launch.study import OpenTrial, Study

log = logging.getLogger(__name__)

DEFAULT_TRIALS = 20
_POLL_SECONDS = 0.5
_KILLED = 128
"""Greater exit codes are those of processes that a signal ended."""
_MOST_DEATHS = 3
"""So often a trial that a signal ended is started again: the kernel ends what takes too much memory in this way."""
_MOST_FAILURES = 3
"""So many failures in a row end the sweep: more of the same would teach nothing."""
_SETTLING_SHARE = 1 / 3
"""No trial is pruned in this part of its steps: high learning rates look bad at first."""
_OWN_KEYS = ("run", "resume")
_VERSION = 1

NewRun = Callable[[Path, RunConfig, Sequence[str]], TrialRun]


@dataclass(frozen=True, slots=True)
class Sweep:
    """What is tried.

    Attributes:
        name: Its folder below the root, and the beginning of the names of its runs.
        space: What all trials share and what varies.
        trials: How many there will be, failed ones included.
        seed: Decides what is drawn.
    """

    name: str
    space: Space
    trials: int
    seed: int

    def settings(self, number: int, values: dict[str, Value]) -> list[str]:
        """The overrides of a trial, as `memory3 pretrain` takes them."""
        return [*self.space.settings(values), f"run={self.run_name(number)}"]

    def run_name(self, number: int) -> str:
        return f"{self.name}-{number:03d}"

    def to_json(self) -> dict[str, Any]:
        """What decides the trials; where they lie and how many they are does not."""
        fixed = [text for text in self.space.fixed if not text.startswith("paths.root=")]
        return {"version": _VERSION, "seed": self.seed, "fixed": fixed, "swept": self.space.texts}


def run(arguments: argparse.Namespace) -> int:
    """Run the trials that are left, then print the report."""
    from launch import prepare

    if importlib.util.find_spec("optuna") is None:
        raise ValueError(
            "optuna draws the trials and is not installed; run: pip install 'memory3-pretrain[sweep]'"
        )
    sweep = sweep_of(arguments)
    first, *others = sweep.space.corners()
    config = compose_config([*first, f"run={sweep.name}"])
    for settings in others:
        compose_unchecked(settings)
    folder = Path(config.paths.root) / sweep.name
    if not arguments.report and not (folder / "sweep.json").exists():
        prepare.ensure(config)
    return control(sweep, config, folder, only_report=arguments.report)


def sweep_of(arguments: argparse.Namespace) -> Sweep:
    """The sweep that a command line asks for; a file of conf/sweep/ comes before its own settings.

    Raises:
        ValueError: Naming the setting and what to write instead.
    """
    overrides: list[str] = list(arguments.overrides)
    chosen = [text for text in overrides if text.startswith("sweep=")]
    name, trials = arguments.name, arguments.trials
    if chosen:
        file = _read_file(chosen[-1].removeprefix("sweep="))
        overrides = [*file.overrides, *(text for text in overrides if text not in chosen)]
        name = name or chosen[-1].removeprefix("sweep=")
        trials = file.trials if trials is None else trials
    space = read_space(overrides)
    for text in [*space.fixed, *space.swept]:
        if text.partition("=")[0] in _OWN_KEYS:
            raise ValueError(
                f"{text}: a sweep decides this itself; --name NAME names it, its runs are NAME-000, ..."
            )
    trials = DEFAULT_TRIALS if trials is None else trials
    if trials < 1:
        raise ValueError(f"--trials {trials}: set 1 or more")
    return Sweep(name or "sweep", space, trials, arguments.seed)


@dataclass(frozen=True, slots=True)
class _File:
    trials: int
    overrides: list[str]


def _read_file(name: str) -> _File:
    path = CONF / "sweep" / f"{name}.yaml"
    if not path.exists():
        raise ValueError(unknown_choice("sweep", name, CONF))
    return _File(**yaml.safe_load(path.read_text()))


def control(
    sweep: Sweep, config: RunConfig, folder: Path, *, only_report: bool = False, new_run: NewRun = TrialRun
) -> int:
    """Run what is left of a sweep in its folder, then print and write the report.

    Args:
        sweep: What is tried.
        config: The configuration of any trial: for the root and the number of steps.
        folder: The sweep's folder.
        only_report: Whether nothing is trained.
        new_run: Makes the processes of a trial.

    Raises:
        ValueError: The folder is in use or holds another sweep, or one trial after the other fails.
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
            previous = signal.signal(signal.SIGTERM, _interrupt)
            try:
                _run_trials(sweep, study, Path(config.paths.root), new_run)
            finally:
                signal.signal(signal.SIGTERM, previous)
        print(write_report(sweep, config, study, folder))
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


def _run_trials(sweep: Sweep, study: "Study", root: Path, new_run: NewRun) -> None:
    failures = 0
    while study.num_finished < sweep.trials:
        trial = study.next()
        state, why = _run_trial(sweep, trial, root, new_run)
        log.info("trial %d of %d %s%s", study.num_finished, sweep.trials, state, f": {why}" if why else "")
        failures = failures + 1 if state == "failed" else 0
        if failures >= _MOST_FAILURES:
            raise ValueError(
                f"{failures} trials failed one after the other, the last one so: {why}\nmend what they share; the same "
                f"command then goes on with trial {study.num_finished}"
            )


def _run_trial(sweep: Sweep, trial: "OpenTrial", root: Path, new_run: NewRun) -> tuple[str, str]:
    """Bring a trial to its end, wherever it stands; how it ended, and why."""
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
    log.info("trial %d of %d, %s: %s", trial.number + 1, sweep.trials, folder, describe(trial.values))
    run = new_run(folder, config, [*settings, "logging.progress=false"])
    try:
        return _watch(trial, run)
    except KeyboardInterrupt:
        run.stop()
        log.info("trial %d was stopped; the same command goes on with it", trial.number)
        raise


def _watch(trial: "OpenTrial", run: TrialRun) -> tuple[str, str]:
    final = None
    was_alive = False
    while True:
        alive = run.is_alive()  # asked first: what is read afterwards is then all there is
        for each in run.new_losses():
            if not math.isfinite(each.loss):
                run.stop()
                return _failed(trial, f"validation loss is {each.loss} at step {each.step}")
            worse = trial.report(each.step, each.loss)
            if each.is_last:
                final = each.loss
            elif worse:
                run.stop()
                trial.prune()
                return "pruned", f"its loss of {each.loss:.4f} at step {each.step} is worse than most"
        if alive:
            was_alive = True
            time.sleep(_POLL_SECONDS)
            continue
        code = run.exit_code()
        if code == 0 and final is not None:
            trial.finish(final)
            return "finished", f"loss {final:.4f}"
        if code is not None and code <= _KILLED:
            return _failed(trial, run.last_words())
        if (
            code is not None or was_alive
        ):  # else nobody saw it die: the machine, or this command, was ended as well
            trial.died()
        if trial.deaths >= _MOST_DEATHS:
            return _failed(trial, f"ended {trial.deaths} times by a signal; {run.last_words()}")
        run.start()


def _failed(trial: "OpenTrial", why: str) -> tuple[str, str]:
    trial.fail(why)
    return "failed", why


def describe(values: Mapping[str, Value]) -> str:
    """Drawn values, for people."""
    return ", ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in values.items()
    )


def _interrupt(signal_number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt

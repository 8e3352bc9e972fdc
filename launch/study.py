"""The trials of a sweep on disk, and what is drawn next: the one module that knows Optuna.

    SWEEP/journal.log    one line per change, appended and synced; one that a kill tore is cut off at the next opening

What is drawn is a function of the seed, the trial's number and the trials finished before, and a trial is written down
with all its values in one line: a controller that is killed at any moment draws the same when it is started again.
Only the holder of the sweep's lock may open a study.
Not here: what a value means (`launch.space`), training (`launch.trial`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from launch.space import Choice, Dimension, Value

_STARTUP_TRIALS = 8
"""Trials drawn at random before the sampler learns from them: sweeps have tens of trials, not hundreds."""
_PRUNING_STARTS_AFTER = 4
"""Trials that must have finished before one is pruned."""
_BEST_SHARE = 0.25
"""Of the finished trials, those whose values are set against all."""


@dataclass(frozen=True, slots=True)
class Row:
    """What is known of a trial.

    Attributes:
        state: "finished", "pruned", "failed" or "running".
        loss: The objective; of a pruned trial the last it reported, None where there is none.
        values: What was drawn, by key.
        beside: Other losses of a trial that finished, by name.
        note: Why it failed, or which trial it repeats.
    """

    number: int
    state: str
    loss: float | None
    values: dict[str, Value]
    beside: dict[str, float] = field(default_factory=dict)
    note: str = ""


class OpenTrial:
    """A trial that is not finished."""

    def __init__(self, trial: Trial) -> None:
        self._trial = trial
        self._study = trial.study

    @property
    def number(self) -> int:
        return self._trial.number

    @property
    def values(self) -> dict[str, Value]:
        return self._trial.params

    @property
    def deaths(self) -> int:
        """How often it was seen to end by a signal."""
        return int(self._trial.user_attrs.get("deaths", 0))

    def died(self) -> None:
        self._trial.set_user_attr("deaths", self.deaths + 1)

    def report(self, step: int, loss: float) -> bool:
        """Note a validation loss, once per step, and return whether the trial is worse than most were there."""
        if step not in self._frozen.intermediate_values:
            self._trial.report(loss, step)
        return step == self._frozen.last_step and self._trial.should_prune()

    def finish(self, loss: float, beside: Mapping[str, float] | None = None) -> None:
        if beside:
            self._trial.set_user_attr("beside", dict(beside))
        self._study.tell(self._trial, loss)

    def prune(self) -> None:
        self._study.tell(self._trial, state=TrialState.PRUNED)

    def fail(self, why: str) -> None:
        self._trial.set_user_attr("note", why)
        self._study.tell(self._trial, state=TrialState.FAIL)

    def end_like_known(self) -> tuple[str, str] | None:
        """End it like an earlier trial of the same values, if there is one: training repeats itself; how, and why."""
        for known in self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)):
            if known.params == self._trial.params:
                for step, loss in sorted(known.intermediate_values.items()):
                    self._trial.report(loss, step)
                if "beside" in known.user_attrs:
                    self._trial.set_user_attr("beside", known.user_attrs["beside"])
                note = f"like trial {known.number}"
                self._trial.set_user_attr("note", note)
                if known.state is TrialState.COMPLETE:
                    self._study.tell(self._trial, known.value)
                else:
                    self._study.tell(self._trial, state=known.state)
                return _STATES[known.state], note
        return None

    @property
    def _frozen(self) -> FrozenTrial:
        return self._study.get_trials(deepcopy=False)[self.number]


class Study:
    """All trials of a sweep."""

    def __init__(
        self, folder: Path, dimensions: Mapping[str, Dimension], *, seed: int, settle_steps: int
    ) -> None:
        """Open the journal of a folder, or begin one.

        Args:
            folder: The sweep's folder, which this process holds.
            dimensions: What is drawn, by key.
            seed: Decides all draws.
            settle_steps: Trials are not pruned before this step.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._distributions = {key: _distribution(each) for key, each in dimensions.items()}
        self._seed = seed
        path = folder / "journal.log"
        _cut_torn_line(path)
        self._study = optuna.create_study(
            study_name="sweep",
            storage=JournalStorage(JournalFileBackend(str(path), lock_obj=_HeldAlready(str(path)))),
            direction="minimize",
            pruner=optuna.pruners.MedianPruner(
                n_startup_trials=_PRUNING_STARTS_AFTER, n_warmup_steps=settle_steps
            ),
            load_if_exists=True,
        )

    @property
    def num_finished(self) -> int:
        """Trials that will not be trained again: finished, pruned or failed."""
        return sum(trial.state.is_finished() for trial in self._study.get_trials(deepcopy=False))

    @property
    def has_finished(self) -> bool:
        """Whether a trial was trained to its end; none is pruned before."""
        return any(trial.state is TrialState.COMPLETE for trial in self._study.get_trials(deepcopy=False))

    def open(self, num_trials: int) -> list[OpenTrial]:
        """The trials that are not finished, new ones among them where there are fewer than `num_trials`."""
        while len(self._running()) < num_trials:
            self._study.add_trial(self._drawn())
        return [OpenTrial(Trial(self._study, trial._trial_id)) for trial in self._running()]

    def rows(self) -> list[Row]:
        """All trials, in the order in which they were drawn."""
        return [
            Row(
                trial.number,
                _STATES[trial.state],
                trial.value,
                dict(trial.params),
                trial.user_attrs.get("beside", {}),
                trial.user_attrs.get("note", ""),
            )
            for trial in self._study.get_trials(deepcopy=False)
        ]

    def importances(self) -> dict[str, float]:
        """By key, which values set the best quarter of the finished trials apart (PED-ANOVA); shares of 1.

        Empty while fewer than four trials have finished, or none is worse than the best quarter.
        """
        finished = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        losses = sorted(trial.value for trial in finished if trial.value is not None)
        if len(losses) < 4 or losses[math.ceil(_BEST_SHARE * len(losses)) - 1] == losses[-1]:
            return {}
        return get_param_importances(
            self._study, evaluator=PedAnovaImportanceEvaluator(target_quantile=_BEST_SHARE)
        )

    def _running(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))

    def _drawn(self) -> FrozenTrial:
        known = self._study.get_trials(deepcopy=False)
        seed = (self._seed * 1_000_003 + len(known)) % 2**32
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=_STARTUP_TRIALS)
        draft = optuna.create_study(sampler=sampler)
        draft.add_trials(known)
        drawn = draft.ask(self._distributions)
        return create_trial(state=TrialState.RUNNING, params=drawn.params, distributions=self._distributions)


_STATES = {
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
}


class _HeldAlready(JournalFileOpenLock):
    """The sweep's own lock serves; a lock file would outlive a killed controller."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


def _cut_torn_line(path: Path) -> None:
    if path.exists():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with path.open("r+b") as file:
                file.truncate(whole)


def _distribution(dimension: Dimension) -> BaseDistribution:
    if isinstance(dimension, Choice):
        return CategoricalDistribution(dimension.options)
    if dimension.whole:
        return IntDistribution(
            int(dimension.low), int(dimension.high), log=dimension.log, step=int(dimension.step or 1)
        )
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log, step=dimension.step)

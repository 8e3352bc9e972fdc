"""Whether training has gone wrong, and what follows: decided from values that are the same on every rank. Pure.

An update is bad when its loss or its gradient norm is not finite, or when its loss stands out from those of the good
updates before it. Bad updates in a row, or one that has put numbers into the weights that are not finite, mean that
the run goes back to the checkpoint before them and passes their rows over: those steps are counted, and make no
update, so that steps, rows, schedule and bank epochs keep their places.

`Health` is part of the run's state: a resumed run decides as the undisturbed one would have.
Not here: going back (`run`), what a single update does with numbers that are not finite (`engine`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, Self

from train.config import DivergenceConfig
from train.engine import StepResult

_SIGMA_OF_MAD = 1.4826
"""Standard deviation of normal values whose median absolute deviation is 1."""


@dataclass(frozen=True, slots=True)
class Health:
    """How a stage has been going.

    Attributes:
        losses: Of the last good updates, oldest first.
        bad: Bad updates in a row, up to now.
        rollbacks: How often the stage has gone back.
        lr_factor: What the schedule's learning rate is multiplied by.
        passed_over: Updates [first, last), counted from 0 in the stage, that are not made.
    """

    losses: tuple[float, ...] = ()
    bad: int = 0
    rollbacks: int = 0
    lr_factor: float = 1.0
    passed_over: tuple[tuple[int, int], ...] = ()

    def after(self, result: StepResult, config: DivergenceConfig) -> Self:
        """The health after one more update."""
        if not _is_finite(result) or self.stands_out(result.loss, config):
            return replace(self, bad=self.bad + 1)
        return replace(self, losses=(*self.losses, result.loss)[-config.window_steps :], bad=0)

    def stands_out(self, loss: float, config: DivergenceConfig) -> bool:
        """Whether a finite loss lies far above the last good ones, once there are enough of them."""
        if config.spike_nats is None or len(self.losses) < config.window_steps:
            return False
        middle = median(self.losses)
        spread = _SIGMA_OF_MAD * median(abs(each - middle) for each in self.losses)
        return loss > middle + max(config.spike_nats, config.spike_sigmas * spread)

    def judge(self, step: int, result: StepResult, config: DivergenceConfig) -> None:
        """Say whether the run may go on after an update, with the health that it left.

        Args:
            step: Updates finished, this one included.
            result: Of the update.
            config: How much is borne.

        Raises:
            DivergedError: It must go back.
        """
        finite = _is_finite(result)
        if not finite and not result.skipped:
            what = f"loss {result.loss:g}, gradient norm {result.grad_norm}: they have reached the weights"
            raise DivergedError(step, self, what)
        if self.bad >= config.patience:
            what = f"loss {result.loss:.3f} stands out" if finite else "no finite gradient"
            raise DivergedError(step, self, f"{what}, {self.bad} bad updates in a row")

    def passes_over(self, step: int) -> bool:
        """Whether the update that follows `step` finished ones is left out."""
        return any(first <= step < last for first, last in self.passed_over)

    def back_at(self, earlier: Self, window: tuple[int, int], config: DivergenceConfig) -> Self:
        """The health with which the stage goes on from an earlier state, passing a window over."""
        return replace(
            self,
            losses=earlier.losses,
            bad=earlier.bad,
            rollbacks=self.rollbacks + 1,
            lr_factor=self.lr_factor * config.lr_factor,
            passed_over=(*self.passed_over, window),
        )

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `dataclasses.asdict`, by way of JSON."""
        windows = tuple((int(first), int(last)) for first, last in values["passed_over"])
        return cls(**{**values, "losses": tuple(values["losses"]), "passed_over": windows})


class DivergedError(Exception):
    """Training has gone wrong; every rank raises it after the same update.

    Attributes:
        step: Updates finished, the bad ones included.
        health: Of the stage, by then.
        reason: What was seen.
    """

    def __init__(self, step: int, health: Health, reason: str) -> None:
        super().__init__(f"{reason} (update {step})")
        self.step = step
        self.health = health
        self.reason = reason

    def window(self, config: DivergenceConfig) -> tuple[int, int]:
        """The updates [first, last), counted from 0, whose rows are to be passed over."""
        return max(0, self.step - self.health.bad - config.margin_steps), self.step + config.margin_steps


class HopelessError(Exception):
    """The run has done what its settings allow, and goes nowhere: somebody has to look."""


def _is_finite(result: StepResult) -> bool:
    norm = 0.0 if result.grad_norm is None else result.grad_norm
    return not result.skipped and math.isfinite(result.loss) and math.isfinite(norm)

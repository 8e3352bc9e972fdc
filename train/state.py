"""Where a run stands: everything a resumed run needs besides weights and optimizer state.

Not here: what was read, of which the rows follow (`history`), how it is written to disk (`checkpoint`).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from train.divergence import Health
from train.engine import StepResult


@dataclass(frozen=True, slots=True)
class RunState:
    """The position of a run after a whole number of optimizer updates.

    Attributes:
        stage: "warmup" or "continual".
        step: Finished updates of the stage.
        epoch: Number of the epoch in the stage, from 0.
        epoch_step: Value of `step` when the epoch began.
        cursor: Rows of the epoch's plan consumed by the whole run.
        tokens: Targets trained on in this run, both stages.
        skipped: Updates left out: a gradient was not finite, or their rows were passed over.
        generation: Name of the bank generation that the epoch reads, None without one.
        generation_fingerprint: Its fingerprint: a resumed epoch reads exactly this one.
        validation: Loss of held-out text with these very weights, None when it was not measured.
        health: How the stage has been going.
    """

    stage: str
    step: int = 0
    epoch: int = 0
    epoch_step: int = 0
    cursor: int = 0
    tokens: int = 0
    skipped: int = 0
    generation: str | None = None
    generation_fingerprint: str | None = None
    validation: float | None = None
    health: Health = field(default_factory=Health)

    def after(self, result: StepResult, *, cursor: int, health: Health | None = None) -> Self:
        """The state after one more update."""
        return replace(
            self,
            step=self.step + 1,
            cursor=cursor,
            tokens=self.tokens + result.tokens,
            skipped=self.skipped + result.skipped,
            validation=None,
            health=health or self.health,
        )

    def passing_over(self, *, cursor: int) -> Self:
        """The state after a step whose rows were passed over."""
        return replace(self, step=self.step + 1, cursor=cursor, skipped=self.skipped + 1)

    def next_epoch(self) -> Self:
        """The state at the beginning of the epoch that follows."""
        return replace(
            self,
            epoch=self.epoch + 1,
            epoch_step=self.step,
            cursor=0,
            generation=None,
            generation_fingerprint=None,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`."""
        return cls(
            **{**values, "health": Health.from_json(values["health"])} if "health" in values else values
        )

"""What happens at which step of a stage: learning rate, validation, saving, where bank epochs end, and how many
generations lie there at a time. Pure.

Steps count finished optimizer updates: `learning_rate(step)` is the rate of the update that follows `step`
finished ones, `saves(step)` asks after `step` finished ones.

`epoch_steps` of a stage is a number of steps, or ranges of steps with the length that a bank epoch has in each:
"0-1000:100,1000-:500" is ten epochs of 100 steps, then epochs of 500. An epoch ends where its range ends.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from train.config import SavingConfig, StageConfig


@dataclass(frozen=True, slots=True)
class Schedule:
    """Warmup-stable-decay: linear ramp, plateau, linear decay (paper, section 5.1).

    Attributes:
        num_steps: Updates of the stage.
        peak_lr: Learning rate of the plateau.
        final_lr: Learning rate that the decay ends at.
        ramp_steps: Updates of the ramp.
        decay_steps: Updates of the decay, the last ones of the stage.
        save_every: Steps between two checkpoints.
        validate_every: Steps between two validations.
    """

    num_steps: int
    peak_lr: float
    final_lr: float
    ramp_steps: int
    decay_steps: int
    save_every: int
    validate_every: int

    @property
    def branch_step(self) -> int:
        """The last step before the decay: where a continual stage branches off."""
        return self.num_steps - self.decay_steps

    def learning_rate(self, step: int) -> float:
        """Learning rate of the update that follows `step` finished ones."""
        if step < self.ramp_steps:
            return self.peak_lr * (step + 1) / self.ramp_steps
        if step < self.branch_step:
            return self.peak_lr
        left = (self.num_steps - step) / (self.decay_steps + 1)
        return self.final_lr + (self.peak_lr - self.final_lr) * left

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is published after `step` finished updates."""
        return step in (self.branch_step, self.num_steps) or step % self.save_every == 0

    def validates(self, step: int) -> bool:
        """Whether held-out text is read after `step` finished updates."""
        return step == self.num_steps or step % self.validate_every == 0


def schedule_of(stage: StageConfig, *, save_every: int, validate_every: int) -> Schedule:
    """The schedule that a stage's settings describe."""
    return Schedule(
        num_steps=stage.steps,
        peak_lr=stage.peak_lr,
        final_lr=stage.final_lr,
        ramp_steps=stage.ramp_steps,
        decay_steps=stage.decay_steps,
        save_every=save_every,
        validate_every=validate_every,
    )


@dataclass(frozen=True, slots=True)
class EpochRange:
    """The steps [begin, end) of a stage, in which a bank epoch is `steps` long; without an end, up to the stage's."""

    begin: int
    end: int | None
    steps: int


def epoch_ranges(epoch_steps: str, *, num_steps: int, key: str) -> list[EpochRange]:
    """The ranges that a stage's `epoch_steps` states; one number is one range.

    Args:
        epoch_steps: The setting.
        num_steps: Updates of the stage, all of which must lie in a range.
        key: Its name, for messages.

    Raises:
        ValueError: It is not of this form, holds no step, or leaves a gap, overlaps or ends too early.
    """
    setting = f"{key}={epoch_steps}"
    ranges: list[EpochRange] = []
    expected: int | None = 0
    parts = [f"0-:{epoch_steps}"] if re.fullmatch(r"-?\d+", epoch_steps) else epoch_steps.split(",")
    for part in parts:
        match = re.fullmatch(r"\s*(\d+)-(\d*):(-?\d+)\s*", part)
        if match is None:
            raise ValueError(
                f"{setting}: {part.strip()!r} is not BEGIN-END:STEPS in whole numbers; write for example "
                "0-1000:100,1000-:500"
            )
        begin, end, steps = int(match[1]), int(match[2]) if match[2] else None, int(match[3])
        if steps < 1:
            raise ValueError(f"{setting} is below 1; set null for one pass over the rows")
        if expected is None:
            raise ValueError(
                f"{setting}: the range before {part.strip()!r} has no end; let it end at {begin}, where this one begins"
            )
        if begin != expected:
            fault = (
                "overlaps the range before it"
                if begin < expected
                else f"leaves out the steps from {expected}"
            )
            raise ValueError(f"{setting}: {part.strip()!r} {fault}; let it begin at {expected}")
        if end is not None and end <= begin:
            raise ValueError(f"{setting}: {part.strip()!r} holds no step; let it end above {begin}")
        ranges.append(EpochRange(begin, end, steps))
        expected = end
    if expected is not None and expected < num_steps:
        raise ValueError(
            f"{setting} ends at step {expected} of {num_steps}; leave out the last end: "
            f"{ranges[-1].begin}-:{ranges[-1].steps}"
        )
    return ranges


def epoch_end(stage: StageConfig, begin: int) -> int | None:
    """The step at which the bank epoch ends that begins after `begin` updates; None: after one pass over the rows."""
    if stage.epoch_steps is None:
        return None
    for part in epoch_ranges(stage.epoch_steps, num_steps=stage.steps, key="epoch_steps"):
        if part.end is None or begin < part.end:
            return min(begin + part.steps, stage.steps if part.end is None else min(part.end, stage.steps))
    raise AssertionError(f"no range holds step {begin}")


def epoch_begins(stage: StageConfig) -> list[int]:
    """The step at which each bank epoch begins; empty when epochs are passes over the rows, counted as they come."""
    begins = [0]
    while (end := epoch_end(stage, begins[-1])) is not None and end < stage.steps:
        begins.append(end)
    return [] if end is None else begins


def most_generations(begins: Sequence[int], stage: StageConfig, saving: SavingConfig) -> int:
    """Return how many generations of a stage lie on disk at a time, at most, the one being compiled included.

    Args:
        begins: The steps at which its bank epochs begin.
        stage: Its length.
        saving: When checkpoints are published, and what stays.
    """
    branch = stage.steps - stage.decay_steps
    saved = sorted(
        {*range(saving.every_steps, stage.steps + 1, saving.every_steps), branch, stage.steps} - {0}
    )
    epochs = [bisect_left(begins, step) - 1 for step in saved]
    for_good: set[int] = set()
    most = seen = 0
    for epoch, begin in enumerate([*begins, stage.steps]):
        published = bisect_right(saved, begin)
        for place in range(seen, published):
            if saved[place] == branch or (saving.keep_every and saved[place] % saving.keep_every == 0):
                for_good.add(epochs[place])
        seen = published
        last = epochs[max(0, published - saving.keep_last) : published]
        newest = range(max(0, epoch - saving.keep_generations), epoch)
        there = min(epoch, len(for_good.union(last, newest)) + saving.keep_best)
        most = max(most, there + (epoch < len(begins)))
    return most

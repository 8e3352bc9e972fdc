"""What happens at which step of a stage: learning rate, validation, saving. Pure.

Steps count finished optimizer updates: `learning_rate(step)` is the rate of the update that follows `step`
finished ones, `saves(step)` asks after `step` finished ones.
"""

from dataclasses import dataclass

from train.config import StageConfig


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

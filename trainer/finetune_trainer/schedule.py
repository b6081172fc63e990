"""The learning rate as a function of progress, and progress as a function of the steps that are left (pure)."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Pace:
    """How far the fine-tuning is: `done` steps, and `progress` from 0 to 1 along the schedule."""

    done: int = 0
    progress: float = 0.0

    def next_stride(self, steps_left: int) -> float:
        """Return the share of the schedule that the next step covers when `steps_left` steps, this one included, are left."""
        return (1.0 - self.progress) / max(1, steps_left)

    def step(self, steps_left: int) -> "Pace":
        """Return the pace after the next step; exactly 1 after the last one."""
        progress = 1.0 if steps_left <= 1 else self.progress + self.next_stride(steps_left)
        return Pace(self.done + 1, progress)


def compute_rate(progress: float, *, warmup_share: float) -> float:
    """Return the learning rate relative to its peak: a linear rise, then a cosine that is zero at progress 1."""
    if progress < warmup_share:
        return progress / warmup_share
    if progress >= 1.0:
        return 0.0
    return 0.5 * (1.0 + math.cos(math.pi * (progress - warmup_share) / (1.0 - warmup_share)))


def count_steps_left(done: int, *, planned: int | None, seconds_left: float | None, step_seconds: float) -> int:
    """Return how many steps are left: those of the plan, or as many as fit into the time, whichever is fewer."""
    limits = []
    if planned is not None:
        limits.append(planned - done)
    if seconds_left is not None:
        limits.append(int(seconds_left / step_seconds))
    assert limits, "fine-tuning needs a number of steps or a budget"
    return max(0, min(limits))

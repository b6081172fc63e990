"""How long the rest of a training takes, from the pace of this very attempt (pure).

A trainer's own estimate is not used: many divide the time since their start by all steps of the run, those of earlier attempts
included, so that it is far too low after every resume. Here only steps count that were seen to be done in this attempt, with
the times at which the reports came in. The first step never counts, as compilation and caches make it slow.
"""

import math
from dataclasses import dataclass, replace
from typing import Self

from finetune_api.contract import TrainerReport

# So many recent intervals between two reports make the pace: it follows a machine that becomes slower or faster.
_MAX_STRETCHES = 16
_MAX_PAUSES = 8
_FEWEST_FOR_PAUSES = 4
# An interval that took this many times as long as usual, and this much longer, holds a pause: an evaluation, a stalled disk.
_PAUSE_FACTOR = 3.0
_SHORTEST_PAUSE_SECONDS = 5.0
# Pauses that have stayed away for so many of their intervals are over: they were those of a start, or of a slower time.
_MISSED_INTERVALS = 2.0

# What trainers call their steps: Hugging Face's and ours, and in the spelling of KEP-2779's examples.
_STEP_NAMES = (("current_step", "total_steps"), ("currentStep", "totalSteps"))
_STEPS, _PERCENT = "steps", "percent"


@dataclass(frozen=True, slots=True)
class Position:
    """How far a training is: so many of so many steps, or percent."""

    unit: str
    done: float
    total: float


@dataclass(frozen=True, slots=True)
class Stretch:
    """What was done between two reports, and how long that took."""

    end: float
    steps: float
    seconds: float

    @property
    def seconds_per_step(self) -> float:
        """Return the time of one step."""
        return self.seconds / self.steps


@dataclass(frozen=True, slots=True)
class Pause:
    """Time in which nothing was done, and the position after it."""

    end: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Pace:
    """What was seen of the pace of one attempt."""

    unit: str
    done: float
    since: float
    """When this position was first reported, on a monotonic clock."""
    stretches: tuple[Stretch, ...] = ()
    pauses: tuple[Pause, ...] = ()
    """Those before the stretches."""

    def advance(self, done: float, *, at: float) -> Self:
        """Return the pace after another report. Steps that are done again, after a setback, count anew."""
        if done == self.done:
            return self
        if done < self.done:
            return replace(self, done=done, since=at)
        stretch = Stretch(end=done, steps=done - self.done, seconds=at - self.since)
        stretches, pauses = (*self.stretches, stretch), self.pauses
        if len(stretches) > _MAX_STRETCHES:
            forgotten, stretches = stretches[0], stretches[1:]
            pauses = (*pauses, *(each for each in _find_pauses(self.stretches) if each.end == forgotten.end))[-_MAX_PAUSES:]
        return replace(self, done=done, since=at, stretches=stretches, pauses=pauses)


def read_position(report: TrainerReport) -> Position | None:
    """Return how far the trainer is: by its steps if it reports them, else by its percentage."""
    values = {metric.name: _parse_number(metric.value) for metric in report.trainer_status.metrics}
    for current, total in _STEP_NAMES:
        done, of = values.get(current), values.get(total)
        if done is not None and of is not None and of > 0:
            return Position(_STEPS, done, of)
    percentage = report.trainer_status.progress_percentage
    return None if percentage is None else Position(_PERCENT, percentage, 100)


def follow(pace: Pace | None, report: TrainerReport, *, at: float) -> Pace | None:
    """Return the pace of an attempt after a report that was received at a time of a monotonic clock."""
    position = read_position(report)
    if position is None or position.done <= 0:
        # Before the first step, and after a resume many say 0 until then: it is no place to count from.
        return pace
    if pace is None or pace.unit != position.unit:
        return Pace(position.unit, position.done, at)
    return pace.advance(position.done, at=at)


def estimate_seconds_left(pace: Pace | None, report: TrainerReport, *, at: float) -> float | None:
    """Return how long the rest probably takes, or None while too little was seen of this attempt."""
    position, time_left = read_position(report), report.time_left
    if report.trainer_status.progress_percentage == 100:
        return 0.0
    budget = time_left.budget_seconds if time_left else None
    seconds = None
    if position is not None and (position.unit == _STEPS or time_left is None):
        seconds = _extrapolate(pace, position, at=at)
    if seconds is not None and time_left is not None:
        seconds += time_left.after_steps_seconds or 0.0
    known = [max(0.0, each) for each in (seconds, budget) if each is not None]
    return min(known) if known else None


def _extrapolate(pace: Pace | None, position: Position, *, at: float) -> float | None:
    left = position.total - position.done
    if left <= 0:
        return 0.0
    if pace is None or pace.unit != position.unit or not pace.stretches:
        return None
    pauses = _find_pauses(pace.stretches)
    paused = {each.end for each in pauses}
    usual = [each for each in pace.stretches if each.end not in paused]
    step_seconds = sum(each.seconds for each in usual) / sum(each.steps for each in usual)
    step_seconds += _count_pause_seconds_per_step((*pace.pauses, *pauses)[-_MAX_PAUSES:], done=pace.done)
    # A part of the next step is done already.
    return left * step_seconds - min(step_seconds, at - pace.since)


def _find_pauses(stretches: tuple[Stretch, ...]) -> tuple[Pause, ...]:
    """Return the pauses in stretches, each as long as its stretch took longer than usual."""
    if len(stretches) < _FEWEST_FOR_PAUSES:
        return ()
    usual = _find_usual_seconds(stretches)
    excess = ((each, each.seconds - usual * each.steps) for each in stretches)
    return tuple(
        Pause(each.end, seconds)
        for each, seconds in excess
        if seconds > max(_SHORTEST_PAUSE_SECONDS, (_PAUSE_FACTOR - 1) * usual * each.steps)
    )


def _find_usual_seconds(stretches: tuple[Stretch, ...]) -> float:
    """Return the median time of a step."""
    ordered = sorted(stretches, key=lambda each: each.seconds_per_step)
    half = sum(each.steps for each in ordered) / 2
    seen = 0.0
    for each in ordered:
        seen += each.steps
        if seen >= half:
            return each.seconds_per_step
    raise AssertionError("there is no stretch")


def _count_pause_seconds_per_step(pauses: tuple[Pause, ...], *, done: float) -> float:
    """Return what pauses add to a step: one is an accident, more come again in the same intervals, until they stay away."""
    if len(pauses) < 2:
        return 0.0
    interval = (pauses[-1].end - pauses[0].end) / (len(pauses) - 1)
    if interval <= 0 or done - pauses[-1].end > _MISSED_INTERVALS * interval:
        return 0.0
    return sum(each.seconds for each in pauses) / len(pauses) / interval


def _parse_number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None

"""The remaining time, for synthetic courses of a training."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

import pytest
from finetune_api.contract import TimeLeft, TrainerReport
from finetune_operator.policies.pace import Pace, estimate_seconds_left, follow

_TOTAL = 500


@dataclass(frozen=True)
class Course:
    """How a training goes: the seconds of each step, given its number and a source of chance."""

    step_seconds: Callable[[int, Random], float]
    first: int = 0
    """The step that the attempt resumes from."""


def _steady(_step: int, chance: Random) -> float:
    return 2 * chance.uniform(0.85, 1.15)


def _report(done: int | None, *, total: int = _TOTAL, own_estimate: int | None = 1) -> TrainerReport:
    """Return a report as Hugging Face's Trainer sends it; before the first step it has no step."""
    metrics = [{"name": "total_steps", "value": str(total)}]
    if done is not None:
        metrics.append({"name": "current_step", "value": str(done)})
    percentage = min(99, 100 * (done or 0) // total)
    status = {"progressPercentage": percentage, "estimatedRemainingSeconds": own_estimate, "metrics": metrics}
    return TrainerReport.model_validate({"trainerStatus": status})


def _play(course: Course, *, seconds_between: float = 5.0) -> Iterator[tuple[float, int, TrainerReport]]:
    """Yield time, step and report, one at the start, and then at the end of the first step after each interval."""
    chance, at, posted = Random(0), 100.0, 100.0
    yield at, course.first, _report(None)
    for step in range(course.first + 1, _TOTAL + 1):
        at += course.step_seconds(step, chance)
        if at - posted >= seconds_between or step == _TOTAL:
            posted = at
            yield at, step, _report(step)


def _estimate_all(reports: list[tuple[float, int, TrainerReport]]) -> list[tuple[float, int, float | None]]:
    pace: Pace | None = None
    found = []
    for at, step, report in reports:
        pace = follow(pace, report, at=at)
        found.append((at, step, estimate_seconds_left(pace, report, at=at)))
    return found


@pytest.mark.parametrize(
    "course",
    [
        pytest.param(Course(_steady), id="steady"),
        pytest.param(Course(lambda step, chance: _steady(step, chance) + (300 if step == 1 else 0)), id="slow first step"),
        pytest.param(Course(lambda step, chance: _steady(step, chance) + (60 if step < 4 else 0)), id="slow first three steps"),
        pytest.param(Course(lambda step, chance: _steady(step, chance) + (400 if step == 60 else 0)), id="one long pause"),
        pytest.param(Course(lambda step, chance: _steady(step, chance) + (30 if step % 20 == 0 else 0)), id="evaluations"),
        pytest.param(Course(lambda step, chance: _steady(step, chance) * (4 if step > 50 else 1)), id="slower from 10 % on"),
        pytest.param(Course(lambda step, chance: _steady(step, chance) * (1 if step > 50 else 4)), id="faster from 10 % on"),
        pytest.param(Course(lambda _step, chance: 7 * chance.uniform(0.9, 1.1)), id="steps longer than the interval"),
        pytest.param(Course(lambda _step, chance: 0.05 * chance.uniform(0.5, 1.5)), id="many steps in each interval"),
        pytest.param(Course(_steady, first=300), id="resumed"),
        pytest.param(
            Course(lambda step, chance: _steady(step, chance) + (200 if step == 451 else 0), first=450),
            id="resumed near the end, slow first step",
        ),
    ],
)
def test_estimate_is_within_a_tenth_after_a_fifth_of_the_steps(course: Course) -> None:
    between = 5.0 if course.step_seconds(100, Random(0)) > 1 else 0.5
    reports = list(_play(course, seconds_between=between))
    ended_at = reports[-1][0]
    settled = course.first + (_TOTAL - course.first) / 5

    late = [(at, step, seconds) for at, step, seconds in _estimate_all(reports) if settled <= step < _TOTAL]

    # Near the end a tenth of what is left is less than a step: what counts there is the whole attempt.
    length = ended_at - reports[0][0]
    assert late
    for at, step, seconds in late:
        assert seconds is not None, step
        assert math.isclose(seconds, ended_at - at, rel_tol=0.1, abs_tol=0.02 * length), (step, seconds, ended_at - at)


def test_resumed_attempt_never_counts_the_steps_of_earlier_ones() -> None:
    estimates = [seconds for _, _, seconds in _estimate_all(list(_play(Course(_steady, first=300))))]

    assert estimates[:2] == [None, None]
    assert estimates[2] == pytest.approx(400, rel=0.2)


def test_trainer_that_reports_more_often_than_it_steps_counts_down_in_between() -> None:
    pace = None
    found = []
    for at in range(0, 200, 5):
        report = _report(1 + at // 60, total=11)
        pace = follow(pace, report, at=float(at))
        found.append(estimate_seconds_left(pace, report, at=float(at)))

    assert found[:12] == [None] * 12
    assert found[12:15] == [540, 535, 530]


def test_percentage_counts_where_there_are_no_steps() -> None:
    pace = None
    for percentage in (0, 10, 11, 12, 13):
        report = TrainerReport.model_validate({"trainerStatus": {"progressPercentage": percentage}})
        pace = follow(pace, report, at=30.0 * percentage)

    assert estimate_seconds_left(pace, report, at=390) == pytest.approx(87 * 30)


@pytest.mark.parametrize(
    ("status", "time_left", "expected"),
    [
        pytest.param({}, None, None, id="nothing"),
        pytest.param({"progressPercentage": 50, "estimatedRemainingSeconds": 7}, None, None, id="the trainer's own estimate"),
        pytest.param({"progressPercentage": 100}, None, 0, id="all done"),
        pytest.param({"progressPercentage": 15}, TimeLeft(budget_seconds=80), 80, id="a budget before the first step"),
        pytest.param({"progressPercentage": 15}, TimeLeft(), None, id="phases of unknown length"),
        pytest.param(
            {"metrics": [{"name": "current_step", "value": "9"}, {"name": "total_steps", "value": "9"}]},
            TimeLeft(after_steps_seconds=12, budget_seconds=80),
            12,
            id="what comes after the last step",
        ),
        pytest.param(
            {"metrics": [{"name": "current_step", "value": "9"}, {"name": "total_steps", "value": "9"}]},
            TimeLeft(after_steps_seconds=12, budget_seconds=5),
            5,
            id="never more than the budget",
        ),
        pytest.param(
            {"metrics": [{"name": "current_step", "value": "nan"}, {"name": "total_steps", "value": "inf"}]},
            None,
            None,
            id="steps that are no numbers",
        ),
    ],
)
def test_first_report(status: dict[str, Any], time_left: TimeLeft | None, expected: float | None) -> None:
    report = TrainerReport.model_validate({"trainerStatus": status, "timeLeft": time_left})

    assert estimate_seconds_left(follow(None, report, at=0), report, at=0) == expected


def test_steps_that_are_done_again_count_anew() -> None:
    pace = None
    for at, done in ((0, 10), (10, 20), (20, 30), (100, 15), (105, 20)):
        report = _report(done, total=100)
        pace = follow(pace, report, at=at)

    assert estimate_seconds_left(pace, report, at=105) == pytest.approx(80, rel=0.01)


def test_memory_of_a_long_training_is_bounded() -> None:
    pace = None
    for number in range(1, 5000):
        pace = follow(pace, _report(number, total=5000), at=number * (40.0 if number % 10 == 0 else 5.0) + number)

    assert pace is not None
    assert (len(pace.stretches), len(pace.pauses)) <= (16, 8)

"""When a report is written into the status."""

import itertools
import math
import random
from collections.abc import Iterable

import pytest
from finetune_operator.policies.progress import compute_report_delay

_INTERVAL = 10.0


def compute_delay(later: float, *, age: float = 0) -> float:
    return compute_report_delay(later, age_seconds=age, interval_seconds=_INTERVAL)


def list_writes(arrivals: Iterable[float]) -> list[tuple[float, float]]:
    """Return when which reports would be written until the last one arrives, each by the time when it arrived."""
    writes: list[tuple[float, float]] = []
    for arrival, following in itertools.pairwise(arrivals):
        shown = writes[-1][1] if writes else None
        now = arrival
        while now < following:
            delay = 0.0 if shown is None else compute_delay(arrival - shown, age=now - arrival)
            if delay == 0:
                writes.append((now, arrival))
                break
            now += delay
    return writes


@pytest.mark.parametrize(
    ("later", "age", "delay"),
    [
        pytest.param(5, 0, 10, id="early: another one is waited for"),
        pytest.param(5, 4, 6, id="early, looked at again"),
        pytest.param(5, 10, 0, id="no other one came"),
        pytest.param(8.9, 0, 6.1, id="a little too early"),
        pytest.param(9, 0, 0, id="just before the end"),
        pytest.param(10.3, 0, 0, id="just after the end"),
        pytest.param(math.inf, 0, 0, id="the first one"),
    ],
)
def test_report_waits_for_the_end_of_its_interval(later: float, age: float, delay: float) -> None:
    assert pytest.approx(delay) == compute_delay(later, age=age)


@pytest.mark.parametrize(
    ("since_write", "delay"),
    [
        pytest.param(9.9, 0, id="it came at once"),
        pytest.param(7.5, 0, id="it waited a little"),
        pytest.param(7.4, 7.6, id="it waited for long"),
    ],
)
def test_write_that_waited_for_its_turn_makes_the_next_one_later(since_write: float, delay: float) -> None:
    found = compute_report_delay(10, seconds_since_write=since_write, interval_seconds=_INTERVAL)

    assert pytest.approx(delay) == found


@pytest.mark.parametrize("period", [0.1, 1, 2, 3, 4, 5, 6, 7, 10, 13, 60])
def test_each_status_is_written_as_its_report_comes(period: float) -> None:
    chance = random.Random(period)
    arrivals = [(number + chance.uniform(0, 0.04)) * period for number in range(int(3600 / period))]

    writes = list_writes(arrivals)

    assert all(written == arrived for written, arrived in writes)
    gaps = [later - earlier for (earlier, _), (later, _) in itertools.pairwise(writes)]
    assert 0.9 * _INTERVAL <= min(gaps)
    assert max(gaps) <= max(_INTERVAL, 1.1 * period) + period


@pytest.mark.parametrize("period", [2, 5])
def test_trainer_with_a_whole_number_of_reports_in_an_interval_has_one_status_in_each(period: float) -> None:
    writes = list_writes(number * period for number in range(int(600 / period) + 1))

    assert [number * _INTERVAL for number in range(60)] == [written for written, _ in writes]


def test_last_report_of_a_trainer_that_falls_silent_is_shown_after_an_interval_and_a_half() -> None:
    assert [(0, 0), (15, 5), (60, 60)] == list_writes([0, 5, 60, 61])

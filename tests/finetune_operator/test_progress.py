"""When a report is written into the status."""

import itertools
import random
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

import pytest
from finetune_operator.policies.progress import compute_report_delay

_SHOWN_AT = datetime(2026, 1, 1, tzinfo=UTC)
_INTERVAL = 10.0


def compute_delay(*, received: float | None, now: float) -> float:
    return compute_report_delay(
        _SHOWN_AT,
        received_at=None if received is None else _SHOWN_AT + timedelta(seconds=received),
        now=_SHOWN_AT + timedelta(seconds=now),
        interval_seconds=_INTERVAL,
    )


def list_writes(arrivals: Iterable[float]) -> list[tuple[float, float]]:
    """Return when which reports would be written until the last one arrives, each by the time when it arrived."""
    writes: list[tuple[float, float]] = []
    for arrival, following in itertools.pairwise(arrivals):
        shown = writes[-1][1] if writes else None
        now = arrival
        while now < following:
            delay = 0.0 if shown is None else compute_delay(received=arrival - shown, now=now - shown)
            if delay == 0:
                writes.append((now, arrival))
                break
            now += delay
    return writes


@pytest.mark.parametrize(
    ("received", "now", "delay"),
    [
        pytest.param(5, 5, 10, id="early: another one is waited for"),
        pytest.param(5, 15, 0, id="no other one came"),
        pytest.param(8.9, 8.9, 6.1, id="a little too early"),
        pytest.param(9, 9, 0, id="just before the end"),
        pytest.param(10.3, 10.3, 0, id="just after the end"),
        pytest.param(60, 60, 0, id="rare"),
        pytest.param(None, 0, 0, id="the status has no report any more"),
    ],
)
def test_report_waits_for_the_end_of_its_interval(received: float | None, now: float, delay: float) -> None:
    assert pytest.approx(delay) == compute_delay(received=received, now=now)


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

"""When failed attempts are tried again."""

from collections import Counter
from datetime import UTC, datetime, timedelta

import pytest
from finetune_api.v1alpha1 import FineTuneJobStatus
from finetune_operator.policies.retry import compute_retry_time, record_restart

_FAILED_AT = datetime(2026, 1, 1, tzinfo=UTC)


def build_status(*, failures: int) -> FineTuneJobStatus:
    status = FineTuneJobStatus()
    for attempt in range(1, failures + 1):
        status = record_restart(
            status, attempt=attempt, reason="TrainerError", is_counted=True, ended_at=_FAILED_AT, lost_seconds=0
        )
    return status


def compute_delay(status: FineTuneJobStatus, *, uid: str) -> float:
    due = compute_retry_time(status, uid=uid, base_seconds=10, limit_seconds=360)
    assert due is not None
    return (due - _FAILED_AT) / timedelta(seconds=1)


def test_jobs_that_fail_together_come_back_spread_over_half_of_the_delay() -> None:
    status = build_status(failures=1)

    delays = [compute_delay(status, uid=f"uid-{number}") for number in range(1000)]

    each_second = Counter(int(delay) for delay in delays)
    assert [10, 11, 12, 13, 14] == sorted(each_second)
    assert all(150 < count < 250 for count in each_second.values())


def test_a_job_has_one_retry_time_however_often_it_is_computed_and_another_share_for_each_retry() -> None:
    first, second = build_status(failures=1), build_status(failures=2)

    assert compute_delay(first, uid="a") == compute_delay(first, uid="a")
    assert compute_delay(second, uid="a") != 2 * compute_delay(first, uid="a")


@pytest.mark.parametrize(
    ("failures", "shortest"),
    [
        pytest.param(1, 10, id="first"),
        pytest.param(2, 20, id="second"),
        pytest.param(3, 40, id="third"),
        pytest.param(7, 360, id="at the limit"),
        pytest.param(2000, 360, id="so many that a power of two would overflow"),
    ],
)
def test_delay_doubles_up_to_the_limit(failures: int, shortest: int) -> None:
    assert shortest <= compute_delay(build_status(failures=failures), uid="a") < 1.5 * shortest

"""What a status write tells to the metrics; a restart of the operator repeats no status write."""

from datetime import datetime

from finetune_api.v1alpha1 import FineTuneJobStatus, Usage

from finetune_operator.metrics import (
    ACCELERATOR_SECONDS,
    END_SECONDS,
    ENDS,
    FAILED_ATTEMPTS,
    FAILURES,
    LOST_SECONDS,
    OTHER,
    RETRIES,
    START_SECONDS,
    WASTED_ACCELERATOR_SECONDS,
    Metrics,
)
from finetune_operator.observed import JobView
from finetune_operator.policies.failure import MEMORY_REASONS, is_disruption


def measure(metrics: Metrics, job: JobView, status: FineTuneJobStatus, *, created_at: datetime | None) -> None:
    """Add what has changed with a status write."""
    if status.run == job.status.run:
        _measure_restart(metrics, job.status, status)
        _measure_failure(metrics, job.status, status)
        _measure_usage(metrics, job.status, status, namespace=job.namespace)
    # After a change of the spec, the time since the creation means nothing.
    if created_at is None or job.generation != 1:
        return
    if status.start_time and job.status.start_time is None:
        metrics.observe(START_SECONDS, (status.start_time - created_at).total_seconds())
    ready = next((each.reason for each in status.conditions if each.type == "Ready"), "")
    if status.completion_time and job.status.completion_time is None and ready in ENDS:
        metrics.observe(END_SECONDS, (status.completion_time - created_at).total_seconds(), result=ready)


def _measure_restart(metrics: Metrics, old: FineTuneJobStatus, new: FineTuneJobStatus) -> None:
    failure = new.failure if new.failure != old.failure else None
    if new.restarts > old.restarts:
        cause = _find_cause(new.restart_history[-1].reason)
        metrics.count(RETRIES, cause=cause)
    else:
        cause = _find_cause(failure.reason) if failure else "stop"
    if (lost := new.lost_seconds - old.lost_seconds) > 0:
        metrics.count(LOST_SECONDS, lost, cause=cause)


def _measure_failure(metrics: Metrics, old: FineTuneJobStatus, new: FineTuneJobStatus) -> None:
    """Count an attempt that failed; what is written about it may be mended later, and is counted once."""
    failure = new.failure
    if failure is None or (old.failure and (old.failure.attempt, old.failure.reason) == (failure.attempt, failure.reason)):
        return
    metrics.count(FAILED_ATTEMPTS, reason=failure.reason if failure.reason in FAILURES else OTHER)


def _measure_usage(metrics: Metrics, old: FineTuneJobStatus, new: FineTuneJobStatus, *, namespace: str) -> None:
    """Count what an attempt has used that ended with this write, which may already begin the next one.

    Zero is counted as well: a series must be seen before it grows.
    """
    if new.usage is None:
        return
    before, after = old.usage or Usage(), new.usage
    kind = (before if old.running_since else after).accelerator_kind.value
    for definition, seconds in (
        (ACCELERATOR_SECONDS, after.accelerator_seconds - before.accelerator_seconds),
        (WASTED_ACCELERATOR_SECONDS, after.wasted_accelerator_seconds - before.wasted_accelerator_seconds),
    ):
        metrics.count(definition, max(0, seconds), kind=kind, job_namespace=namespace)


def _find_cause(reason: str) -> str:
    if reason in MEMORY_REASONS:
        return "oom"
    return "disruption" if is_disruption(reason) else "error"

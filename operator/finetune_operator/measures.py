"""What a status write tells to the metrics; a restart of the operator repeats no status write."""

from datetime import datetime

from finetune_api.v1alpha1 import FineTuneJobStatus, Restart

from finetune_operator.metrics import END_SECONDS, ENDS, LOST_SECONDS, RETRIES, START_SECONDS, Metrics
from finetune_operator.observed import JobView
from finetune_operator.policies.failure import OUT_OF_MEMORY, is_disruption


def measure(metrics: Metrics, job: JobView, status: FineTuneJobStatus, *, created_at: datetime | None) -> None:
    """Add what has changed with a status write."""
    if status.run == job.status.run:
        _measure_restart(metrics, job.status, status)
    # After a change of the spec, the time since the creation means nothing.
    if created_at is None or job.generation != 1:
        return
    if status.start_time and job.status.start_time is None:
        metrics.observe(START_SECONDS, (status.start_time - created_at).total_seconds())
    ready = next((each.reason for each in status.conditions if each.type == "Ready"), "")
    if status.completion_time and job.status.completion_time is None and ready in ENDS:
        metrics.observe(END_SECONDS, (status.completion_time - created_at).total_seconds(), result=ready)


def _measure_restart(metrics: Metrics, old: FineTuneJobStatus, new: FineTuneJobStatus) -> None:
    restart = new.restart_history[-1] if new.restarts > old.restarts else None
    if restart is not None:
        metrics.count(RETRIES, cause=_find_cause(restart))
    if (lost := new.lost_seconds - old.lost_seconds) > 0:
        is_failure = new.failure is not None and new.failure != old.failure
        cause = _find_cause(restart) if restart else "error" if is_failure else "stop"
        metrics.count(LOST_SECONDS, lost, cause=cause)


def _find_cause(restart: Restart) -> str:
    if restart.reason == OUT_OF_MEMORY:
        return "oom"
    return "disruption" if is_disruption(restart.reason) else "error"

"""Which deadline has come, and in how many seconds the next one does (pure)."""

from datetime import datetime, timedelta

from finetune_api.v1alpha1 import FineTuneJobStatus, RunPolicy

from finetune_operator.policies.usage import compute_active_seconds

DEADLINE = "DeadlineExceeded"
START_DEADLINE = "StartDeadlineExceeded"


def compute_start_seconds(policy: RunPolicy, status: FineTuneJobStatus, *, now: datetime) -> float | None:
    """Return in how many seconds a waiting attempt is given up; None without a deadline."""
    if policy.start_deadline_seconds is None:
        return None
    due = (status.pending_since or now) + timedelta(seconds=policy.start_deadline_seconds)
    return max(0.0, (due - now).total_seconds())


def has_later_deadline(reason: str, policy: RunPolicy, status: FineTuneJobStatus) -> bool:
    """Return whether a run that a deadline ended has more time by now."""
    if reason == START_DEADLINE and status.pending_since and status.completion_time:
        return compute_start_seconds(policy, status, now=status.completion_time) != 0
    return reason == DEADLINE


def compute_active_seconds_left(policy: RunPolicy, status: FineTuneJobStatus, *, now: datetime) -> float | None:
    """Return for how many seconds trainers may run yet; None without a deadline."""
    if policy.active_deadline_seconds is None:
        return None
    return max(0.0, policy.active_deadline_seconds - compute_active_seconds(status, now=now))


def compute_ttl_seconds(policy: RunPolicy, status: FineTuneJobStatus, *, now: datetime) -> float | None:
    """Return in how many seconds the children of a finished run are removed; None when they stay."""
    if policy.ttl_seconds_after_finished is None:
        return None
    due = (status.completion_time or now) + timedelta(seconds=policy.ttl_seconds_after_finished)
    return max(0.0, (due - now).total_seconds())

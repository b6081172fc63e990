"""When a failed attempt is tried again (pure)."""

from datetime import datetime, timedelta


def compute_retry_time(failed_at: datetime, *, restarts: int, base_seconds: float, limit_seconds: float) -> datetime:
    """Return when the attempt after a failure starts: base, 2 x base, 4 x base ... after it, at most the limit.

    `restarts` counts this retry, so the first one has 1. The defaults (10 s, 6 min) are those of batch/v1 Jobs:
    https://kubernetes.io/docs/concepts/workloads/controllers/job/#pod-backoff-failure-policy
    """
    # The exponent is bounded so that a large count cannot overflow the float.
    delay = base_seconds * 2.0 ** min(max(restarts - 1, 0), 30)
    return failed_at + timedelta(seconds=min(delay, limit_seconds))

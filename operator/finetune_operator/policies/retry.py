"""When a failed attempt is tried again, and what a restart leaves in the status (pure)."""

import hashlib
from datetime import datetime, timedelta

from finetune_api.v1alpha1 import FineTuneJobStatus, Restart

from finetune_operator.policies.failure import MEMORY_REASONS, is_disruption

_MAX_HISTORY = 16
_MAX_DIVISOR = 1024
# The largest share by which a delay is longer than the usual one.
_SPREAD = 0.5
# Disruptions are retried at once, but not when they come as fast as pods can be created.
_STORM_RESTARTS = 4
_STORM_SECONDS = 60


def record_restart(
    status: FineTuneJobStatus, *, attempt: int, reason: str, is_counted: bool, ended_at: datetime, lost_seconds: int
) -> FineTuneJobStatus:
    """Return the status with one more restart in it; after running out of memory the next attempt splits its batches more."""
    restart = Restart(attempt=attempt, reason=reason, time=ended_at, counted=is_counted, lost_seconds=lost_seconds)
    divisor = status.micro_batch_divisor * (2 if reason in MEMORY_REASONS else 1)
    update = {
        "restarts": status.restarts + 1,
        "restarts_counted_towards_limit": status.restarts_counted_towards_limit + int(is_counted),
        "restart_history": (*status.restart_history, restart)[-_MAX_HISTORY:],
        "micro_batch_divisor": min(divisor, _MAX_DIVISOR),
    }
    return status.model_copy(update=update)


def compute_retry_time(status: FineTuneJobStatus, *, uid: str, base_seconds: float, limit_seconds: float) -> datetime | None:
    """Return when the attempt after the last restart starts, or None when there was none.

    After a failure that counts: base, 2 x base, 4 x base ... after it, at most the limit. The defaults (10 s, 6 min) are those
    of batch/v1 Jobs: https://kubernetes.io/docs/concepts/workloads/controllers/job/#pod-backoff-failure-policy
    Each delay is longer by a share of its own, which follows from the FineTuneJob's uid: many that fail at one time, as their
    dataset or registry is away, would otherwise come back as one wave.
    """
    if not status.restart_history:
        return None
    last = status.restart_history[-1]
    if not last.counted and is_disruption(last.reason) and not _is_storm(status.restart_history):
        return last.time
    # The exponent is bounded so that a large count cannot overflow the float.
    doublings = min(max(status.restarts_counted_towards_limit - 1, 0), 30) if last.counted else 0
    delay = min(base_seconds * 2.0**doublings, limit_seconds)
    return last.time + timedelta(seconds=delay * (1 + _SPREAD * _pick_share(f"{uid}/{status.restarts}")))


def _pick_share(text: str) -> float:
    """Return a number from 0 to 1, always the same for a text and evenly spread over many of them."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64


def _is_storm(history: tuple[Restart, ...]) -> bool:
    latest = history[-_STORM_RESTARTS:]
    return len(latest) == _STORM_RESTARTS and (latest[-1].time - latest[0].time).total_seconds() < _STORM_SECONDS

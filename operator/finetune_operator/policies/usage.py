"""How long trainers ran, what they used and cost, and how much of that is lost when an attempt ends (pure).

Each attempt is accounted for exactly once: `runningSince` is set while its trainer runs and cleared in the same status write
that adds its time. So are the number and the price of its accelerators, as its Job may be gone when it is accounted for.
"""

from datetime import datetime
from decimal import Decimal

from finetune_api.v1alpha1 import FineTuneJobStatus, Usage

from finetune_operator.policies.gang import Gang
from finetune_operator.snapshot import Snapshot

_SECONDS_PER_HOUR = 3600
_COST_PLACES = Decimal("0.0001")


def begin_attempt(status: FineTuneJobStatus, *, attempt: int, pod_shape: str, snapshot: Snapshot) -> FineTuneJobStatus:
    """Return the status of an attempt that is under way, with what it will be accounted by."""
    update = {
        "accelerators": snapshot.accelerators,
        "accelerator_kind": snapshot.accelerator_kind,
        "price_per_accelerator_hour": snapshot.price_per_accelerator_hour,
    }
    return status.model_copy(
        update={
            "attempt": attempt,
            "pod_shape": pod_shape,
            "training_seconds": snapshot.training_seconds or status.training_seconds,
            "usage": (status.usage or Usage()).model_copy(update=update),
        }
    )


def begin_running(status: FineTuneJobStatus, gang: Gang) -> FineTuneJobStatus:
    """Return the status with the start of the first trainer in it, if one runs: what the others hold is in use as well."""
    started_at = min((pod.started_at for pod in gang.present if pod.started_at), default=None)
    if started_at is None or status.running_since is not None or all(pod.is_ended for pod in gang.present):
        return status
    return status.model_copy(update={"running_since": started_at, "start_time": status.start_time or started_at})


def end_running(
    status: FineTuneJobStatus, gang: Gang, *, now: datetime, is_complete: bool = False
) -> tuple[FineTuneJobStatus, int]:
    """Return the status with the running time of an ended attempt added, and the seconds of it that are lost.

    Lost is what lies between the newest checkpoint, or the start, and the end, unless the run is complete.
    """
    since = status.running_since or gang.started_at
    if since is None:
        return status, 0
    end = _find_end(status, gang, now=now)
    saved_at = status.checkpoint.time if status.checkpoint else since
    seconds = _seconds_between(since, end)
    lost = 0 if is_complete else _seconds_between(max(since, saved_at), end)
    update = {
        "running_since": None,
        "start_time": status.start_time or since,
        "active_seconds": status.active_seconds + seconds,
        "lost_seconds": status.lost_seconds + lost,
        "usage": _add_use(status.usage or Usage(), seconds=seconds, lost_seconds=lost),
    }
    return status.model_copy(update=update), lost


def compute_active_seconds(status: FineTuneJobStatus, *, now: datetime) -> float:
    """Return how long the run's trainers ran until now."""
    running = (now - status.running_since).total_seconds() if status.running_since else 0.0
    return status.active_seconds + max(0.0, running)


def _add_use(usage: Usage, *, seconds: int, lost_seconds: int) -> Usage:
    used = usage.accelerators * seconds
    update: dict[str, object] = {
        "accelerator_seconds": usage.accelerator_seconds + used,
        "wasted_accelerator_seconds": usage.wasted_accelerator_seconds + usage.accelerators * lost_seconds,
    }
    if usage.price_per_accelerator_hour is not None:
        cost = Decimal(usage.cost or 0) + used * Decimal(usage.price_per_accelerator_hour) / _SECONDS_PER_HOUR
        update["cost"] = f"{cost.quantize(_COST_PLACES)}"
    return usage.model_copy(update=update)


def _find_end(status: FineTuneJobStatus, gang: Gang, *, now: datetime) -> datetime:
    """Return when the last trainer ended: as its pod tells, else its last sign of life, else now."""
    if gang.finished_at:
        return gang.finished_at
    reported_at = status.trainer_status.last_updated_time if status.trainer_status else None
    is_sign_of_life = reported_at is not None and status.running_since is not None and reported_at > status.running_since
    return reported_at if is_sign_of_life and reported_at is not None else now


def _seconds_between(start: datetime, end: datetime) -> int:
    return max(0, int((end - start).total_seconds()))

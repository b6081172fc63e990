"""Whether a queue has taken the pods of an attempt that ran (pure)."""

from dataclasses import dataclass
from datetime import UTC, datetime

from finetune_api.v1alpha1 import FineTuneJobStatus

from finetune_operator.observed import ChildView
from finetune_operator.policies.gang import Gang

_LAST = datetime.max.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Eviction:
    """An eviction, as far as it is known."""

    gang: Gang
    """The pods that the queue took."""
    ended_at: datetime
    """When they had stopped: as they tell, else about when."""


def find_eviction(child: ChildView, status: FineTuneJobStatus, gang: Gang, *, is_stopped: bool, now: datetime) -> Eviction | None:
    """Return the eviction of an attempt since it began to run, or None if there was none.

    It is seen from the suspended Job once its pods have stopped. If it was missed, because the operator was down, it is seen
    from the pods of the next admission: `runningSince` is when the first of the pods before them started.
    """
    since = status.running_since
    if since is None:
        return None
    if child.suspended:
        ended_at = gang.finished_at or child.suspended_at or now
        return Eviction(gang=gang, ended_at=ended_at) if is_stopped else None
    created = [pod.created_at for pod in gang.present if pod.created_at]
    if child.queue is None or not created or min(created) <= since:
        return None
    is_next = all((pod.started_at or _LAST) > since for pod in gang.present)
    return Eviction(gang=Gang(), ended_at=min(created)) if is_next else None

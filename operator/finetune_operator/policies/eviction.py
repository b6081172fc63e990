"""Whether a queue has taken the pods of an attempt that ran (pure)."""

from datetime import UTC, datetime

from finetune_api.v1alpha1 import FineTuneJobStatus

from finetune_operator.observed import ChildView
from finetune_operator.policies.gang import Gang

EVICTED = "QueueEvicted"

_LAST = datetime.max.replace(tzinfo=UTC)


def find_evicted(child: ChildView, status: FineTuneJobStatus, gang: Gang, *, is_stopped: bool) -> Gang | None:
    """Return what is known of the pods that a queue took since the attempt began to run, or None if it did not.

    It is seen from the suspended Job once its pods have stopped. If it was missed, because the operator was down, it is seen
    from the pods of the next admission: `runningSince` is when the first of the pods before them started.
    """
    since = status.running_since
    if since is None:
        return None
    if child.suspended:
        return gang if is_stopped else None
    if child.queue is None or not gang.present:
        return None
    is_next = all((pod.started_at or _LAST) > since and (pod.created_at or since) > since for pod in gang.present)
    return Gang() if is_next else None

"""What becomes of an attempt whose Job a queue holds (pure).

A queue, such as Kueue, owns the suspension of the Job from the Job's creation on, and may add to its pod template. The operator
creates the Job suspended, never writes it again, and reads what the queue has decided from the Job and its pods.
"""

from dataclasses import replace

from finetune_operator.observed import ChildView
from finetune_operator.outcome import EventNote, EventType
from finetune_operator.policies.eviction import find_eviction
from finetune_operator.policies.failure import QUEUE_EVICTED
from finetune_operator.policies.retry import record_restart
from finetune_operator.policies.usage import end_running
from finetune_operator.state import Phase, State
from finetune_operator.steps import Context, Step, without_estimate


def wait_for_admission(context: Context, current: ChildView) -> Step:
    """Tell what a suspended attempt waits for; nothing is held meanwhile, so no deadline counts."""
    if context.busy_pods:
        message = f"{_name_queue(current.queue)} has evicted attempt {current.attempt}: its trainers save their state and stop"
    else:
        message = f"{_name_queue(current.queue)} has to admit attempt {current.attempt}"
    return Step(state=State(phase=Phase.QUEUED, message=message), status=without_estimate(context.status))


def explain_queueing(queue: str, *, attempt: int) -> State:
    """Return the state of an attempt whose Job is being created for a queue."""
    return State(phase=Phase.QUEUED, message=f"{_name_queue(queue)} has to admit attempt {attempt}")


def account_for_eviction(context: Context, current: ChildView) -> tuple[Context, tuple[EventNote, ...]]:
    """Return the context with one more restart, which is free, if a queue has taken the pods of an attempt that ran.

    The attempt stays the same: with its next admission, its trainers go on from the checkpoint.
    """
    gang = context.find_gang(current.attempt)
    eviction = find_eviction(current, context.status, gang, is_stopped=not context.busy_pods, now=context.now)
    if eviction is None:
        return context, ()
    status, lost_seconds = end_running(context.status, eviction.gang, now=eviction.ended_at)
    status = record_restart(
        without_estimate(status),
        attempt=current.attempt,
        reason=QUEUE_EVICTED,
        is_counted=False,
        ended_at=eviction.ended_at,
        lost_seconds=lost_seconds,
    )
    message = f"{_name_queue(current.queue)} has evicted attempt {current.attempt}, which goes on when it is admitted again"
    note = EventNote(type=EventType.NORMAL, reason=QUEUE_EVICTED, action="Evict", message=message)
    return replace(context, status=status), (note,)


def _name_queue(queue: str | None) -> str:
    return f"queue {queue}" if queue else "the manager that suspended the Job"

"""What an attempt waits for, and what the next one waits for (pure)."""

from dataclasses import replace
from datetime import timedelta

from finetune_api.conditions import find_condition

from finetune_operator.observed import ChildView, PodView
from finetune_operator.policies.failure import NODE_LOST
from finetune_operator.policies.gang import Gang, has_cause
from finetune_operator.policies.pending import explain_pending
from finetune_operator.state import Phase, State
from finetune_operator.steps import Context, Step, without_estimate

# The kubelet reports a stopped pod within a moment; after this it does not answer.
_OVERDUE_SECONDS = 10
# The Job controller creates a pod within a second, or an event that tells why it cannot.
_INSPECT_SECONDS = 2
_INSPECT_LIMIT_SECONDS = 60
_MAX_NAMED = 3


def wait_for_start(context: Context, current: ChildView, *, gang: Gang) -> Step:
    """Tell what an attempt waits for; while a pod is missing, the events of its Job may know."""
    is_missing = len(gang.pods) < current.nodes
    found = context.observed.refusal
    refusal = found if found and found.child_uid == current.uid and is_missing else None
    state = explain_pending(gang, child=current, spec=context.spec, refusal=refusal.message if refusal else None)
    step = Step(state=state, status=without_estimate(context.status))
    if not is_missing:
        return step
    # At 2, 4, 8, 16 ... seconds: the cause may change while a quota or a policy is being mended.
    checked_at = refusal.checked_at if refusal else current.created_at
    age = (checked_at - current.created_at).total_seconds()
    due = checked_at + timedelta(seconds=min(max(_INSPECT_SECONDS, age), _INSPECT_LIMIT_SECONDS))
    seconds = (due - context.now).total_seconds()
    return step.wake(seconds) if seconds > 0 else replace(step, inspect=current)


def wait_for_removal(context: Context, children: tuple[ChildView, ...], *, message: str, problem: str | None = None) -> Step:
    """Have children deleted, which ends their pods by SIGTERM first, and wait until they are gone."""
    phase = Phase.SUSPENDING if context.spec.suspend and problem is None else Phase.PENDING
    state = State(phase=phase, problem=problem, message=message, scheduled=False, is_start=False)
    overdue, seconds = find_overdue(context)
    return Step(
        state=state if overdue is None else replace(explain_overdue(overdue), phase=phase, problem=problem or NODE_LOST),
        status=without_estimate(context.status),
        delete=tuple(child for child in children if not child.deleting),
        requeue_after=seconds,
    )


def wait_for_pods(context: Context) -> Step:
    """Wait for pods whose Job is gone or has ended, as two trainers must never write to one folder."""
    pods = [pod.name for pod in context.busy_pods]
    others = f" and {len(pods) - _MAX_NAMED} more" if len(pods) > _MAX_NAMED else ""
    named = ", ".join(pods[:_MAX_NAMED]) + others
    return wait_for_removal(context, (), message=f"the next attempt waits until pod {named} has stopped")


def wait_for_end(context: Context, current: ChildView) -> Step:
    """Wait until an attempt of which a trainer has ended shows how: the Job controller stops the other pods first."""
    overdue, seconds = find_overdue(context)
    state = keep_state(context, current) if overdue is None else explain_overdue(overdue)
    return Step(state=state, status=context.status, requeue_after=seconds)


def keep_state(context: Context, current: ChildView) -> State:
    """Return Running if that is what is shown: a moment of waiting for evidence is no transition."""
    ready = find_condition(context.status.conditions, "Ready")
    if ready is not None and ready.reason == Phase.RUNNING.value:
        return State(phase=Phase.RUNNING, message=ready.message)
    message = f"attempt {current.attempt} has ended; waiting for its pod to show how"
    return State(phase=Phase.PENDING, message=message, scheduled=True, is_start=False)


def compute_evidence_delay(context: Context, child: ChildView, *, gang: Gang) -> float:
    """Return for how long the last status of a pod that has the cause may still be on its way."""
    if shows_end(child, gang=gang):
        return 0
    elapsed = (context.now - (child.finished_at or context.now)).total_seconds()
    return max(0.0, context.settings.evidence_seconds - elapsed)


def shows_end(child: ChildView, *, gang: Gang) -> bool:
    """Return whether the pods of an attempt show how it ended."""
    ended = [pod for pod in gang.pods if pod.is_ended]
    return len(ended) == len(gang.pods) and (len(ended) >= child.nodes or has_cause(gang))


def find_overdue(context: Context) -> tuple[PodView | None, float | None]:
    """Return a pod that should have stopped by now, or in how many seconds one could become such."""
    dues = sorted(
        ((pod.deletion_due + timedelta(seconds=_OVERDUE_SECONDS), pod) for pod in context.busy_pods if pod.deletion_due),
        key=lambda pair: pair[0],
    )
    if not dues:
        return None, None
    due, pod = dues[0]
    seconds = (due - context.now).total_seconds()
    return (pod, None) if seconds <= 0 else (None, seconds)


def explain_overdue(pod: PodView) -> State:
    """Return the state of a run that waits for a pod whose node does not answer."""
    message = (
        f"node {pod.node} does not confirm that pod {pod.name} has stopped, and the next attempt must not write beside it: bring "
        "the node back, or delete its Node object if the machine is gone"
    )
    return State(phase=Phase.PENDING, problem=NODE_LOST, message=message, scheduled=True, is_start=False)

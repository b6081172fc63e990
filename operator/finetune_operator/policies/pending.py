"""Why an attempt does not run yet (pure)."""

from finetune_operator.observed import PodView
from finetune_operator.state import Phase, State

# Reasons of a waiting container that are steps of a normal start; all others are problems.
# https://github.com/kubernetes/kubernetes/blob/v1.34.4/pkg/kubelet/images/types.go and pkg/kubelet/container/sync_result.go
_NORMAL_WAITING = frozenset({"ContainerCreating", "PodInitializing"})

_STARTING = "waiting for the trainer's pod to be created and scheduled"


def explain_pending(pod: PodView | None) -> State:
    """Return the pending state of an attempt, with the scheduler's or the kubelet's own reason where there is one.

    The steps of a normal start share one message, so that they cost no status writes.
    """
    if pod is None:
        return State(phase=Phase.PENDING, message=_STARTING)
    if not pod.scheduled:
        return _explain_unscheduled(pod)
    if pod.waiting_reason and pod.waiting_reason not in _NORMAL_WAITING:
        message = f"pod {pod.name}, image {pod.image}: {pod.waiting_message or pod.waiting_reason}"
        return State(phase=Phase.PENDING, problem=pod.waiting_reason, message=message, scheduled=True)
    return State(phase=Phase.PENDING, message=f"pod {pod.name} starts on node {pod.node}", scheduled=True)


def _explain_unscheduled(pod: PodView) -> State:
    if not pod.unscheduled_reason:
        return State(phase=Phase.PENDING, message=_STARTING)
    message = f"pod {pod.name}: {pod.unscheduled_message or pod.unscheduled_reason}"
    return State(phase=Phase.PENDING, problem=pod.unscheduled_reason, message=message, scheduled=False)

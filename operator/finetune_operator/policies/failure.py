"""What follows a failed attempt (pure): one table from what ended the pod to the cause, a message, and an action.

Disruptions are retried free and at once, as nothing is wrong with the training; what a retry meets again is final; the rest is
charged to backoffLimit. A trainer's own verdict about the spec, the data or the model counts even while it is being disrupted.
"""

from dataclasses import dataclass, replace

from finetune_api import names
from finetune_api.conditions import truncate
from finetune_api.contract import NEVER_RETRIED, ExitCode, TrainerReport
from finetune_api.v1alpha1 import Failure, FailureAction, FailureRule, FineTuneJobSpec

from finetune_operator.observed import ChildView, PodView

OUT_OF_MEMORY = "OOMKilled"
# As the kernel says it, and as trainers do whose processes could not split a batch on their own.
MEMORY_REASONS = frozenset({OUT_OF_MEMORY, "OutOfMemory"})
NODE_LOST = "NodeLost"
QUEUE_EVICTED = "QueueEvicted"

_MAX_LOG_TAIL = 1024
_MAX_MESSAGE = 1024

# Reasons of the condition DisruptionTarget, by what users call them:
# https://kubernetes.io/docs/concepts/workloads/pods/disruptions/#pod-disruption-conditions
_DISRUPTIONS = {
    "PreemptionByScheduler": "Preempted",
    "DeletionByTaintManager": "Evicted",
    "EvictionByEvictionAPI": "Evicted",
    "TerminationByKubelet": "Evicted",
    "DeletionByPodGC": NODE_LOST,
}
# `status.reason` of pods that the kubelet or the control plane ended, for clusters and causes that set no condition:
# pkg/kubelet/{eviction,preemption,nodeshutdown} and pkg/util/node of https://github.com/kubernetes/kubernetes
_POD_REASONS = {
    "Evicted": "Evicted",
    "Preempting": "Preempted",
    "NodeLost": NODE_LOST,
    "NodeShutdown": "NodeShutdown",
    "Shutdown": "NodeShutdown",
    "Terminated": "NodeShutdown",
}
# Exit codes that a deletion of the pod leads to: saved and left, ended by SIGTERM, ended by SIGKILL.
_DELETED = frozenset({ExitCode.PREEMPTED.value, 143, 137})
_DISRUPTED = frozenset({*_DISRUPTIONS.values(), *_POD_REASONS.values(), "Disrupted", "PodDeleted", "PodLost", QUEUE_EVICTED})


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What the table says: the cause in one word, a sentence about it, and what follows."""

    reason: str
    message: str
    action: FailureAction


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A classified failure."""

    failure: Failure
    action: FailureAction


def classify_failure(child: ChildView, pod: PodView | None, *, report: TrainerReport | None, spec: FineTuneJobSpec) -> Verdict:
    """Return what failed an attempt and what follows; the user's rules come before the table."""
    row = _apply_rules(spec.run_policy.failure_rules, _classify(child, pod, report=report, spec=spec), pod=pod)
    failure = Failure(
        reason=truncate(row.reason, 64),
        message=truncate(row.message, _MAX_MESSAGE),
        attempt=child.attempt,
        exit_code=pod.exit_code if pod else None,
        pod=pod.name if pod else None,
        node=pod.node if pod else None,
        container=names.CONTAINER if pod and pod.exit_code is not None else None,
        log_tail=_find_log_tail(pod, report=report),
    )
    return Verdict(failure=failure, action=row.action)


def is_disruption(reason: str) -> bool:
    """Return whether a failure of this reason says nothing about the training, so that a retry need not wait."""
    return reason in _DISRUPTED


def _classify(child: ChildView, pod: PodView | None, *, report: TrainerReport | None, spec: FineTuneJobSpec) -> Row:
    if pod is None:
        message = f"the pod of Job {child.name} is gone without a trace of how it ended ({child.reason}: {child.message})"
        return Row(reason="PodLost", message=message, action=FailureAction.RETRY_FREE)
    if pod.exit_code is not None and pod.exit_code in NEVER_RETRIED:
        return _explain_exit(pod, pod.exit_code, report=report, spec=spec)
    if disruption := _find_disruption(pod):
        return disruption
    if pod.termination_reason == OUT_OF_MEMORY:
        message = (
            f"pod {pod.name} used more memory than spec.resources.memory allows ({spec.resources.memory}); a retry uses half "
            "the micro-batch, and more memory makes it faster"
        )
        return Row(reason=OUT_OF_MEMORY, message=message, action=FailureAction.RETRY)
    if pod.exit_code is not None:
        return _explain_exit(pod, pod.exit_code, report=report, spec=spec)
    if pod.phase == "Failed":
        message = f"pod {pod.name} on node {pod.node}: {pod.pod_message or pod.pod_reason or 'failed before its trainer started'}"
        return Row(reason=pod.pod_reason or "PodFailed", message=message, action=FailureAction.RETRY)
    message = f"pod {pod.name} on node {pod.node} did not run to its end ({child.reason}: {child.message})"
    return Row(reason="PodLost", message=message, action=FailureAction.RETRY_FREE)


def find_disruption_reason(pod: PodView) -> str | None:
    """Return who ended a pod for a cause that is not its own, by what users call it, or None if nothing tells of that."""
    if pod.disruption_reason:
        return _DISRUPTIONS.get(pod.disruption_reason, "Disrupted")
    return _POD_REASONS.get(pod.pod_reason or "")


def was_deleted(pod: PodView) -> bool:
    """Return whether a pod ended as one does that somebody deletes."""
    return pod.deleting and pod.termination_reason != OUT_OF_MEMORY and (pod.exit_code is None or pod.exit_code in _DELETED)


def _find_disruption(pod: PodView) -> Row | None:
    """Return the row of a pod that was ended for a cause outside of it, or None."""
    if reason := find_disruption_reason(pod):
        detail = pod.disruption_message or pod.disruption_reason or pod.pod_message or pod.pod_reason
    elif was_deleted(pod):
        reason, detail = "PodDeleted", "somebody deleted it"
    else:
        return None
    message = f"pod {pod.name} on node {pod.node} was ended for a cause outside of the training: {detail}"
    return Row(reason=reason, message=message, action=FailureAction.RETRY_FREE)


def _explain_exit(pod: PodView, exit_code: int, *, report: TrainerReport | None, spec: FineTuneJobSpec) -> Row:
    """Return the row of a trainer that ended by itself, in its own words if it left some."""
    action = FailureAction.FAIL if exit_code in NEVER_RETRIED else FailureAction.RETRY
    reason, advice = _EXITS.get(exit_code, ("TrainerError", "logTail and `kubectl logs` tell more"))
    message = f"pod {pod.name} ended with exit code {exit_code}: {advice.format(spec=spec)}"
    row = Row(reason=reason, message=message, action=action)
    return replace(row, reason=report.failure.reason, message=report.failure.message) if report and report.failure else row


# Causes and advice by exit code, for trainers that could not write a report.
_EXITS = {
    ExitCode.COMPLETE.value: ("ResultMissing", "it published no model in {spec.output.uri}"),
    ExitCode.INVALID_SPEC.value: ("InvalidSpec", "the spec asks for something that cannot be done"),
    ExitCode.INVALID_DATA.value: ("InvalidData", "the data in {spec.dataset.uri} cannot be learned from; mend it"),
    ExitCode.DIVERGED.value: ("Diverged", "the loss became infinite; lower spec.hyperparameters.learningRate"),
    ExitCode.PREEMPTED.value: ("Interrupted", "its trainer was told to stop, though nobody deleted the pod"),
    ExitCode.PEER_LOST.value: (
        "PeerLost",
        "another trainer of the attempt did not answer, and no pod tells of a cause; check the network between the nodes",
    ),
    ExitCode.MODEL_NOT_FOUND.value: ("ModelNotFound", "there is no model at {spec.model.uri}; check spec.model.uri"),
    137: ("Killed", "something ended it by SIGKILL, perhaps a process that ran out of memory"),
    143: ("Interrupted", "something ended it by SIGTERM, though nobody deleted the pod"),
}


def _apply_rules(rules: tuple[FailureRule, ...], row: Row, *, pod: PodView | None) -> Row:
    """Return the row with the action of the first rule that matches, which the message names."""
    exit_code = pod.exit_code if pod else None
    rule = next((each for each in rules if exit_code in each.on_exit_codes or row.reason in each.on_reasons), None)
    if rule is None:
        return row
    suffix = f" ({rule.action.value} by rule {rule.name!r} of failureRules)"
    return replace(row, message=truncate(row.message, _MAX_MESSAGE - len(suffix)) + suffix, action=rule.action)


def _find_log_tail(pod: PodView | None, *, report: TrainerReport | None) -> str | None:
    """Return the end of the log: from the report, or from the kubelet, which puts it there when there is no report."""
    text = report.log_tail if report else pod.termination_message if pod else None
    return text[-_MAX_LOG_TAIL:] if text else None

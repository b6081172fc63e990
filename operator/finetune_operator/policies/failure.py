"""How a failed attempt is classified (pure): the cause in one word, a message, and whether a retry can mend it."""

from dataclasses import dataclass

from finetune_api import names
from finetune_api.conditions import truncate
from finetune_api.contract import NEVER_RETRIED, ExitCode, TrainerReport
from finetune_api.v1alpha1 import Failure

from finetune_operator.observed import ChildView, PodView

_MAX_LOG_TAIL = 1024
_MAX_MESSAGE = 1024

# Reasons for exit codes of the contract, for trainers that could not write a report.
_REASONS = {
    ExitCode.INVALID_SPEC: "InvalidSpec",
    ExitCode.INVALID_DATA: "InvalidData",
    ExitCode.DIVERGED: "Diverged",
    ExitCode.PREEMPTED: "Preempted",
    ExitCode.MODEL_NOT_FOUND: "ModelNotFound",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A classified failure."""

    failure: Failure
    is_retryable: bool


def classify_failure(child: ChildView, pod: PodView | None, *, report: TrainerReport | None) -> Verdict:
    """Return what failed an attempt, from the pod's end, its report, and the Job, whichever says more."""
    reason, message = _explain(child, pod, report=report)
    failure = Failure(
        reason=truncate(reason, 64),
        message=truncate(message, _MAX_MESSAGE),
        attempt=child.attempt,
        exit_code=pod.exit_code if pod else None,
        pod=pod.name if pod else None,
        node=pod.node if pod else None,
        container=names.CONTAINER if pod and pod.exit_code is not None else None,
        log_tail=_find_log_tail(pod, report=report),
    )
    return Verdict(failure=failure, is_retryable=failure.exit_code not in NEVER_RETRIED)


def _explain(child: ChildView, pod: PodView | None, *, report: TrainerReport | None) -> tuple[str, str]:
    if report and report.failure:
        return report.failure.reason, report.failure.message
    if pod is None:
        return "PodLost", f"the pod of Job {child.name} is gone without a trace of how it ended ({child.reason}: {child.message})"
    if pod.pod_reason and pod.exit_code is None:
        return pod.pod_reason, f"pod {pod.name}: {pod.pod_message or pod.pod_reason}"
    if pod.termination_reason == "OOMKilled":
        return "OOMKilled", f"pod {pod.name} used more memory than spec.resources.memory allows; raise it"
    if pod.exit_code == ExitCode.COMPLETE:
        return "ResultMissing", f"pod {pod.name} ended with exit code 0 but without publishing a model"
    if pod.exit_code is not None:
        reason = _REASONS.get(ExitCode(pod.exit_code)) if pod.exit_code in set(ExitCode) else None
        return reason or "TrainerError", f"pod {pod.name} ended with exit code {pod.exit_code}"
    return "PodLost", f"pod {pod.name} did not run to its end ({child.reason}: {child.message})"


def _find_log_tail(pod: PodView | None, *, report: TrainerReport | None) -> str | None:
    """Return the end of the log: from the report, or from the kubelet, which puts it there when there is no report."""
    text = report.log_tail if report else pod.termination_message if pod else None
    return text[-_MAX_LOG_TAIL:] if text else None

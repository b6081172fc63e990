"""Why an attempt does not run yet (pure): the scheduler's, the kubelet's or the API server's evidence in words for users."""

import re
from dataclasses import replace

from finetune_api.contract import claim_of
from finetune_api.v1alpha1 import FineTuneJobSpec

from finetune_operator.observed import ChildView, PodView
from finetune_operator.policies.gang import NORMAL_WAITING, Gang, find_hindrance
from finetune_operator.policies.refusal import explain_refusal
from finetune_operator.state import Phase, State

# Both are shown as one: the kubelet goes to and fro between trying to pull and waiting for the next try.
_PULL = frozenset({"ErrImagePull", "ImagePullBackOff"})
_ADVICE = {
    "ImagePullBackOff": "check the image's name and that the node can reach and read its registry",
    "InvalidImageName": "this is no name of an image; correct the operator's trainer image, or that of the profile",
    "ErrImageNeverPull": "the pull policy is Never, and the node does not have the image",
    "CreateContainerConfigError": "mend what the message names",
}

_OF_EVERY_NODE = frozenset({"cpu", "memory", "ephemeral-storage"})

_STARTING = "waiting for the trainer's pod to be created and scheduled"


def explain_pending(gang: Gang, *, child: ChildView, spec: FineTuneJobSpec, refusal: str | None = None) -> State:
    """Return the pending state of an attempt, with its own reason for each kind of problem.

    The steps of a normal start share one message, so that they cost no status writes.
    """
    state = _explain_hindrance(gang, child=child, spec=spec, refusal=refusal)
    if child.nodes == 1:
        return state
    if state.problem is None:
        return replace(state, message=f"waiting until all {child.nodes} pods of the attempt run")
    return replace(state, message=f"{state.message}; {len(gang.running)} of {child.nodes} pods run")


def explain_creation() -> State:
    """Return the state of an attempt whose Job is being created."""
    return State(phase=Phase.PENDING, message=_STARTING)


def _explain_hindrance(gang: Gang, *, child: ChildView, spec: FineTuneJobSpec, refusal: str | None) -> State:
    if refusal is not None:
        reason, message = explain_refusal(refusal, subject=f"the pod of Job {child.name}")
        return State(phase=Phase.PENDING, problem=reason, message=message)
    pod = find_hindrance(gang)
    if pod is None:
        return explain_creation()
    if not pod.scheduled:
        return _explain_unscheduled(pod, spec=spec)
    if pod.waiting_reason and pod.waiting_reason not in NORMAL_WAITING:
        return _explain_waiting(pod, pod.waiting_reason)
    return State(phase=Phase.PENDING, message=f"pod {pod.name} starts on node {pod.node}", scheduled=True)


def _explain_unscheduled(pod: PodView, *, spec: FineTuneJobSpec) -> State:
    if not pod.unscheduled_reason:
        return State(phase=Phase.PENDING, message=_STARTING)
    text = pod.unscheduled_message or pod.unscheduled_reason
    reason, advice = _find_shortage(pod, text, spec=spec)
    message = f"pod {pod.name} cannot be scheduled: {advice}{text}"
    return State(phase=Phase.PENDING, problem=reason, message=message, scheduled=False)


def _find_shortage(pod: PodView, text: str, *, spec: FineTuneJobSpec) -> tuple[str, str]:
    """Return what the scheduler misses in one word, and what to do; its words are those of its plugins.

    Source: https://github.com/kubernetes/kubernetes/tree/v1.34.4/pkg/scheduler/framework/plugins (noderesources, volumebinding,
    nodeaffinity, dynamicresources)
    """
    if missing := re.search('persistentvolumeclaim "([^"]+)" not found', text):
        advice = "create it, or correct the URI in the spec or the volume in the profile"
        return "ClaimNotFound", f"there is no PersistentVolumeClaim {missing[1]}; {advice}: "
    if "unbound immediate PersistentVolumeClaims" in text:
        claims = ", ".join(sorted(_list_claims(spec)))
        return "ClaimNotBound", f"a PersistentVolumeClaim of {claims} has no volume; check its storage class: "
    labels = ", ".join(f"{label}={value}" for label, value in sorted(pod.node_selector.items()))
    node = f"no node with the labels {labels}" if labels else "no node"
    if short := sorted(set(re.findall(r"Insufficient ([A-Za-z0-9./-]*[A-Za-z0-9])", text))):
        advice = "lower spec.resources" if set(short) <= _OF_EVERY_NODE else "check spec.accelerator"
        return "InsufficientResources", f"{node} has enough {' and '.join(short)} free; {advice} or add nodes: "
    if "cannot allocate all claims" in text:
        return (
            "InsufficientResources",
            f"{node} has the devices of {_name_devices(spec)} free; check spec.accelerator or add nodes: ",
        )
    if "didn't match Pod's node affinity/selector" in text:
        return "NoMatchingNode", f"no node has the labels {labels}; correct spec.accelerator or add such nodes: "
    return pod.unscheduled_reason or "", ""


def _name_devices(spec: FineTuneJobSpec) -> str:
    device_class, custom = spec.accelerator.device_class, spec.accelerator.custom
    if device_class:
        return f"DeviceClass {device_class.name}"
    return f"accelerator class {custom.class_name}" if custom else "spec.accelerator"


def _list_claims(spec: FineTuneJobSpec) -> set[str]:
    uris = (spec.model.uri, spec.dataset.uri, spec.output.uri, spec.checkpoint.uri or "")
    return {claim for uri in uris if (claim := claim_of(uri))}


def _explain_waiting(pod: PodView, waiting: str) -> State:
    """Return what the kubelet waits for."""
    reason = "ImagePullBackOff" if waiting in _PULL else waiting
    text = _strip_backoff(pod.waiting_message or waiting)
    advice = _ADVICE.get(reason, "")
    if missing := re.search(r'secret "([^"]+)" not found', text):
        reason, advice = "SecretNotFound", f"create Secret {missing[1]} or correct spec.checkpoint.secretRef"
    message = f"pod {pod.name}, image {pod.image}: {text}" + (f" ({advice})" if advice else "")
    return State(phase=Phase.PENDING, problem=reason, message=message, scheduled=True)


def _strip_backoff(text: str) -> str:
    """Return the error itself: `Back-off pulling image "x": ErrImagePull: error` says the same while the kubelet waits."""
    return re.sub(r'^Back-off pulling image "[^"]*": (ErrImagePull: )?', "", text)

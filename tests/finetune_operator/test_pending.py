"""The table of diagnoses while an attempt does not run yet."""

import re
from dataclasses import replace
from typing import Any

import pytest
from finetune_api.v1alpha1 import FineTuneJobSpec
from finetune_operator.observed import PodView
from finetune_operator.policies.gang import Gang
from finetune_operator.policies.pending import explain_pending
from finetune_operator.policies.refusal import explain_refusal
from finetune_operator.state import State
from finetune_operator.views import project_pod
from world import START, build_child, build_pod

_SPEC = FineTuneJobSpec.model_validate(
    {
        "task": "image-classification",
        "dataset": {"uri": "pvc://datasets/pets"},
        "output": {"uri": "pvc://models/pets"},
        "checkpoint": {"uri": "s3://bucket/a", "secretRef": {"name": "keys"}},
        "accelerator": {"deviceClass": {"name": "gpu.corp.test"}},
    }
)


def _explain(*pods: PodView, nodes: int = 1, refusal: str | None = None) -> State:
    child = build_child(name="emoji-1", nodes=nodes)
    return explain_pending(Gang(pods=pods), child=child, spec=_SPEC, refusal=refusal)


def _unscheduled(message: str) -> dict[str, Any]:
    return {"scheduled": False, "unscheduled_reason": "Unschedulable", "unscheduled_message": message}


@pytest.mark.parametrize(
    ("pod", "reason", "words"),
    [
        pytest.param(
            _unscheduled('0/3 nodes are available: persistentvolumeclaim "datasets" not found. preemption: not helpful'),
            "ClaimNotFound",
            ["PersistentVolumeClaim datasets", "create it"],
            id="claim missing",
        ),
        pytest.param(
            _unscheduled("0/3 nodes are available: pod has unbound immediate PersistentVolumeClaims. not found"),
            "ClaimNotBound",
            ["datasets, models", "storage class"],
            id="claim unbound",
        ),
        pytest.param(
            _unscheduled("0/3 nodes are available: 1 Insufficient memory, 2 Insufficient cpu. preemption: 0/3 nodes"),
            "InsufficientResources",
            ["enough cpu and memory", "spec.resources"],
            id="cpu and memory",
        ),
        pytest.param(
            _unscheduled("0/3 nodes are available: 3 Insufficient nvidia.com/gpu."),
            "InsufficientResources",
            ["no node has enough nvidia.com/gpu free", "check spec.accelerator or add nodes"],
            id="accelerators",
        ),
        pytest.param(
            _unscheduled("0/3 nodes are available: 1 Insufficient nvidia.com/mig-1g.10gb, 2 Insufficient hugepages-2Mi."),
            "InsufficientResources",
            ["enough hugepages-2Mi and nvidia.com/mig-1g.10gb free", "check spec.accelerator"],
            id="slices and huge pages",
        ),
        pytest.param(
            _unscheduled(
                "0/3 nodes are available: 1 Insufficient google.com/tpu, 2 node(s) didn't match Pod's node affinity/selector."
            )
            | {"node_selector": {"pool": "a", "cloud.google.com/gke-tpu-topology": "4x4"}},
            "InsufficientResources",
            ["no node with the labels cloud.google.com/gke-tpu-topology=4x4, pool=a has enough google.com/tpu free"],
            id="accelerators with labels",
        ),
        pytest.param(
            _unscheduled("0/3 nodes are available: 3 node(s) didn't match Pod's node affinity/selector.")
            | {"node_selector": {"nvidia.com/gpu.product": "Tesla-T4"}},
            "NoMatchingNode",
            ["no node has the labels nvidia.com/gpu.product=Tesla-T4; correct spec.accelerator or add such nodes"],
            id="labels",
        ),
        pytest.param(
            _unscheduled("0/3 nodes are available: 3 cannot allocate all claims."),
            "InsufficientResources",
            ["no node has the devices of DeviceClass gpu.corp.test free", "check spec.accelerator"],
            id="devices",
        ),
        pytest.param(
            _unscheduled("0/3 nodes are available: 3 node(s) had untolerated taint(s)."),
            "Unschedulable",
            ["untolerated taint"],
            id="something else",
        ),
        pytest.param(
            {"waiting_reason": "ErrImagePull", "waiting_message": "failed to pull: not found"},
            "ImagePullBackOff",
            ["image trainer:1", "failed to pull: not found", "registry"],
            id="first pull fails",
        ),
        pytest.param(
            {
                "waiting_reason": "ImagePullBackOff",
                "waiting_message": 'Back-off pulling image "trainer:1": ErrImagePull: failed to pull: not found',
            },
            "ImagePullBackOff",
            ["image trainer:1: failed to pull: not found"],
            id="pull is waited for",
        ),
        pytest.param(
            {"waiting_reason": "InvalidImageName", "waiting_message": 'couldn\'t parse image name "A:b:c"'},
            "InvalidImageName",
            ['"A:b:c"', "trainer image"],
            id="no name of an image",
        ),
        pytest.param(
            {"waiting_reason": "CreateContainerConfigError", "waiting_message": 'secret "keys" not found'},
            "SecretNotFound",
            ["Secret keys", "spec.checkpoint.secretRef"],
            id="secret missing",
        ),
        pytest.param(
            {"waiting_reason": "CreateContainerConfigError", "waiting_message": "image has non-numeric user"},
            "CreateContainerConfigError",
            ["non-numeric user"],
            id="configuration",
        ),
        pytest.param(
            {"waiting_reason": "CreateContainerError", "waiting_message": "no command specified"},
            "CreateContainerError",
            ["no command specified"],
            id="container cannot be created",
        ),
    ],
)
def test_cause_of_waiting_has_a_reason_and_names_the_object(
    objects: Any, pod: dict[str, Any], reason: str, words: list[str]
) -> None:
    record = project_pod(objects.pod())
    assert record is not None
    view = replace(record.content, **({"scheduled": True, "image": "trainer:1"} | pod))

    state = _explain(view)

    assert (reason, reason) == (state.problem, state.reason)
    assert view.name in state.message
    assert [] == [word for word in words if word not in state.message]


def test_both_ways_of_the_kubelet_to_tell_of_a_failing_pull_are_one(objects: Any) -> None:
    record = project_pod(objects.pod())
    assert record is not None
    pull = replace(record.content, scheduled=True, waiting_reason="ErrImagePull", waiting_message="no such host")
    waits = 'Back-off pulling image "trainer:1": ErrImagePull: no such host'

    assert _explain(pull) == _explain(replace(pull, waiting_reason="ImagePullBackOff", waiting_message=waits))


_FORBIDDEN = 'pods "emoji-1-0-x" is forbidden: '


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        pytest.param(_FORBIDDEN + "exceeded quota: team, requested: pods=1, used: pods=0, limited: pods=0", "QuotaExceeded"),
        pytest.param(_FORBIDDEN + "failed quota: team: must specify limits.ephemeral-storage", "QuotaExceeded"),
        pytest.param(_FORBIDDEN + 'violates PodSecurity "restricted:latest": seccompProfile', "PodSecurityViolation"),
        pytest.param('admission webhook "check.corp" denied the request: no', "AdmissionDenied"),
        pytest.param(_FORBIDDEN + "ValidatingAdmissionPolicy 'p' with binding 'b' denied request: no", "AdmissionDenied"),
        pytest.param('Internal error occurred: failed calling webhook "check.corp": timeout', "WebhookFailed"),
        pytest.param(_FORBIDDEN + 'error looking up service account team/default: "default" not found', "Forbidden"),
        pytest.param('Pod "emoji" is invalid: spec.containers[0].image: Required value', "InvalidJob"),
    ],
)
def test_refusal_has_a_reason_and_keeps_the_words_of_the_api_server(message: str, reason: str) -> None:
    pod = _explain(refusal=f"Error creating: {message}")

    assert reason == explain_refusal(message, subject="Job emoji-1")[0]
    assert reason == pod.reason
    assert f"the pod of Job emoji-1 is refused: {message} (" in pod.message


_RUNS = {"phase": "Running", "started_at": START}
_STARTS = {"phase": "Pending", "waiting_reason": "ContainerCreating"}
_PULLS = {"phase": "Pending", "waiting_reason": "ErrImagePull", "waiting_message": "not found"}
_FULL = {"phase": "Pending"} | _unscheduled("0/3 nodes are available: 3 Insufficient cpu.")


@pytest.mark.parametrize(
    ("pods", "problem", "words"),
    [
        pytest.param([_RUNS, _STARTS, _PULLS, _FULL], "InsufficientResources", "pod p3 .* 1 of 4 pods run", id="no room first"),
        pytest.param(
            [_RUNS, _RUNS, _STARTS, _PULLS], "ImagePullBackOff", "pod p3, image .* 2 of 4 pods run", id="then the image"
        ),
        pytest.param([_RUNS, _STARTS, _STARTS, _STARTS], None, "until all 4 pods of the attempt run$", id="normal start"),
        pytest.param([_RUNS, _FULL], "InsufficientResources", "pod p1 .* 1 of 4 pods run", id="some pods are not there yet"),
        pytest.param([_RUNS], None, "until all 4 pods of the attempt run$", id="most pods are not there yet"),
    ],
)
def test_start_of_many_pods_is_told_by_the_one_with_the_worst_problem(
    pods: list[dict[str, Any]], problem: str | None, words: str
) -> None:
    state = _explain(*(build_pod(name=f"p{index}", index=index, **pod) for index, pod in enumerate(pods)), nodes=4)

    assert problem == state.problem
    assert re.search(words, state.message)


def test_refused_pod_of_many_is_told_though_others_run() -> None:
    state = _explain(build_pod(**_RUNS), nodes=2, refusal="exceeded quota: team")

    assert "QuotaExceeded" == state.problem
    assert "1 of 2 pods run" in state.message

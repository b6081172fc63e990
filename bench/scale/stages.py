"""What kwok plays: the lives of nodes and of trainer pods, told by the first word of the Job's name (pure).

`hold-...` runs until its pod is annotated, `fail-...` ends with exit code 1, and every other Job's pod completes with the last
word of a trainer that has published its model.
"""

import json
from typing import Any

from finetune_api import names

HOLD, FAIL = "hold-", "fail-"
RELEASE = "bench.finetune.dev/release"
_JOB = '.metadata.labels["batch.kubernetes.io/job-name"]'
_WORD = f'{_JOB} // "" | split("-")[0]'
_RUNS = {"key": ".status.phase", "operator": "In", "values": ["Running"]}
_STAYS = {"key": ".metadata.deletionTimestamp", "operator": "DoesNotExist"}

LAST_WORD = {
    "trainerStatus": {"progressPercentage": 100, "metrics": [{"name": "val_accuracy", "value": "0.861"}]},
    "output": {"uri": "pvc://models/bench", "digest": "sha256:" + "0" * 64, "bytes": 13_700_000},
    "result": {
        "candidate": "finetuned",
        "metrics": [{"name": "test_accuracy", "value": "0.822", "low": "0.777", "high": "0.864"}],
    },
}


def build_stages(*, run_seconds: float) -> list[dict[str, Any]]:
    """Return the stages; pods run for this long."""
    is_job = {"key": _JOB, "operator": "Exists"}
    others = {"key": _WORD, "operator": "NotIn", "values": [HOLD.rstrip("-"), FAIL.rstrip("-")]}
    failing = {"key": _WORD, "operator": "In", "values": [FAIL.rstrip("-")]}
    released = {"key": f'.metadata.annotations["{RELEASE}"]', "operator": "Exists"}
    done = _end(exit_code=0, message=json.dumps(LAST_WORD, separators=(",", ":")))
    return [
        _stage("node-ready", kind="Node", matches=[_READY | {"operator": "NotIn"}], template=_NODE),
        _stage("node-heartbeat", kind="Node", matches=[_READY | {"operator": "In"}], template=_NODE, seconds=15),
        _stage("pod-run", matches=[_STAYS, {"key": ".status.podIP", "operator": "DoesNotExist"}], template=_RUN),
        _stage("pod-complete", matches=[_STAYS, _RUNS, is_job, others], template=done, seconds=run_seconds),
        _stage("pod-fail", matches=[_STAYS, _RUNS, failing], template=_end(exit_code=1, message=""), seconds=run_seconds),
        _stage("pod-release", matches=[_STAYS, _RUNS, released], template=done),
        _stage("pod-delete", matches=[_STAYS | {"operator": "Exists"}], next={"finalizers": {"empty": True}, "delete": True}),
    ]


def build_node(name: str) -> dict[str, Any]:
    """Return a node with room for everything, accelerators included."""
    amounts = {"cpu": "100k", "memory": "1Pi", "pods": "1M", "nvidia.com/gpu": "1M"}
    labels = {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64", "type": "kwok"}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": labels, "annotations": {"kwok.x-k8s.io/node": "fake"}},
        "status": {"allocatable": amounts, "capacity": amounts},
    }


def _stage(
    name: str,
    *,
    matches: list[dict[str, Any]],
    kind: str = "Pod",
    template: str = "",
    next: dict[str, Any] | None = None,
    seconds: float = 0,
) -> dict[str, Any]:
    delay = {"delay": {"durationMilliseconds": int(1000 * seconds)}} if seconds else {}
    spec = {
        "resourceRef": {"apiGroup": "v1", "kind": kind},
        "selector": {"matchExpressions": matches},
        "next": next or {"statusTemplate": template},
        **delay,
    }
    return {"apiVersion": "kwok.x-k8s.io/v1alpha1", "kind": "Stage", "metadata": {"name": name}, "spec": spec}


def _end(*, exit_code: int, message: str) -> str:
    reason = "PodFailed" if exit_code else "PodCompleted"
    # A JSON string is a YAML string as well.
    return f"""
      {{{{ $now := Now }}}}
      phase: {"Failed" if exit_code else "Succeeded"}
      conditions:
      - {{type: Ready, status: "False", reason: {reason}, lastTransitionTime: {{{{ $now | Quote }}}}}}
      containerStatuses:
      - name: {names.CONTAINER}
        image: {{{{ (index .spec.containers 0).image | Quote }}}}
        ready: false
        started: false
        restartCount: 0
        state:
          terminated:
            exitCode: {exit_code}
            reason: {"Error" if exit_code else "Completed"}
            message: {json.dumps(message)}
            startedAt: {{{{ .status.startTime | Quote }}}}
            finishedAt: {{{{ $now | Quote }}}}
    """


_READY: dict[str, Any] = {"key": '.status.conditions.[] | select(.type == "Ready") | .status', "values": ["True"]}

_NODE = """
      {{ $now := Now }}
      conditions:
      {{ range NodeConditions }}
      - type: {{ .type | Quote }}
        status: {{ .status | Quote }}
        reason: {{ .reason | Quote }}
        message: {{ .message | Quote }}
        lastHeartbeatTime: {{ $now | Quote }}
        lastTransitionTime: {{ $now | Quote }}
      {{ end }}
"""

_RUN = f"""
      {{{{ $now := Now }}}}
      phase: Running
      startTime: {{{{ $now | Quote }}}}
      podIP: 10.0.0.1
      conditions:
      - {{type: Initialized, status: "True", lastTransitionTime: {{{{ $now | Quote }}}}}}
      - {{type: Ready, status: "True", lastTransitionTime: {{{{ $now | Quote }}}}}}
      - {{type: ContainersReady, status: "True", lastTransitionTime: {{{{ $now | Quote }}}}}}
      containerStatuses:
      - name: {names.CONTAINER}
        image: {{{{ (index .spec.containers 0).image | Quote }}}}
        ready: true
        started: true
        restartCount: 0
        state:
          running:
            startedAt: {{{{ $now | Quote }}}}
"""

"""A stand-in for Kueue: it does to a Job what Kueue v0.17.0 does, by the same requests, when it is told to.

Kueue's own decisions (quota, order, preemption) are not here, nor its webhooks. What it writes to a batch/v1 Job is, as in
https://github.com/kubernetes-sigs/kueue/tree/v0.17.0:

- pkg/controller/jobframework/reconciler.go, startJob: one merge patch with the resourceVersion, made by RunWithPodSetsInfo
- pkg/controller/jobs/job/job_controller.go, RunWithPodSetsInfo: suspend becomes false, and podset.Merge adds to the template
- pkg/controller/jobs/job/job_controller.go, Stop: suspend becomes true with the annotation kueue.x-k8s.io/stopping, then
  status.startTime is removed, as the API server lets nobody change the template of a Job that has started, then
  RestorePodSetsInfo puts the template back to that of the Workload, which was copied when the Job was first seen
- pkg/podset/podset.go, Merge and RestorePodSpec: annotations, labels, node selector, tolerations, never over a value that differs
- pkg/util/client/client.go, Patch and PatchStatus: merge patches that fail when the object has changed; then it tries again
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

_MANAGER = "kueue"
_STOPPING = "kueue.x-k8s.io/stopping"
# The Job controller's own, which are no part of the Workload.
_JOB_LABELS = ("job-name", "controller-uid", "batch.kubernetes.io/job-name", "batch.kubernetes.io/controller-uid")
_MAX_TRIES = 10


@dataclass(frozen=True, kw_only=True)
class PodSetInfo:
    """What a pod template has, or gets, from a queue."""

    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[Mapping[str, str], ...] = ()


class QueueStandIn:
    """One queue manager of a namespace."""

    def __init__(self, api: Any, *, jobs_path: str) -> None:
        self._api = api
        self._jobs_path = jobs_path
        self._workloads: dict[str, PodSetInfo] = {}

    def create_workload(self, name: str) -> None:
        """Take note of a Job that waits, with its pod template."""
        job = self._get(name)
        assert job["spec"]["suspend"] is True, "Kueue's webhook would have suspended it"
        self._workloads[name] = _read_info(job)

    def admit(self, name: str, info: PodSetInfo) -> None:
        """Start a Job with what the flavors of its queue add to the pods."""

        def start(job: dict[str, Any]) -> None:
            job["spec"]["suspend"] = False
            _merge(job["spec"]["template"], info)

        self._patch(name, start)

    def evict(self, name: str) -> None:
        """Stop a Job, and take back what was added to its pods."""

        def suspend(job: dict[str, Any]) -> None:
            job["spec"]["suspend"] = True
            job["metadata"].setdefault("annotations", {})[_STOPPING] = "true"

        def reset(job: dict[str, Any]) -> None:
            job["status"].pop("startTime", None)

        def restore(job: dict[str, Any]) -> None:
            labels = job["spec"]["template"]["metadata"].get("labels", {})
            kept = {label: labels[label] for label in _JOB_LABELS if label in labels}
            _restore(job["spec"]["template"], self._workloads[name], kept=kept)
            job["metadata"].get("annotations", {}).pop(_STOPPING, None)

        self._patch(name, suspend)
        self._patch(name, reset, subresource="/status")
        self._patch(name, restore)

    def _get(self, name: str) -> dict[str, Any]:
        return dict(self._api.get(f"{self._jobs_path}/{name}"))

    def _patch(self, name: str, change: Callable[[dict[str, Any]], None], *, subresource: str = "") -> None:
        """Send what a change differs in, and again when somebody else has changed the Job meanwhile."""
        for _ in range(_MAX_TRIES):
            before = self._get(name)
            after = copy.deepcopy(before)
            change(after)
            patch = _diff(before, after) or {}
            patch.setdefault("metadata", {})["resourceVersion"] = before["metadata"]["resourceVersion"]
            path = f"{self._jobs_path}/{name}{subresource}?fieldManager={_MANAGER}"
            status, answer = self._api.request("PATCH", path, patch, type="application/merge-patch+json")
            if status != 409:
                assert status == 200, answer
                return
        raise AssertionError(f"Job {name} changes all the time")


def _read_info(job: dict[str, Any]) -> PodSetInfo:
    metadata, spec = job["spec"]["template"]["metadata"], job["spec"]["template"]["spec"]
    return PodSetInfo(
        labels={key: value for key, value in metadata.get("labels", {}).items() if key not in _JOB_LABELS},
        annotations=metadata.get("annotations", {}),
        node_selector=spec.get("nodeSelector", {}),
        tolerations=tuple(spec.get("tolerations", ())),
    )


def _merge(template: dict[str, Any], info: PodSetInfo) -> None:
    for part, name, added in (
        (template["metadata"], "annotations", info.annotations),
        (template["metadata"], "labels", info.labels),
        (template["spec"], "nodeSelector", info.node_selector),
    ):
        known = part.get(name, {})
        conflicts = [key for key in added if known.get(key, added[key]) != added[key]]
        assert not conflicts, f"{name} conflict: {conflicts}"
        part[name] = {**added, **known}
    tolerations = template["spec"].setdefault("tolerations", [])
    tolerations.extend(dict(each) for each in info.tolerations if each not in tolerations)


def _restore(template: dict[str, Any], info: PodSetInfo, *, kept: Mapping[str, str]) -> None:
    template["metadata"] |= {"annotations": dict(info.annotations), "labels": {**info.labels, **kept}}
    template["spec"] |= {"nodeSelector": dict(info.node_selector), "tolerations": [dict(each) for each in info.tolerations]}


def _diff(before: Any, after: Any) -> Any:
    """Return the merge patch (RFC 7386) from one object to another, or None if they are equal."""
    if not isinstance(before, dict) or not isinstance(after, dict):
        return after
    patch = {key: None for key in before if key not in after}
    return patch | {key: _diff(before.get(key, {}), value) for key, value in after.items() if before.get(key) != value}

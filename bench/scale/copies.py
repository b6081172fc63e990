"""Thousands of completed FineTuneJobs with their Jobs and pods in minutes: copies of one, made while no controller runs."""

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Any

from finetune_api import names

from bench.scale.burst import NAMESPACE, measure_burst
from bench.scale.client import Client, do_all
from bench.scale.cluster import World
from bench.scale.load import finetunejobs, jobs, number
from bench.scale.operators import run_operator

_PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
_CONTROLLERS = ("kube-controller-manager", "kube-scheduler", "kwok")
_SET_BY_SERVER = ("uid", "resourceVersion", "creationTimestamp", "managedFields", "generation", "generateName", "finalizers")


@contextlib.contextmanager
def run_copies(world: World, *, count: int) -> Iterator[None]:
    """Let the operator lead one FineTuneJob to its end, and have so many copies of it until the end of the context."""
    with run_operator(world.kubeconfig, world.folder) as operator:
        measure_burst(world, operator, count=1)
    client = world.client
    job = client.get_first(finetunejobs(NAMESPACE))
    child = client.get_first(jobs(NAMESPACE))
    pod = client.get_first(_PODS)
    with _hold(world):
        do_all(lambda name: _copy(client, name, job=job, child=child, pod=pod), number("copy-", count))
        yield


@contextlib.contextmanager
def _hold(world: World) -> Iterator[None]:
    """Stop what would change the copies; the processes end well, so they go on before that."""
    pids = [pid for name, pid in world.read_pids().items() if name in _CONTROLLERS]
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def _copy(client: Client, name: str, *, job: Any, child: Any, pod: Any) -> None:
    made = _create(client, finetunejobs(NAMESPACE), name, of=job | {"apiVersion": names.API_VERSION, "kind": names.KIND})
    child_name = name + child["metadata"]["name"].removeprefix(job["metadata"]["name"])
    labels = {names.LABEL_JOB: name}
    # The API server gives selector and labels to a Job that has none.
    template = child["spec"]["template"]
    template = template | {"metadata": template["metadata"] | {"labels": _drop_tracking(template["metadata"]["labels"]) | labels}}
    spec = {key: value for key, value in child["spec"].items() if key != "selector"} | {"template": template}
    plain = child | {"apiVersion": "batch/v1", "kind": "Job", "spec": spec}
    made = _create(client, jobs(NAMESPACE), child_name, of=plain, owner=made, labels=labels)
    uid = made["metadata"]["uid"]
    labels |= {f"{prefix}job-name": child_name for prefix in ("", "batch.kubernetes.io/")}
    labels |= {f"{prefix}controller-uid": uid for prefix in ("", "batch.kubernetes.io/")}
    _create(client, _PODS, f"{child_name}-0", of=pod | {"apiVersion": "v1", "kind": "Pod"}, owner=made, labels=labels)


def _create(client: Client, path: str, name: str, *, of: Any, owner: Any = None, labels: Any = None) -> Any:
    """Create a copy of an object with another name, owner and labels, and return it."""
    metadata = {key: value for key, value in of["metadata"].items() if key not in _SET_BY_SERVER}
    metadata |= {"name": name, "labels": metadata.get("labels", {}) | (labels or {})}
    if owner is not None:
        mine = {"name": owner["metadata"]["name"], "uid": owner["metadata"]["uid"]}
        metadata["ownerReferences"] = [metadata["ownerReferences"][0] | mine]
    made = client.create(path, {key: value for key, value in of.items() if key != "status"} | {"metadata": metadata})
    return client.replace(f"{path}/{name}/status", made | {"status": of["status"]})


def _drop_tracking(labels: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in labels.items() if not key.endswith(("job-name", "controller-uid"))}

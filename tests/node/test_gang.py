"""Several processes and pods as one trainer, on the real node: they start, fail and go on together, and give the same model."""

import json
import random
import re
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import cluster_client
import pytest

pytestmark = [pytest.mark.node, pytest.mark.slow]

_RESOURCE = "example.com/fake-accelerator"
_CLASS = "fake"
# Enough steps to be disturbed in the middle, in pods that fit the node twice. Sums in another order differ in their last bits,
# which training enlarges with every step, the more so the larger the learning rate is; with this one they stay below 1e-5.
_SPEC: dict[str, Any] = {
    "method": {"type": "full"},
    "hyperparameters": {"maxSteps": 40, "imageSize": 64, "batchSize": 16, "learningRate": 1e-6},
    "checkpoint": {"intervalSeconds": 1},
    "resources": {"cpu": "800m", "memory": "2Gi"},
}
_LOSSES = ("val_nll", "test_nll")
_TPU_LABELS = {"cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice", "cloud.google.com/gke-tpu-topology": "2x2"}
# Jobs with their resources, and the processes that each of their pods has to start.
_STARTED: tuple[tuple[str, dict[str, Any], str, int], ...] = (
    ("on-gpus", {"nvidia": {"count": 2}}, "nvidia.com/gpu", 2),
    ("on-slices", {"nvidia": {"mig": {"profile": "1g.10gb", "count": 3}}}, "nvidia.com/mig-1g.10gb", 3),
    ("on-amd-gpus", {"amd": {"count": 2}}, "amd.com/gpu", 2),
    ("on-neuron-devices", {"neuron": {"devices": 1}}, "aws.amazon.com/neuron", 2),
    ("on-neuron-cores", {"neuron": {"cores": 2}}, "aws.amazon.com/neuroncore", 2),
    ("on-tpus", {"tpu": {"type": "tpu-v6e-slice", "topology": "2x2"}}, "google.com/tpu", 4),
)


@pytest.fixture(scope="session")
def alone(team: Any) -> dict[str, float]:
    """The losses of the model that one process trains."""
    team.apply("alone", **_SPEC)
    assert "Complete" == team.wait("alone", "Complete", "Failed")
    return read_losses(team, "alone")


@pytest.fixture(scope="session")
def paired(team: Any) -> dict[str, float]:
    """The losses of the model that two pods train, undisturbed."""
    team.apply("pair", **_SPEC | {"nodes": 2})
    team.wait("pair", "Running")
    assert "2 pods" in team.condition("pair", "Running")["message"]
    assert "Complete" == team.wait("pair", "Complete", "Failed")
    return read_losses(team, "pair")


@pytest.fixture(scope="module")
def fake_accelerators(node: None) -> Iterator[None]:
    """The node with accelerators that are not there, and those of a class that the administrator has added, on the CPU."""
    name = cluster_client.get("nodes")["items"][0]["metadata"]["name"]
    resources = (_RESOURCE, *(resource for _, _, resource, _ in _STARTED))
    for resource in resources:
        _patch_capacity(name, {"op": "add", "path": _capacity_path(resource), "value": "8"})
    cluster_client.kubectl("label", "node", name, *(f"{label}={value}" for label, value in _TPU_LABELS.items()))
    values = {"resource": _RESOURCE, "device": "cpu", "backend": "gloo"}
    classes = (f"accelerators.{_CLASS}.{key}={value}" for key, value in values.items())
    cluster_client.install_operator("retries.baseSeconds=2", *classes)
    yield
    cluster_client.install_operator("retries.baseSeconds=2")
    cluster_client.kubectl("label", "node", name, *(f"{label}-" for label in _TPU_LABELS))
    for resource in resources:
        _patch_capacity(name, {"op": "remove", "path": _capacity_path(resource)})


@pytest.fixture(scope="module")
def started(team: Any, fake_accelerators: None) -> Any:
    """Jobs on accelerators that are not there, applied together."""
    small = {"resources": {"cpu": "200m", "memory": "2Gi"}, "method": {"type": "probe"}, "hyperparameters": {"imageSize": 64}}
    for name, accelerator, _, _ in _STARTED:
        team.apply(name, **small, accelerator=accelerator)
    return team


def read_losses(team: Any, name: str) -> dict[str, float]:
    metrics = json.loads((team.models / name / "metrics.json").read_text(encoding="utf-8"))["metrics"]
    return {each["name"]: each["value"] for each in metrics if each["name"] in _LOSSES}


def list_pods(team: Any, name: str) -> list[dict[str, Any]]:
    return list(team.get("pods", "-l", f"finetune.dev/job={name}")["items"])


def has_saved(team: Any, name: str, *, attempt: int) -> bool:
    """Return whether an attempt has saved its fine-tuning; the status tells of that some seconds later."""
    manifests = (team.models / name / ".finetune" / "checkpoints").glob("checkpoint-*-steps/manifest.json")
    try:
        return any(json.loads(path.read_text(encoding="utf-8"))["attempt"] == attempt for path in manifests)
    except FileNotFoundError:  # replaced by a newer one meanwhile
        return False


def find_attempts_at_work(pods: list[dict[str, Any]]) -> set[str]:
    """Return the attempts of which a container may run."""
    return {pod["metadata"]["labels"]["finetune.dev/attempt"] for pod in pods if pod["status"]["phase"] in ("Pending", "Running")}


def wait_for_end(team: Any, name: str, *, until: Callable[..., Any]) -> None:
    """Wait until a job is Complete, and see to it that no two attempts are ever at work."""

    def check() -> bool:
        assert len(find_attempts_at_work(list_pods(team, name))) <= 1
        return bool(team.state(name) in ("Complete", "Failed"))

    until(check, what=f"{name} ends", timeout_seconds=300)
    assert "Complete" == team.state(name)


def test_two_pods_train_the_same_model_as_one(team: Any, alone: dict[str, float], paired: dict[str, float]) -> None:
    assert alone == pytest.approx(paired, abs=1e-5)
    assert ["0", "1"] == sorted(_read_index(pod) for pod in list_pods(team, "pair"))


def test_two_processes_of_a_pod_train_the_same_model_as_one(team: Any, alone: dict[str, float], fake_accelerators: None) -> None:
    accelerator = {"custom": {"className": _CLASS, "count": 2}}
    team.apply("twins", **_SPEC | {"accelerator": accelerator, "resources": {"cpu": "1600m", "memory": "4Gi"}})
    assert "Complete" == team.wait("twins", "Complete", "Failed")

    assert alone == pytest.approx(read_losses(team, "twins"), abs=1e-5)


@pytest.mark.parametrize(("name", "processes"), [pytest.param(name, count, id=name) for name, _, _, count in _STARTED])
def test_a_pod_starts_one_process_for_each_accelerator(started: Any, name: str, processes: int) -> None:
    started.wait(name, "Failed")

    (pod,) = list_pods(started, name)
    log = started.kubectl("logs", pod["metadata"]["name"])
    assert f"starting {processes} of {processes} processes in pod 0 of 1" in log
    assert set(range(processes)) == {int(rank) for rank in re.findall("rank ([0-9]+) ERROR DeviceMissing", log)}
    assert "DeviceMissing" == started.job(name)["status"]["failure"]["reason"]


def test_the_number_of_pods_can_change_in_the_middle(team: Any, alone: dict[str, float], until: Any) -> None:
    team.apply("scaled", **_SPEC | {"nodes": 2})
    for attempt, nodes in ((1, 1), (2, 2)):
        team.wait("scaled", "Running")
        until(lambda attempt=attempt: has_saved(team, "scaled", attempt=attempt), what="a checkpoint of it")
        team.kubectl("patch", "ftj", "scaled", "--type=merge", "-p", json.dumps({"spec": {"nodes": nodes}}))
        until(lambda attempt=attempt: team.job("scaled")["status"]["attempt"] == attempt + 1, what="the next attempt")

    wait_for_end(team, "scaled", until=until)
    status = team.job("scaled")["status"]
    assert (3, 0) == (status["attempt"], status["restartsCountedTowardsLimit"])
    assert 2 == len(list_pods(team, "scaled"))
    assert alone == pytest.approx(read_losses(team, "scaled"), abs=1e-5)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.faults) for seed in range(1, 10))])
def test_a_killed_pod_fails_and_restarts_the_gang(team: Any, paired: dict[str, float], until: Any, seed: int) -> None:
    name, chance = f"bereft-{seed}", random.Random(seed)
    team.apply(name, **_SPEC | {"nodes": 2})
    team.wait(name, "Running")
    # At a random moment of the work: the pair that nothing disturbed shows how long it takes.
    started, ended = (datetime.fromisoformat(team.job("pair")["status"][field]) for field in ("startTime", "completionTime"))
    time.sleep(chance.uniform(0, 0.6) * (ended - started).total_seconds())

    victim = chance.choice([pod for pod in list_pods(team, name) if pod["status"]["phase"] == "Running"])
    team.kubectl("delete", "pod", victim["metadata"]["name"], "--grace-period=0", "--force")

    wait_for_end(team, name, until=until)
    status = team.job(name)["status"]
    assert (2, 0) == (status["attempt"], status["restartsCountedTowardsLimit"])
    assert "PodDeleted" == status["restartHistory"][-1]["reason"]
    assert paired == read_losses(team, name)


def _read_index(pod: dict[str, Any]) -> str:
    return str(pod["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"])


def _capacity_path(resource: str) -> str:
    return "/status/capacity/" + resource.replace("/", "~1")


def _patch_capacity(name: str, change: dict[str, Any]) -> None:
    """Have the node advertise a resource: https://kubernetes.io/docs/tasks/administer-cluster/extended-resource-node/"""
    cluster_client.kubectl("patch", "node", name, "--subresource=status", "--type=json", "-p", json.dumps([change]))

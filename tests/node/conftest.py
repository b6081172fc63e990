"""A real node for the tests: kubelet, containerd, both images and the chart."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cluster_client
import pytest

# The local cluster's modules belong to no installed package.
sys.path.insert(0, str(cluster_client.ROOT / "hack" / "cluster"))

_SPEC: dict[str, Any] = {
    "task": "image-classification",
    "dataset": {"uri": "pvc://datasets/pictures", "validationFraction": 0.2, "testFraction": 0.2},
    "method": {"type": "full"},
    "hyperparameters": {"maxSteps": 6, "imageSize": 64, "batchSize": 16},
    "resources": {"cpu": "900m", "memory": "3Gi"},
    "runPolicy": {"backoffLimit": 1},
}


class Namespace:
    """A namespace of the cluster's own, with its volumes, under Pod Security restricted."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._applied: set[str] = set()
        cluster_client.ensure_namespace(name)
        self.datasets = cluster_client.ensure_volume("datasets", namespace=name)
        self.models = cluster_client.ensure_volume("models", namespace=name)
        # The cluster keeps volumes, and a model that an earlier run of the tests published would be taken as it is.
        for folder in self.models.iterdir():
            shutil.rmtree(folder)

    def remove(self) -> None:
        """Delete the namespace with its volumes."""
        cluster_client.kubectl("delete", "namespace", self.name, "--wait=true", "--timeout=120s")
        for claim in ("datasets", "models"):
            cluster_client.kubectl("delete", "pv", "--ignore-not-found", f"{self.name}-{claim}")

    def apply(self, name: str, **spec: Any) -> dict[str, Any]:
        """Apply a new FineTuneJob with small settings, and return its manifest; all modules share the names."""
        assert name not in self._applied, f"another test has a job named {name}"
        manifest = {
            "apiVersion": "finetune.dev/v1alpha1",
            "kind": "FineTuneJob",
            "metadata": {"name": name, "namespace": self.name},
            "spec": _SPEC | {"output": {"uri": f"pvc://models/{name}"}} | spec,
        }
        self.kubectl("apply", "-f", "-", stdin=json.dumps(manifest))
        self._applied.add(name)
        return manifest

    def kubectl(self, *words: str, stdin: str | None = None) -> str:
        return cluster_client.kubectl("-n", self.name, *words, stdin=stdin)

    def get(self, *words: str) -> dict[str, Any]:
        return cluster_client.get("-n", self.name, *words)

    def job(self, name: str) -> dict[str, Any]:
        return self.get("finetunejob", name)

    def state(self, name: str) -> str:
        return self.condition(name, "Ready").get("reason", "")

    def condition(self, name: str, kind: str) -> dict[str, Any]:
        conditions = self.job(name).get("status", {}).get("conditions", [])
        return next((each for each in conditions if each["type"] == kind), {})

    def wait(self, name: str, *states: str, timeout_seconds: float = 240) -> str:
        """Wait until the STATE of a job is one of those given."""
        return wait_until(
            lambda: self.state(name) if self.state(name) in states else None,
            what=f"{name} is {' or '.join(states)}",
            timeout_seconds=timeout_seconds,
            explain=lambda: self.kubectl("describe", "finetunejob,job,pod"),
        )


def wait_until(
    check: Callable[[], Any], *, what: str, timeout_seconds: float = 120, explain: Callable[[], str] = lambda: ""
) -> Any:
    """Return the first true value of a check; fail with an explanation when there is none in time."""
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        value = check()
        if value:
            return value
        time.sleep(0.5)
    raise AssertionError(f"not seen within {timeout_seconds} s: {what}\n{explain()}")


@pytest.fixture(scope="session")
def node() -> Iterator[None]:
    """Run the cluster with its node and the operator; a cluster that was up before stays up."""
    was_up = "main" in cluster_client.cluster("status")
    cluster_client.cluster("up")
    cluster_client.cluster("images")
    cluster_client.install_operator("retries.baseSeconds=2")
    yield
    if not was_up:
        cluster_client.cluster("down")


@pytest.fixture(scope="session")
def team(node: None) -> Iterator[Namespace]:
    """A namespace with 300 emoji pictures."""
    namespace = Namespace("node-test")
    script = cluster_client.ROOT / "hack" / "data" / "emoji.py"
    subprocess.run([sys.executable, str(script), str(namespace.datasets / "pictures"), "--limit", "300"], check=True)
    yield namespace
    namespace.remove()


@pytest.fixture(scope="session")
def make_namespace(node: None) -> Iterator[Callable[[str], Namespace]]:
    """Make further namespaces, which are removed at the end."""
    made: list[Namespace] = []

    def make(name: str) -> Namespace:
        made.append(Namespace(name))
        return made[-1]

    yield make
    for namespace in made:
        namespace.remove()


@pytest.fixture(scope="session")
def until() -> Callable[..., Any]:
    return wait_until


@pytest.fixture
def pictures(team: Namespace) -> Path:
    return team.datasets / "pictures"

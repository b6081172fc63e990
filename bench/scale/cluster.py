"""The cluster of a load test: a real control plane, kwok as all its kubelets, and the volumes that FineTuneJobs name."""

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml
from finetune_api.crd import build_crds

from bench.operator import ROOT, run_control_plane
from bench.scale.client import Client, wait_until
from bench.scale.processes import read_pids, run_process
from bench.scale.stages import build_node, build_stages

NODES = 10
_CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
_CLAIMS = ("datasets", "models")


@dataclass(frozen=True, kw_only=True)
class World:
    """What every part of the test needs."""

    kubeconfig: Path
    client: Client
    folder: Path
    """For logs and other files; it is gone at the end."""
    kwok_pid: int

    @property
    def cluster_folder(self) -> Path:
        """Return the folder of the local cluster, where the audit log is."""
        return self.kubeconfig.parent

    def read_pids(self) -> dict[str, int]:
        """Return the process ids of all that is not the operator."""
        return read_pids(self.cluster_folder) | {"kwok": self.kwok_pid}

    def create_namespace(self, name: str) -> None:
        """Make a namespace with the claims that FineTuneJobs name, bound to volumes that no kubelet mounts."""
        self.client.create("/api/v1/namespaces", {"metadata": {"name": name}})
        for claim in _CLAIMS:
            self._create_claim(name, claim)
        claims = f"/api/v1/namespaces/{name}/persistentvolumeclaims"
        wait_until(
            lambda: all(each["status"].get("phase") == "Bound" for each in self.client.get(claims)["items"]),
            what=f"the claims of {name} are bound",
            seconds=120,
        )
        accounts = f"/api/v1/namespaces/{name}/serviceaccounts/default"
        wait_until(lambda: self.client.get(accounts), what=f"{name} has its service account", seconds=120)

    def _create_claim(self, namespace: str, claim: str) -> None:
        volume = f"{namespace}-{claim}"
        shared = {"accessModes": ["ReadWriteMany"], "storageClassName": ""}
        self.client.create(
            "/api/v1/persistentvolumes",
            {
                "metadata": {"name": volume},
                "spec": shared
                | {
                    "capacity": {"storage": "1Gi"},
                    "hostPath": {"path": "/nonexistent"},
                    "claimRef": {"namespace": namespace, "name": claim},
                },
            },
        )
        self.client.create(
            f"/api/v1/namespaces/{namespace}/persistentvolumeclaims",
            {
                "metadata": {"name": claim},
                "spec": shared | {"volumeName": volume, "resources": {"requests": {"storage": "1Gi"}}},
            },
        )


@contextlib.contextmanager
def run_world(*, run_seconds: float, with_crds: bool = True) -> Iterator[World]:
    """Run the cluster; pods run for this long. Everything that was started is stopped at the end."""
    with run_control_plane() as kubeconfig, tempfile.TemporaryDirectory() as name:
        folder, client = Path(name), Client(kubeconfig)
        with _run_kwok(kubeconfig, folder, run_seconds=run_seconds) as pid:
            _create_nodes(client)
            if with_crds:
                _apply_crds(client)
            yield World(kubeconfig=kubeconfig, client=client, folder=folder, kwok_pid=pid)


@contextlib.contextmanager
def _run_kwok(kubeconfig: Path, folder: Path, *, run_seconds: float) -> Iterator[int]:
    config = folder / "kwok.yaml"
    config.write_text(yaml.safe_dump_all(build_stages(run_seconds=run_seconds)), encoding="utf-8")
    command = [find_program("kwok"), f"--kubeconfig={kubeconfig}", f"--config={config}", "--manage-all-nodes", "--v=WARN"]
    # No lease of its own for each node: heartbeats are a stage, and cost a write in 15 s.
    with run_process(command, log=folder / "kwok.log") as process:
        yield process.pid


def find_program(name: str) -> str:
    """Return the path of a program of the local cluster, compiling it if need be."""
    command = [sys.executable, str(ROOT / "hack" / "cluster"), "path", name]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def _create_nodes(client: Client) -> None:
    for number in range(NODES):
        client.create("/api/v1/nodes", build_node(f"kwok-{number}"))
    # The controller manager taints a node until it has seen that it is ready.
    wait_until(
        lambda: all(not each["spec"].get("taints") and _is_ready(each) for each in client.get("/api/v1/nodes")["items"]),
        what="kwok's nodes are ready",
        seconds=120,
    )


def _is_ready(node: dict[str, list[dict[str, str]]] | dict[str, dict[str, list[dict[str, str]]]]) -> bool:
    conditions = node["status"].get("conditions") or []  # type: ignore[union-attr]
    return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)


def _apply_crds(client: Client) -> None:
    for crd in build_crds():
        client.apply(f"{_CRDS}/{crd['metadata']['name']}", crd)
    wait_for_crds(client)


def wait_for_crds(client: Client) -> None:
    """Wait until the API server serves the custom resources."""

    def is_served() -> bool:
        found = [client.get(f"{_CRDS}/{crd['metadata']['name']}").get("status", {}) for crd in build_crds()]
        return all(
            any(each["type"] == "Established" and each["status"] == "True" for each in status.get("conditions") or ())
            for status in found
        )

    wait_until(is_served, what="the custom resources are served", seconds=120)

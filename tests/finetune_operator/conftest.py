"""Objects as the API server sends them, a control plane's namespace, and an operator process in it."""

import json
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import FaultProxy
from fault_trials import FAILOVERS, TABLE, Trials, format_failovers
from harness import (
    SPEC,
    Operator,
    Team,
    build_operator,
    grant_rights,
    wait_until,
    write_certificate,
    write_kubeconfig,
)
from nursery import Nursery


class Objects:
    """Builders of raw objects with valid defaults."""

    def job(
        self,
        name: str = "emoji",
        *,
        uid: str | None = None,
        version: int = 1,
        namespace: str = "team",
        generation: int = 1,
        spec: dict[str, Any] | None = None,
        status: dict[str, Any] | None = None,
        **metadata: Any,
    ) -> dict[str, Any]:
        return {
            "apiVersion": "finetune.dev/v1alpha1",
            "kind": "FineTuneJob",
            "metadata": {
                "name": name,
                "namespace": namespace,
                "uid": uid or f"uid-{namespace}-{name}",
                "resourceVersion": str(version),
                "generation": generation,
                "creationTimestamp": "2026-01-01T00:00:00Z",
                **metadata,
            },
            "spec": SPEC if spec is None else spec,
            **({"status": status} if status else {}),
        }

    def profile(self, name: str = "team", *, version: int = 1, **spec: Any) -> dict[str, Any]:
        return {
            "apiVersion": "finetune.dev/v1alpha1",
            "kind": "FineTuneProfile",
            "metadata": {"name": name, "uid": f"uid-{name}", "resourceVersion": str(version), "generation": version},
            "spec": spec,
        }

    def child(
        self,
        name: str = "emoji-0a1b2c3d-1",
        *,
        job: str = "emoji",
        job_uid: str | None = None,
        uid: str | None = None,
        version: int = 1,
        namespace: str = "team",
        attempt: int = 1,
        status: dict[str, Any] | None = None,
        **metadata: Any,
    ) -> dict[str, Any]:
        labels = _labels(job, job_uid=job_uid or f"uid-{namespace}-{job}", attempt=attempt)
        return {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {
                "name": name,
                "namespace": namespace,
                "uid": uid or f"uid-{namespace}-{name}",
                "resourceVersion": str(version),
                "labels": labels,
                "ownerReferences": [{"kind": "FineTuneJob", "name": job, "uid": labels["finetune.dev/job-uid"]}],
                "creationTimestamp": "2026-01-01T00:00:00Z",
                **metadata,
            },
            "status": status or {},
        }

    def pod(
        self,
        name: str = "emoji-0a1b2c3d-1-0-x7x7x",
        *,
        child: str = "emoji-0a1b2c3d-1",
        job: str = "emoji",
        job_uid: str | None = None,
        uid: str | None = None,
        version: int = 1,
        namespace: str = "team",
        index: int = 0,
        status: dict[str, Any] | None = None,
        **metadata: Any,
    ) -> dict[str, Any]:
        _, run, attempt = child.rsplit("-", 2)
        labels = _labels(job, job_uid=job_uid or f"uid-{namespace}-{job}", run=run, attempt=int(attempt))
        return {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": name,
                "namespace": namespace,
                "uid": uid or f"uid-{namespace}-{name}",
                "resourceVersion": str(version),
                "labels": labels | {"batch.kubernetes.io/job-completion-index": str(index)},
                "ownerReferences": [{"apiVersion": "batch/v1", "kind": "Job", "name": child, "uid": "j", "controller": True}],
                **metadata,
            },
            "spec": {"nodeName": "node-1", "containers": [{"name": "trainer", "image": "trainer:1"}]},
            "status": status or {"phase": "Pending"},
        }


def _labels(job: str, *, job_uid: str, run: str = "0a1b2c3d", attempt: int) -> dict[str, str]:
    return {
        "app.kubernetes.io/managed-by": "finetune-operator",
        "finetune.dev/job": job,
        "finetune.dev/job-uid": job_uid,
        "finetune.dev/run": run,
        "finetune.dev/attempt": str(attempt),
        "finetune.dev/pod-shape": "5e6f7a8b",
    }


@pytest.fixture
def objects() -> Objects:
    return Objects()


@pytest.fixture
def team(api: Any) -> Iterator[Team]:
    """A namespace of the test's own."""
    team = Team(api, f"team-{secrets.token_hex(4)}")
    yield team
    team.remove()


@pytest.fixture
def operator_settings() -> dict[str, str]:
    """Settings of a module's own."""
    return {}


@pytest.fixture
def operator(team: Team, tls: tuple[Path, Path], tmp_path: Path, operator_settings: dict[str, str]) -> Iterator[Operator]:
    """An operator for the team's namespace, not started yet."""
    grant_rights(team)
    write_kubeconfig(team, tmp_path / "kubeconfig")
    operator = build_operator(team, tls=tls, folder=tmp_path, **operator_settings)
    yield operator
    operator.stop()
    assert "Traceback" not in operator.log, operator.log


@pytest.fixture(scope="session")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for localhost, and its key."""
    return write_certificate(tmp_path_factory.mktemp("tls"), name="localhost")


@pytest.fixture(scope="session")
def until() -> Callable[..., Any]:
    return wait_until


@pytest.fixture
def requests(control_plane: Path) -> Callable[[], list[dict[str, Any]]]:
    """The requests that the API server finished, from its audit log."""

    def read() -> list[dict[str, Any]]:
        lines = (control_plane.parent / "audit.log").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    return read


@pytest.fixture
def writes(requests: Callable[[], list[dict[str, Any]]]) -> Callable[..., list[tuple[str, str]]]:
    """The verb and path of every write of the team's operator to a FineTuneJob and its children."""

    def read(team: Team, *, about: str) -> list[tuple[str, str]]:
        user = f"system:serviceaccount:{team.namespace}:operator"
        verbs = {"create", "update", "patch", "delete", "deletecollection"}
        mine = [each for each in requests() if each["user"]["username"] == user and each["verb"] in verbs]
        return [(each["verb"], each["requestURI"]) for each in mine if each["objectRef"].get("name", "").startswith(about)]

    return read


@pytest.fixture
def created(requests: Callable[[], list[dict[str, Any]]]) -> Callable[[Team], list[str]]:
    """The name of every Job that the team's operator created, in order."""

    def read(team: Team) -> list[str]:
        user = f"system:serviceaccount:{team.namespace}:operator"
        mine = [each for each in requests() if each["user"]["username"] == user and each["responseStatus"].get("code") == 201]
        return [each["objectRef"]["name"] for each in mine if each["objectRef"].get("resource") == "jobs"]

    return read


@pytest.fixture
def certify() -> Callable[..., tuple[Path, Path]]:
    return write_certificate


@pytest.fixture
def proxy(api: Any, operator: Operator, tmp_path: Path) -> Iterator[FaultProxy]:
    """A proxy that the team's operator goes through."""
    with FaultProxy(api, folder=tmp_path) as proxy:
        proxy.route(tmp_path / "kubeconfig")
        yield proxy
        # It ends before the proxy does, or its log would tell of an API server that is gone.
        operator.stop()


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """Where operators start in a moment."""
    with Nursery() as nursery:
        yield nursery


@pytest.fixture
def trials(
    api: Any, tls: tuple[Path, Path], tmp_path: Path, nursery: Nursery, requests: Callable[[], list[dict[str, Any]]]
) -> Trials:
    """Lives of FineTuneJobs side by side."""
    return Trials(api, tls=tls, folder=tmp_path, nursery=nursery, read_requests=requests)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show what became of all trials of faults, and how long it took until another operator led."""
    if TABLE.rows:
        terminalreporter.section("faults")
        terminalreporter.write_line(str(TABLE))
    if FAILOVERS:
        terminalreporter.section("failovers")
        terminalreporter.write_line(format_failovers())

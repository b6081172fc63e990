"""The chart on a real kube-apiserver: install, upgrade, uninstall."""

import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.apiserver

_RELEASE = "finetune-operator"
_CRD = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/finetunejobs.finetune.dev"

Install = Callable[..., None]


class Release:
    """A release of the chart in a namespace that enforces Pod Security restricted."""

    def __init__(self, helm: Any, api: Any, kubeconfig: Path) -> None:
        self._helm = helm
        self._kubeconfig = kubeconfig
        self.api = api
        self.namespace = f"chart-{secrets.token_hex(3)}"
        labels = {"pod-security.kubernetes.io/enforce": "restricted"}
        api.create("/api/v1/namespaces", {"metadata": {"name": self.namespace, "labels": labels}})

    def run(self, *words: str, values: dict[str, Any] | None = None) -> str:
        result = self._helm("--kubeconfig", str(self._kubeconfig), "--namespace", self.namespace, *words, values=values)
        assert 0 == result.returncode, result.stderr
        return str(result.stdout)

    def upgrade(self, **values: Any) -> None:
        self.run("upgrade", "--install", "--take-ownership", _RELEASE, "CHART", values=values)

    def get(self, kind: str, name: str) -> dict[str, Any]:
        prefix = "/apis/apps/v1" if kind == "deployments" else "/api/v1"
        return dict(self.api.get(f"{prefix}/namespaces/{self.namespace}/{kind}/{name}"))

    def may(self, user: str, verb: str, resource: str, *, group: str = "", namespace: str = "") -> bool:
        """Return whether a user may do something, by the API server's own word."""
        attributes = {"verb": verb, "group": group, "resource": resource, "namespace": namespace}
        review = {"spec": {"user": user, "resourceAttributes": attributes}}
        return bool(self.api.create("/apis/authorization.k8s.io/v1/subjectaccessreviews", review)["status"]["allowed"])


@pytest.fixture
def release(helm: Any, api: Any, control_plane: Path) -> Iterator[Release]:
    release = Release(helm, api, control_plane)
    yield release
    release.run("uninstall", _RELEASE, "--ignore-not-found")
    api.delete(f"/api/v1/namespaces/{release.namespace}")


def _wait(check: Callable[[], Any], *, what: str) -> Any:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if value := check():
            return value
        time.sleep(0.1)
    raise AssertionError(f"not seen within 30 s: {what}")


def test_pod_is_admitted_under_pod_security_restricted(release: Release) -> None:
    release.upgrade()

    pods = _wait(
        lambda: release.api.get(f"/api/v1/namespaces/{release.namespace}/pods")["items"], what="the operator's pod is created"
    )
    assert "restricted" not in str(pods[0]["metadata"].get("annotations", {}))


def test_upgrade_keeps_the_certificate_and_the_pod(release: Release) -> None:
    release.upgrade()
    before, deployment = release.get("secrets", f"{_RELEASE}-tls"), release.get("deployments", _RELEASE)
    release.upgrade()
    after, again = release.get("secrets", f"{_RELEASE}-tls"), release.get("deployments", _RELEASE)

    assert before["data"] == after["data"]
    assert deployment["metadata"]["generation"] == again["metadata"]["generation"]


def test_a_changed_setting_replaces_the_pod(release: Release) -> None:
    release.upgrade()
    before = release.get("deployments", _RELEASE)["spec"]["template"]
    release.upgrade(logs={"level": "DEBUG"})

    assert before != release.get("deployments", _RELEASE)["spec"]["template"]


def test_a_lost_certificate_is_made_anew_and_replaces_the_pod(release: Release) -> None:
    release.upgrade()
    before = release.get("deployments", _RELEASE)["spec"]["template"]
    release.api.delete(f"/api/v1/namespaces/{release.namespace}/secrets/{_RELEASE}-tls")
    release.upgrade()

    assert release.get("secrets", f"{_RELEASE}-tls")["data"]["tls.key"]
    assert before != release.get("deployments", _RELEASE)["spec"]["template"]


def test_uninstall_keeps_the_crd_and_removes_the_rest(release: Release) -> None:
    release.upgrade()
    release.run("uninstall", _RELEASE, "--wait")

    assert release.api.exists(_CRD)
    assert not release.api.exists(f"/apis/apps/v1/namespaces/{release.namespace}/deployments/{_RELEASE}")
    assert not release.api.exists(f"/api/v1/namespaces/{release.namespace}/secrets/{_RELEASE}-tls")
    assert not release.api.exists(f"/apis/rbac.authorization.k8s.io/v1/clusterroles/{_RELEASE}-{release.namespace}")


def test_in_namespaced_mode_the_operator_may_do_nothing_elsewhere(release: Release) -> None:
    release.upgrade(namespaces=[release.namespace])
    user = f"system:serviceaccount:{release.namespace}:{_RELEASE}"

    def may_create_jobs(namespace: str) -> bool:
        return release.may(user, "create", "jobs", group="batch", namespace=namespace)

    assert _wait(lambda: may_create_jobs(release.namespace), what="the Role counts")
    assert not may_create_jobs("default")
    assert release.may(user, "create", "tokenreviews", group="authentication.k8s.io")
    assert not release.may(user, "get", "secrets", namespace=release.namespace)
    assert release.may(user, "list", "finetuneprofiles", group="finetune.dev")
    assert release.may(user, "watch", "finetuneprofiles", group="finetune.dev")
    assert not release.may(user, "patch", "finetuneprofiles", group="finetune.dev")


def test_network_policies_are_accepted(release: Release) -> None:
    release.upgrade(namespaces=[release.namespace], networkPolicy={"enabled": True})
    path = f"/apis/networking.k8s.io/v1/namespaces/{release.namespace}/networkpolicies"

    assert [_RELEASE, f"{_RELEASE}-trainers"] == sorted(each["metadata"]["name"] for each in release.api.get(path)["items"])


def test_users_who_may_edit_may_edit_finetunejobs(release: Release) -> None:
    release.upgrade()
    prefix = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{release.namespace}/rolebindings"
    for role in ("view", "edit"):
        reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role}
        subjects = [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": f"{role}er"}]
        release.api.create(prefix, {"metadata": {"name": role}, "roleRef": reference, "subjects": subjects})

    def may(user: str, verb: str) -> bool:
        return release.may(user, verb, "finetunejobs", group="finetune.dev", namespace=release.namespace)

    assert _wait(lambda: may("editer", "create") and may("viewer", "list"), what="the roles are aggregated")
    assert not may("viewer", "create")
    assert not may("stranger", "list")

"""What the operator may do, in the API server's own words, compared with a golden list."""

import secrets
import time
from collections.abc import Iterator
from typing import Any

import pytest

pytestmark = pytest.mark.apiserver

_RBAC = "/apis/rbac.authorization.k8s.io/v1"
_OWN = "finetune"
_USER = f"system:serviceaccount:{_OWN}:finetune-operator"
_REVIEW = "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews"


@pytest.fixture
def namespace(api: Any) -> Iterator[str]:
    name = f"rights-{secrets.token_hex(3)}"
    api.create("/api/v1/namespaces", {"metadata": {"name": name}})
    yield name
    api.delete(f"/api/v1/namespaces/{name}")


@pytest.mark.parametrize(
    ("name", "is_named", "place"),
    [
        pytest.param("rights-clusterwide.txt", False, "here", id="cluster-wide"),
        pytest.param("rights-namespaced.txt", True, "here", id="in a named namespace"),
        pytest.param("rights-elsewhere.txt", True, "default", id="elsewhere"),
        pytest.param("rights-own.txt", True, _OWN, id="in its own namespace"),
    ],
)
def test_rights_are_those_of_the_golden_list(
    api: Any, render: Any, golden: Any, namespace: str, name: str, *, is_named: bool, place: str
) -> None:
    values = {"namespaces": [namespace]} if is_named else {}
    place = namespace if place == "here" else place
    api.apply(f"/api/v1/namespaces/{_OWN}", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": _OWN}})
    plain = _list_rights(api, "default")
    paths = _apply_roles(api, render, values)
    try:
        rights = _wait_for(api, place, _expect(render, values, place))
    finally:
        for path in paths:
            api.request("DELETE", path)

    golden(name, "".join(f"{line}\n" for line in sorted(rights - plain)))


def _expect(render: Any, values: dict[str, Any], place: str) -> set[str]:
    bound = [role for role in render(values, kind="ClusterRole") if not role["metadata"]["name"].endswith(("-view", "-edit"))]
    here = [role for role in render(values, kind="Role") if role["metadata"]["namespace"] == place]
    return _spell([rule for role in (*bound, *here) for rule in role["rules"]])


def _apply_roles(api: Any, render: Any, values: dict[str, Any]) -> list[str]:
    paths = []
    for kind in ("ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding"):
        for document in render(values, kind=kind):
            place = f"/namespaces/{document['metadata']['namespace']}" if "namespace" in document["metadata"] else ""
            paths.append(f"{_RBAC}{place}/{kind.lower()}s/{document['metadata']['name']}")
            api.apply(paths[-1], document)
    return paths


def _wait_for(api: Any, namespace: str, expected: set[str]) -> set[str]:
    """Return the rights once the bindings count."""
    deadline = time.monotonic() + 120
    while not (rights := _list_rights(api, namespace)) >= expected:
        assert time.monotonic() < deadline, f"not granted: {expected - rights}"
        time.sleep(0.2)
    return rights


def _spell(rules: list[dict[str, Any]]) -> set[str]:
    """Return a line for each resource and verb."""
    return {
        f"{resource}.{group} {verb}".replace(". ", " ")
        for rule in rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def _list_rights(api: Any, namespace: str) -> set[str]:
    """Return what `kubectl auth can-i --list` shows."""
    review = {"spec": {"namespace": namespace}}
    return _spell(api.acting_as(_USER).create(_REVIEW, review)["status"]["resourceRules"])

"""Who may name which Secret in a FineTuneJob, by the chart's policy on a real API server."""

import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from finetune_api.crd import build_crd, build_profile_crd
from generate_admission import UnboundedReferenceError, list_secret_references

_RBAC = "/apis/rbac.authorization.k8s.io/v1"
_ADMISSION = "/apis/admissionregistration.k8s.io/v1"
_KINDS = {
    "ValidatingAdmissionPolicy": f"{_ADMISSION}/validatingadmissionpolicies",
    "ValidatingAdmissionPolicyBinding": f"{_ADMISSION}/validatingadmissionpolicybindings",
}
_TEXT = {"type": "string"}


def _read_schema(crd: dict[str, Any]) -> dict[str, Any]:
    return dict(crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"])


def test_every_field_that_names_a_secret_is_found() -> None:
    assert (("spec.checkpoint.secretRef", ("spec.checkpoint.uri",)),) == list_secret_references(_read_schema(build_crd()))
    assert () == list_secret_references(_read_schema(build_profile_crd()))


def test_a_field_of_a_new_kind_is_found_too() -> None:
    reference = {"type": "object", "properties": {"name": _TEXT}}
    spec = {"model": {"properties": {"uri": _TEXT, "secretRef": reference}}, "tokenSecretRef": reference}
    schema = {"properties": {"spec": {"properties": spec}}}

    assert (
        ("spec.model.secretRef", ("spec.model.uri",)),
        ("spec.tokenSecretRef", ()),
    ) == list_secret_references(schema)


def test_a_field_in_a_list_needs_a_rule_of_its_own() -> None:
    items = {"properties": {"secretRef": {"properties": {"name": _TEXT}}}}
    schema = {"properties": {"spec": {"properties": {"sources": {"items": items}}}}}

    with pytest.raises(UnboundedReferenceError, match=r"spec\.sources\.secretRef lies in a list"):
        list_secret_references(schema)


def test_the_policy_follows_the_namespaces(render: Any) -> None:
    def read(values: dict[str, Any]) -> Any:
        (policy,) = render(values, kind="ValidatingAdmissionPolicy")
        return policy["spec"]["matchConstraints"].get("namespaceSelector")

    expected = {"key": "kubernetes.io/metadata.name", "operator": "In", "values": ["team-a", "team-b"]}
    assert read({}) is None
    assert [expected] == read({"namespaces": ["team-a", "team-b"]})["matchExpressions"]


class Members:
    """A namespace with two people who may edit FineTuneJobs, of whom one may read the Secret `bucket`."""

    def __init__(self, api: Any) -> None:
        self.namespace = f"members-{secrets.token_hex(3)}"
        self.path = f"/apis/finetune.dev/v1alpha1/namespaces/{self.namespace}/finetunejobs"
        self._api = api
        api.create("/api/v1/namespaces", {"metadata": {"name": self.namespace}})
        edit = {"apiGroups": ["finetune.dev"], "resources": ["finetunejobs"], "verbs": ["get", "create", "update", "patch"]}
        read = {"apiGroups": [""], "resources": ["secrets"], "verbs": ["get"], "resourceNames": ["bucket"]}
        self._grant("reader", [edit, read])
        self._grant("stranger", [edit])

    def request(self, user: str, method: str, *, name: str = "emoji", **spec: Any) -> tuple[int, str]:
        """Create (POST) or change (PATCH) a FineTuneJob, and return status and message."""
        body: dict[str, Any] = {"spec": spec}
        if method == "POST":
            required = {
                "task": "image-classification",
                "dataset": {"uri": "pvc://datasets/emoji"},
                "output": {"uri": "pvc://models/emoji"},
            }
            body = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": name}}
            body |= {"spec": required | spec}
        path, media = self.path, "application/json"
        if method == "PATCH":
            path, media = f"{self.path}/{name}", "application/merge-patch+json"
        status, answer = self._api.acting_as(f"{user}-{self.namespace}").request(method, path, body, type=media)
        return int(status), str(answer.get("message", ""))

    def remove(self) -> None:
        for job in self._api.get(self.path)["items"]:
            self._api.delete(f"{self.path}/{job['metadata']['name']}")
        self._api.delete(f"/api/v1/namespaces/{self.namespace}")

    def _grant(self, user: str, rules: list[dict[str, Any]]) -> None:
        prefix = f"{_RBAC}/namespaces/{self.namespace}"
        reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": user}
        subject = {"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": f"{user}-{self.namespace}"}
        self._api.create(f"{prefix}/roles", {"metadata": {"name": user}, "rules": rules})
        self._api.create(f"{prefix}/rolebindings", {"metadata": {"name": user}, "roleRef": reference, "subjects": [subject]})


def _wait(check: Callable[[], bool], *, what: str) -> None:
    deadline = time.monotonic() + 120
    while not check():
        assert time.monotonic() < deadline, f"not seen within 120 s: {what}"
        time.sleep(0.1)


def _secret(name: str, uri: str = "s3://bucket/emoji") -> dict[str, Any]:
    return {"uri": uri, "secretRef": {"name": name}}


@pytest.fixture(scope="module")
def members(api: Any, render: Any) -> Iterator[Members]:
    """The policy in force in a namespace of this module alone."""
    members = Members(api)
    documents = [document for kind in _KINDS for document in render({"namespaces": [members.namespace]}, kind=kind)]
    paths = [f"{_KINDS[document['kind']]}/{document['metadata']['name']}" for document in documents]
    try:
        for path, document in zip(paths, documents, strict=True):
            api.apply(path, document)

        def is_in_force() -> bool:
            # Roles and policies reach the server that decides a little later.
            refused = members.request("stranger", "POST", name="probe", checkpoint=_secret("bucket"))
            allowed = members.request("reader", "POST", name=f"probe-{secrets.token_hex(3)}", checkpoint=_secret("bucket"))
            return (refused[0], allowed[0]) == (403, 201) and "secretRef" in refused[1]

        _wait(is_in_force, what="the policy refuses the stranger and allows the reader")
        yield members
    finally:
        for path in reversed(paths):
            api.request("DELETE", path)
        members.remove()


@pytest.mark.apiserver
def test_a_secret_that_one_may_not_read_is_refused_by_name(members: Members) -> None:
    status, message = members.request("stranger", "POST", name="mine", checkpoint=_secret("bucket"))

    assert 403 == status
    assert "spec.checkpoint.secretRef: you may not get the Secret bucket in the namespace " in message


@pytest.mark.apiserver
def test_a_right_on_one_secret_is_none_on_another(members: Members) -> None:
    assert 403 == members.request("reader", "POST", name="other", checkpoint=_secret("other"))[0]
    assert 201 == members.request("reader", "POST", name="mine", checkpoint=_secret("bucket"))[0]


@pytest.mark.apiserver
def test_a_job_without_a_secret_needs_no_right(members: Members) -> None:
    assert 201 == members.request("stranger", "POST", name="plain")[0]
    assert 201 == members.request("stranger", "POST", name="volume", checkpoint={"uri": "pvc://checkpoints/emoji"})[0]
    assert 200 == members.request("stranger", "PATCH", name="plain", suspend=True)[0]


@pytest.mark.apiserver
def test_updates_that_leave_the_secret_alone_are_let_through(members: Members) -> None:
    assert 201 == members.request("reader", "POST", name="shared", checkpoint=_secret("bucket"))[0]

    assert 200 == members.request("stranger", "PATCH", name="shared", suspend=True)[0]
    assert 200 == members.request("stranger", "PATCH", name="shared", checkpoint={"intervalSeconds": 30})[0]
    assert 200 == members.request("stranger", "PATCH", name="shared", checkpoint=None)[0]


@pytest.mark.apiserver
def test_updates_to_a_secret_or_to_its_use_are_refused(members: Members) -> None:
    assert 201 == members.request("stranger", "POST", name="later", checkpoint={"uri": "s3://bucket/emoji"})[0]
    assert 201 == members.request("reader", "POST", name="theirs", checkpoint=_secret("bucket"))[0]

    assert 403 == members.request("stranger", "PATCH", name="later", checkpoint=_secret("bucket"))[0]
    assert 403 == members.request("stranger", "PATCH", name="theirs", checkpoint=_secret("other"))[0]
    elsewhere = members.request("stranger", "PATCH", name="theirs", checkpoint={"uri": "s3://elsewhere/emoji"})
    assert 403 == elsewhere[0]
    assert "you may not get the Secret bucket" in elsewhere[1]
    assert 200 == members.request("reader", "PATCH", name="theirs", checkpoint={"uri": "s3://elsewhere/emoji"})[0]


@pytest.mark.apiserver
def test_the_policy_type_checks(members: Members, api: Any, render: Any) -> None:
    (policy,) = render({"namespaces": [members.namespace]}, kind="ValidatingAdmissionPolicy")
    path = f"{_KINDS['ValidatingAdmissionPolicy']}/{policy['metadata']['name']}"
    _wait(lambda: "typeChecking" in api.get(path).get("status", {}), what="the policy is type-checked")

    assert not api.get(path)["status"]["typeChecking"].get("expressionWarnings")

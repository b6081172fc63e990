"""Every reason why a job cannot begin, provoked on the real node: told at once, given up at the deadline, nothing left."""

import json
import subprocess
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import cluster_client
import pytest
from localcluster.oci import has_image, import_single_program

pytestmark = [pytest.mark.node, pytest.mark.slow]

_DEADLINE_SECONDS = 15
_POLICY = {"backoffLimit": 0, "startDeadlineSeconds": _DEADLINE_SECONDS}
_EXIT_IMAGE = "docker.io/library/finetune-exit"


@pytest.fixture(scope="session")
def hindered(team: Any, make_namespace: Any) -> Iterator[dict[str, Any]]:
    """Jobs that cannot begin, each in a namespace that hinders it, applied together."""
    crowded, guarded = make_namespace("crowded"), make_namespace("guarded")
    team.kubectl("apply", "-f", "-", stdin=json.dumps(_UNBOUND_CLAIM))
    crowded.kubectl("create", "quota", "small", "--hard=requests.cpu=100m,requests.memory=1Gi,limits.cpu=1,limits.memory=1Gi")
    cluster_client.kubectl("apply", "-f", "-", stdin=json.dumps(_GUARD))
    places = {
        "no-such-claim": (team, {"dataset": {"uri": "pvc://missing/pictures"}}),
        "unbound": (team, {"dataset": {"uri": "pvc://unbound/pictures"}}),
        "too-large": (team, {"resources": {"cpu": "64", "memory": "1Gi"}}),
        "no-secret": (team, {"checkpoint": {"uri": "s3://bucket/states", "secretRef": {"name": "missing-keys"}}}),
        "over-quota": (crowded, {}),
        "denied": (guarded, {}),
    }
    small = {"resources": {"cpu": "200m", "memory": "1Gi"}, "runPolicy": _POLICY}
    for name, (namespace, spec) in places.items():
        namespace.apply(name, **small | spec)
    yield {name: namespace for name, (namespace, _) in places.items()}
    cluster_client.kubectl("delete", "validatingadmissionpolicy,validatingadmissionpolicybinding", "guard")


@pytest.mark.parametrize(
    ("name", "reason", "words"),
    [
        pytest.param("no-such-claim", "ClaimNotFound", ("missing", "create it"), id="claim missing"),
        pytest.param("unbound", "ClaimNotBound", ("unbound", "storage class"), id="claim unbound"),
        pytest.param("too-large", "InsufficientResources", ("cpu", "spec.resources"), id="no node is large enough"),
        pytest.param("no-secret", "SecretNotFound", ("missing-keys", "secretRef"), id="secret missing"),
        pytest.param("over-quota", "QuotaExceeded", ("small", "requests.cpu"), id="quota exceeded"),
        pytest.param("denied", "AdmissionDenied", ("guard", "no trainers here"), id="admission refused"),
    ],
)
def test_a_hindrance_is_named_and_given_up_at_the_deadline(
    hindered: dict[str, Any], until: Any, name: str, reason: str, words: tuple[str, ...]
) -> None:
    check_hindrance(hindered[name], name, reason=reason, words=words, until=until)


def check_hindrance(namespace: Any, name: str, *, reason: str, words: tuple[str, ...], until: Any) -> None:
    """Check the diagnosis of a job that cannot begin, from its events while it waited to what its end left."""
    namespace.wait(name, "Failed", timeout_seconds=60)
    job = namespace.job(name)
    failure, failed = job["status"]["failure"], namespace.condition(name, "Failed")

    assert (reason, "StartDeadlineExceeded") == (failure["reason"], failed["reason"])
    assert all(word in failure["message"] for word in words), failure["message"]
    assert f"startDeadlineSeconds {_DEADLINE_SECONDS}" in failed["message"]
    times = (job["metadata"]["creationTimestamp"], job["status"]["completionTime"])
    created, ended = (datetime.fromisoformat(text) for text in times)
    assert (ended - created).total_seconds() <= _DEADLINE_SECONDS + 5
    until(lambda: not namespace.get("jobs,pods", "-l", f"finetune.dev/job={name}")["items"], what="nothing is left")
    told = {each["reason"] for each in namespace.get("events.events.k8s.io")["items"] if each["regarding"]["name"] == name}
    assert reason in told


@pytest.mark.parametrize(
    ("name", "image", "reason"),
    [
        pytest.param("no-image", ("finetune-trainer", "missing"), "ImagePullBackOff", id="image cannot be pulled"),
        pytest.param("bad-image", ("Not/A/Name", "1"), "InvalidImageName", id="no name of an image"),
    ],
)
def test_an_image_that_cannot_be_had_is_named(team: Any, until: Any, name: str, image: tuple[str, str], reason: str) -> None:
    repository, tag = image
    cluster_client.install_operator("retries.baseSeconds=2", f"trainer.image.repository={repository}", f"trainer.image.tag={tag}")
    try:
        team.apply(name, runPolicy=_POLICY)

        check_hindrance(team, name, reason=reason, words=(f"{repository}:{tag}",), until=until)
    finally:
        cluster_client.install_operator("retries.baseSeconds=2")


@pytest.fixture(scope="module")
def ended(team: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Jobs named exit-CODE whose container ends with that code, run to their end."""
    if not has_image(f"{_EXIT_IMAGE}:1"):
        program = tmp_path_factory.mktemp("exit") / "exit"
        subprocess.run(["gcc", "-static", "-Os", "-s", "-o", program, Path(__file__).with_name("exit.c")], check=True)
        import_single_program(program, reference=f"{_EXIT_IMAGE}:1")
    cluster_client.install_operator("retries.baseSeconds=1", f"trainer.image.repository={_EXIT_IMAGE}", "trainer.image.tag=1")
    rules = [{"name": "give-up", "onExitCodes": [3], "action": "Fail"}]
    for code in (0, 1, 3, 64, 65, 70, 75, 78, 137, 143):
        policy = {"backoffLimit": 1, "failureRules": rules}
        small = {"cpu": "50m", "memory": "64Mi"}
        team.apply(f"exit-{code}", hyperparameters={"seed": code}, runPolicy=policy, resources=small)
    yield team
    cluster_client.install_operator("retries.baseSeconds=2")


@pytest.mark.parametrize(
    ("code", "reason", "failed", "restarts"),
    [
        pytest.param(0, "ResultMissing", "BackoffLimitExceeded", 1, id="success without a model"),
        pytest.param(1, "TrainerError", "BackoffLimitExceeded", 1, id="crash"),
        pytest.param(3, "TrainerError", "TrainerError", 0, id="a rule of the user's"),
        pytest.param(64, "InvalidSpec", "InvalidSpec", 0, id="invalid spec"),
        pytest.param(65, "InvalidData", "InvalidData", 0, id="invalid data"),
        pytest.param(70, "Diverged", "BackoffLimitExceeded", 1, id="diverged"),
        pytest.param(75, "Interrupted", "BackoffLimitExceeded", 1, id="interrupted though nobody deleted the pod"),
        pytest.param(78, "ModelNotFound", "ModelNotFound", 0, id="model missing"),
        pytest.param(137, "Killed", "BackoffLimitExceeded", 1, id="killed"),
        pytest.param(143, "Interrupted", "BackoffLimitExceeded", 1, id="terminated"),
    ],
)
def test_an_exit_code_leads_to_its_row_of_the_table(ended: Any, code: int, reason: str, failed: str, restarts: int) -> None:
    name = f"exit-{code}"
    ended.wait(name, "Failed", timeout_seconds=90)

    status = ended.job(name)["status"]
    failure = status["failure"]
    assert (reason, failed) == (failure["reason"], ended.condition(name, "Failed")["reason"])
    assert (code, "trainer") == (failure["exitCode"], failure["container"])
    assert (restarts, restarts) == (status["restarts"], status["restartsCountedTowardsLimit"])
    assert failure["pod"] in failure["message"]
    if code:
        assert f"ending with {code}" in failure["logTail"]


_UNBOUND_CLAIM = {
    "apiVersion": "v1",
    "kind": "PersistentVolumeClaim",
    "metadata": {"name": "unbound"},
    "spec": {"storageClassName": "none", "accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}},
}
_GUARD = {
    "apiVersion": "v1",
    "kind": "List",
    "items": [
        {
            "apiVersion": "admissionregistration.k8s.io/v1",
            "kind": "ValidatingAdmissionPolicy",
            "metadata": {"name": "guard"},
            "spec": {
                "matchConstraints": {
                    "resourceRules": [{"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}]
                },
                "validations": [{"expression": "false", "message": "no trainers here"}],
            },
        },
        {
            "apiVersion": "admissionregistration.k8s.io/v1",
            "kind": "ValidatingAdmissionPolicyBinding",
            "metadata": {"name": "guard"},
            "spec": {
                "policyName": "guard",
                "validationActions": ["Deny"],
                "matchResources": {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "guarded"}}},
            },
        },
    ],
}

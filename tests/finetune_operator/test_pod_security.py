"""Whatever a FineTuneJob says, its pods are admitted under Pod Security restricted, by a real API server."""

import random
from collections.abc import Iterator
from typing import Any

import pytest
from accelerators import CLASSES
from finetune_api.profile import FineTuneProfileSpec
from finetune_api.v1alpha1 import FineTuneJobSpec
from finetune_operator.manifests.job import build_job
from finetune_operator.manifests.profile import add_profile
from finetune_operator.policies.accelerator import shape_pods
from finetune_operator.settings import TrainerSettings
from finetune_operator.snapshot import Snapshot
from generator import generate_spec
from harness import Team
from pydantic import ValidationError
from world import build_view

pytestmark = pytest.mark.apiserver

_JOBS = 300
_SEED = 20
_SETTINGS = TrainerSettings(
    image="trainer:1", report_url="https://operator.finetune.svc:10443", report_ca="-- CA --\n", accelerators=CLASSES
)
_PROFILE = FineTuneProfileSpec.model_validate(
    {
        "image": "team:1",
        "nodeSelector": {"pool": "a"},
        "tolerations": [{"key": "team", "operator": "Exists"}, {"operator": "Exists", "effect": "NoSchedule"}],
        "volumes": [
            {"name": "shared", "mountPath": "/mnt/shared", "claimName": "shared", "readOnly": False},
            {"name": "config", "mountPath": "/etc/team", "configMapName": "team"},
        ],
        "environment": [{"name": "HTTP_PROXY", "value": "http://proxy.test:3128"}],
    }
)


@pytest.fixture
def restricted(team: Team, until: Any) -> Team:
    """A namespace that enforces the level restricted."""
    labels = {"pod-security.kubernetes.io/enforce": "restricted", "pod-security.kubernetes.io/enforce-version": "latest"}
    team.api.patch(f"/api/v1/namespaces/{team.namespace}", {"metadata": {"labels": labels}})
    until(lambda: team.api.exists(team.path("serviceaccounts", "default")), what="pods can be created")
    until(lambda: "restricted" in _try_pod(team, {"hostNetwork": True})[1], what="the level is enforced")
    return team


def test_every_job_that_the_crd_accepts_has_pods_under_restricted(restricted: Team) -> None:
    refused = []
    for number, spec in enumerate(_generate_jobs(restricted)):
        job = _build(spec, restricted.namespace, profile=_PROFILE if number % 2 else None)
        status, message = _try_pod(restricted, **job["spec"]["template"])
        if status != 201:
            refused.append((spec, message))
        if number == _JOBS - 1:
            break

    assert _JOBS == number + 1
    assert [] == refused


def _generate_jobs(team: Team) -> Iterator[dict[str, Any]]:
    """Yield specs that the CRD accepts."""
    choices = random.Random(_SEED)
    for _ in range(20 * _JOBS):
        spec = generate_spec(choices)
        try:
            FineTuneJobSpec.model_validate(spec)
        except ValidationError:
            continue
        job = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "emoji"}, "spec": spec}
        status, answer = team.api.request("POST", team.path("finetunejobs") + "?dryRun=All", job)
        if status == 201:
            yield answer["spec"]


def _build(raw: dict[str, Any], namespace: str, *, profile: FineTuneProfileSpec | None) -> dict[str, Any]:
    spec = FineTuneJobSpec.model_validate(raw)
    shape = shape_pods(spec, _SETTINGS.accelerators)
    job = build_job(build_view(namespace=namespace), spec, attempt=1, shape=shape, micro_batch_divisor=1, settings=_SETTINGS)
    return add_profile(job, profile, snapshot=Snapshot())


def _try_pod(team: Team, spec: dict[str, Any], metadata: dict[str, Any] | None = None) -> tuple[int, str]:
    """Create a pod as the Job controller does, without keeping it."""
    container = {"containers": [{"name": "trainer", "image": "trainer:1"}]}
    body = {"metadata": {"generateName": "emoji-", **(metadata or {})}, "spec": container | spec}
    status, answer = team.api.request("POST", team.path("pods") + "?dryRun=All", body)
    return int(status), str(answer.get("message", ""))

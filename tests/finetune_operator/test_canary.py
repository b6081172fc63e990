"""The value of a Secret that a FineTuneJob names shows nowhere but in the Secret."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import Operator, Team, build_operator, grant_rights, wait_until, write_kubeconfig

pytestmark = pytest.mark.apiserver

_CANARY = "canary-b4e1d7"


@pytest.fixture
def talkative_operator(team: Team, tls: tuple[Path, Path], tmp_path: Path) -> Iterator[Operator]:
    """An operator that logs all that it can."""
    grant_rights(team)
    write_kubeconfig(team, tmp_path / "kubeconfig")
    operator = build_operator(team, tls=tls, folder=tmp_path, log_level="DEBUG")
    yield operator.start()
    operator.stop()


def test_a_secret_shows_nowhere(team: Team, talkative_operator: Operator, requests: Any) -> None:
    secret = {"metadata": {"name": "keys"}, "stringData": {"AWS_SECRET_ACCESS_KEY": _CANARY}}
    team.api.create(team.path("secrets"), secret)
    team.apply(checkpoint={"uri": "s3://bucket/emoji", "secretRef": {"name": "keys"}}, runPolicy={"backoffLimit": 0})
    pod = team.wait_for_pod()
    team.run_pod(pod)
    team.wait("Running")
    report = {"trainerStatus": {}, "failure": {"reason": "StorageError", "message": "the store refuses [redacted]"}}
    team.end_pod(pod, 1, message=json.dumps(report))
    team.wait("Failed")
    wait_until(lambda: ("Warning", "Failed") in team.events(), what="the event")
    metrics = talkative_operator.scrape()
    talkative_operator.stop()
    objects = [team.api.get(team.path(plural)) for plural in ("finetunejobs", "jobs", "pods", "events", "configmaps", "services")]
    user = f"system:serviceaccount:{team.namespace}:operator"
    asked = {each["objectRef"]["resource"] for each in requests() if each["user"]["username"] == user and "objectRef" in each}

    assert {"secretRef": {"name": "keys"}} in pod["spec"]["containers"][0]["envFrom"]
    assert [] == [each["kind"] for each in objects if _CANARY in json.dumps(each)]
    assert _CANARY not in talkative_operator.log + metrics
    assert "jobs" in asked
    assert "secrets" not in asked

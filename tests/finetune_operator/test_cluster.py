"""Requests to a real API server: what server-side apply owns, what preconditions protect, how errors come back."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from finetune_api.conditions import set_condition
from finetune_api.v1alpha1 import FineTuneJobStatus
from finetune_operator.cluster import Cluster
from finetune_operator.errors import ConflictError, NotFoundError, RefusedError
from finetune_operator.manifests.job import build_job
from finetune_operator.manifests.service import build_service
from finetune_operator.metrics import Metrics
from finetune_operator.observed import JobView
from finetune_operator.outcome import Deletion, EventNote, EventType
from finetune_operator.policies.accelerator import shape_pods
from finetune_operator.recorder import Recorder
from finetune_operator.settings import TrainerSettings
from finetune_operator.transport import ClientSettings, Transport
from finetune_operator.views import Kind, build_job_view, project_job

pytestmark = pytest.mark.apiserver

_SETTINGS = TrainerSettings(image="trainer:1", report_url="https://operator:10443", report_ca="ca")
_NOW = datetime(2026, 1, 1, tzinfo=UTC)

Connect = Callable[[], AbstractAsyncContextManager[Cluster]]


@pytest.fixture
def connect(control_plane: Path, monkeypatch: pytest.MonkeyPatch) -> Connect:
    """Connect as the administrator."""
    monkeypatch.setattr("kubernetes.aio.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(control_plane))

    @asynccontextmanager
    async def open_cluster() -> AsyncIterator[Cluster]:
        settings = ClientSettings(requests_per_second=500, burst=500, connections=8)
        cluster = Cluster(await Transport.connect(settings, metrics=Metrics()))
        try:
            yield cluster
        finally:
            await cluster.close()

    return open_cluster


def _view(team: Any) -> JobView:
    return build_job_view(project_job(team.job()))


def _status(reason: str, **fields: Any) -> FineTuneJobStatus:
    conditions = set_condition((), "Ready", status=False, reason=reason, message="m", generation=1, now=_NOW)
    return FineTuneJobStatus(conditions=conditions, **fields)


def _owned(raw: dict[str, Any], manager: str) -> dict[str, Any]:
    return next(each["fieldsV1"] for each in raw["metadata"]["managedFields"] if each["manager"] == manager)


async def test_status_is_owned_by_a_manager_of_its_own(team: Any, connect: Connect) -> None:
    team.apply()
    async with connect() as cluster:
        await cluster.apply_status(_view(team), _status("Pending", run="0a1b2c3d"))

    fields = _owned(team.job(), "finetune-operator-status")
    assert list(fields) == ["f:status"]
    assert 'k:{"type":"Ready"}' in fields["f:status"]["f:conditions"]


async def test_status_field_that_is_left_out_is_removed(team: Any, connect: Connect) -> None:
    team.apply()
    async with connect() as cluster:
        await cluster.apply_status(_view(team), _status("Pending", run="0a1b2c3d", completion_time=_NOW))
        await cluster.apply_status(_view(team), _status("Running"))

    assert team.state() == "Running"
    assert {"run", "completionTime"}.isdisjoint(team.status())


async def test_condition_of_another_manager_is_left_alone(team: Any, connect: Connect) -> None:
    team.apply()
    body = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "status": {"conditions": [{"type": "Audited", "status": "True", "reason": "Ok", "message": "", "observedGeneration": 1,
                                   "lastTransitionTime": "2026-01-01T00:00:00Z"}]},
    }  # fmt: skip
    team.api.apply(team.path("finetunejobs", "emoji") + "/status", body, manager="auditor")
    async with connect() as cluster:
        await cluster.apply_status(_view(team), _status("Running"))

    assert team.condition("Audited")["status"] == "True"


async def test_equal_status_again_does_not_change_the_object(team: Any, connect: Connect) -> None:
    team.apply()
    async with connect() as cluster:
        first = await cluster.apply_status(_view(team), _status("Running"))
        second = await cluster.apply_status(_view(team), _status("Running"))

    assert first["metadata"]["resourceVersion"] == second["metadata"]["resourceVersion"]


async def test_status_for_a_predecessor_does_not_reach_its_successor(team: Any, connect: Connect) -> None:
    team.apply()
    old = _view(team)
    team.api.delete(team.path("finetunejobs", "emoji"))
    async with connect() as cluster:
        with pytest.raises((ConflictError, NotFoundError)):
            await cluster.apply_status(old, _status("Running"))
        team.apply()
        with pytest.raises(ConflictError):
            await cluster.apply_status(old, _status("Running"))

    status = team.status()
    assert (status["observedGeneration"], status["conditions"]) == (-1, [])


async def test_child_that_another_manager_has_changed_is_left_as_it_is(team: Any, connect: Connect) -> None:
    team.apply()
    view = _view(team)
    assert view.spec is not None
    manifest = build_job(view, view.spec, attempt=1, shape=shape_pods(view.spec, {}), settings=_SETTINGS)
    path = team.path("jobs", manifest["metadata"]["name"])
    async with connect() as cluster:
        first = await cluster.apply_child(manifest)
        again = await cluster.apply_child(manifest)
        team.api.patch(path, {"spec": {"suspend": True}})
        with pytest.raises(ConflictError, match=r"conflict with .*\.spec\.suspend"):
            await cluster.apply_child(manifest | {"spec": manifest["spec"] | {"suspend": False}})

    child = team.api.get(path)
    assert first["metadata"]["uid"] == again["metadata"]["uid"]
    assert first["spec"] == again["spec"]
    assert child["spec"]["suspend"] is True
    assert "f:spec" in _owned(child, "finetune-operator")
    assert child["metadata"]["ownerReferences"][0]["controller"] is True


async def test_service_is_applied_as_well(team: Any, connect: Connect) -> None:
    team.apply()
    manifest = build_service(_view(team))
    async with connect() as cluster:
        await cluster.apply_child(manifest)
        team.api.patch(
            team.path("services", manifest["metadata"]["name"]), {"spec": {"selector": {"finetune.dev/job-uid": "other"}}}
        )
        with pytest.raises(ConflictError, match="conflict with"):
            await cluster.apply_child(manifest)

    assert "None" == team.api.get(team.path("services", manifest["metadata"]["name"]))["spec"]["clusterIP"]


@pytest.mark.parametrize("field", ["uid", "resource_version"])
async def test_child_that_changed_is_not_deleted(team: Any, connect: Connect, field: str) -> None:
    team.apply()
    view = _view(team)
    assert view.spec is not None
    async with connect() as cluster:
        child = await cluster.apply_child(
            build_job(view, view.spec, attempt=1, shape=shape_pods(view.spec, {}), settings=_SETTINGS)
        )
        metadata = child["metadata"]
        seen = {"uid": metadata["uid"], "resource_version": metadata["resourceVersion"]}
        seen |= {field: "1" if field == "resource_version" else "00000000-0000-0000-0000-000000000000"}
        with pytest.raises(ConflictError):
            await cluster.delete_child(team.namespace, Deletion(name=metadata["name"], **seen))

    assert team.api.exists(team.path("jobs", metadata["name"]))


async def test_absent_child_is_not_found(team: Any, connect: Connect) -> None:
    async with connect() as cluster:
        with pytest.raises(NotFoundError):
            await cluster.get(Kind.JOB, (team.namespace, "absent"))
        with pytest.raises(NotFoundError):
            await cluster.delete_child(team.namespace, Deletion(name="absent", uid="1", resource_version="1"))


async def test_invalid_child_is_refused_with_the_servers_words(team: Any, connect: Connect) -> None:
    team.apply()
    view = _view(team)
    assert view.spec is not None
    manifest = build_job(view, view.spec, attempt=1, shape=shape_pods(view.spec, {}), settings=_SETTINGS)
    manifest["spec"]["parallelism"] = -1
    async with connect() as cluster:
        with pytest.raises(RefusedError, match=r"spec\.parallelism") as caught:
            await cluster.apply_child(manifest)

    assert caught.value.status == 422


async def test_listing_shows_ours_alone(team: Any, connect: Connect) -> None:
    team.apply()
    view = _view(team)
    assert view.spec is not None
    async with connect() as cluster:
        child = await cluster.apply_child(
            build_job(view, view.spec, attempt=1, shape=shape_pods(view.spec, {}), settings=_SETTINGS)
        )
        stranger = {"name": "trainer", "image": "i"}
        pod = {"metadata": {"name": "stranger"}, "spec": {"containers": [stranger]}}
        team.api.create(team.path("pods"), pod)
        team.apply_profile()
        scopes = {kind: kind.list_scopes((team.namespace,))[0] for kind in Kind}
        listings = {kind: await cluster.list_versions(kind, namespace=scope) for kind, scope in scopes.items()}

    assert set(listings[Kind.FINETUNEJOB].objects) == {view.uid}
    assert listings[Kind.JOB].objects[child["metadata"]["uid"]][0] == (team.namespace, child["metadata"]["name"])
    assert "stranger" not in {key[1] for key, _ in listings[Kind.POD].objects.values()}
    assert ("", team.namespace) in {key for key, _ in listings[Kind.FINETUNEPROFILE].objects.values()}


async def test_token_names_its_pod(team: Any, connect: Connect) -> None:
    pod = {"metadata": {"name": "some"}, "spec": {"containers": [{"name": "trainer", "image": "i"}]}}
    created = team.api.create(team.path("pods"), pod)
    async with connect() as cluster:
        reviewed = await cluster.review_token(team.create_token(created))
        other_audience = await cluster.review_token(team.create_token(created, audience="https://elsewhere"))

    assert reviewed is not None
    assert (reviewed.pod, reviewed.pod_uid) == ("some", created["metadata"]["uid"])
    assert reviewed.username == f"system:serviceaccount:{team.namespace}:default"
    assert other_audience is None


async def test_repeated_event_is_one_object(team: Any, connect: Connect) -> None:
    team.apply()
    note = EventNote(type=EventType.WARNING, reason="AttemptFailed", action="Retry", message="again")
    async with connect() as cluster:
        recorder = Recorder(cluster, instance="test", clock=lambda: datetime.now(UTC), metrics=Metrics())
        for _ in range(3):
            await recorder.write(_view(team), note)

    (event,) = team.api.get(team.path("events"))["items"]
    assert (event["reason"], event["series"]["count"]) == ("AttemptFailed", 3)
    assert event["regarding"]["uid"] == team.job()["metadata"]["uid"]

"""Projections of objects as the API server sends them."""

from datetime import UTC, datetime
from typing import Any

import pytest
from finetune_operator.observed import ChildState, ChildView, PodView
from finetune_operator.views import (
    build_job_view,
    is_unanswered,
    project_child,
    project_job,
    project_pod,
    project_profile,
)

_TIME = datetime(2026, 1, 1, 0, 5, tzinfo=UTC)


def _condition(type: str, status: str = "True", **fields: str) -> dict[str, str]:
    return {"type": type, "status": status, "lastTransitionTime": "2026-01-01T00:05:00Z"} | fields


def _container(**state: Any) -> dict[str, Any]:
    sidecar = {"name": "istio-proxy", "state": {"terminated": {"exitCode": 9, "reason": "Error"}}}
    return {"phase": "Running", "containerStatuses": [sidecar, {"name": "trainer", "state": state}]}


def test_job_keeps_its_spec_and_status(objects: Any) -> None:
    status = {
        "run": "0a1b2c3d",
        "attempt": 2,
        "conditions": [_condition("Ready", "False", reason="Running", message="m") | {"observedGeneration": 3}],
    }
    record = project_job(objects.job(version=42, generation=3, status=status))
    view = build_job_view(record)

    assert record.content.state == "Running"
    assert (view.key, view.uid, view.generation, view.resource_version) == (("team", "emoji"), "uid-team-emoji", 3, "42")
    assert view.spec is not None
    assert view.spec.dataset.uri == "pvc://datasets/emoji"
    assert (view.status.run, view.status.attempt) == ("0a1b2c3d", 2)


@pytest.mark.parametrize(
    ("generation", "status", "expected"),
    [
        pytest.param(1, None, True, id="created"),
        pytest.param(2, {"observedGeneration": 1}, True, id="changed"),
        pytest.param(2, {"observedGeneration": 2}, False, id="answered"),
    ],
)
def test_change_of_the_user_is_told_from_our_own(
    objects: Any, *, generation: int, status: dict[str, Any] | None, expected: bool
) -> None:
    assert is_unanswered(objects.job(generation=generation, status=status)) is expected


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        pytest.param("2026-01-01T00:05:00Z", _TIME, id="shown"),
        pytest.param(None, None, id="none"),
        pytest.param("soon", None, id="no time"),
        pytest.param("2026-01-01T00:05:00", None, id="no zone"),
        pytest.param(7, None, id="no text"),
    ],
)
def test_job_knows_when_its_progress_was_received(objects: Any, *, time: Any, expected: datetime | None) -> None:
    record = project_job(objects.job(status={"trainerStatus": {"lastUpdatedTime": time}}))

    assert record.content.progress_at == expected


def test_job_without_status_has_an_empty_one(objects: Any) -> None:
    view = build_job_view(project_job(objects.job()))

    assert (view.status.run, view.status.conditions, view.deleting) == (None, (), False)


@pytest.mark.parametrize("spec", ["text", ["text"], 7, {"profileRef": "team"}, {"profileRef": {"name": ["team"]}}, {}])
def test_job_whose_spec_fits_no_schema_is_seen_with_an_error(objects: Any, spec: Any) -> None:
    record = project_job(objects.job() | {"spec": spec})
    view = build_job_view(record)

    assert (None, None) == (record.content.profile, view.spec)
    assert "spec" in (view.spec_error or "")


@pytest.mark.parametrize(
    "status",
    [
        "Complete",
        ["Complete"],
        {"conditions": "Ready"},
        {"conditions": ["Ready"]},
        {"conditions": [{"type": "Ready", "reason": []}]},
    ],
)
def test_job_whose_status_fits_no_schema_counts_as_one_without(objects: Any, status: Any) -> None:
    raw = objects.job() | {"status": status}
    record = project_job(raw)

    assert is_unanswered(raw)
    assert ("", None) == (record.content.state, build_job_view(record).status.run)


def test_profile_whose_spec_fits_no_schema_is_seen_with_an_error(objects: Any) -> None:
    profile = project_profile(objects.profile() | {"spec": "text"}).content

    assert (False, None) == (profile.is_default, profile.spec)
    assert "spec" in (profile.spec_error or "")


def test_job_under_deletion_is_seen_as_such(objects: Any) -> None:
    assert build_job_view(project_job(objects.job(deletionTimestamp="2026-01-01T00:00:00Z"))).deleting


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        pytest.param({}, "spec.task: Field required", id="empty"),
        pytest.param({"task": "poetry"}, "spec.task: Input should be 'image-classification'", id="value of a later version"),
    ],
)
def test_spec_that_cannot_be_parsed_is_explained(objects: Any, spec: dict[str, Any], problem: str) -> None:
    view = build_job_view(project_job(objects.job(spec=spec)))

    assert view.spec is None
    assert problem in str(view.spec_error)


def test_status_that_cannot_be_parsed_counts_as_none(objects: Any) -> None:
    assert build_job_view(project_job(objects.job(status={"attempt": "many"}))).status.attempt == 0


@pytest.mark.parametrize(
    ("status", "state", "reason"),
    [
        pytest.param({}, ChildState.ACTIVE, "", id="fresh"),
        pytest.param({"active": 1, "conditions": [_condition("Suspended", "False")]}, ChildState.ACTIVE, "", id="resumed"),
        pytest.param(
            {"conditions": [_condition("FailureTarget", reason="BackoffLimitExceeded")]},
            ChildState.ACTIVE,
            "",
            id="pods still stop",
        ),
        pytest.param(
            {"conditions": [_condition("FailureTarget"), _condition("Failed", reason="BackoffLimitExceeded")]},
            ChildState.FAILED,
            "BackoffLimitExceeded",
            id="failed",
        ),
        pytest.param(
            {"conditions": [_condition("Complete", reason="CompletionsReached")], "completionTime": "2026-01-01T00:05:00Z"},
            ChildState.COMPLETE,
            "CompletionsReached",
            id="complete",
        ),
    ],
)
def test_state_of_a_child_is_that_of_its_conditions(objects: Any, status: dict[str, Any], state: ChildState, reason: str) -> None:
    child = _project_child(objects.child(status=status))

    assert (child.state, child.reason) == (state, reason)
    assert child.finished_at == (None if state is ChildState.ACTIVE else _TIME)


def test_child_keeps_its_labels(objects: Any) -> None:
    record = project_child(objects.child(attempt=3))

    assert record is not None
    assert (record.owner, record.owner_uid) == (("team", "emoji"), "uid-team-emoji")
    assert (record.content.run, record.content.attempt, record.content.pod_shape) == ("0a1b2c3d", 3, "5e6f7a8b")


def test_objects_without_our_labels_are_no_concern(objects: Any) -> None:
    assert project_child(objects.child(labels={})) is None
    assert project_pod(objects.pod(labels={})) is None


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        pytest.param(
            {
                "phase": "Pending",
                "conditions": [_condition("PodScheduled", "False", reason="Unschedulable", message="0/3 nodes")],
            },
            {"scheduled": False, "unscheduled_reason": "Unschedulable", "unscheduled_message": "0/3 nodes", "started_at": None},
            id="no node fits",
        ),
        pytest.param(
            {"phase": "Pending", "conditions": [_condition("PodScheduled")]},
            {"scheduled": True, "unscheduled_reason": None},
            id="scheduled",
        ),
        pytest.param(
            _container(waiting={"reason": "ImagePullBackOff", "message": "back-off"}),
            {"waiting_reason": "ImagePullBackOff", "waiting_message": "back-off", "exit_code": None},
            id="image cannot be pulled",
        ),
        pytest.param(
            _container(running={"startedAt": "2026-01-01T00:05:00Z"}),
            {"started_at": _TIME, "finished_at": None, "exit_code": None},
            id="running",
        ),
        pytest.param(
            _container(
                terminated={
                    "exitCode": 137,
                    "reason": "OOMKilled",
                    "message": "the end of the log",
                    "startedAt": "2026-01-01T00:05:00Z",
                    "finishedAt": "2026-01-01T00:05:00Z",
                }
            ),
            {
                "started_at": _TIME,
                "finished_at": _TIME,
                "exit_code": 137,
                "termination_reason": "OOMKilled",
                "termination_message": "the end of the log",
            },
            id="out of memory",
        ),
        pytest.param(
            _container(
                terminated={
                    "exitCode": 128,
                    "reason": "StartError",
                    "startedAt": "1970-01-01T00:00:00Z",
                    "finishedAt": "2026-01-01T00:05:00Z",
                }
            ),
            {"started_at": None, "finished_at": _TIME, "exit_code": 128},
            id="never started",
        ),
        pytest.param(
            {"phase": "Failed", "reason": "Evicted", "message": "low on memory"},
            {"phase": "Failed", "pod_reason": "Evicted", "pod_message": "low on memory", "exit_code": None},
            id="evicted",
        ),
    ],
)
def test_pod_shows_what_the_kubelet_tells_of_the_trainer(objects: Any, status: dict[str, Any], expected: dict[str, Any]) -> None:
    pod = _project_pod(objects.pod(status=status))

    assert {name: getattr(pod, name) for name in expected} == expected
    assert (pod.child, pod.image, pod.node) == ("emoji-0a1b2c3d-1", "trainer:1", "node-1")


def _project_child(raw: dict[str, Any]) -> ChildView:
    record = project_child(raw)
    assert record is not None
    return record.content


def _project_pod(raw: dict[str, Any]) -> PodView:
    record = project_pod(raw)
    assert record is not None
    return record.content


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        pytest.param({"status": "True", "reason": "EvictionByEvictionAPI"}, "EvictionByEvictionAPI", id="evicted"),
        pytest.param({"status": "True"}, "DisruptionTarget", id="without a reason"),
        pytest.param({"status": "False", "reason": "EvictionByEvictionAPI"}, None, id="called off"),
    ],
)
def test_disruption_of_a_pod_is_its_condition(objects: Any, condition: dict[str, str], expected: str | None) -> None:
    record = project_pod(objects.pod(status={"conditions": [{"type": "DisruptionTarget"} | condition]}))

    assert record is not None
    assert expected == record.content.disruption_reason


def test_pod_knows_its_attempt_its_index_and_when_it_must_have_stopped(objects: Any) -> None:
    deletion = {"deletionTimestamp": "2026-01-01T00:00:30Z", "deletionGracePeriodSeconds": 20}
    pod = _project_pod(objects.pod(child="emoji-0a1b2c3d-3", index=2, **deletion))

    assert ("0a1b2c3d", 3, 2) == (pod.run, pod.attempt, pod.index)
    assert datetime(2026, 1, 1, 0, 0, 30, tzinfo=UTC) == pod.deletion_due
    assert datetime(2026, 1, 1, 0, 0, 10, tzinfo=UTC) == pod.deleted_at


def test_child_knows_its_number_of_pods(objects: Any) -> None:
    raw = objects.child()

    assert 1 == _project_child(raw).nodes
    assert 4 == _project_child(raw | {"spec": {"completions": 4}}).nodes


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        pytest.param({"completions": 2, "parallelism": 2}, False, id="as it was created"),
        pytest.param({"completions": 3, "parallelism": 3}, True, id="more"),
        pytest.param({"completions": 1, "parallelism": 1}, True, id="fewer"),
        pytest.param({"completions": 2, "parallelism": 0}, True, id="not all at once"),
    ],
)
def test_child_knows_whether_somebody_changed_its_number_of_pods(objects: Any, *, spec: dict[str, Any], expected: bool) -> None:
    variable = {"name": "FINETUNE_TRAINER_CONFIG", "value": '{"world":{"nodes":2}}'}
    template = {"spec": {"containers": [{"name": "trainer", "env": [variable]}]}}
    child = _project_child(objects.child() | {"spec": spec | {"template": template}})

    assert (2, expected) == (child.nodes, child.is_resized)


def test_child_knows_whether_it_goes_with_its_job(objects: Any) -> None:
    assert _project_child(objects.child()).is_owned
    assert not _project_child(objects.child(ownerReferences=[{"kind": "FineTuneJob", "uid": "another"}])).is_owned


@pytest.mark.parametrize(
    ("reason", "expected"),
    [("OutOfnvidia.com/gpu", "OutOfnvidiacomgpu"), ("Evicted", "Evicted"), ("", None), ("-", None), (None, None)],
)
def test_reason_of_a_pod_can_be_that_of_a_condition(objects: Any, reason: str | None, expected: str | None) -> None:
    record = project_pod(objects.pod(status={"phase": "Failed", "reason": reason}))

    assert record is not None
    assert expected == record.content.pod_reason


_KUEUE = "kueue.x-k8s.io"


def test_job_knows_its_queue_and_nothing_else_of_its_metadata(objects: Any) -> None:
    labels = {f"{_KUEUE}/queue-name": "a", f"{_KUEUE}/priority-class": "high", "team": "x"}
    topology = {f"{_KUEUE}/podset-preferred-topology": "rack"}
    raw = objects.job(labels=labels, annotations=topology | {f"{_KUEUE}/other": "1", "note": "x"})
    view, plain = build_job_view(project_job(raw)), build_job_view(project_job(objects.job()))

    assert ("a", "a/high", topology) == (view.queue, view.queue_request, view.topology)
    assert (None, "", {}, {}) == (plain.queue, plain.queue_request, plain.queue_labels, plain.topology)


def test_priority_without_a_queue_asks_for_nothing(objects: Any) -> None:
    view = build_job_view(project_job(objects.job(labels={f"{_KUEUE}/priority-class": "high"})))

    assert (None, "") == (view.queue, view.queue_request)


def test_child_knows_whether_its_queue_holds_it(objects: Any) -> None:
    raw = objects.child(annotations={"finetune.dev/queue": "a/high"})
    raw["metadata"]["labels"] |= {f"{_KUEUE}/queue-name": "a"}
    held, plain = _project_child(raw | {"spec": {"suspend": True}}), _project_child(objects.child())

    assert (True, "a", "a/high") == (held.suspended, held.queue, held.queue_request)
    assert held.suspended_at is None
    assert (False, None, "") == (plain.suspended, plain.queue, plain.queue_request)


@pytest.mark.parametrize(("status", "expected"), [("True", datetime(2026, 1, 1, tzinfo=UTC)), ("False", None)])
def test_child_knows_since_when_it_is_stopped(objects: Any, status: str, expected: datetime | None) -> None:
    condition = {"type": "Suspended", "status": status, "lastTransitionTime": "2026-01-01T00:00:00Z"}

    assert expected == _project_child(objects.child(status={"conditions": [condition]})).suspended_at

"""The life of a FineTuneJob in a queue, on a real control plane; the test plays the kubelet, and queue_stand_in.py the queue."""

import json
import signal
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from queue_stand_in import PodSetInfo, QueueStandIn

pytestmark = pytest.mark.apiserver

_QUEUE = "kueue.x-k8s.io/queue-name"
_LABELS = {_QUEUE: "team-queue", "kueue.x-k8s.io/priority-class": "high"}
_TOPOLOGY = {"kueue.x-k8s.io/podset-preferred-topology": "cloud.provider.com/rack"}
_SPOT = PodSetInfo(
    labels={"kueue.x-k8s.io/podset": "main"},
    annotations={"kueue.x-k8s.io/workload": "job-emoji"},
    node_selector={"node-type": "spot"},
    tolerations=({"key": "spot", "operator": "Exists", "effect": "NoSchedule"},),
)
_RESERVED = PodSetInfo(labels={"kueue.x-k8s.io/podset": "main"}, node_selector={"node-type": "reserved"})
_SAVED = {"step": 40, "samples": 1280, "time": "2026-01-01T00:00:00Z", "attempt": 1}
_LAST_WORD = json.dumps({"trainerStatus": {"progressPercentage": 40}, "checkpoint": _SAVED})
_PUBLISHED = {
    "trainerStatus": {"progressPercentage": 100},
    "output": {"uri": "pvc://models/emoji", "digest": "sha256:00", "bytes": 7},
}


@pytest.fixture
def kueue(team: Any) -> QueueStandIn:
    return QueueStandIn(team.api, jobs_path=team.path("jobs"))


def _queue(team: Any, kueue: QueueStandIn) -> str:
    """Wait until a FineTuneJob is queued, and return the name of the child that the queue has taken note of."""
    team.wait("Queued")
    (child,) = team.children()
    kueue.create_workload(child["metadata"]["name"])
    return str(child["metadata"]["name"])


def _run_pods(team: Any, number: int) -> list[dict[str, Any]]:
    """Run the pods of the only attempt that the queue has admitted."""
    pods: list[dict[str, Any]] = team.wait_for_pods(number)
    for pod in pods:
        team.run_pod(pod)
    team.wait("Running")
    return pods


def _evict(team: Any, kueue: QueueStandIn, child: str, pods: list[dict[str, Any]]) -> None:
    """Evict an attempt, whose trainers save and leave."""
    for pod in pods:
        finalizers = [*pod["metadata"]["finalizers"], "finetune.dev/test"]
        team.api.patch(team.path("pods", pod["metadata"]["name"]), {"metadata": {"finalizers": finalizers}})
    kueue.evict(child)
    for pod in pods:
        team.end_pod(pod, 75, message=_LAST_WORD)
        team.api.patch(team.path("pods", pod["metadata"]["name"]), {"metadata": {"finalizers": None}})


def _ours(team: Any) -> tuple[Any, Any, Any, Any]:
    """Return all of a FineTuneJob that belongs to its user."""
    job = team.job()
    metadata = job["metadata"]
    return job["spec"], metadata["labels"], metadata["annotations"], metadata["generation"]


def test_attempt_is_queued_admitted_evicted_admitted_again_and_completes(
    team: Any, operator: Any, kueue: QueueStandIn, until: Any, writes: Any, created: Any, requests: Any
) -> None:
    operator.start()
    team.apply(labels=_LABELS, annotations=_TOPOLOGY, nodes=2, runPolicy={"backoffLimit": 0})
    before = _ours(team)
    name = _queue(team, kueue)
    template = team.children()[0]["spec"]["template"]
    assert team.children()[0]["metadata"]["labels"].items() >= _LABELS.items()
    assert team.pods() == []

    kueue.admit(name, _SPOT)
    first = _run_pods(team, 2)
    for pod in first:
        assert pod["spec"]["nodeSelector"] == {"node-type": "spot"}
        assert _SPOT.tolerations[0].items() <= pod["spec"]["tolerations"][0].items()
        assert pod["metadata"]["labels"].items() >= _SPOT.labels.items()
        assert pod["metadata"]["annotations"].items() >= (_SPOT.annotations | _TOPOLOGY).items()
        assert _QUEUE not in pod["metadata"]["labels"]

    _evict(team, kueue, name, first)
    until(lambda: team.status().get("restarts") == 1, what="the eviction is accounted for")
    evicted = team.wait("Queued")
    until(lambda: team.children()[0]["spec"]["template"] == template, what="the template is the queue's to restore")
    until(lambda: team.pods() == [], what="the pods are gone")

    kueue.admit(name, _RESERVED)
    second = _run_pods(team, 2)
    assert {pod["spec"]["nodeSelector"]["node-type"] for pod in second} == {"reserved"}
    for pod in second:
        team.end_pod(pod, message=json.dumps(_PUBLISHED))
    complete = team.wait("Complete")
    child = team.children()[0]

    assert [(each["attempt"], each["reason"], each["counted"]) for each in evicted["restartHistory"]] == [
        (1, "QueueEvicted", False)
    ]
    assert (evicted["restartsCountedTowardsLimit"], evicted["checkpoint"]) == (0, _SAVED)
    assert "runningSince" not in evicted
    assert "failure" not in complete
    assert _ours(team) == before
    # Not one write was fought over: the operator wrote the Job once, when it created it.
    assert created(team) == [name]
    assert [verb for verb, _ in writes(team, about=name)] == ["patch"]
    user = f"system:serviceaccount:{team.namespace}:operator"
    mine = [each for each in requests() if each["user"]["username"] == user]
    assert [each["requestURI"] for each in mine if each["responseStatus"].get("code") == 409] == []
    assert child["spec"]["template"]["spec"]["nodeSelector"] == {"node-type": "reserved"}
    assert {each["manager"] for each in child["metadata"]["managedFields"]} >= {"finetune-operator", "kueue"}
    until(lambda: ("Normal", "QueueEvicted") in team.events(), what="the event")
    assert 'finetune_job_retries_total{cause="disruption"} 1.0' in operator.scrape()


def test_what_the_queue_does_while_the_operator_is_down_is_found_later(
    team: Any, operator: Any, kueue: QueueStandIn, writes: Any, until: Any
) -> None:
    operator.start()
    team.apply(labels=_LABELS)
    name = _queue(team, kueue)
    kueue.admit(name, _SPOT)
    first = _run_pods(team, 1)
    operator.stop(signal.SIGKILL)
    # Times in the API are whole seconds: only a pod of a later one can be told from the first.
    since = datetime.fromisoformat(team.status()["runningSince"])
    until(lambda: datetime.now(UTC) > since + timedelta(seconds=1), what="the next second")
    _evict(team, kueue, name, first)
    kueue.admit(name, _RESERVED)
    new = [pod for pod in team.wait_for_pods(1) if pod["metadata"]["uid"] != first[0]["metadata"]["uid"]]
    team.run_pod(new[0])
    operator.start()
    team.apply("marker")
    team.wait("Unschedulable", "marker")
    status = team.wait("Running")

    assert [each["reason"] for each in status["restartHistory"]] == ["QueueEvicted"]
    assert (status["attempt"], status["restartsCountedTowardsLimit"]) == (1, 0)
    assert [verb for verb, _ in writes(team, about=name)] == ["patch"]


def test_failed_attempt_is_followed_by_one_that_is_queued(team: Any, operator: Any, kueue: QueueStandIn, until: Any) -> None:
    operator.start()
    team.apply(labels=_LABELS)
    name = _queue(team, kueue)
    kueue.admit(name, _SPOT)
    (pod,) = _run_pods(team, 1)
    team.end_pod(pod, 1, message="Traceback: no")
    until(lambda: team.status()["attempt"] == 2, what="the next attempt")
    status = team.wait("Queued")

    assert status["restartsCountedTowardsLimit"] == 1
    assert [child["spec"]["suspend"] for child in team.children()] == [False, True]


def test_user_takes_an_attempt_out_of_the_queue_and_moves_it_to_another(
    team: Any, operator: Any, kueue: QueueStandIn, until: Any
) -> None:
    operator.start()
    team.apply(labels=_LABELS)
    _queue(team, kueue)
    team.apply(labels=_LABELS, suspend=True)
    team.wait("Suspended")
    assert team.children() == []
    team.apply(labels=_LABELS)
    team.wait("Queued")
    team.apply(labels={_QUEUE: "other"})
    until(
        lambda: [child["metadata"]["labels"][_QUEUE] for child in team.children()] == ["other"], what="it is in the other queue"
    )
    status = team.wait("Queued")

    assert "queue other" in team.condition("Ready")["message"]
    assert status["restarts"] == 0


def test_job_of_another_manager_is_left_alone(team: Any, operator: Any, requests: Any) -> None:
    operator.start()
    foreign = team.apply("foreign", labels=_LABELS, managedBy="kueue.x-k8s.io/multikueue")
    team.apply("marker")
    team.wait("Unschedulable", "marker")
    operator.stop()
    operator.start()
    team.apply("marker", suspend=True)
    team.wait("Suspended", "marker")
    page = operator.scrape()
    user = f"system:serviceaccount:{team.namespace}:operator"
    mine = [each for each in requests() if each["user"]["username"] == user]

    assert team.job("foreign") == foreign
    assert team.events("foreign") == []
    assert team.children() == []
    assert [each for each in mine if each.get("objectRef", {}).get("name", "").startswith("foreign")] == []
    assert 1 == sum(float(line.split()[1]) for line in page.splitlines() if line.startswith("finetune_jobs{"))

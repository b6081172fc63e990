"""Attempts of many pods on a real control plane; the test plays the kubelet by patching pods."""

import json
from typing import Any

import pytest

pytestmark = pytest.mark.apiserver

_PUBLISHED = {
    "trainerStatus": {"progressPercentage": 100},
    "output": {"uri": "pvc://models/emoji", "digest": "sha256:00", "bytes": 7},
}


def _attempts(team: Any) -> set[str]:
    """Return the attempts that have pods which have not ended, those that are being deleted included."""
    pods = team.api.get(team.path("pods"))["items"]
    ended = ("Succeeded", "Failed")
    return {pod["metadata"]["labels"]["finetune.dev/attempt"] for pod in pods if pod["status"].get("phase") not in ended}


def test_many_pods_start_fail_and_end_as_one(team: Any, operator: Any, until: Any) -> None:
    operator.start()
    team.apply(nodes=3, runPolicy={"backoffLimit": 1})
    first = team.wait_for_pods(3)
    service = team.api.get(team.path("services"))["items"][0]
    for pod in first[:2]:
        team.run_pod(pod)
    until(lambda: "2 of 3 pods run" in team.condition("Ready")["message"], what="it is shown that a pod is missing")
    assert team.state() == "Unschedulable"
    team.run_pod(first[2])
    running = team.wait("Running")
    # A pod that is deleted stays until its kubelet has stopped it.
    for pod in first:
        finalizers = [*pod["metadata"]["finalizers"], "finetune.dev/test"]
        team.api.patch(team.path("pods", pod["metadata"]["name"]), {"metadata": {"finalizers": finalizers}})
    team.end_pod(first[1], 1, message="Traceback: no")
    until(lambda: len(team.pods()) == 1, what="the Job controller deletes the others")
    team.end_pod(first[0], 76)
    assert _attempts(team) == {"1"}
    team.end_pod(first[2], 76)
    for pod in first:
        team.api.patch(team.path("pods", pod["metadata"]["name"]), {"metadata": {"finalizers": None}})
    second = team.wait_for_pods(3, attempt=2)
    assert _attempts(team) == {"2"}
    for pod in second:
        team.run_pod(pod)
    retried = team.wait("Running")
    for index, pod in enumerate(second):
        team.end_pod(pod, message="" if index else json.dumps(_PUBLISHED))
    complete = team.wait("Complete")

    assert "runs in 3 pods" in next(each["message"] for each in running["conditions"] if each["type"] == "Running")
    assert (retried["failure"]["reason"], retried["failure"]["pod"]) == ("TrainerError", first[1]["metadata"]["name"])
    assert (complete["restarts"], complete["restartsCountedTowardsLimit"]) == (1, 1)
    assert complete["output"]["digest"] == "sha256:00"
    assert {pod["spec"]["subdomain"] for pod in first + second} == {service["metadata"]["name"]}
    assert [pod["spec"]["hostname"] for pod in second] == [f"emoji-{complete['run']}-2-{index}" for index in range(3)]


def test_evicted_pod_restarts_all_for_free(team: Any, operator: Any) -> None:
    operator.start()
    team.apply(nodes=2, runPolicy={"backoffLimit": 0})
    first = team.wait_for_pods(2)
    for pod in first:
        team.run_pod(pod)
    team.wait("Running")
    team.evict_pod(first[1], 75)
    team.end_pod(first[0], 76)
    for pod in team.wait_for_pods(2, attempt=2):
        team.run_pod(pod)
    status = team.wait("Running")

    assert [(each["reason"], each["counted"]) for each in status["restartHistory"]] == [("Evicted", False)]


def test_number_of_nodes_goes_down_and_up_within_the_run(team: Any, operator: Any) -> None:
    operator.start()
    team.apply(nodes=2)
    for pod in team.wait_for_pods(2):
        team.run_pod(pod)
    before = team.wait("Running")
    for attempt, nodes in ((2, 1), (3, 2)):
        team.apply(nodes=nodes)
        for pod in team.wait_for_pods(nodes, attempt=attempt):
            team.run_pod(pod)
        after = team.wait("Running")
        assert _attempts(team) == {str(attempt)}

    assert (before["run"], 3, 0) == (after["run"], after["attempt"], after["restarts"])

"""What a FineTuneJob loses and keeps, on a real control plane; the test plays the kubelet by patching pods."""

import json
import signal
import time
from datetime import datetime
from typing import Any

import pytest

pytestmark = pytest.mark.apiserver

_PUBLISHED = {
    "trainerStatus": {"progressPercentage": 100},
    "output": {"uri": "pvc://models/emoji", "digest": "sha256:00", "bytes": 7},
}
_SAVED = {"step": 40, "samples": 1280, "time": "2026-01-01T00:00:00Z", "attempt": 1}
_LAST_WORD = json.dumps({"trainerStatus": {"progressPercentage": 40}, "checkpoint": _SAVED})


def _run_next(team: Any, attempt: int) -> dict[str, Any]:
    """Run the pod of an attempt as soon as there is one."""
    pod: dict[str, Any] = team.wait_for_pod(f"emoji-{team.status()['run']}-{attempt}")
    team.run_pod(pod)
    return pod


def _cause(team: Any) -> tuple[str, str]:
    return team.condition("Failed")["reason"], team.status()["failure"]["reason"]


def test_evicted_pod_is_replaced_at_once_and_free(team: Any, operator: Any, until: Any) -> None:
    operator.start()
    team.apply(runPolicy={"backoffLimit": 0})
    pod = team.wait_for_pod()
    team.run_pod(pod)
    team.wait("Running")
    evicted_at = time.monotonic()
    team.evict_pod(pod, message=_LAST_WORD)
    _run_next(team, 2)
    seconds = time.monotonic() - evicted_at
    status = team.wait("Running")

    assert (status["attempt"], status["restarts"], status["restartsCountedTowardsLimit"]) == (2, 1, 0)
    assert [(each["reason"], each["counted"]) for each in status["restartHistory"]] == [("Evicted", False)]
    assert status["checkpoint"] == _SAVED
    assert pod["metadata"]["name"] in status["failure"]["message"]
    until(lambda: ("Warning", "Evicted") in team.events(), what="an event with the cause")
    assert 'finetune_job_retries_total{cause="disruption"} 1.0' in operator.scrape()
    assert seconds < 10


def test_deleted_pod_is_no_failure_of_the_training(team: Any, operator: Any) -> None:
    operator.start()
    team.apply(runPolicy={"backoffLimit": 0})
    pod = team.wait_for_pod()
    team.run_pod(pod)
    team.wait("Running")
    team.api.delete(team.path("pods", pod["metadata"]["name"]))
    team.end_pod(pod, 143)
    _run_next(team, 2)

    assert team.wait("Running")["restartHistory"][0]["reason"] == "PodDeleted"


def test_next_attempt_waits_for_a_pod_that_does_not_stop(team: Any, operator: Any, until: Any, created: Any) -> None:
    operator.start()
    team.apply()
    pod = team.wait_for_pod()
    team.run_pod(pod)
    team.wait("Running")
    # The Job goes without its pod, as with `kubectl delete job --cascade=orphan`.
    team.api.delete(team.path("jobs", team.children()[0]["metadata"]["name"]), propagation="Orphan")
    until(lambda: pod["metadata"]["name"] in team.condition("Ready")["message"] and not team.children(), what="it waits")
    assert len(created(team)) == 1

    team.end_pod(pod, 75)
    _run_next(team, 2)
    assert len(created(team)) == 2


def test_refused_job_is_given_up_at_its_deadline_with_the_cause(team: Any, operator: Any, until: Any) -> None:
    quota = {"metadata": {"name": "none"}, "spec": {"hard": {"count/jobs.batch": "0"}}}
    team.api.create(team.path("resourcequotas"), quota)
    until(lambda: team.api.get(team.path("resourcequotas", "none")).get("status", {}).get("used"), what="the quota is in force")
    operator.start()
    team.apply(runPolicy={"startDeadlineSeconds": 5})
    waiting = team.wait("QuotaExceeded")
    assert "none" in team.condition("Ready")["message"]
    failed = team.wait("Failed")

    assert _cause(team) == ("StartDeadlineExceeded", "QuotaExceeded")
    assert "exceeded quota: none" in failed["failure"]["message"]
    assert "startDeadlineSeconds 5" in team.condition("Stalled")["message"]
    assert 5 <= _seconds(waiting["pendingSince"], failed["completionTime"]) < 10
    assert (team.children(), team.pods()) == ([], [])
    until(lambda: {("Warning", "QuotaExceeded"), ("Warning", "Failed")} <= set(team.events()), what="the events")


def test_unschedulable_attempt_frees_what_it_holds_at_its_deadline(team: Any, operator: Any, until: Any) -> None:
    operator.start()
    team.apply(runPolicy={"startDeadlineSeconds": 3})
    team.wait("Unschedulable")
    failed = team.wait("Failed")
    until(lambda: not team.children() and not team.pods(), what="all is gone", seconds=5)

    assert _cause(team) == ("StartDeadlineExceeded", "Unschedulable")
    assert failed["failure"]["pod"] in failed["failure"]["message"]


def test_refused_pod_is_diagnosed_from_the_events_of_its_job(team: Any, operator: Any, until: Any, requests: Any) -> None:
    quota = {"metadata": {"name": "no-pods"}, "spec": {"hard": {"pods": "0"}}}
    team.api.create(team.path("resourcequotas"), quota)
    until(
        lambda: team.api.get(team.path("resourcequotas", "no-pods")).get("status", {}).get("used"), what="the quota is in force"
    )
    operator.start()
    team.apply(runPolicy={"startDeadlineSeconds": 12})
    child = until(team.children, what="the Job is accepted")[0]
    until(lambda: team.state() == "QuotaExceeded", what="the cause is shown", seconds=8)
    message = team.condition("Ready")["message"]
    team.wait("Failed")
    until(lambda: not team.children(), what="the Job is gone", seconds=5)
    user = f"system:serviceaccount:{team.namespace}:operator"
    codes = {each["responseStatus"]["code"] for each in requests() if each["user"]["username"] == user}

    assert f"the pod of Job {child['metadata']['name']} is refused" in message
    assert "exceeded quota: no-pods" in message
    assert _cause(team) == ("StartDeadlineExceeded", "QuotaExceeded")
    assert codes.isdisjoint({401, 403})


def test_pod_that_a_policy_denies_is_diagnosed_and_starts_when_the_policy_is_gone(team: Any, operator: Any, until: Any) -> None:
    prefix = "/apis/admissionregistration.k8s.io/v1"
    name = f"deny-{team.namespace}"
    pods = {"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}
    selector = {"matchLabels": {"kubernetes.io/metadata.name": team.namespace}}
    policy = {
        "metadata": {"name": name},
        "spec": {
            "matchConstraints": {"resourceRules": [pods], "namespaceSelector": selector},
            "validations": [{"expression": "false", "message": "no pods on Sundays"}],
        },
    }
    team.api.create(f"{prefix}/validatingadmissionpolicies", policy)
    binding = {"metadata": {"name": name}, "spec": {"policyName": name, "validationActions": ["Deny"]}}
    team.api.create(f"{prefix}/validatingadmissionpolicybindings", binding)
    probe = {"metadata": {"name": "probe"}, "spec": {"containers": [{"name": "c", "image": "i"}]}}
    try:
        until(lambda: team.api.request("POST", team.path("pods") + "?dryRun=All", probe)[0] == 422, what="the policy is in force")
        operator.start()
        team.apply()
        until(lambda: team.state() == "AdmissionDenied", what="the cause is shown")
        message = team.condition("Ready")["message"]
    finally:
        team.api.delete(f"{prefix}/validatingadmissionpolicybindings/{name}")
        team.api.delete(f"{prefix}/validatingadmissionpolicies/{name}")
    team.wait("Unschedulable")

    assert "no pods on Sundays" in message
    assert name in message


def test_running_time_ends_at_its_deadline(team: Any, operator: Any, until: Any) -> None:
    operator.start()
    team.apply(runPolicy={"activeDeadlineSeconds": 3})
    team.run_pod(team.wait_for_pod())
    team.wait("Running")
    failed = team.wait("Failed")

    assert _cause(team) == ("DeadlineExceeded", "DeadlineExceeded")
    assert failed["activeSeconds"] >= 3
    assert "runningSince" not in failed
    until(lambda: not team.children() and not team.pods(), what="all is gone")


def test_finished_jobs_children_go_and_nothing_is_trained_again(team: Any, operator: Any, until: Any, created: Any) -> None:
    operator.start()
    team.apply(runPolicy={"ttlSecondsAfterFinished": 2})
    pod = team.wait_for_pod()
    team.run_pod(pod)
    team.end_pod(pod, message=json.dumps(_PUBLISHED))
    complete = team.wait("Complete")
    assert len(team.children()) == 1
    until(lambda: not team.children() and not team.pods(), what="all is gone")
    operator.stop()
    operator.start()
    team.apply("marker")
    team.wait("Unschedulable", "marker")

    assert team.status() == complete
    assert [each for each in created(team) if each.startswith("emoji")] == created(team)[:1]


def test_suspended_job_keeps_its_progress_and_its_checkpoint(team: Any, operator: Any, until: Any) -> None:
    operator.start()
    team.apply()
    pod = team.wait_for_pod()
    team.run_pod(pod)
    team.wait("Running")
    team.api.patch(team.path("pods", pod["metadata"]["name"]), {"metadata": {"finalizers": ["finetune.dev/test"]}})
    team.apply(suspend=True)
    team.wait("Suspending")
    team.end_pod(pod, 75, message=_LAST_WORD)
    until(lambda: team.status().get("checkpoint") == _SAVED, what="the last word of the pod is taken")
    team.api.patch(team.path("pods", pod["metadata"]["name"]), {"metadata": {"finalizers": None}})
    suspended = team.wait("Suspended")
    team.apply(suspend=False)
    _run_next(team, 2)
    resumed = team.wait("Running")

    assert "runningSince" not in suspended
    assert (resumed["checkpoint"], resumed["restarts"]) == (_SAVED, 0)


def test_killed_operator_repeats_no_attempt_and_loses_no_state(team: Any, operator: Any, until: Any, created: Any) -> None:
    """SIGKILL in every phase, and again as soon as it is back; what happens meanwhile is found."""

    def revive() -> None:
        for _ in range(2):
            operator.start()
            operator.stop(signal.SIGKILL)
        operator.start()

    operator.start()
    team.apply(runPolicy={"backoffLimit": 1})
    until(lambda: team.status().get("run"), what="a run")
    operator.stop(signal.SIGKILL)
    revive()
    first = _run_next(team, 1)
    team.wait("Running")
    operator.stop(signal.SIGKILL)
    team.end_pod(first, 1, message="Traceback: no")
    revive()
    second = _run_next(team, 2)
    team.wait("Running")
    operator.stop(signal.SIGKILL)
    team.evict_pod(second, message=_LAST_WORD)
    revive()
    _run_next(team, 3)
    team.wait("Running")
    operator.stop(signal.SIGKILL)
    team.apply(suspend=True, runPolicy={"backoffLimit": 1})
    revive()
    suspended = team.wait("Suspended")
    operator.stop(signal.SIGKILL)
    team.apply(suspend=False, runPolicy={"backoffLimit": 1})
    revive()
    fourth = _run_next(team, 4)
    team.wait("Running")
    operator.stop(signal.SIGKILL)
    team.end_pod(fourth, message=json.dumps(_PUBLISHED))
    revive()
    complete = team.wait("Complete")

    assert created(team) == [f"emoji-{complete['run']}-{attempt}" for attempt in (1, 2, 3, 4)]
    assert (suspended["restarts"], suspended["restartsCountedTowardsLimit"]) == (2, 1)
    assert [each["attempt"] for each in complete["restartHistory"]] == [1, 2]
    assert [each["counted"] for each in complete["restartHistory"]] == [True, False]


def _seconds(start: str, end: str) -> float:
    return (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds()

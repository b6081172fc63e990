"""The life of a FineTuneJob on a real control plane; the test plays the kubelet by patching pods."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from harness import PUBLISHED, post_progress
from replicas import election, seed_lease

pytestmark = pytest.mark.apiserver


@pytest.fixture
def operator_settings(team: Any) -> dict[str, str]:
    """Here the operator takes part in an election, as it does by default."""
    seed_lease(team)
    return election(("15", "10", "1"))


def _names(objects: list[dict[str, Any]]) -> list[str]:
    return sorted(each["metadata"]["name"] for each in objects)


def test_job_goes_from_pending_to_complete(team: Any, operator: Any, tls: tuple[Path, Path], until: Any) -> None:
    operator.start()
    created = team.apply()
    pending = team.wait("Unschedulable")
    pod = team.wait_for_pod()
    team.run_pod(pod)
    running = team.wait("Running")
    url = f"{operator.report_url}/apis/trainer.kubeflow.org/v1alpha1/namespaces/{team.namespace}/trainjobs/emoji/status"
    answer = until(lambda: next(iter([post_progress(url, token=team.create_token(pod), ca=tls[0])])), what="an answer")
    until(lambda: team.status().get("trainerStatus", {}).get("progressPercentage") == 40, what="progress is shown")
    team.end_pod(pod, message=json.dumps(PUBLISHED))
    complete = team.wait("Complete")

    assert pending["observedGeneration"] == created["metadata"]["generation"] == 1
    assert {each["type"] for each in pending["conditions"]} >= {"Ready", "Stalled", "Complete", "Failed"}
    assert "startTime" in running
    assert answer == (200, {"trainerStatus": {"progressPercentage": 40, "estimatedRemainingSeconds": 30}})
    assert complete["output"]["digest"] == "sha256:00"
    assert complete["metric"] == "test_accuracy=0.81"
    assert "completionTime" in complete
    until(lambda: ("Normal", "Complete") in team.events(), what="the event")
    assert ("Normal", "Running") in team.events()
    metrics = operator.scrape()
    assert 'finetune_jobs{state="Complete"} 1.0' in metrics
    assert "finetune_job_start_seconds_count 1.0" in metrics
    assert 'finetune_job_duration_seconds_count{result="Complete"} 1.0' in metrics
    assert 'finetune_reports_total{result="accepted"} 1.0' in metrics
    stopped_at = time.monotonic()
    assert operator.stop() == 0
    assert time.monotonic() - stopped_at < 5


def test_tokens_of_others_are_refused(team: Any, operator: Any, tls: tuple[Path, Path]) -> None:
    operator.start()
    for name in ("mine", "other"):
        team.apply(name)
        team.wait("Unschedulable", name)
    pods = {pod["metadata"]["labels"]["finetune.dev/job"]: pod for pod in team.pods()}
    prefix = f"{operator.report_url}/apis/trainer.kubeflow.org/v1alpha1/namespaces"

    def code(token: str, path: str = "mine") -> int:
        return post_progress(f"{prefix}/{team.namespace}/trainjobs/{path}/status", token=token, ca=tls[0])[0]

    assert code(team.create_token(pods["mine"])) == 200
    assert code(team.create_token(pods["other"])) == 403
    assert code(team.create_token(pods["mine"], audience="https://kubernetes.default.svc.cluster.local")) == 401
    assert code("nonsense") == 401
    assert code(team.create_token(pods["mine"]), "absent") == 404


def test_failed_attempt_is_retried_until_the_limit(team: Any, operator: Any) -> None:
    operator.start()
    team.apply(runPolicy={"backoffLimit": 1})
    first = team.wait_for_pod()
    team.run_pod(first)
    team.wait("Running")
    team.end_pod(first, 137, reason="OOMKilled")
    child = team.children()[0]["metadata"]["name"]
    second = team.wait_for_pod(child.removesuffix("-1") + "-2")
    team.run_pod(second)
    retried = team.wait("Running")
    team.end_pod(second, 1, message="Traceback: no")
    failed = team.wait("Failed")

    assert (retried["attempt"], retried["restarts"]) == (2, 1)
    assert retried["failure"]["reason"] == "OOMKilled"
    assert failed["failure"]["exitCode"] == 1
    assert failed["failure"]["attempt"] == 2
    assert failed["restarts"] == 1
    assert team.condition("Stalled")["status"] == "True"
    assert len(team.children()) == 2
    assert 'finetune_job_retries_total{cause="oom"} 1.0' in operator.scrape()


@pytest.mark.parametrize("exit_code", [64, 65, 78])
def test_failure_that_a_retry_cannot_mend_is_final(team: Any, operator: Any, exit_code: int) -> None:
    operator.start()
    team.apply()
    pod = team.wait_for_pod()
    report = {"trainerStatus": {}, "failure": {"reason": "NoPictures", "message": "the folder is empty"}}
    team.end_pod(pod, exit_code, message=json.dumps(report))
    failed = team.wait("Failed")

    assert (failed["restarts"], len(team.children())) == (0, 1)
    assert failed["failure"]["reason"] == "NoPictures"
    assert "the folder is empty" in failed["failure"]["message"]


def test_suspended_job_loses_its_pods_and_resumes_later(team: Any, operator: Any, until: Any) -> None:
    operator.start()
    team.apply()
    pod = team.wait_for_pod()
    team.run_pod(pod)
    before = team.wait("Running")
    team.apply(suspend=True)
    suspended = team.wait("Suspended")
    until(lambda: not team.pods() and not team.children(), what="all is gone")
    team.apply(suspend=False)
    resumed = team.wait_for_pod()
    team.run_pod(resumed)
    after = team.wait("Running")

    assert team.condition("Suspended")["status"] == "False"
    assert suspended["run"] == before["run"] == after["run"]
    assert resumed["metadata"]["name"] != pod["metadata"]["name"]
    assert after["restarts"] == 0


def test_changed_training_starts_one_new_run(team: Any, operator: Any, until: Any) -> None:
    operator.start()
    team.apply()
    team.run_pod(team.wait_for_pod())
    before = team.wait("Running")
    team.apply(hyperparameters={"seed": 7})
    until(lambda: team.status()["run"] != before["run"], what="a new run")
    run = team.status()["run"]
    team.wait_for_pod(f"emoji-{run}-1")
    team.wait("Unschedulable")

    assert _names(team.children()) == [f"emoji-{run}-1"]
    assert (team.status()["attempt"], team.status()["restarts"]) == (1, 0)
    assert team.status()["observedGeneration"] == 2


def test_same_yaml_again_writes_nothing(team: Any, operator: Any, writes: Any) -> None:
    operator.start()
    team.apply()
    team.wait("Unschedulable")
    operator.stop()
    before, events = writes(team, about="emoji"), team.events("emoji")
    operator.start()
    team.apply()
    version = team.job()["metadata"]["resourceVersion"]
    # A second job passes through the same queue after it, so its end shows that the first was dealt with.
    team.apply("marker")
    team.wait("Unschedulable", "marker")

    assert team.job()["metadata"]["resourceVersion"] == version
    assert writes(team, about="emoji") == before
    assert team.events("emoji") == events


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_restart_in_the_middle_writes_nothing(team: Any, operator: Any, writes: Any, until: Any, number: int) -> None:
    operator.start()
    team.apply()
    pod = team.wait_for_pod()
    team.run_pod(pod)
    running = team.wait("Running")
    # The event is the last write of a reconcile.
    until(lambda: ("Normal", "Running") in team.events(), what="the event")
    operator.stop(number)
    before, events = writes(team, about="emoji"), team.events("emoji")
    operator.start()
    team.apply("marker")
    team.wait("Unschedulable", "marker")

    assert writes(team, about="emoji") == before
    assert team.events("emoji") == events
    assert team.status() == running


def test_deletion_while_the_operator_is_down_leaves_nothing(team: Any, operator: Any, until: Any) -> None:
    operator.start()
    team.apply()
    team.wait_for_pod()
    operator.stop()
    team.api.delete(team.path("finetunejobs", "emoji"))

    until(lambda: not team.children() and not team.pods(), what="all is gone")
    operator.start()
    assert operator.stop() == 0


def test_what_happens_while_the_operator_is_down_is_found_later(team: Any, operator: Any) -> None:
    operator.start()
    team.apply()
    pod = team.wait_for_pod()
    team.run_pod(pod)
    team.wait("Running")
    operator.stop()
    team.end_pod(pod, message=json.dumps(PUBLISHED))
    team.apply("late")
    operator.start()

    team.wait("Complete")
    team.wait("Unschedulable", "late")


def test_successor_of_the_same_name_is_a_new_job(team: Any, operator: Any, until: Any) -> None:
    operator.start()
    first = team.apply()
    old = team.wait_for_pod()
    team.run_pod(old)
    team.wait("Running")
    team.api.delete(team.path("finetunejobs", "emoji"))
    second = team.apply()
    team.wait("Unschedulable")

    assert first["metadata"]["uid"] != second["metadata"]["uid"]
    until(lambda: len(team.children()) == 1, what="one child")
    labels = team.children()[0]["metadata"]["labels"]
    assert labels["finetune.dev/job-uid"] == second["metadata"]["uid"]
    assert len(team.children()[0]["metadata"]["ownerReferences"]) == 1


def test_deleted_child_is_restored(team: Any, operator: Any, until: Any) -> None:
    operator.start()
    team.apply()
    pod = team.wait_for_pod()
    team.run_pod(pod)
    team.wait("Running")
    team.api.delete(team.path("jobs", team.children()[0]["metadata"]["name"]))

    again = until(lambda: [each for each in team.pods() if each["metadata"]["uid"] != pod["metadata"]["uid"]], what="a pod again")
    assert len(again) == 1


def test_quota_is_shown_and_waited_for(team: Any, operator: Any, until: Any) -> None:
    quota = {"metadata": {"name": "none"}, "spec": {"hard": {"count/jobs.batch": "0"}}}
    team.api.create(team.path("resourcequotas"), quota)
    until(lambda: team.api.get(team.path("resourcequotas", "none")).get("status", {}).get("used"), what="the quota is in force")
    operator.start()
    team.apply()
    refused = team.wait("QuotaExceeded")
    message = team.condition("Ready")["message"]
    until(lambda: ("Warning", "QuotaExceeded") in team.events(), what="a warning")
    team.api.delete(team.path("resourcequotas", "none"))
    team.wait("Unschedulable")

    assert "exceeded quota" in message
    assert refused["restarts"] == 0
    assert not any(each["type"] == "Failed" and each["status"] == "True" for each in refused["conditions"])


def test_profile_comes_changes_and_goes(team: Any, operator: Any, until: Any, writes: Any) -> None:
    operator.start()
    team.apply(profileRef={"name": team.namespace})
    team.wait("ProfileNotFound")
    team.apply_profile(image="old:1", pricePerAcceleratorHour="3600", environment=[{"name": "A", "value": "1"}])
    first = team.wait_for_pod()
    team.wait("Unschedulable")
    team.run_pod(first)
    team.wait("Running")
    until(lambda: ("Normal", "Running") in team.events(), what="the event")
    before = writes(team, about="emoji")
    team.apply_profile(image="new:1", allowedUriSchemes=["timm", "pvc"])
    team.apply("marker", profileRef={"name": team.namespace}, checkpoint={"uri": "s3://bucket"})
    team.wait("ProfileViolated", "marker")
    untouched = writes(team, about="emoji")
    team.evict_pod(first)
    until(lambda: team.status()["attempt"] == 2, what="the next attempt")
    second = team.wait_for_pod(team.children()[-1]["metadata"]["name"])
    team.api.delete(team.profile_path)
    team.run_pod(second)
    team.wait("Running")
    team.end_pod(second, message=json.dumps(PUBLISHED))
    complete = team.wait("Complete")

    assert before == untouched, "a change of the profile touches nothing that runs"
    assert ["old:1", "new:1"] == [pod["spec"]["containers"][0]["image"] for pod in (first, second)]
    assert {"name": "A", "value": "1"} in first["spec"]["containers"][0]["env"]
    usage = complete["usage"]
    assert usage["acceleratorSeconds"] == complete["activeSeconds"]
    paid = usage["acceleratorSeconds"] if "pricePerAcceleratorHour" in usage else None
    assert paid is None, "the second attempt has no price"
    assert usage["cost"].endswith(".0000"), "a second costs one"
    team.wait("ProfileNotFound", "marker")


def test_replaced_token_is_taken_up(team: Any, operator: Any) -> None:
    operator.start()
    team.apply("before")
    team.wait("Unschedulable", "before")
    operator.replace_token(team)
    team.apply("after")

    team.wait("Unschedulable", "after")

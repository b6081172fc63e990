"""What a FineTuneJob loses and keeps: retries, deadlines, suspension, time to live."""

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from finetune_api.conditions import is_true
from finetune_api.contract import FailureReport
from finetune_operator.observed import ChildState, PodRefusal
from world import PUBLISHED, SETTINGS, SPEC, World, build_report


def _policy(**fields: Any) -> World:
    return World(spec=SPEC | {"runPolicy": fields}).settle()


def test_disruption_is_retried_at_once_and_free() -> None:
    world = _policy(backoffLimit=0).run().disrupt()

    assert ("Pending", 2) == (world.state, world.status.attempt)
    assert (1, 0) == (world.status.restarts, world.status.restarts_counted_towards_limit)
    assert [("Evicted", False)] == [(each.reason, each.counted) for each in world.status.restart_history]
    assert ("Warning", "Evicted") in world.events


def test_disruptions_leave_the_limit_to_failures() -> None:
    world = _policy(backoffLimit=1)
    for _ in range(3):
        world.wait(60).run().disrupt()
    world.run().exit(1)

    assert ("Retrying", 4, 1) == (world.state, world.status.restarts, world.status.restarts_counted_towards_limit)
    world.wait(15).settle().run().exit(1)
    assert ("Failed", ("BackoffLimitExceeded", "TrainerError")) == (world.state, world.cause)
    assert "TrainerError: " in world.message
    assert "backoffLimit 1 is reached" in world.message


def test_delay_looks_at_the_failures_that_count() -> None:
    world = _policy(backoffLimit=5).run().disrupt().wait(60).run().disrupt().run().exit(1)

    assert 10 <= (world.reconcile().requeue_after or 0) < 15


def test_disruptions_as_fast_as_pods_are_not_retried_at_once() -> None:
    world = _policy()
    for _ in range(3):
        world.wait(1).run().disrupt()
        assert "Pending" == world.state
    world.wait(1).run().disrupt()

    assert "Retrying" == world.state
    assert 10 <= (world.reconcile().requeue_after or 0) < 15
    world.wait(15).settle()
    assert 5 == world.status.attempt


def test_last_word_of_a_pod_that_is_gone_before_its_job_fails_counts() -> None:
    world = _policy().run().wait(30)
    saved = world.checkpoint(step=77)

    world.disrupt(message=build_report(checkpoint=saved))

    assert (saved, 0) == (world.status.checkpoint, world.status.lost_seconds)


def test_pod_that_is_gone_without_a_trace_costs_no_retry() -> None:
    world = _policy(backoffLimit=0).run()
    world.pods.clear()
    world.finish(ChildState.FAILED)
    world.settle().wait(SETTINGS.evidence_seconds).settle()

    assert ("PodLost", 2, 0) == (
        world.status.restart_history[-1].reason,
        world.status.attempt,
        world.status.restarts_counted_towards_limit,
    )


_TOLD = build_report(failure=FailureReport(reason="OutOfMemory", message="memory ran out"))


@pytest.mark.parametrize(
    ("code", "ending"),
    [
        pytest.param(137, {"reason": "OOMKilled"}, id="killed by the kernel"),
        pytest.param(1, {"message": _TOLD}, id="told by the trainer"),
    ],
)
def test_each_time_out_of_memory_halves_the_micro_batch(code: int, ending: dict[str, Any]) -> None:
    world = _policy(backoffLimit=5)
    divisors = [world.config.micro_batch_divisor]
    for _ in range(2):
        world.run().exit(code, **ending).wait(360).settle()
        divisors.append(world.config.micro_batch_divisor)
    world.run().exit(1).wait(360).settle()

    assert [1, 2, 4] == divisors
    assert (4, 3) == (world.config.micro_batch_divisor, world.status.restarts_counted_towards_limit)


def test_rule_for_a_failure_comes_before_the_table() -> None:
    rules = [
        {"name": "flaky", "onExitCodes": [1], "action": "RetryFree"},
        {"name": "oom", "onReasons": ["OOMKilled"], "action": "Fail"},
    ]
    world = _policy(backoffLimit=0, failureRules=rules).run().exit(1)
    assert ("Retrying", 0) == (world.state, world.status.restarts_counted_towards_limit)
    assert 10 <= (world.reconcile().requeue_after or 0) < 15

    world.wait(15).settle().run().exit(137, reason="OOMKilled")

    assert ("Failed", ("OOMKilled", "OOMKilled")) == (world.state, world.cause)
    assert "'oom'" in world.message


def test_history_has_the_latest_restarts() -> None:
    world = _policy()
    for _ in range(20):
        world.wait(60).run().disrupt()

    assert (20, list(range(5, 21))) == (world.status.restarts, [each.attempt for each in world.status.restart_history])


def test_no_attempt_begins_beside_a_pod_that_does_not_stop() -> None:
    world = _policy().run()
    stuck = replace(world.pod().pods.popitem()[1], deleting=True, deletion_due=world.now + timedelta(seconds=60))
    world.children.clear()
    world.pods = {"stuck": stuck}
    world.settle()
    assert ("Pending", {}) == (world.state, world.children)
    assert stuck.name in world.message

    assert 70 == world.reconcile().requeue_after
    world.wait(70).settle()
    assert ("NodeLost", {}) == (world.state, world.children)
    assert "node n1" in world.message

    world.pods.clear()
    world.settle()
    assert ["2"] == [each["metadata"]["labels"]["finetune.dev/attempt"] for each in world.manifests[1:]]


def test_no_attempt_begins_beside_a_pod_of_an_earlier_run() -> None:
    world = _policy().run().change(hyperparameters={"seed": 7}).settle()
    pod = world.pod().pods.popitem()[1]
    world.children.clear()
    world.pods = {"old": pod}
    world.settle()
    assert {} == world.children

    world.pods = {"old": replace(pod, phase="Failed", exit_code=75)}
    world.settle()
    assert [1] == [child.attempt for child in world.active]


def test_running_trainer_on_a_node_that_does_not_answer_is_shown_as_lost() -> None:
    world = _policy().run().pod(deleting=True, deletion_due=World().now + timedelta(seconds=30)).settle()
    assert ("Running", 40) == (world.state, world.reconcile().requeue_after)

    world.wait(40).settle()

    assert "NodeLost" == world.state
    assert 1 == len(world.manifests)


_PENDING: dict[str, Any] = {
    "scheduled": False,
    "unscheduled_reason": "Unschedulable",
    "unscheduled_message": "1 Insufficient cpu",
}


@pytest.mark.parametrize(
    ("pod", "cause", "words"),
    [
        pytest.param(_PENDING, "InsufficientResources", "Insufficient cpu", id="unschedulable"),
        pytest.param(
            {"waiting_reason": "ErrImagePull", "waiting_message": "no such host"}, "ImagePullBackOff", "trainer:1", id="image"
        ),
        pytest.param({}, "TrainerNotStarted", "node n1", id="without a known cause"),
        pytest.param(None, "TrainerNotStarted", "waiting for", id="without a pod"),
    ],
)
def test_attempt_that_does_not_start_in_time_is_given_up_with_its_cause(
    pod: dict[str, Any] | None, cause: str, words: str
) -> None:
    world = _policy(startDeadlineSeconds=30)
    if pod is not None:
        world.pod(**pod)
    world.wait(29).settle()
    assert "Failed" != world.state
    assert world.reconcile().requeue_after == 1

    world.wait(1).settle()

    assert ("Failed", ("StartDeadlineExceeded", cause)) == (world.state, world.cause)
    assert words in world.message
    assert "startDeadlineSeconds 30 is over" in world.message
    assert [True] == [child.deleting for child in world.children.values()]
    world.collect().wait(1000).settle()
    assert ({}, 1, "Failed") == (world.children, len(world.manifests), world.state)


def test_start_deadline_is_written_before_anything_is_deleted() -> None:
    world = _policy(startDeadlineSeconds=30).wait(30)

    outcome = world.reconcile()

    assert ((), 0) == (outcome.delete, outcome.requeue_after)
    assert outcome.status is not None
    assert is_true(outcome.status.conditions, "Failed")


def test_start_deadline_counts_while_the_api_server_refuses_the_job() -> None:
    world = World(spec=SPEC | {"runPolicy": {"startDeadlineSeconds": 30}})
    refused = world.refuse("exceeded quota: team")
    world.carry_out(refused)
    assert ("QuotaExceeded", 30) == (world.state, refused.requeue_after)

    world.wait(30).settle()

    assert ("Failed", ("StartDeadlineExceeded", "QuotaExceeded"), 0) == (world.state, world.cause, len(world.manifests))
    assert "exceeded quota: team" in world.message


def test_start_deadline_begins_anew_with_each_attempt() -> None:
    world = _policy(startDeadlineSeconds=30).wait(20).run().wait(100).disrupt().wait(20).settle()
    assert ("Pending", 2) == (world.state, world.status.attempt)

    world.wait(10).settle()

    assert "Failed" == world.state


def test_time_between_attempts_is_no_waiting_for_a_start() -> None:
    world = _policy(startDeadlineSeconds=5).run().exit(1).wait(9).settle()
    assert ("Retrying", None) == (world.state, world.status.pending_since)

    world.change(suspend=True).settle().wait(100).change(suspend=False).settle()

    assert ("Pending", world.now) == (world.state, world.status.pending_since)


def test_other_resources_revive_a_run_that_did_not_start_in_time() -> None:
    world = _policy(startDeadlineSeconds=30).pod(**_PENDING).wait(30).settle().collect()

    world.change(resources={"cpu": "1", "memory": "1Gi"}).settle()

    assert ("Pending", 2, world.now) == (world.state, world.status.attempt, world.status.pending_since)


@pytest.mark.parametrize("policy", [{}, {"startDeadlineSeconds": 31}])
def test_later_or_no_start_deadline_revives_a_run_that_did_not_start_in_time(policy: dict[str, Any]) -> None:
    world = _policy(startDeadlineSeconds=30).pod(**_PENDING).wait(30).settle().collect()
    world.wait(500).change(runPolicy={"startDeadlineSeconds": 30, "backoffLimit": 5}).settle()
    assert "Failed" == world.state

    world.change(runPolicy=policy).settle()

    assert ("Pending", 2, world.now) == (world.state, world.status.attempt, world.status.pending_since)


def test_active_deadline_counts_the_running_time_of_all_attempts() -> None:
    world = _policy(activeDeadlineSeconds=100).wait(500).run().wait(60).exit(1).wait(500).settle().wait(500).run()
    assert (60, 40) == (world.status.active_seconds, world.reconcile().requeue_after)

    world.wait(40).settle()
    assert ("DeadlineExceeded", [2]) == (world.state, [each.attempt for each in world.children.values() if each.deleting])
    assert "saves" in world.message

    world.save(step=9).collect()
    assert ("Failed", ("DeadlineExceeded", "DeadlineExceeded"), 100) == (world.state, world.cause, world.status.active_seconds)
    assert "step 9" in world.message
    assert 2 == len(world.manifests)


def test_suspension_does_not_use_up_the_active_deadline() -> None:
    world = _policy(activeDeadlineSeconds=100).run().wait(60).change(suspend=True).settle().collect()
    world.wait(1000).settle().change(suspend=False).settle().run().wait(39).settle()

    assert ("Running", 60) == (world.state, world.status.active_seconds)


def test_model_that_is_published_while_its_time_ends_counts() -> None:
    world = _policy(activeDeadlineSeconds=100).run().wait(100).settle()

    world.end(0, message=PUBLISHED, deleting=True).settle().collect()

    assert ("Complete", PUBLISHED.output) == (world.state, world.status.output)


def test_clock_of_a_node_gives_no_time_beyond_the_deadline() -> None:
    world = _policy(activeDeadlineSeconds=100).run().wait(100).settle()
    world.end(75, deleting=True).pod(finished_at=world.now - timedelta(seconds=30))
    world.collect().settle()

    assert ("Failed", 100) == (world.state, world.status.active_seconds)


def test_failure_at_the_deadline_is_not_retried() -> None:
    world = _policy(activeDeadlineSeconds=100).run().wait(99.5).settle().wait(1).exit(1)

    assert ("Failed", "DeadlineExceeded") == (world.state, world.cause[0])


def test_longer_deadline_lets_the_run_go_on() -> None:
    world = _policy(activeDeadlineSeconds=100).run().save().wait(100).settle().collect()

    world.change(runPolicy={"activeDeadlineSeconds": 150}).settle().run()

    assert ("Running", 2, 100, 50) == (
        world.state, world.status.attempt, world.status.active_seconds, world.reconcile().requeue_after
    )  # fmt: skip
    assert world.status.checkpoint is not None


@pytest.mark.parametrize("code", [0, 65])
def test_children_of_a_finished_run_go_when_their_time_is_over_and_nothing_comes_back(code: int) -> None:
    world = _policy(ttlSecondsAfterFinished=50).run().exit(code, message=PUBLISHED if code == 0 else None)
    state = world.state
    assert 50 == world.reconcile().requeue_after

    world.wait(49).settle()
    assert not any(child.deleting for child in world.children.values())
    world.wait(1).settle()
    assert all(child.deleting for child in world.children.values())
    world.collect().wait(1000).settle()

    assert (state, {}, 1, None) == (world.state, world.children, len(world.manifests), world.reconcile().requeue_after)


def test_failed_run_without_children_is_revived_by_other_resources() -> None:
    world = _policy(ttlSecondsAfterFinished=0, backoffLimit=0).run().exit(137, reason="OOMKilled").collect()
    assert ("Failed", {}) == (world.state, world.children)

    world.change(resources={"cpu": "2", "memory": "8Gi"}).settle()

    assert ("Pending", 2, None, 1) == (
        world.state, world.status.attempt, world.status.failure, world.config.micro_batch_divisor
    )  # fmt: skip


def _lose_pod(world: World) -> None:
    world.pods.clear()
    world.finish(ChildState.FAILED)
    world.settle().wait(SETTINGS.evidence_seconds).settle()


@pytest.mark.parametrize(
    "end",
    [
        pytest.param(lambda world: world.exit(1), id="failure"),
        pytest.param(lambda world: world.exit(65), id="final failure"),
        pytest.param(lambda world: world.exit(0, message=PUBLISHED), id="success"),
        pytest.param(lambda world: world.disrupt(), id="disruption"),
        pytest.param(lambda world: world.change(suspend=True).settle().collect(), id="suspension"),
        pytest.param(lambda world: world.change(resources={"memory": "8Gi"}).settle().collect(), id="other resources"),
        pytest.param(_lose_pod, id="lost pod"),
    ],
)
def test_running_time_is_accounted_for_once(end: Callable[[World], object]) -> None:
    world = _policy().run()
    world.wait(60).post(progress_percentage=5).settle()

    end(world)
    world.settle().wait(0).settle()

    assert (60, None) == (world.status.active_seconds, world.status.running_since)


def test_new_run_has_used_no_time() -> None:
    world = _policy().run().save().wait(60).change(hyperparameters={"seed": 7}).settle().collect()

    assert (0, 0, None, None) == (
        world.status.active_seconds, world.status.lost_seconds, world.status.checkpoint, world.status.running_since
    )  # fmt: skip


def test_last_word_of_an_earlier_run_is_not_the_new_ones() -> None:
    world = _policy().run().save(step=5).change(hyperparameters={"seed": 7}).settle()
    world.end(75, message=build_report(checkpoint=world.checkpoint(step=6))).collect().settle()

    assert (1, None) == (world.status.attempt, world.status.checkpoint)


def test_attempt_whose_number_of_pods_somebody_changed_is_replaced() -> None:
    world = World(spec=SPEC | {"nodes": 2}).settle().run()
    world.children[world.newest.name] = replace(world.newest, is_resized=True)
    assert "changed the number of pods" in world.reconcile().events[0].message

    world.settle().collect()

    assert ("Pending", 2, 0) == (world.state, world.status.attempt, world.status.restarts)


def test_run_that_returns_does_not_take_its_earlier_trainers_for_the_new_ones() -> None:
    world = World().settle().run().wait(60).post(progress_percentage=40).settle()
    world.change(hyperparameters={"seed": 7}, suspend=True).settle().collect().wait(5)
    world.change(hyperparameters={}, suspend=False).settle()
    assert ("Pending", 1) == (world.state, world.status.attempt)
    assert "waiting for the trainer's pod" in world.message

    world.run()

    assert ("Running", None) == (world.state, world.status.trainer_status)


def test_run_that_returns_to_its_queue_is_not_complete_by_its_earlier_model() -> None:
    world = World(labels={"kueue.x-k8s.io/queue-name": "a"}).settle().admit().settle().run().exit(0, message=PUBLISHED)
    assert "Complete" == world.state
    world.change(hyperparameters={"seed": 7}, suspend=True).settle().collect()

    world.change(hyperparameters={}, suspend=False).settle()

    assert "Queued" == world.state


def test_lost_time_is_what_lies_between_the_checkpoint_and_the_end() -> None:
    world = _policy(backoffLimit=5).run().wait(40).save().wait(25).exit(1).wait(15).settle()
    world.run().wait(7).exit(1)

    assert [25, 7] == [each.lost_seconds for each in world.status.restart_history]
    assert (32, 72) == (world.status.lost_seconds, world.status.active_seconds)


def test_model_that_is_published_has_lost_nothing() -> None:
    world = _policy().run().save().wait(60).exit(0, message=PUBLISHED)

    assert (0, 60) == (world.status.lost_seconds, world.status.active_seconds)


def test_suspension_keeps_progress_and_the_checkpoint() -> None:
    world = _policy().run().wait(30).change(suspend=True).settle()
    saved = world.checkpoint(step=12)
    world.end(75, deleting=True, message=build_report(checkpoint=saved)).settle().collect()
    assert ("Suspended", saved, 0) == (world.state, world.status.checkpoint, world.status.lost_seconds)

    world.change(suspend=False).settle().run()

    assert ("Running", saved, 2) == (world.state, world.status.checkpoint, world.status.attempt)


def test_older_checkpoint_does_not_replace_a_newer_one() -> None:
    world = _policy().run()
    older = world.checkpoint(step=1)
    world.wait(20).save(step=2).wait(20).post(checkpoint=older).settle()

    assert world.status.checkpoint is not None
    assert 2 == world.status.checkpoint.step


def test_checkpoint_is_progress_and_costs_no_writes_of_its_own() -> None:
    world = _policy().run().save(step=1).wait(4)
    world.post(progress_percentage=40, checkpoint=world.checkpoint(step=2))

    outcome = world.reconcile()

    assert (None, 11) == (outcome.status, outcome.requeue_after)


def test_events_of_a_job_without_a_pod_are_looked_at_ever_more_rarely() -> None:
    world = _policy()
    looks = []
    for second in range(40):
        if (child := world.reconcile().inspect) is not None:
            looks.append(second)
            world.refusal = PodRefusal(child_uid=child.uid, checked_at=world.now, message='violates PodSecurity "restricted"')
        world.settle().wait(1)

    assert [2, 4, 8, 16, 32] == looks
    assert "PodSecurityViolation" == world.state
    assert ("Warning", "PodSecurityViolation") in world.events


def test_refusal_is_over_when_there_is_a_pod() -> None:
    world = _policy()
    child = next(iter(world.children.values()))
    world.refusal = PodRefusal(child_uid=child.uid, checked_at=world.now, message="exceeded quota: team")
    assert "QuotaExceeded" == world.settle().state

    world.pod(node="n1").settle()

    assert ("Pending", None) == (world.state, world.reconcile().inspect)


def test_model_that_is_published_while_the_pod_is_evicted_counts() -> None:
    world = _policy().run()
    world.end(0, message=PUBLISHED, deleting=True, disruption_reason="EvictionByEvictionAPI").pod(phase="Failed")
    world.finish(ChildState.FAILED)
    world.settle()

    assert ("Complete", 0) == (world.state, world.status.restarts)


def test_pod_that_never_started_on_a_node_that_does_not_answer_is_shown_as_lost() -> None:
    world = _policy().pod(deleting=True, deletion_due=World().now).settle().wait(10).settle()

    assert "NodeLost" == world.state


@pytest.mark.parametrize("policy", [{"backoffLimit": 0}, {"ttlSecondsAfterFinished": 0, "backoffLimit": 0}])
def test_revived_run_goes_on_though_the_operator_is_killed_before_it_writes_that(policy: dict[str, Any]) -> None:
    world = _policy(**policy).run().exit(137, reason="OOMKilled").collect()
    world.change(resources={"cpu": "2", "memory": "8Gi"})

    world.kill(world.reconcile(), writes=1).settle()
    assert ("Pending", 2, 0) == (world.state, world.status.attempt, world.status.restarts)
    world.run().wait(5).exit(0, message=PUBLISHED)

    assert ("Complete", 2) == (world.state, len(world.manifests))


def test_model_that_is_published_while_its_job_is_deleted_counts_at_once() -> None:
    world = _policy().change(suspend=True).settle()

    world.end(0, message=PUBLISHED, deleting=True, started_at=world.now).settle()

    assert "Complete" == world.state


def test_suspended_failed_run_stays_until_it_is_resumed() -> None:
    world = _policy(backoffLimit=0).run().exit(1).change(suspend=True, resources={"memory": "8Gi"}).settle()
    assert "Failed" == world.state

    world.change(suspend=False).settle()

    assert ("Pending", 2) == (world.state, world.status.attempt)

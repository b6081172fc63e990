"""The decision, case by case, against a small model of the cluster."""

from dataclasses import replace
from typing import Any

import pytest
from finetune_api.conditions import find_condition, is_true
from finetune_api.contract import FailureReport, TrainerReport, compute_pod_shape, compute_run
from finetune_api.v1alpha1 import FineTuneJobSpec, Metric
from finetune_operator.observed import ChildState, Observed, ReceivedReport
from finetune_operator.outcome import EventType, Outcome
from finetune_operator.reconcile import reconcile
from statuses import record
from world import PUBLISHED, SETTINGS, SPEC, START, World, build_report


def test_the_first_write_has_every_condition_and_is_not_ready() -> None:
    world = World().settle()

    assert {"Ready", "Stalled", "Suspended", "Scheduled", "Running", "Complete", "Failed"} == {
        each.type for each in world.status.conditions
    }
    assert not is_true(world.status.conditions, "Ready")
    assert (1, "Pending", 1) == (world.status.observed_generation, world.state, world.status.attempt)


def test_one_child_is_created_and_then_nothing_more() -> None:
    world = World().settle()

    assert 1 == len(world.children)
    assert Outcome(requeue_after=2) == world.reconcile(), "it only looks again whether there is a pod"


@pytest.mark.parametrize(
    ("pod", "state", "word"),
    [
        pytest.param({"scheduled": False, "node": None}, "Pending", "waiting", id="not scheduled yet"),
        pytest.param(
            {"scheduled": False, "unscheduled_reason": "Unschedulable", "unscheduled_message": "0/1 nodes: claim not found"},
            "Unschedulable",
            "claim not found",
            id="unschedulable",
        ),
        pytest.param({"waiting_reason": "ContainerCreating"}, "Pending", "starts on node n1", id="starting"),
        pytest.param(
            {"waiting_reason": "ImagePullBackOff", "waiting_message": "Back-off pulling"},
            "ImagePullBackOff",
            "trainer:1: Back-off pulling",
            id="image cannot be pulled",
        ),
        pytest.param({"phase": "Running", "started_at": START}, "Running", "on node n1", id="running"),
    ],
)
def test_state_tells_what_the_pod_waits_for(pod: dict[str, Any], state: str, word: str) -> None:
    world = World().settle().pod(**pod).settle()

    ready = find_condition(world.status.conditions, "Ready")
    assert ready is not None
    assert state == ready.reason
    assert word in ready.message


def test_a_problem_while_pending_is_a_warning_event_and_not_stalled() -> None:
    world = World().settle().pod(scheduled=False, unscheduled_reason="Unschedulable").settle()

    assert ("Warning", "Unschedulable") in world.events
    assert not is_true(world.status.conditions, "Stalled")


def test_start_time_is_that_of_the_first_trainer() -> None:
    world = World().settle().run()

    assert world.now == world.status.start_time


def test_complete_takes_output_result_and_metric_from_the_termination_message() -> None:
    world = World().settle().run().wait(60).exit(0, message=PUBLISHED, reason="Completed")

    assert ("Complete", "test_accuracy=0.81") == (world.state, world.status.metric)
    assert PUBLISHED.output == world.status.output
    assert world.now == world.status.completion_time
    assert world.status.trainer_status is not None
    assert 100 == world.status.trainer_status.progress_percentage
    assert is_true(world.status.conditions, "Ready")
    assert is_true(world.status.conditions, "Complete")


def test_complete_stays_when_its_job_is_deleted() -> None:
    world = World().settle().run().exit(0, message=PUBLISHED)
    world.children.clear()
    world.pods.clear()

    assert Outcome() == world.reconcile()


def test_success_without_a_model_is_a_failure() -> None:
    world = World().settle().run().exit(0, message="")

    assert "Retrying" == world.state
    assert world.status.failure is not None
    assert "ResultMissing" == world.status.failure.reason


def test_an_ended_job_waits_for_its_pods_evidence_then_does_without() -> None:
    world = World().settle().run()
    world.finish(ChildState.FAILED)

    outcome = world.reconcile()
    assert (None, SETTINGS.evidence_seconds) == (outcome.status, outcome.requeue_after)

    world.wait(SETTINGS.evidence_seconds).settle()
    assert world.status.failure is not None
    assert "PodLost" == world.status.failure.reason


@pytest.mark.parametrize(
    ("code", "message", "reason", "expected", "state"),
    [
        pytest.param(64, None, "Error", "InvalidSpec", "Failed", id="invalid spec"),
        pytest.param(65, None, "Error", "InvalidData", "Failed", id="invalid data"),
        pytest.param(78, None, "Error", "ModelNotFound", "Failed", id="missing model"),
        pytest.param(70, None, "Error", "Diverged", "Retrying", id="diverged"),
        pytest.param(75, None, "Error", "Interrupted", "Retrying", id="interrupted"),
        pytest.param(137, None, "OOMKilled", "OOMKilled", "Retrying", id="out of memory"),
        pytest.param(1, "Traceback: boom", "Error", "TrainerError", "Retrying", id="crash"),
        pytest.param(
            65,
            build_report(failure=FailureReport(reason="OneClassOnly", message="pictures: all of class cat")),
            "Error",
            "OneClassOnly",
            "Failed",
            id="the trainer's own words",
        ),
    ],
)
def test_failure_is_classified(code: int, message: str | TrainerReport | None, reason: str, expected: str, state: str) -> None:
    world = World().settle().run().exit(code, message=message, reason=reason)

    failure = world.status.failure
    assert failure is not None
    assert (expected, code, "trainer", 1) == (failure.reason, failure.exit_code, failure.container, failure.attempt)
    assert state == world.state


def test_a_crash_keeps_the_end_of_the_log() -> None:
    world = World().settle().run().exit(1, message="x" * 5000 + "boom")

    assert world.status.failure is not None
    assert world.status.failure.log_tail is not None
    assert world.status.failure.log_tail.endswith("boom")
    assert 1024 == len(world.status.failure.log_tail)


def test_failed_is_stalled_and_names_the_cause() -> None:
    world = World().settle().run().exit(65)

    stalled = find_condition(world.status.conditions, "Stalled")
    assert stalled is not None
    assert ("True", "InvalidData") == (stalled.status.value, stalled.reason)
    assert ("Warning", "Failed") in world.events
    assert world.status.completion_time == world.now


def test_retries_wait_exponentially_and_end_at_the_limit() -> None:
    world = World(spec=SPEC | {"runPolicy": {"backoffLimit": 2}}).settle()
    delays = []
    while True:
        world.run().exit(1)
        if world.state == "Failed":
            break
        delay = world.reconcile().requeue_after
        assert delay is not None
        delays.append(delay)
        world.wait(delay - 1).settle()
        assert not world.active, "no attempt starts before its time"
        world.wait(1).settle()

    assert [10 <= delays[0] < 15, 20 <= delays[1] < 30] == [True, True]
    assert (2, 3, 2) == (len(delays), len(world.children), world.status.restarts)
    ready = find_condition(world.status.conditions, "Ready")
    assert ready is not None
    assert "backoffLimit 2 is reached" in ready.message


def test_a_retry_is_counted_once_even_if_the_operator_stops_before_the_next_attempt() -> None:
    world = World().settle().run().exit(1)

    first = world.reconcile()
    second = world.reconcile()

    assert first == second
    assert (1, None) == (world.status.restarts, first.status)


def test_a_lost_status_write_repeats_the_same_decision() -> None:
    world = World().settle().run()
    before = world.status
    world.exit(1)
    world.status = before
    world.settle()

    assert 1 == world.status.restarts


def test_suspend_deletes_the_attempt_and_shows_suspended_when_its_pods_are_gone() -> None:
    world = World().settle().run().change(suspend=True).settle()
    assert ("Suspending", [True]) == (world.state, [child.deleting for child in world.children.values()])

    world.collect()
    assert ("Suspended", {}) == (world.state, world.children)
    assert is_true(world.status.conditions, "Suspended")


def test_resume_starts_a_new_attempt_that_counts_no_restart() -> None:
    world = World().settle().run().change(suspend=True).settle().collect().change(suspend=False).settle()

    assert ("Pending", 2, 0) == (world.state, world.status.attempt, world.status.restarts)
    assert not is_true(world.status.conditions, "Suspended")


def test_a_job_created_suspended_creates_nothing() -> None:
    world = World(spec=SPEC | {"suspend": True}).settle()

    assert ("Suspended", {}) == (world.state, world.children)


def test_resume_after_a_failed_and_a_suspended_attempt_uses_a_fresh_name() -> None:
    world = World().settle().run().exit(1).wait(15).settle().run().change(suspend=True).settle().collect()

    world.change(suspend=False).settle()

    assert 3 == world.status.attempt
    assert [3] == [child.attempt for child in world.active]


def test_a_new_attempt_is_created_only_if_the_one_before_is_known_to_be_gone() -> None:
    world = World().settle().run().change(suspend=True).settle().collect().change(suspend=False)

    outcome = world.reconcile()

    run = compute_run(FineTuneJobSpec.model_validate(SPEC))
    assert (f"emoji-{run}-1",) == outcome.absent
    assert 1 == len(outcome.apply)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"hyperparameters": {"learningRate": 0.01}}, id="learning rate"),
        pytest.param({"budget": {"trainingSeconds": 99}}, id="budget"),
        pytest.param({"output": {"uri": "pvc://models/other"}}, id="output"),
    ],
)
def test_a_changed_training_field_starts_exactly_one_new_run(change: dict[str, Any]) -> None:
    world = World().settle().run().exit(0, message=PUBLISHED).change(**change).settle()
    assert world.children, "the new run waits for the old Job to go"
    assert all(child.deleting for child in world.children.values())

    world.collect()

    assert [1] == [child.attempt for child in world.active]
    assert ("Pending", 1, 0) == (world.state, world.status.attempt, world.status.restarts)
    assert (None, PUBLISHED.output) == (world.status.completion_time, world.status.output)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"runPolicy": {"backoffLimit": 9}}, id="run policy"),
        pytest.param({"resources": {"cpu": "4", "memory": "8Gi"}}, id="resources"),
        pytest.param({"suspend": True}, id="suspend"),
    ],
)
def test_a_complete_job_is_not_trained_again(change: dict[str, Any]) -> None:
    world = World().settle().run().exit(0, message=PUBLISHED).change(**change).settle()

    assert ("Complete", 1, 2) == (world.state, len(world.children), world.status.observed_generation)


def test_other_resources_replace_the_running_attempt() -> None:
    world = World().settle().run().change(resources={"cpu": "4", "memory": "8Gi"}).settle().collect()

    assert [(2, compute_pod_shape(FineTuneJobSpec.model_validate(world.spec)))] == [
        (child.attempt, child.pod_shape) for child in world.active
    ]
    assert 0 == world.status.restarts


def test_other_resources_give_a_failed_job_another_chance() -> None:
    world = World(spec=SPEC | {"runPolicy": {"backoffLimit": 0}}).settle().run().exit(137, reason="OOMKilled")
    assert "Failed" == world.state

    world.change(resources={"cpu": "2", "memory": "8Gi"}).settle()

    assert ("Pending", 2, None) == (world.state, world.status.attempt, world.status.completion_time)
    assert not is_true(world.status.conditions, "Stalled")


def test_progress_is_written_at_once_and_then_when_ten_seconds_are_over_or_no_other_report_comes() -> None:
    world = World().settle().run().post(progress_percentage=10, metrics=(Metric(name="loss", value="1.5"),)).settle()
    assert world.status.trainer_status is not None
    assert (10, "loss=1.5") == (world.status.trainer_status.progress_percentage, world.status.metric)

    world.wait(4).post(progress_percentage=20)
    outcome = world.reconcile()
    assert (None, 11) == (outcome.status, outcome.requeue_after)

    world.wait(6).post(progress_percentage=30).settle()
    assert 30 == world.status.trainer_status.progress_percentage

    world.wait(4).post(progress_percentage=40).wait(11).settle()
    assert 40 == world.status.trainer_status.progress_percentage


def test_only_a_write_of_mere_progress_can_wait_its_turn() -> None:
    running = World().settle().run()
    started, progressed = running.reconcile(), running.settle().post(progress_percentage=10).reconcile()

    assert (started.is_only_progress, progressed.is_only_progress) == (False, True)


def test_remaining_time_is_ours_and_not_the_trainers() -> None:
    world = World().settle().run().post(progress_percentage=10, estimated_remaining_seconds=9999)
    assert world.report is not None
    shown = replace(world, report=replace(world.report, seconds_left=41.6)).settle().status.trainer_status

    assert shown is not None
    assert shown.estimated_remaining_seconds == 42
    assert world.settle().status.trainer_status.estimated_remaining_seconds is None


def test_a_transition_does_not_wait_for_the_progress_interval() -> None:
    world = World().settle().run().post(progress_percentage=10).settle().wait(1).post(progress_percentage=90)

    world.exit(0, message=PUBLISHED)

    assert "Complete" == world.state


@pytest.mark.parametrize("limit", [pytest.param(0, id="failed"), pytest.param(1, id="retrying")])
def test_a_failed_attempt_shows_its_last_report_even_within_the_interval(limit: int) -> None:
    world = World(spec=SPEC | {"runPolicy": {"backoffLimit": limit}}).settle().run().post(progress_percentage=10).settle()

    world.wait(1).post(progress_percentage=90, metrics=(Metric(name="loss", value="0.5"),)).exit(1)

    assert world.status.trainer_status is not None
    assert (90, "loss=0.5") == (world.status.trainer_status.progress_percentage, world.status.metric)
    assert world.status.trainer_status.estimated_remaining_seconds is None


def test_a_report_of_another_attempt_is_not_shown() -> None:
    world = World().settle().run().exit(1).wait(15).settle().run()
    world.report = ReceivedReport(run=world.newest.run, attempt=1, received_at=world.now, report=build_report())
    world.settle()

    assert 2 == world.status.attempt
    assert world.status.trainer_status is None


def test_the_model_reported_by_post_counts_when_the_termination_message_is_lost() -> None:
    world = World().settle().run()
    child = next(iter(world.children.values()))
    world.report = ReceivedReport(run=child.run, attempt=1, received_at=world.now, report=PUBLISHED)
    world.pods.clear()
    world.finish(ChildState.COMPLETE)

    world.settle()

    assert ("Complete", PUBLISHED.output) == (world.state, world.status.output)


def test_a_job_that_is_being_deleted_is_left_alone() -> None:
    assert Outcome() == reconcile(replace(World().job, deleting=True), Observed(), now=START, settings=SETTINGS)


def test_an_unreadable_spec_stalls_and_touches_nothing() -> None:
    world = World().settle().run()
    job = replace(world.job, spec=None, spec_error="spec.task: 'speech' is unknown")

    outcome = reconcile(job, world.observed, now=world.now, settings=SETTINGS)

    assert outcome.status is not None
    record(outcome.status, generation=world.generation)
    assert ((), ()) == (outcome.delete, outcome.apply)
    assert is_true(outcome.status.conditions, "Stalled")


def test_a_refused_child_is_shown_as_pending_with_the_reason() -> None:
    world = World()

    outcome = world.refuse("jobs is forbidden: exceeded quota: team")

    assert outcome.status is not None
    ready = find_condition(outcome.status.conditions, "Ready")
    assert ready is not None
    assert "QuotaExceeded" == ready.reason
    assert "exceeded quota: team" in ready.message
    assert not is_true(outcome.status.conditions, "Failed")


def test_warnings_are_only_for_bad_news() -> None:
    world = World().settle().run().exit(0, message=PUBLISHED)

    assert [("Normal", "Pending"), ("Normal", "Running"), ("Normal", "Complete")] == world.events
    assert EventType.WARNING.value not in {kind for kind, _ in world.events}

"""The decision, case by case, and as whole lives against a small model of the cluster."""

import random
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from finetune_api.conditions import find_condition, is_true
from finetune_api.contract import FailureReport, TrainerReport, compute_pod_shape, compute_run
from finetune_api.v1alpha1 import (
    FineTuneJobSpec,
    FineTuneJobStatus,
    Metric,
    OutputStatus,
    Result,
    ResultMetric,
    TrainerStatus,
)
from finetune_operator.observed import ChildState, ChildView, JobView, Observed, PodRefusal, PodView, ReceivedReport
from finetune_operator.outcome import EventType, Outcome
from finetune_operator.reconcile import reconcile, refuse
from finetune_operator.settings import TrainerSettings

_START = datetime(2026, 1, 1, tzinfo=UTC)
_SETTINGS = TrainerSettings(image="trainer:1", report_url="https://operator:10443", report_ca="ca")
_SPEC: dict[str, Any] = {
    "task": "image-classification",
    "dataset": {"uri": "pvc://data"},
    "output": {"uri": "pvc://models/emoji"},
}


def _report(**fields: Any) -> TrainerReport:
    return TrainerReport.model_validate({"trainer_status": TrainerStatus(progress_percentage=40)} | fields)


_PUBLISHED = _report(
    output=OutputStatus(uri="pvc://models/emoji", digest="sha256:1", bytes=9),
    result=Result(metrics=(ResultMetric(name="test_accuracy", value="0.81", low="0.77", high="0.86"),)),
)


@dataclass
class World:
    """A FineTuneJob, its children and its pods, as a cluster would change them."""

    spec: dict[str, Any] = field(default_factory=lambda: dict(_SPEC))
    status: FineTuneJobStatus = field(default_factory=FineTuneJobStatus)
    generation: int = 1
    children: dict[str, ChildView] = field(default_factory=dict)
    pods: dict[str, PodView] = field(default_factory=dict)
    former_pods: dict[str, PodView] = field(default_factory=dict)
    report: ReceivedReport | None = None
    refusal: PodRefusal | None = None
    now: datetime = _START
    events: list[tuple[str, str]] = field(default_factory=list)

    @property
    def job(self) -> JobView:
        return JobView(
            namespace="team",
            name="emoji",
            uid="u",
            generation=self.generation,
            resource_version="1",
            deleting=False,
            spec=FineTuneJobSpec.model_validate(self.spec),
            spec_error=None,
            status=self.status,
        )

    @property
    def observed(self) -> Observed:
        return Observed(
            children=tuple(self.children.values()),
            pods=tuple(self.pods.values()),
            former_pods=tuple(self.former_pods.values()),
            report=self.report,
            refusal=self.refusal,
        )

    @property
    def state(self) -> str:
        ready = find_condition(self.status.conditions, "Ready")
        return ready.reason if ready else ""

    @property
    def active(self) -> list[ChildView]:
        return [child for child in self.children.values() if child.state is ChildState.ACTIVE]

    def reconcile(self) -> Outcome:
        return reconcile(self.job, self.observed, now=self.now, settings=_SETTINGS)

    def refuse(self, message: str) -> Outcome:
        """Let the API server refuse the child that the decision wants."""
        (manifest,) = self.reconcile().apply
        name = manifest["metadata"]["name"]
        return refuse(self.job, self.observed, child=name, message=message, now=self.now, settings=_SETTINGS)

    def settle(self) -> "World":
        """Reconcile and carry out, until nothing is left to do but wait."""
        for _ in range(10):
            outcome = self.reconcile()
            if outcome == replace(Outcome(), requeue_after=outcome.requeue_after, inspect=outcome.inspect):
                return self
            self.carry_out(outcome)
        raise AssertionError("the decision never comes to rest")

    def carry_out(self, outcome: Outcome) -> None:
        for deletion in outcome.delete:
            self.children[deletion.name] = replace(self.children[deletion.name], deleting=True)
        assert not [name for name in outcome.absent if name in self.children]
        for manifest in outcome.apply:
            labels = manifest["metadata"]["labels"]
            name = manifest["metadata"]["name"]
            assert name not in self.children, "a Job is never applied twice"
            self.children[name] = ChildView(
                name=name,
                uid=f"uid-{name}",
                resource_version="1",
                run=labels["finetune.dev/run"],
                attempt=int(labels["finetune.dev/attempt"]),
                pod_shape=labels["finetune.dev/pod-shape"],
                deleting=False,
                state=ChildState.ACTIVE,
                reason="",
                message="",
                created_at=self.now,
                finished_at=None,
            )
        self.status = outcome.status or self.status
        self.events += [(note.type.value, note.reason) for note in outcome.events]

    def wait(self, seconds: float) -> "World":
        self.now += timedelta(seconds=seconds)
        return self

    def change(self, **fields: Any) -> "World":
        self.spec = self.spec | fields
        self.generation += 1
        return self

    def pod(self, **fields: Any) -> "World":
        """Show or change the pod of the newest attempt."""
        child = max(self.children.values(), key=lambda each: each.attempt)
        known = self.pods.get(child.name) or PodView(
            name=f"{child.name}-0",
            uid="p",
            resource_version="1",
            child=child.name,
            run=child.run,
            attempt=child.attempt,
            phase="Pending",
            node="n1",
            deleting=False,
            image="trainer:1",
            scheduled=True,
            unscheduled_reason=None,
            unscheduled_message=None,
            waiting_reason=None,
            waiting_message=None,
            started_at=None,
            finished_at=None,
            exit_code=None,
            termination_reason=None,
            termination_message=None,
            pod_reason=None,
            pod_message=None,
        )
        self.pods[child.name] = replace(known, **fields)
        return self

    def run(self) -> "World":
        return self.pod(phase="Running", started_at=self.now).settle()

    def exit(self, code: int, *, message: str | TrainerReport | None = None, reason: str = "Error") -> "World":
        text = message.model_dump_json(by_alias=True) if isinstance(message, TrainerReport) else message
        self.pod(
            phase="Succeeded" if code == 0 else "Failed",
            exit_code=code,
            finished_at=self.now,
            termination_reason=reason,
            termination_message=text,
        )
        self.finish(ChildState.COMPLETE if code == 0 else ChildState.FAILED)
        return self.settle()

    def finish(self, state: ChildState) -> None:
        name = max(self.children.values(), key=lambda each: each.attempt).name
        self.children[name] = replace(self.children[name], state=state, finished_at=self.now, reason="BackoffLimitExceeded")

    def collect(self) -> "World":
        """Let the garbage collector finish the deletions that were asked for."""
        for name in [name for name, child in self.children.items() if child.deleting]:
            del self.children[name]
            self.pods.pop(name, None)
        return self.settle()

    def post(self, **fields: Any) -> "World":
        attempt = max(self.children.values(), key=lambda each: each.attempt)
        report = _report(trainer_status=TrainerStatus.model_validate(fields))
        self.report = ReceivedReport(run=attempt.run, attempt=attempt.attempt, received_at=self.now, report=report)
        return self


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
        pytest.param({"phase": "Running", "started_at": _START}, "Running", "on node n1", id="running"),
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
    world = World().settle().run().wait(60).exit(0, message=_PUBLISHED, reason="Completed")

    assert ("Complete", "test_accuracy=0.81") == (world.state, world.status.metric)
    assert _PUBLISHED.output == world.status.output
    assert world.now == world.status.completion_time
    assert world.status.trainer_status is not None
    assert 100 == world.status.trainer_status.progress_percentage
    assert is_true(world.status.conditions, "Ready")
    assert is_true(world.status.conditions, "Complete")


def test_complete_stays_when_its_job_is_deleted() -> None:
    world = World().settle().run().exit(0, message=_PUBLISHED)
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
    assert (None, _SETTINGS.evidence_seconds) == (outcome.status, outcome.requeue_after)

    world.wait(_SETTINGS.evidence_seconds).settle()
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
            _report(failure=FailureReport(reason="OneClassOnly", message="pictures: all of class cat")),
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
    world = World(spec=_SPEC | {"runPolicy": {"backoffLimit": 2}}).settle()
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

    assert ([10, 20], 3, 2) == (delays, len(world.children), world.status.restarts)
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
    world = World(spec=_SPEC | {"suspend": True}).settle()

    assert ("Suspended", {}) == (world.state, world.children)


def test_resume_after_a_failed_and_a_suspended_attempt_uses_a_fresh_name() -> None:
    world = World().settle().run().exit(1).wait(10).settle().run().change(suspend=True).settle().collect()

    world.change(suspend=False).settle()

    assert 3 == world.status.attempt
    assert [3] == [child.attempt for child in world.active]


def test_a_new_attempt_is_created_only_if_the_one_before_is_known_to_be_gone() -> None:
    world = World().settle().run().change(suspend=True).settle().collect().change(suspend=False)

    outcome = world.reconcile()

    run = compute_run(FineTuneJobSpec.model_validate(_SPEC))
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
    world = World().settle().run().exit(0, message=_PUBLISHED).change(**change).settle()
    assert world.children, "the new run waits for the old Job to go"
    assert all(child.deleting for child in world.children.values())

    world.collect()

    assert [1] == [child.attempt for child in world.active]
    assert ("Pending", 1, 0) == (world.state, world.status.attempt, world.status.restarts)
    assert (None, _PUBLISHED.output) == (world.status.completion_time, world.status.output)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"runPolicy": {"backoffLimit": 9}}, id="run policy"),
        pytest.param({"resources": {"cpu": "4", "memory": "8Gi"}}, id="resources"),
        pytest.param({"suspend": True}, id="suspend"),
    ],
)
def test_a_complete_job_is_not_trained_again(change: dict[str, Any]) -> None:
    world = World().settle().run().exit(0, message=_PUBLISHED).change(**change).settle()

    assert ("Complete", 1, 2) == (world.state, len(world.children), world.status.observed_generation)


def test_other_resources_replace_the_running_attempt() -> None:
    world = World().settle().run().change(resources={"cpu": "4", "memory": "8Gi"}).settle().collect()

    assert [(2, compute_pod_shape(FineTuneJobSpec.model_validate(world.spec).resources))] == [
        (child.attempt, child.pod_shape) for child in world.active
    ]
    assert 0 == world.status.restarts


def test_other_resources_give_a_failed_job_another_chance() -> None:
    world = World(spec=_SPEC | {"runPolicy": {"backoffLimit": 0}}).settle().run().exit(137, reason="OOMKilled")
    assert "Failed" == world.state

    world.change(resources={"cpu": "2", "memory": "8Gi"}).settle()

    assert ("Pending", 2, None) == (world.state, world.status.attempt, world.status.completion_time)
    assert not is_true(world.status.conditions, "Stalled")


def test_progress_is_written_at_once_and_then_at_most_every_ten_seconds() -> None:
    world = World().settle().run().post(progress_percentage=10, metrics=(Metric(name="loss", value="1.5"),)).settle()
    assert world.status.trainer_status is not None
    assert (10, "loss=1.5") == (world.status.trainer_status.progress_percentage, world.status.metric)

    world.wait(4).post(progress_percentage=20)
    outcome = world.reconcile()
    assert (None, 6) == (outcome.status, outcome.requeue_after)

    world.wait(6).settle()
    assert 20 == world.status.trainer_status.progress_percentage


def test_a_transition_does_not_wait_for_the_progress_interval() -> None:
    world = World().settle().run().post(progress_percentage=10).settle().wait(1).post(progress_percentage=90)

    world.exit(0, message=_PUBLISHED)

    assert "Complete" == world.state


def test_a_report_of_another_attempt_is_not_shown() -> None:
    world = World().settle().run().post(progress_percentage=70).exit(1).wait(10).settle().run()

    assert 2 == world.status.attempt
    assert world.status.trainer_status is None


def test_the_model_reported_by_post_counts_when_the_termination_message_is_lost() -> None:
    world = World().settle().run()
    child = next(iter(world.children.values()))
    world.report = ReceivedReport(run=child.run, attempt=1, received_at=world.now, report=_PUBLISHED)
    world.pods.clear()
    world.finish(ChildState.COMPLETE)

    world.settle()

    assert ("Complete", _PUBLISHED.output) == (world.state, world.status.output)


def test_a_job_that_is_being_deleted_is_left_alone() -> None:
    assert Outcome() == reconcile(replace(World().job, deleting=True), Observed(), now=_START, settings=_SETTINGS)


def test_an_unreadable_spec_stalls_and_touches_nothing() -> None:
    world = World().settle().run()
    job = replace(world.job, spec=None, spec_error="spec.task: 'speech' is unknown")

    outcome = reconcile(job, world.observed, now=world.now, settings=_SETTINGS)

    assert outcome.status is not None
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
    world = World().settle().run().exit(0, message=_PUBLISHED)

    assert [("Normal", "Pending"), ("Normal", "Running"), ("Normal", "Complete")] == world.events
    assert EventType.WARNING.value not in {kind for kind, _ in world.events}


@pytest.mark.parametrize("seed", range(200))
def test_random_lives_never_overlap_attempts_and_never_exceed_the_limit(seed: int) -> None:
    """Whatever happens in whatever order, at most one attempt is active and retries stay within backoffLimit."""
    chance = random.Random(seed)
    world = World(spec=_SPEC | {"runPolicy": {"backoffLimit": 2}}).settle()
    for _ in range(40):
        _happen(world, chance)
        world.settle()
        assert 1 >= len(world.active)
        assert 2 >= world.status.restarts
        assert world.status.observed_generation == world.generation
        assert not (is_true(world.status.conditions, "Complete") and is_true(world.status.conditions, "Failed"))


def _happen(world: World, chance: random.Random) -> None:
    active = [child for child in world.active if not child.deleting]
    choice = chance.randrange(8)
    if choice == 0:
        world.change(suspend=chance.random() < 0.5)
    elif choice == 1:
        world.change(hyperparameters={"seed": chance.randrange(3)})
    elif choice == 2:
        world.change(resources={"cpu": str(chance.randrange(1, 3)), "memory": "1Gi"})
    elif choice == 3:
        world.wait(chance.choice([1, 20, 400]))
    elif choice == 4:
        world.collect()
    elif choice == 5 and active:
        world.run()
    elif choice == 6 and active:
        world.run().exit(chance.choice([0, 1, 65, 75, 137]), message=chance.choice([None, _PUBLISHED]))
    elif choice == 7:
        for name in [name for name in world.children if chance.random() < 0.5]:
            del world.children[name]
            world.pods.pop(name, None)

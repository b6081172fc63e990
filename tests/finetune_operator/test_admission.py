"""Attempts that a queue holds, admits and evicts."""

from dataclasses import replace
from typing import Any

import pytest
import yaml
from finetune_api import names
from finetune_api.conditions import find_condition
from finetune_operator.manifests.job import build_job
from finetune_operator.policies.accelerator import shape_pods
from world import PUBLISHED, SETTINGS, SPEC, World

_QUEUE = "kueue.x-k8s.io/queue-name"
_PRIORITY = "kueue.x-k8s.io/priority-class"
_LABELS = {_QUEUE: "team-queue"}


def _queued(**spec: Any) -> World:
    return World(spec=SPEC | spec, labels=dict(_LABELS)).settle()


def _running(**spec: Any) -> World:
    return _queued(**spec).admit().settle().run()


def _restarts(world: World) -> list[tuple[int, str, bool]]:
    return [(each.attempt, each.reason, each.counted) for each in world.status.restart_history]


def test_job_for_a_queue_is_the_golden_one(golden: Any) -> None:
    world = World(labels=_LABELS | {_PRIORITY: "high"})
    job = replace(world.job, topology={"kueue.x-k8s.io/podset-required-topology": "cloud.provider.com/rack"})
    assert job.spec is not None

    golden(
        "job-queue.yaml",
        yaml.safe_dump(build_job(job, job.spec, attempt=1, shape=shape_pods(job.spec, {}), settings=SETTINGS), sort_keys=False),
    )


def test_job_without_a_queue_leaves_the_suspension_to_others() -> None:
    world = World().settle()

    assert "suspend" not in world.manifests[0]["spec"]
    assert names.ANNOTATION_QUEUE not in world.manifests[0]["metadata"]["annotations"]


def test_attempt_is_queued_until_it_is_admitted_and_no_deadline_counts() -> None:
    world = _queued(runPolicy={"startDeadlineSeconds": 60, "activeDeadlineSeconds": 60})
    for _ in range(3):
        world.wait(4000).settle()
    status = world.status

    assert ("Queued", "queue team-queue has to admit attempt 1") == (world.state, world.message)
    assert (None, 0, 1) == (status.pending_since, status.active_seconds, len(world.manifests))
    assert {"False"} == {each.status.value for each in status.conditions}
    scheduled = find_condition(status.conditions, "Scheduled")
    assert scheduled is not None
    assert "Queued" == scheduled.reason
    assert [("Normal", "Queued")] == world.events


def test_start_deadline_counts_from_the_admission() -> None:
    world = _queued(runPolicy={"startDeadlineSeconds": 60}).wait(4000).settle().admit().settle()
    assert "Pending" == world.state
    world.wait(59).settle()
    assert "Pending" == world.state
    world.wait(1).settle()

    assert ("Failed", ("StartDeadlineExceeded", "TrainerNotStarted")) == (world.state, world.cause)
    assert world.newest.deleting


def test_eviction_is_a_free_restart_of_the_same_attempt() -> None:
    world = _running(nodes=2, runPolicy={"backoffLimit": 0}).wait(30).save().wait(7).suspend_child().settle()
    assert ("Queued", 0) == (world.state, world.status.restarts)
    assert "its trainers save their state and stop" in world.message
    world.wait(3).evict().settle()
    evicted = world.status
    world.wait(500).settle().admit().settle().run().wait(20).exit(0, message=PUBLISHED)

    assert [(1, "QueueEvicted", False)] == _restarts(world)
    assert (1, 0, 40, 10) == (
        evicted.restarts,
        evicted.restarts_counted_towards_limit,
        evicted.active_seconds,
        evicted.lost_seconds,
    )
    assert (None, 100) == (evicted.running_since, evicted.checkpoint.step if evicted.checkpoint else None)
    assert ("Complete", 1, 1, 60) == (world.state, world.status.attempt, len(world.manifests), world.status.active_seconds)
    assert ("Normal", "QueueEvicted") in world.events


def test_eviction_counts_once_however_often_it_is_looked_at() -> None:
    world = _running().wait(5).evict()
    for _ in range(5):
        world.wait(50).settle()

    assert 1 == world.status.restarts


def test_operator_that_was_down_learns_from_the_job_when_it_was_evicted() -> None:
    world = _running().wait(20).evict()
    world.children[world.newest.name] = replace(world.newest, suspended_at=world.now)
    world.former_pods = {}
    world.wait(4000).settle()

    assert (20, 20) == (world.status.active_seconds, world.status.restart_history[0].lost_seconds)


def test_time_between_a_missed_eviction_and_the_next_admission_is_not_counted() -> None:
    world = _running().wait(20).evict()
    world.pods, world.former_pods = {}, {}
    world.wait(10).admit().pod(created_at=world.now).wait(4000)
    world.pod(phase="Running", started_at=world.now).settle()

    assert 30 == world.status.active_seconds


def test_attempt_of_which_a_part_has_completed_is_replaced_when_it_is_evicted() -> None:
    world = _running(nodes=2).wait(9).end(0, index=1).evict().settle()
    assert world.newest.deleting
    world.collect()

    assert ("Queued", 2, [(1, "QueueEvicted", False)]) == (world.state, world.status.attempt, _restarts(world))


def test_eviction_before_the_start_is_no_restart() -> None:
    world = _queued().admit().settle().pod().settle().evict().settle()

    assert ("Queued", 0) == (world.state, world.status.restarts)


def test_eviction_that_was_missed_is_seen_from_the_next_pods() -> None:
    """The operator is down from before the eviction until after the next admission."""
    world = _running().wait(30).save()
    world.wait(9).evict().wait(50).admit().wait(1).pod().wait(2)
    world.pod(phase="Running", started_at=world.now).settle()
    again = world.status
    world.wait(10).settle()

    assert ("Running", [(1, "QueueEvicted", False)]) == (world.state, _restarts(world))
    assert world.pods[f"{world.newest.name}-0"].started_at == again.running_since
    assert 1 == world.status.restarts


def test_pods_that_started_at_different_times_are_no_eviction() -> None:
    world = _queued(nodes=2).admit().settle().pod(0).pod(1).wait(5)
    world.pod(0, phase="Running", started_at=world.now).settle().wait(5)
    world.pod(1, phase="Running", started_at=world.now).settle().forget(0).settle()

    assert 0 == world.status.restarts


def test_trainer_that_publishes_while_it_is_evicted_is_complete() -> None:
    world = _running().wait(9).suspend_child().end(0, message=PUBLISHED).forget().settle()

    assert ("Complete", 0) == (world.state, world.status.restarts)
    assert world.newest.deleting, "or the queue would admit it again"


def test_failure_after_an_eviction_counts_as_one_and_queues_the_next_attempt() -> None:
    world = _running().wait(9).evict().settle().admit().settle().run().wait(9).exit(1).wait(60).settle()

    assert [(1, "QueueEvicted", False), (1, "TrainerError", True)] == _restarts(world)
    assert ("Queued", 2, True) == (world.state, world.status.attempt, world.newest.suspended)


def test_user_suspends_what_the_queue_holds() -> None:
    world = _queued().change(suspend=True).settle()
    assert ("Suspending", True) == (world.state, world.newest.deleting)
    world.collect()
    assert "Suspended" == world.state
    world.change(suspend=False).settle()

    assert ("Queued", 0) == (world.state, world.status.restarts)


def test_time_that_is_used_up_ends_a_run_in_the_queue() -> None:
    world = _running(runPolicy={"activeDeadlineSeconds": 30}).wait(31).evict().settle().collect()

    assert ("Failed", ("DeadlineExceeded", "DeadlineExceeded")) == (world.state, world.cause)


@pytest.mark.parametrize(
    "labels",
    [
        pytest.param({_QUEUE: "other"}, id="queue"),
        pytest.param(_LABELS | {_PRIORITY: "high"}, id="priority"),
        pytest.param({}, id="no queue"),
    ],
)
def test_change_of_the_queue_replaces_an_attempt_that_is_queued(labels: dict[str, str]) -> None:
    world = _queued()
    world.labels = labels
    world.settle().collect()

    assert (2, 0) == (world.status.attempt, world.status.restarts)
    assert labels.items() <= world.manifests[-1]["metadata"]["labels"].items()
    assert bool(labels) == world.newest.suspended


def test_change_of_the_queue_leaves_an_attempt_that_runs() -> None:
    world = _running()
    world.labels = {_QUEUE: "other"}
    world.settle().wait(5).exit(1).wait(60).settle()

    assert (2, "other") == (world.status.attempt, world.newest.queue)


def test_queue_that_the_cluster_chose_is_no_change() -> None:
    """With a default queue, Kueue's webhook sets the label and the suspension itself."""
    world = World().settle()
    world.children[world.newest.name] = replace(world.newest, suspended=True, queue="default")
    world.settle()

    assert ("Queued", 1, False) == (world.state, len(world.manifests), world.newest.deleting)
    assert "queue default has to admit" in world.message


def test_job_that_somebody_suspended_is_left_to_them() -> None:
    world = World().settle()
    world.children[world.newest.name] = replace(world.newest, suspended=True)
    world.settle()

    assert ("Queued", False) == (world.state, world.newest.deleting)
    assert "the manager that suspended the Job has to admit attempt 1" == world.message


def test_stop_of_an_evicted_pod_that_is_not_confirmed_is_told() -> None:
    world = _running().suspend_child()
    world.pod(deletion_due=world.now).wait(11).settle()

    assert "NodeLost" == world.state


def test_next_attempt_of_a_killed_operator_is_no_eviction() -> None:
    """The operator was killed after it created the second attempt, before it wrote how the first one ended."""
    world = _running().wait(10)
    world.children.clear()
    world.pods.clear()
    world.kill(world.reconcile(), writes=1).settle()

    assert (2, 0, None, 10) == (
        world.status.attempt,
        world.status.restarts,
        world.status.running_since,
        world.status.active_seconds,
    )

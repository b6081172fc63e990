"""The pods of an attempt as one: which of them tells why it ended, and how a run with many pods lives."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from finetune_api import names
from finetune_api.v1alpha1 import FailureAction, FineTuneJobSpec
from finetune_operator.observed import Observed
from finetune_operator.policies.failure import classify_failure
from finetune_operator.policies.gang import Gang, build_gang, find_root, has_cause
from world import PUBLISHED, SETTINGS, SPEC, START, World, build_child, build_pod

_FREE, _RETRY, _FAIL = FailureAction.RETRY_FREE, FailureAction.RETRY, FailureAction.FAIL


def _at(seconds: float) -> Any:
    return START + timedelta(seconds=seconds)


def _exit(code: int, at: float, **fields: Any) -> dict[str, Any]:
    return {"exit_code": code, "finished_at": _at(at), "started_at": START} | fields


def _deleted(code: int | None, asked: float, at: float, **fields: Any) -> dict[str, Any]:
    ended = {} if code is None else _exit(code, at)
    return {"deleting": True, "deleted_at": _at(asked), **ended, **fields}


def _evicted(code: int, asked: float, at: float, reason: str = "EvictionByEvictionAPI") -> dict[str, Any]:
    return _deleted(code, asked, at, disruption_reason=reason, disrupted_at=_at(asked))


_OOM = {"termination_reason": "OOMKilled"}
_RUNS = {"phase": "Running", "started_at": START}
_GONE = _RUNS | {"uid": "gone"}


@pytest.mark.parametrize(
    ("pods", "speaker", "reason", "action"),
    [
        pytest.param([_exit(76, 9), _exit(1, 9), _exit(76, 9)], 1, "TrainerError", _RETRY, id="one crashed, others lost it"),
        pytest.param([_exit(76, 8), _exit(1, 9)], 1, "TrainerError", _RETRY, id="whatever the clocks say"),
        pytest.param([_exit(1, 9), _exit(70, 8)], 1, "Diverged", _RETRY, id="first of two failures"),
        pytest.param([_exit(1, 9), _exit(137, 8, **_OOM)], 1, "OOMKilled", _RETRY, id="out of memory before a crash"),
        pytest.param([_deleted(137, 9, 12), _exit(1, 9)], 1, "TrainerError", _RETRY, id="deleted after a crash"),
        pytest.param([_deleted(75, 9, 12), _exit(65, 9)], 1, "InvalidData", _FAIL, id="deleted after bad data"),
        pytest.param([_exit(76, 5), _exit(65, 9)], 1, "InvalidData", _FAIL, id="a verdict comes first"),
        pytest.param([_evicted(75, 5, 6), _exit(65, 9)], 1, "InvalidData", _FAIL, id="a verdict comes before an eviction"),
        pytest.param([_exit(76, 7), _evicted(75, 5, 6)], 1, "Evicted", _FREE, id="evicted, and the other lost it"),
        pytest.param([_exit(75, 6), _evicted(75, 5, 6)], 1, "Evicted", _FREE, id="evicted, and all left together"),
        pytest.param([_exit(1, 6), _evicted(137, 5, 8)], 1, "Evicted", _FREE, id="evicted, and the other crashed of it"),
        pytest.param([_exit(1, 5), _evicted(75, 6, 8)], 0, "TrainerError", _RETRY, id="crashed, then evicted"),
        pytest.param([_exit(1, 5), _evicted(137, 300, 301, "DeletionByTaintManager")], 1, "Evicted", _FREE, id="node gone"),
        pytest.param([_exit(76, 5), _evicted(137, 300, 301, "DeletionByPodGC")], 1, "NodeLost", _FREE, id="node lost"),
        pytest.param([_exit(76, 7), _deleted(75, 5, 6)], 1, "PodDeleted", _FREE, id="somebody deleted one"),
        pytest.param([_exit(75, 6), _deleted(75, 6, 6)], 1, "PodDeleted", _FREE, id="somebody deleted one, all left at once"),
        pytest.param([_exit(75, 5), _deleted(75, 6, 6)], 0, "Interrupted", _RETRY, id="one was interrupted, then deleted"),
        pytest.param([_exit(76, 5), _deleted(75, 5, 6)], 0, "PeerLost", _RETRY, id="network, and the other was deleted"),
        pytest.param([_exit(76, 5), _exit(76, 6)], 0, "PeerLost", _RETRY, id="network"),
        pytest.param([_exit(76, 5), _GONE], 1, "PodLost", _FREE, id="gone without a trace"),
        pytest.param([_exit(1, 5), _GONE], 0, "TrainerError", _RETRY, id="gone without a trace after a crash"),
        pytest.param([_exit(76, 5), _RUNS], 0, "PeerLost", _RETRY, id="still there"),
        pytest.param([_exit(76, 5), _deleted(None, 6, 0)], 0, "PeerLost", _RETRY, id="deleted before it ran"),
        pytest.param([_exit(76, 5), {"pod_reason": "OutOfcpu"}], 1, "OutOfcpu", _RETRY, id="refused by its node"),
        pytest.param([_exit(0, 5), _exit(0, 6)], 0, "ResultMissing", _RETRY, id="all done, no model"),
        pytest.param([_exit(0, 5), _exit(1, 6)], 1, "TrainerError", _RETRY, id="one done, one crashed"),
    ],
)
def test_pod_that_failed_first_by_itself_tells_the_cause(
    pods: list[dict[str, Any]], speaker: int, reason: str, action: FailureAction
) -> None:
    views = tuple(build_pod(**({"index": index, "uid": f"u{index}"} | pod)) for index, pod in enumerate(pods))
    gang = Gang(pods=views, gone=frozenset({"gone"}))
    spec = FineTuneJobSpec.model_validate(SPEC)

    root = find_root(gang)
    verdict = classify_failure(build_child(nodes=len(pods)), root, report=None, spec=spec)

    assert (speaker, reason, action) == (root.index if root else None, verdict.failure.reason, verdict.action)
    assert has_cause(gang) == (reason not in ("PeerLost", "ResultMissing"))


def test_order_of_the_pods_changes_nothing() -> None:
    pods = [build_pod(index=index, **_exit(code, 9 - index)) for index, code in enumerate((76, 1, 76, 70))]

    assert find_root(Gang(pods=tuple(pods))) == find_root(Gang(pods=tuple(reversed(pods)))) == pods[3]


def test_no_pod_tells_nothing() -> None:
    assert find_root(Gang()) is None


def test_newest_pod_of_an_index_counts() -> None:
    old = build_pod(uid="old", created_at=_at(0), **_deleted(75, 5, 6))
    new = build_pod(uid="new", created_at=_at(9), phase="Running")
    other = build_pod(uid="other", index=1, phase="Running")
    elsewhere = build_pod(uid="elsewhere", attempt=2)
    observed = Observed(pods=(elsewhere, other, new), former_pods=(old,))

    assert Gang(pods=(new, other)) == build_gang(observed, run=new.run, attempt=1)
    assert Gang(pods=(old,), gone=frozenset({"old"})) == build_gang(Observed(former_pods=(old,)), run=old.run, attempt=1)


def test_pod_that_was_created_twice_is_the_one_that_is_left() -> None:
    kept = build_pod(uid="kept", created_at=_at(0), **_RUNS)
    surplus = build_pod(uid="surplus", created_at=_at(9), phase="Pending")

    assert Gang(pods=(kept,)) == build_gang(Observed(pods=(kept,), former_pods=(surplus,)), run=kept.run, attempt=1)


def _gang(nodes: int = 3, **spec: Any) -> World:
    return World(spec=SPEC | {"nodes": nodes} | spec).settle()


def test_service_comes_before_the_job_of_many_pods() -> None:
    world = World(spec=SPEC | {"nodes": 2})

    assert ["Service", "Job"] == [manifest["kind"] for manifest in world.reconcile().apply]
    assert ["Job"] == [manifest["kind"] for manifest in World().reconcile().apply]


def test_run_is_running_when_all_pods_run() -> None:
    world = _gang().pod(0, phase="Running", started_at=START).settle()
    assert ("Pending", START) == (world.state, world.status.running_since)
    world.wait(5).run()

    assert "Running" == world.state
    assert "runs in 3 pods, the first of them is pod" in world.message
    assert START == world.status.running_since


def test_attempt_that_starts_in_part_is_given_up_and_accounted_for() -> None:
    world = _gang(runPolicy={"startDeadlineSeconds": 30}).pod(0, phase="Running", started_at=START).settle()
    world.pod(1, scheduled=False, unscheduled_reason="Unschedulable", unscheduled_message="no room").wait(30).settle()

    assert ("Failed", ("StartDeadlineExceeded", "Unschedulable")) == (world.state, world.cause)
    assert (30, None) == (world.status.active_seconds, world.status.running_since)
    assert world.newest.deleting


def test_failed_pod_ends_the_attempt_and_the_next_waits_for_all_of_them() -> None:
    world = _gang().run().wait(9).end(1, index=2).settle()
    assert "Running" == world.state  # until the Job controller has stopped the others
    world.end(76, index=0).finish_failed().settle().wait(SETTINGS.evidence_seconds).settle()
    assert ("Pending", 1, "TrainerError") == (world.state, world.status.restarts, world.cause[1])
    world.wait(60).settle()
    assert "pod emoji" in world.message
    assert 1 == len(world.manifests)
    world.end(137, index=1, deleting=True).settle()

    assert (2, 2) == (len(world.manifests), world.status.attempt)


def test_pod_that_does_not_stop_is_told_of_while_the_job_ends() -> None:
    world = _gang(2).run().wait(9).end(76, index=0)
    world.pod(1, deleting=True, deleted_at=world.now, deletion_due=world.now + timedelta(seconds=60)).settle()
    assert "Running" == world.state
    world.wait(71).settle()

    assert "NodeLost" == world.state
    assert world.newest.name + "-1" in world.message


def test_model_counts_when_the_first_pod_has_published_it() -> None:
    world = _gang(2).run().wait(9).end(0, index=0, message=PUBLISHED).end(1, index=1).finish_failed().settle()

    assert "Complete" == world.state


def test_words_of_another_pod_are_no_result() -> None:
    world = _gang(2).run().wait(9).end(0, index=0).end(0, index=1, message=PUBLISHED).finish_failed().settle()

    assert ("Retrying", "ResultMissing") == (world.state, world.cause[1])


def test_running_time_is_from_the_first_start_to_the_last_end() -> None:
    world = _gang(2).pod(0, phase="Running", started_at=START).settle().wait(4).run()
    world.wait(6).end(1, index=1).wait(3).end(76, index=0).finish_failed().settle()

    assert 13 == world.status.active_seconds


def test_number_of_nodes_changes_without_a_restart_and_within_the_run() -> None:
    world = _gang(2).run()
    run = world.status.run
    for nodes in (1, 2):
        world.wait(9).save().change(nodes=nodes).settle()
        assert world.newest.deleting
        world.collect().run()
        assert ("Running", nodes) == (world.state, world.newest.nodes)

    assert (run, 3, 0, 0) == (world.status.run, world.status.attempt, world.status.restarts, world.status.lost_seconds)


def test_message_about_many_pods_that_do_not_stop_is_short() -> None:
    world = _gang(1000).run()
    for name in list(world.children):
        del world.children[name]
    world.settle()

    assert "and 997 more has stopped" in world.message
    assert len(world.message) < 300


@pytest.mark.parametrize(("attempt", "nodes"), [(1, 1024), (999, 1024), (9999, 1000), (99_999, 100)])
def test_host_names_fit_into_63_characters(attempt: int, nodes: int) -> None:
    """The longest name of a FineTuneJob, with the highest index; the API server checks Indexed Jobs for the same."""
    job = replace(World().job, name="n" * names.MAX_NAME_LENGTH, uid="0a1b2c3d-4e5f")
    child = names.child_name(job.name, "0a1b2c3d", attempt)

    assert len(f"{child}-{nodes - 1}") <= 63
    assert len(names.service_name(job.name, job.uid)) <= 63

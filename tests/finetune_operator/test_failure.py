"""The table of failures: from what ended a pod to the cause and what follows."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from finetune_api.contract import FailureReport, TrainerReport
from finetune_api.v1alpha1 import FailureAction, FineTuneJobSpec, TrainerStatus
from finetune_operator.observed import ChildState
from finetune_operator.policies.failure import Verdict, classify_failure, is_disruption
from world import build_child, build_pod

_NOW = datetime(2026, 1, 1, tzinfo=UTC)
_CHILD = build_child(
    state=ChildState.FAILED,
    reason="BackoffLimitExceeded",
    message="Job has reached the specified backoff limit",
    finished_at=_NOW,
)
_POD = build_pod(name="emoji-0a1b2c3d-1-0-abcde", started_at=_NOW, finished_at=_NOW)


def _classify(pod: dict[str, Any] | None, *, report: TrainerReport | None = None, rules: Any = ()) -> Verdict:
    spec = FineTuneJobSpec.model_validate(
        {
            "task": "image-classification",
            "dataset": {"uri": "pvc://data/pets"},
            "model": {"uri": "pvc://models/base"},
            "output": {"uri": "pvc://models/pets"},
            "runPolicy": {"failureRules": rules},
        }
    )
    return classify_failure(_CHILD, None if pod is None else replace(_POD, **pod), report=report, spec=spec)


def _says(reason: str, message: str = "in its own words") -> TrainerReport:
    return TrainerReport(trainer_status=TrainerStatus(), failure=FailureReport(reason=reason, message=message))


_FREE, _RETRY, _FAIL = FailureAction.RETRY_FREE, FailureAction.RETRY, FailureAction.FAIL


@pytest.mark.parametrize(
    ("pod", "reason", "action", "words"),
    [
        pytest.param({"exit_code": 75, "disruption_reason": "PreemptionByScheduler"}, "Preempted", _FREE, "_", id="preempted"),
        pytest.param({"exit_code": 75, "disruption_reason": "EvictionByEvictionAPI"}, "Evicted", _FREE, "_", id="drained"),
        pytest.param({"exit_code": 143, "disruption_reason": "DeletionByTaintManager"}, "Evicted", _FREE, "_", id="tainted"),
        pytest.param({"exit_code": 137, "disruption_reason": "TerminationByKubelet"}, "Evicted", _FREE, "_", id="node pressure"),
        pytest.param({"disruption_reason": "DeletionByPodGC"}, "NodeLost", _FREE, "node n1", id="node gone"),
        pytest.param({"exit_code": 1, "disruption_reason": "EvictionByEvictionAPI"}, "Evicted", _FREE, "_", id="crash"),
        pytest.param({"exit_code": 75, "disruption_reason": "ByVendor"}, "Disrupted", _FREE, "ByVendor", id="unknown disruption"),
        pytest.param({"pod_reason": "Evicted", "pod_message": "low on disk"}, "Evicted", _FREE, "low on disk", id="evicted"),
        pytest.param({"pod_reason": "Preempting"}, "Preempted", _FREE, "_", id="preempted by a critical pod"),
        pytest.param({"pod_reason": "NodeLost", "phase": "Running"}, "NodeLost", _FREE, "_", id="node lost"),
        pytest.param({"pod_reason": "Terminated"}, "NodeShutdown", _FREE, "_", id="node shut down"),
        pytest.param({"pod_reason": "NodeShutdown"}, "NodeShutdown", _FREE, "_", id="node shutting down"),
        pytest.param({"exit_code": 75, "deleting": True}, "PodDeleted", _FREE, "deleted", id="deleted and saved"),
        pytest.param({"exit_code": 143, "deleting": True}, "PodDeleted", _FREE, "_", id="deleted before python listened"),
        pytest.param({"exit_code": 137, "deleting": True}, "PodDeleted", _FREE, "_", id="deleted and grace over"),
        pytest.param({"deleting": True}, "PodDeleted", _FREE, "_", id="deleted before it ran"),
        pytest.param({"exit_code": 1, "deleting": True}, "TrainerError", _RETRY, "code 1", id="crash while deleted"),
        pytest.param(None, "PodLost", _FREE, "without a trace", id="gone without a trace"),
        pytest.param({"phase": "Running"}, "PodLost", _FREE, "node n1", id="did not run to its end"),
        pytest.param({"exit_code": 137, "termination_reason": "OOMKilled"}, "OOMKilled", _RETRY, "4Gi", id="out of memory"),
        pytest.param(
            {"exit_code": 137, "termination_reason": "OOMKilled", "deleting": True}, "OOMKilled", _RETRY, "_", id="both"
        ),
        pytest.param({"exit_code": 64}, "InvalidSpec", _FAIL, "_", id="64"),
        pytest.param({"exit_code": 65}, "InvalidData", _FAIL, "pvc://data/pets", id="65"),
        pytest.param({"exit_code": 78}, "ModelNotFound", _FAIL, "pvc://models/base", id="78"),
        pytest.param({"exit_code": 65, "disruption_reason": "EvictionByEvictionAPI"}, "InvalidData", _FAIL, "_", id="both 65"),
        pytest.param({"exit_code": 0, "phase": "Succeeded"}, "ResultMissing", _RETRY, "pvc://models/pets", id="no model"),
        pytest.param({"exit_code": 1}, "TrainerError", _RETRY, "_", id="1"),
        pytest.param({"exit_code": 70}, "Diverged", _RETRY, "learningRate", id="70"),
        pytest.param({"exit_code": 75}, "Interrupted", _RETRY, "_", id="75 by itself"),
        pytest.param({"exit_code": 76}, "PeerLost", _RETRY, "network", id="76 and no other pod"),
        pytest.param({"exit_code": 137}, "Killed", _RETRY, "SIGKILL", id="137 by itself"),
        pytest.param({"exit_code": 143}, "Interrupted", _RETRY, "SIGTERM", id="143 by itself"),
        pytest.param({"exit_code": 3}, "TrainerError", _RETRY, "code 3", id="a code that is not ours"),
        pytest.param({"pod_reason": "OutOfcpu", "pod_message": "no cpu"}, "OutOfcpu", _RETRY, "no cpu", id="refused by the node"),
    ],
)  # fmt: skip
def test_end_of_a_pod_has_a_cause_and_an_action(
    pod: dict[str, Any] | None, reason: str, action: FailureAction, words: str
) -> None:
    verdict = _classify(pod)

    assert (reason, action) == (verdict.failure.reason, verdict.action)
    assert words in verdict.failure.message or words == "_"
    assert pod is None or _POD.name in verdict.failure.message


@pytest.mark.parametrize(
    ("pod", "expected"),
    [
        pytest.param({"exit_code": 65}, ("OneClassOnly", _FAIL), id="data"),
        pytest.param({"exit_code": 1}, ("OneClassOnly", _RETRY), id="crash"),
        pytest.param({"exit_code": 75, "deleting": True}, ("PodDeleted", _FREE), id="a disruption is told by who made it"),
    ],
)
def test_words_of_the_trainer_come_first(pod: dict[str, Any], expected: tuple[str, FailureAction]) -> None:
    verdict = _classify(pod, report=_says("OneClassOnly"))

    assert expected == (verdict.failure.reason, verdict.action)


_ON_ONE = {"name": "ones", "onExitCodes": [1, 3], "action": "Fail"}
_ON_OOM = {"name": "memory", "onReasons": ["OOMKilled"], "action": "Fail"}


@pytest.mark.parametrize(
    ("pod", "rules", "action", "name"),
    [
        pytest.param({"exit_code": 3}, [_ON_ONE], _FAIL, "ones", id="exit code"),
        pytest.param({"exit_code": 137, "termination_reason": "OOMKilled"}, [_ON_ONE, _ON_OOM], _FAIL, "memory", id="reason"),
        pytest.param({"exit_code": 1}, [_ON_ONE | {"name": "first", "action": "RetryFree"}, _ON_ONE], _FREE, "first", id="first"),
        pytest.param(
            {"exit_code": 65}, [_ON_ONE | {"onExitCodes": [65], "action": "Retry"}], _RETRY, "ones", id="over the table"
        ),
        pytest.param(None, [{"name": "lost", "onReasons": ["PodLost"], "action": "Fail"}], _FAIL, "lost", id="a lost pod"),
        pytest.param({"exit_code": 9}, [_ON_ONE | {"onReasons": ["TrainerError"]}], _FAIL, "ones", id="one of both"),
        pytest.param({"exit_code": 70}, [_ON_ONE, _ON_OOM], _RETRY, None, id="no match"),
    ],
)
def test_first_rule_that_matches_decides_and_is_named(
    pod: dict[str, Any] | None, rules: list[Any], action: FailureAction, name: str | None
) -> None:
    verdict = _classify(pod, rules=rules)

    assert action is verdict.action
    assert (name is not None) == ("failureRules" in verdict.failure.message)
    assert f"rule {name!r}" in verdict.failure.message or name is None


def test_rule_is_named_even_behind_a_long_message() -> None:
    verdict = _classify({"exit_code": 1}, report=_says("Crash", "x" * 1024), rules=[_ON_ONE])

    assert verdict.failure.message.endswith("(Fail by rule 'ones' of failureRules)")
    assert 1024 == len(verdict.failure.message)


def test_only_disruptions_are_retried_at_once() -> None:
    disruptions = {"Preempted", "Evicted", "NodeLost", "NodeShutdown", "Disrupted", "PodDeleted", "PodLost"}

    assert all(is_disruption(reason) for reason in disruptions)
    assert not any(is_disruption(reason) for reason in ("OOMKilled", "TrainerError", "Interrupted", "Killed", "InvalidData"))

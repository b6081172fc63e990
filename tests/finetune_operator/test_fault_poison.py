"""Objects that no operator can make sense of, as a newer schema or a broken restore may leave them: others go on."""

import uuid
from pathlib import Path
from typing import Any

import pytest
from etcd import Etcd
from fault_life import PUBLISHED, await_state, run_attempt
from harness import SPEC, Operator

pytestmark = pytest.mark.apiserver

# Each with what is wrong with it; the API server serves them as they are.
_SPECS: dict[str, Any] = {
    "unknown-task": SPEC | {"task": "telepathy"},
    "unknown-field": SPEC | {"telepathy": {"range": 7}},
    "no-spec": None,
    "empty-spec": {},
    "spec-is-text": "image-classification",
    "spec-is-a-list": [SPEC],
    "profile-is-text": SPEC | {"profileRef": "team"},
    "negative-nodes": SPEC | {"nodes": -1},
    "ten-thousand-nodes": SPEC | {"nodes": 10_000},
    "nested-too-deep": SPEC | {"hyperparameters": {"seed": [[[[[[]]]]]]}},
    "text-for-numbers": SPEC | {"budget": {"trainingSeconds": "soon"}},
    "much-text": SPEC | {"model": {"uri": "timm://" + "x" * 200_000}},
    "lone-surrogate": SPEC | {"output": {"uri": "pvc://models/\ud83d"}},
    "managed-by-number": SPEC | {"managedBy": 7},
}
_STATUSES: dict[str, Any] = {
    "status-is-text": "Complete",
    "status-is-a-list": [],
    "conditions-are-text": {"conditions": "Ready"},
    "condition-is-text": {"conditions": ["Ready"]},
    "condition-without-type": {"conditions": [{"status": "True"}]},
    "attempt-is-text": {"attempt": "third", "run": 7},
    "status-of-the-future": {"observedGeneration": 10**9, "phase": "Transcended"},
    "long-ago": {"startTime": "yesterday"},
}


def _build(team: Any, name: str, spec: Any, status: Any = None) -> dict[str, Any]:
    metadata = {
        "name": name,
        "namespace": team.namespace,
        "uid": str(uuid.uuid4()),
        "generation": 1,
        "creationTimestamp": "2026-01-01T00:00:00Z",
    }
    raw = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": metadata}
    return raw | ({} if spec is None else {"spec": spec}) | ({} if status is None else {"status": status})


@pytest.fixture
def poisoned(team: Any, control_plane: Path) -> Any:
    etcd = Etcd(control_plane)
    for name, spec in _SPECS.items():
        etcd.put("finetunejobs", _build(team, name, spec))
    for name, status in _STATUSES.items():
        etcd.put("finetunejobs", _build(team, name, SPEC, status))
    yield etcd
    for name in (*_SPECS, *_STATUSES):
        etcd.delete("finetunejobs", f"{team.namespace}/{name}")


def test_poison_stops_no_operator_and_no_other_job(team: Any, operator: Operator, poisoned: Etcd, until: Any) -> None:
    operator.start()
    team.apply("healthy")
    pod = run_attempt(team, 1, "healthy")
    # And once more while it runs, as events of a watch.
    for name, spec in _SPECS.items():
        poisoned.put("finetunejobs", _build(team, name, spec))
    team.end_pod(pod, message=PUBLISHED)
    await_state(team, "Complete", "healthy")

    assert operator.stop() == 0

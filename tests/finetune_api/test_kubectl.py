"""The API as people meet it: kubectl and a real kube-apiserver."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from finetune_api.contract import compute_run
from finetune_api.v1alpha1 import FineTuneJob, FineTuneJobStatus

pytestmark = pytest.mark.apiserver

_EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
_PATH = "/apis/finetune.dev/v1alpha1/namespaces/default/finetunejobs"
_MINIMAL: dict[str, Any] = {
    "apiVersion": "finetune.dev/v1alpha1",
    "kind": "FineTuneJob",
    "metadata": {"name": "pets", "namespace": "default"},
    "spec": {
        "task": "image-classification",
        "dataset": {"uri": "pvc://datasets/pets"},
        "output": {"uri": "pvc://models/pets"},
    },
}

Kubectl = Callable[..., Any]


def test_the_api_server_fills_in_every_default(api: Any) -> None:
    spec = api.create(f"{_PATH}?dryRun=All", _MINIMAL)["spec"]

    assert spec == {
        "task": "image-classification",
        "model": {"uri": "timm://tf_efficientnet_lite0"},
        "dataset": {
            "uri": "pvc://datasets/pets",
            "format": "imagefolder",
            "validationFraction": 0.15,
            "testFraction": 0.15,
        },
        "method": {"type": "auto"},
        "hyperparameters": {"precision": "auto", "seed": 0},
        "accelerator": {},
        "resources": {"cpu": "2", "memory": "4Gi"},
        "budget": {},
        "checkpoint": {"intervalSeconds": 60, "keep": 2},
        "output": {"uri": "pvc://models/pets"},
        "suspend": False,
        "managedBy": "finetune.dev/operator",
        "runPolicy": {"backoffLimit": 3, "failureRules": []},
    }


def test_the_models_fill_in_the_same_defaults(api: Any) -> None:
    filled = FineTuneJob.model_validate(api.create(f"{_PATH}?dryRun=All", _MINIMAL))
    local = FineTuneJob.model_validate(_MINIMAL)

    assert filled.spec == local.spec
    assert compute_run(filled.spec) == compute_run(local.spec)


def test_apply_names_the_field_and_what_is_allowed(kubectl: Kubectl) -> None:
    manifest = _MINIMAL | {"spec": _MINIMAL["spec"] | {"dataset": {"uri": "s3://bucket"}, "budget": {"trainingSeconds": 0}}}
    result = kubectl("apply", "-f", "-", stdin=json.dumps(manifest))

    assert 1 == result.returncode
    assert "* spec.budget.trainingSeconds: Invalid value: 0:" in result.stderr
    assert "should be greater than or equal to 10" in result.stderr
    assert "* spec.dataset.uri: Invalid value:" in result.stderr
    assert "uri must be pvc://CLAIM/PATH, such as pvc://datasets/pets" in result.stderr


def test_unknown_fields_are_refused_by_name(kubectl: Kubectl) -> None:
    manifest = _MINIMAL | {"spec": _MINIMAL["spec"] | {"budget": {"seconds": 60}, "learningRate": 1}}
    result = kubectl("apply", "--dry-run=server", "-f", "-", stdin=json.dumps(manifest))

    assert 1 == result.returncode
    assert 'unknown field "spec.budget.seconds"' in result.stderr
    assert 'unknown field "spec.learningRate"' in result.stderr


@pytest.mark.parametrize("path", sorted(_EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_examples_are_accepted(kubectl: Kubectl, path: Path) -> None:
    result = kubectl("apply", "--dry-run=server", "-f", str(path))

    assert 0 == result.returncode, result.stderr


def test_explain_reads_like_documentation(kubectl: Kubectl) -> None:
    text = " ".join(kubectl("explain", "ftj.spec.budget").stdout.split())

    assert "budget limits what the job may spend." in text
    assert "trainingSeconds <integer>" in text
    assert "trainingSeconds is the wall-clock time of the trainer process, in seconds, features and probe included." in text


def test_get_shows_state_progress_and_metric(kubectl: Kubectl, api: Any) -> None:
    name = "columns"
    api.create(_PATH, _MINIMAL | {"metadata": {"name": name}})
    condition = {
        "type": "Ready",
        "status": "False",
        "reason": "Running",
        "message": "attempt 1 runs",
        "lastTransitionTime": "2026-01-01T00:00:00Z",
        "observedGeneration": 1,
    }
    progress = {"progressPercentage": 40, "estimatedRemainingSeconds": 72}
    status = {"conditions": [condition], "trainerStatus": progress, "metric": "val_accuracy=0.81"}
    api.patch(f"{_PATH}/{name}/status", {"status": status})

    header, row = kubectl("get", "ftj", name).stdout.strip().splitlines()
    api.delete(f"{_PATH}/{name}")

    assert ["NAME", "STATE", "PROGRESS", "ETA", "METRIC", "AGE"] == header.split()
    assert [name, "Running", "40", "72", "val_accuracy=0.81"] == row.split()[:5]


def test_a_status_with_every_field_comes_back_whole(api: Any) -> None:
    name = "round-trip"
    api.create(_PATH, _MINIMAL | {"metadata": {"name": name}})
    status = FineTuneJobStatus.model_validate(_FULL_STATUS)
    written = status.model_dump(mode="json", by_alias=True, exclude_none=True)
    api.patch(f"{_PATH}/{name}/status", {"status": written})

    read = api.get(f"{_PATH}/{name}")
    api.delete(f"{_PATH}/{name}")

    assert written == read["status"]
    assert status == FineTuneJobStatus.model_validate(read["status"])
    assert _list_fields(FineTuneJobStatus.model_json_schema(by_alias=True)) == _list_keys(written)


def test_a_status_is_written_through_its_subresource_alone(api: Any) -> None:
    name = "subresource"
    created = api.create(_PATH, _MINIMAL | {"metadata": {"name": name}, "status": {"run": "0a1b2c3d"}})
    changed = api.patch(f"{_PATH}/{name}/status", {"spec": {"suspend": True}, "status": {"run": "0a1b2c3d"}})
    api.delete(f"{_PATH}/{name}")

    assert "run" not in created["status"]
    assert "0a1b2c3d" == changed["status"]["run"]
    assert not changed["spec"]["suspend"]


_TIME = "2026-01-01T00:00:00Z"
_FULL_STATUS = yaml.safe_load(f"""
observedGeneration: 3
run: 0a1b2c3d
attempt: 2
restarts: 2
restartsCountedTowardsLimit: 1
restartHistory: [{{attempt: 1, reason: OOMKilled, time: "{_TIME}", counted: true, lostSeconds: 4}}]
lostSeconds: 4
activeSeconds: 60
pendingSince: "{_TIME}"
runningSince: "{_TIME}"
microBatchDivisor: 2
podShape: 5e6f7a8b
trainingSeconds: 600
usage:
  acceleratorSeconds: 120
  wastedAcceleratorSeconds: 4
  cost: "0.2500"
  accelerators: 8
  acceleratorKind: nvidia
  pricePerAcceleratorHour: "7.5"
checkpoint: {{step: 40, samples: 1280, time: "{_TIME}", attempt: 2}}
conditions:
  - {{type: Ready, status: "True", reason: Complete, message: done, lastTransitionTime: "{_TIME}", observedGeneration: 3}}
startTime: "{_TIME}"
completionTime: "{_TIME}"
trainerStatus:
  progressPercentage: 100
  estimatedRemainingSeconds: 0
  lastUpdatedTime: "{_TIME}"
  metrics: [{{name: loss, value: "0.25"}}]
metric: test_accuracy=0.81
output: {{uri: "pvc://models/pets", digest: "sha256:00", bytes: 17}}
result:
  candidate: finetuned
  warnings: [one file could not be read]
  metrics: [{{name: test_accuracy, value: "0.81", low: "0.78", high: "0.84"}}]
failure:
  reason: OOMKilled
  message: more memory is needed
  attempt: 1
  exitCode: 137
  pod: pets-0a1b2c3d-1-0-x7x7x
  node: node-1
  container: trainer
  logTail: Killed
""")


def _list_fields(schema: dict[str, Any]) -> set[str]:
    """Return the names of all fields of a model and of those in it."""
    names = set(schema["properties"])
    return names.union(*(set(each.get("properties", ())) for each in schema["$defs"].values()))


def _list_keys(value: Any) -> set[str]:
    if isinstance(value, dict):
        return set(value).union(*(_list_keys(each) for each in value.values()))
    return set().union(*(_list_keys(each) for each in value)) if isinstance(value, list) else set()

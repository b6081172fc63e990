"""Specs of FineTuneJobs at random, over all fields of the CRD's schema."""

import functools
import random
from typing import Any

from accelerators import CASES
from finetune_api.crd import build_crd

# What a text without a closed list may be; a field of the API without an entry is an error.
_TEXTS = {
    "model.uri": ("timm://resnet18", "pvc://models/base", "pvc://data"),
    "dataset.uri": ("pvc://data/emoji", "pvc://data-2/a/b/c", "pvc://models"),
    "profileRef.name": ("gold", "team.a"),
    "resources.cpu": ("1", "500m", "0.5", "64"),
    "resources.memory": ("1Gi", "512Mi", "64G"),
    "checkpoint.uri": ("s3://bucket/a", "s3://bucket", "pvc://checkpoints/a", "pvc://models/emoji"),
    "checkpoint.secretRef.name": ("keys", "a.b-c"),
    "output.uri": ("pvc://models/emoji", "pvc://out", "pvc://data/result"),
    "runPolicy.failureRules[].name": ("first", "second", "third"),
    "runPolicy.failureRules[].onReasons[]": ("OOMKilled", "NodeLost", "Diverged"),
}
# They depend on each other, so they come together from a table.
_FROM_CASES = ("accelerator", "nodes")


def generate_spec(choices: random.Random) -> dict[str, Any]:
    """Return a spec that keeps the schema; the rules between fields may refuse it."""
    schema = _read_schema()
    fields = {name: child for name, child in schema["properties"].items() if name not in _FROM_CASES}
    spec = _generate(schema | {"properties": fields}, "", choices)
    case = choices.choice(CASES)
    return dict(spec | case.spec | ({"accelerator": case.accelerator} if case.accelerator else {}))


@functools.cache
def _read_schema() -> dict[str, Any]:
    (version,) = build_crd()["spec"]["versions"]
    return dict(version["schema"]["openAPIV3Schema"]["properties"]["spec"])


def _generate(schema: dict[str, Any], path: str, choices: random.Random) -> Any:
    if "enum" in schema:
        return choices.choice(schema["enum"])
    match schema["type"]:
        case "object":
            required = schema.get("required", ())
            chosen = {name: each for name, each in schema["properties"].items() if name in required or choices.random() < 0.5}
            return {name: _generate(child, f"{path}.{name}".strip("."), choices) for name, child in chosen.items()}
        case "array":
            return [_generate(schema["items"], f"{path}[]", choices) for _ in range(choices.randint(0, 2))]
        case "boolean":
            return choices.random() < 0.5
        case "integer":
            low, high = schema["minimum"], schema["maximum"]
            return choices.choice((low, high, choices.randint(low, high)))
        case "number":
            low, high = schema["minimum"], schema["maximum"]
            return choices.choice((high, round(choices.uniform(low + 0.001 * (high - low), high), 4)))
    return choices.choice(_TEXTS[path])

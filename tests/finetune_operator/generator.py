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
_IMMUTABLE = ("managedBy",)


def generate_spec(choices: random.Random) -> dict[str, Any]:
    """Return a spec that keeps the schema; the rules between fields may refuse it."""
    schema = _read_schema()
    fields = {name: child for name, child in schema["properties"].items() if name not in _FROM_CASES}
    spec = _generate(schema | {"properties": fields}, "", choices)
    case = choices.choice(CASES)
    return dict(spec | case.spec | ({"accelerator": case.accelerator} if case.accelerator else {}))


def list_fields() -> tuple[str, ...]:
    """Return the path of every field that may change, objects included; accelerator stands for nodes as well."""
    schema = _read_schema()
    left_out = (*_FROM_CASES, *_IMMUTABLE)
    paths = [each for name, child in schema["properties"].items() if name not in left_out for each in _list_paths(child, name)]
    return (*paths, "accelerator")


def is_required(path: str) -> bool:
    """Return whether the object that a field belongs to cannot be without it."""
    *parents, name = path.split(".")
    return name in _find_schema(parents).get("required", ())


def has_field(spec: dict[str, Any], path: str) -> bool:
    """Return whether a spec gives this field."""
    for name in path.split("."):
        if name not in spec:
            return False
        spec = spec[name]
    return True


def put_field(spec: dict[str, Any], path: str, choices: random.Random) -> dict[str, Any]:
    """Return the spec with another value in this field; the rules between fields may refuse it."""
    if path == "accelerator":
        case = choices.choice(CASES)
        bare = {name: value for name, value in spec.items() if name not in _FROM_CASES}
        return dict(bare | case.spec | ({"accelerator": case.accelerator} if case.accelerator else {}))
    return _put(spec, path.split("."), choices, prefix=[])


def drop_field(spec: dict[str, Any], path: str) -> dict[str, Any]:
    """Return the spec without this field, as it is with an object that becomes empty."""
    name, _, rest = path.partition(".")
    if path == "accelerator":
        return {each: value for each, value in spec.items() if each not in _FROM_CASES}
    if rest:
        return spec | {name: drop_field(spec[name], rest)} if name in spec else spec
    return {each: value for each, value in spec.items() if each != name}


def _put(spec: dict[str, Any], path: list[str], choices: random.Random, *, prefix: list[str]) -> dict[str, Any]:
    name, *rest = path
    here = [*prefix, name]
    schema = _find_schema(here)
    if not rest:
        return spec | {name: _generate(schema, ".".join(here), choices)}
    required = {
        each: _generate(schema["properties"][each], ".".join([*here, each]), choices) for each in schema.get("required", ())
    }
    return spec | {name: _put(spec.get(name, required), rest, choices, prefix=here)}


def _list_paths(schema: dict[str, Any], path: str) -> list[str]:
    inner = schema.get("properties", {}).items()
    return [path, *(each for name, child in inner for each in _list_paths(child, f"{path}.{name}"))]


def _find_schema(path: list[str]) -> dict[str, Any]:
    schema = _read_schema()
    for name in path:
        schema = schema["properties"][name]
    return schema


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

"""Conventions of Kubernetes APIs, asserted on the CRD."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from finetune_api.crd import build_crd

Schema = dict[str, Any]

_VERSION = build_crd()["spec"]["versions"][0]
_ROOT = _VERSION["schema"]["openAPIV3Schema"]


def _walk(path: str, node: Schema) -> Iterator[tuple[str, Schema]]:
    yield path, node
    for name, child in node.get("properties", {}).items():
        yield from _walk(f"{path}.{name}".strip("."), child)
    if "items" in node:
        yield from _walk(f"{path}[]", node["items"])


_FIELDS = [(path, node) for path, node in _walk("", _ROOT) if path not in ("", "apiVersion", "kind", "metadata")]


def _params(*types: str) -> list[Any]:
    return [pytest.param(path, node, id=path) for path, node in _FIELDS if not types or node["type"] in types]


@pytest.mark.parametrize(("path", "node"), _params())
def test_description_begins_with_the_field_name(path: str, node: Schema) -> None:
    if not path.endswith("[]"):
        assert re.match(rf"{path.rpartition('.')[2]},? ", node["description"])
        assert node["description"].endswith(".")


@pytest.mark.parametrize(("path", "node"), _params("string"))
def test_strings_are_bounded(path: str, node: Schema) -> None:
    assert "enum" in node or "maxLength" in node or node.get("format") == "date-time"


@pytest.mark.parametrize(("path", "node"), _params("array"))
def test_lists_are_bounded_and_say_how_they_merge(path: str, node: Schema) -> None:
    assert 0 < node["maxItems"] <= 64
    assert node["x-kubernetes-list-type"] in ("atomic", "set", "map")
    if node["x-kubernetes-list-type"] == "map":
        assert set(node["x-kubernetes-list-map-keys"]) <= set(node["items"]["required"])


@pytest.mark.parametrize(("path", "node"), _params())
def test_names_are_camel_case_and_types_are_plain(path: str, node: Schema) -> None:
    name = path.rpartition(".")[2].removesuffix("[]")

    assert re.fullmatch(r"[a-z][A-Za-z0-9]*", name)
    assert "phase" != name
    assert node["type"] in ("string", "integer", "number", "boolean", "object", "array")
    assert not {"nullable", "anyOf", "oneOf", "allOf", "additionalProperties", "x-kubernetes-preserve-unknown-fields"} & set(node)


@pytest.mark.parametrize(("path", "node"), _params("number"))
def test_status_holds_no_floating_point_numbers(path: str, node: Schema) -> None:
    assert path.startswith("spec.")


@pytest.mark.parametrize(("path", "node"), [pytest.param("", _ROOT, id="root"), *_params()])
def test_rules_explain_themselves(path: str, node: Schema) -> None:
    for rule in node.get("x-kubernetes-validations", ()):
        assert len(rule["message"]) > 20
        assert "matches(" not in rule["message"]


@pytest.mark.parametrize(("path", "node"), _params())
def test_defaults_hold_no_null(path: str, node: Schema) -> None:
    assert "null" not in json.dumps(node.get("default"), default=str) or "default" not in node


def test_status_is_a_subresource_and_optional() -> None:
    assert {"status": {}} == _VERSION["subresources"]
    assert ["spec"] == _ROOT["required"]


def test_conditions_are_a_map_by_type() -> None:
    conditions = _ROOT["properties"]["status"]["properties"]["conditions"]

    assert ("map", ["type"]) == (conditions["x-kubernetes-list-type"], conditions["x-kubernetes-list-map-keys"])
    assert {"type", "status", "reason", "message", "lastTransitionTime", "observedGeneration"} == set(
        conditions["items"]["required"]
    )


def test_columns_are_those_people_look_for() -> None:
    assert ["STATE", "PROGRESS", "ETA", "METRIC", "AGE"] == [each["name"] for each in _VERSION["additionalPrinterColumns"]]


def test_crd_is_small_enough_for_plain_apply() -> None:
    assert len(json.dumps(build_crd())) < 100_000

"""JSON schema of pydantic to structural schema of Kubernetes."""

from enum import StrEnum
from typing import Annotated, Any

import pytest
from finetune_api.structural import UnsupportedSchemaError, build_structural_schema
from pydantic import BaseModel, Field


class Color(StrEnum):
    """A color."""

    RED = "red"
    BLUE = "blue"


class Inner(BaseModel):
    """An inner object."""

    size: int = 3
    name: str | None = None


class Outer(BaseModel):
    """An outer object."""

    inner: Inner = Field(default=Inner(), description="inner is described here.")


def _convert(**properties: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties}
    return dict(build_structural_schema(schema)["properties"])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        pytest.param({"type": "string", "title": "A"}, {"type": "string"}, id="titles go"),
        pytest.param({"type": "string", "default": None}, {"type": "string"}, id="null defaults go"),
        pytest.param({"type": "integer", "default": 0}, {"type": "integer", "default": 0}, id="false defaults stay"),
        pytest.param(
            {"anyOf": [{"type": "string", "maxLength": 3}, {"type": "null"}], "description": "a"},
            {"type": "string", "maxLength": 3, "description": "a"},
            id="an optional field keeps its own description",
        ),
        pytest.param(
            {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
            {"type": "number", "minimum": 0, "exclusiveMinimum": True, "maximum": 1, "exclusiveMaximum": True},
            id="exclusive bounds become flags",
        ),
        pytest.param(
            {"type": "string", "description": "two\n  lines"}, {"type": "string", "description": "two lines"}, id="folds"
        ),
        pytest.param(
            {"type": "array", "items": {"type": "string", "title": "B"}, "maxItems": 3, "x-kubernetes-list-type": "atomic"},
            {"type": "array", "items": {"type": "string"}, "maxItems": 3, "x-kubernetes-list-type": "atomic"},
            id="items of lists are converted",
        ),
        pytest.param(
            {"type": "object", "additionalProperties": {"type": "string", "title": "B"}, "maxProperties": 3},
            {"type": "object", "additionalProperties": {"type": "string"}, "maxProperties": 3},
            id="values of maps are converted",
        ),
    ],
)
def test_converts(given: dict[str, Any], expected: dict[str, Any]) -> None:
    assert {"a": expected} == _convert(a=given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        pytest.param({"anyOf": [{"type": "string"}, {"type": "integer"}]}, "a: .*union", id="union"),
        pytest.param({"type": "object", "additionalProperties": {}}, "a: .*additionalProperties", id="free-form map"),
        pytest.param({"type": "object", "additionalProperties": False}, "a: .*additionalProperties", id="no further fields"),
        pytest.param({"type": "integer", "multipleOf": 2}, "a: .*multipleOf", id="unknown keyword"),
        pytest.param({"type": "string", "const": "x"}, "a: .*const", id="const"),
    ],
)
def test_refuses_what_kubernetes_cannot_hold(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedSchemaError, match=message):
        _convert(a=given)


def test_references_are_inlined_with_the_description_beside_them() -> None:
    schema = build_structural_schema(Outer.model_json_schema())

    inner = schema["properties"]["inner"]
    assert "inner is described here." == inner["description"]
    assert {"size": {"type": "integer", "default": 3}, "name": {"type": "string"}} == inner["properties"]


def test_a_default_object_leaves_its_fields_to_their_own_defaults() -> None:
    assert {} == build_structural_schema(Outer.model_json_schema())["properties"]["inner"]["default"]


def test_a_default_object_keeps_what_differs_from_its_fields() -> None:
    class Model(BaseModel):
        inner: Inner = Inner(size=7)

    assert {"size": 7} == build_structural_schema(Model.model_json_schema())["properties"]["inner"]["default"]


def test_a_default_object_holds_no_nulls_however_deep() -> None:
    class Model(BaseModel):
        outer: Outer = Outer(inner=Inner(size=7))

    assert {"inner": {"size": 7}} == build_structural_schema(Model.model_json_schema())["properties"]["outer"]["default"]


def test_enums_become_values() -> None:
    class Model(BaseModel):
        color: Annotated[Color, Field(description="color is one.")] = Color.RED

    color = build_structural_schema(Model.model_json_schema())["properties"]["color"]
    assert {"type": "string", "enum": ["red", "blue"], "default": "red", "description": "color is one."} == color


def test_recursion_is_refused() -> None:
    schema = {"$defs": {"Node": {"type": "object", "properties": {"Node": {"$ref": "#/$defs/Node"}}}}, "$ref": "#/$defs/Node"}

    with pytest.raises(UnsupportedSchemaError, match="recursive"):
        build_structural_schema(schema)

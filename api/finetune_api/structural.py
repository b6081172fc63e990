"""Turn the JSON schema that pydantic emits into a Kubernetes structural schema (pure)."""

from typing import Any, cast

JsonSchema = dict[str, Any]

# Keywords that mean nothing to Kubernetes, or that structural schemas forbid at this place.
_DROPPED = frozenset({"title", "$defs", "propertyNames"})
_KEPT = frozenset(
    {
        "type", "description", "default", "enum", "pattern", "format", "required", "maxLength", "minLength", "maximum", "minimum",
        "exclusiveMaximum", "exclusiveMinimum", "maxItems", "minItems", "maxProperties",
        "x-kubernetes-validations", "x-kubernetes-list-type",
        "x-kubernetes-list-map-keys",
    }
)  # fmt: skip


class UnsupportedSchemaError(ValueError):
    """A construct that a structural schema cannot express."""


def build_structural_schema(schema: JsonSchema) -> JsonSchema:
    """Return the structural form of a pydantic JSON schema: references inlined, nulls and titles gone.

    Raises UnsupportedSchemaError for unions, recursion and unknown keywords. Source of the rules:
    https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/#specifying-a-structural-schema
    """
    return _convert(schema, definitions=schema.get("$defs", {}), path=())


def _convert(node: JsonSchema, *, definitions: JsonSchema, path: tuple[str, ...]) -> JsonSchema:
    node = _resolve(node, definitions=definitions, path=path)
    result: JsonSchema = {}
    for key, value in node.items():
        if key in _DROPPED or (key == "default" and value is None):
            continue
        if key == "properties":
            result[key] = {name: _convert(child, definitions=definitions, path=(*path, name)) for name, child in value.items()}
        elif key == "additionalProperties" and isinstance(value, dict) and value:
            result[key] = _convert(value, definitions=definitions, path=(*path, "{}"))
        elif key == "items":
            result[key] = _convert(value, definitions=definitions, path=(*path, "[]"))
        elif key in ("exclusiveMinimum", "exclusiveMaximum"):
            # OpenAPI v3.0 has a flag beside the bound where JSON schema has a bound of its own.
            result |= {key[9:].lower(): value, key: True}
        elif key == "description":
            result[key] = " ".join(value.split())
        elif key in _KEPT:
            result[key] = value
        else:
            raise UnsupportedSchemaError(f"{'.'.join(path)}: a structural schema cannot hold {key!r}")
    if isinstance(result.get("default"), dict) and "properties" in result:
        result["default"] = _strip_default(result["default"], result["properties"])
    return result


def _strip_default(default: JsonSchema, properties: JsonSchema) -> JsonSchema:
    """Return what an object's default adds to its properties' own: the API server fills those in, and refuses nulls."""
    stripped = {
        name: _strip_default(value, properties[name]["properties"]) if "properties" in properties[name] else value
        for name, value in default.items()
        if value is not None
    }
    return {name: value for name, value in stripped.items() if value != properties[name].get("default")}


def _resolve(node: JsonSchema, *, definitions: JsonSchema, path: tuple[str, ...]) -> JsonSchema:
    """Inline `$ref` and drop the null alternative, keeping what stands beside them (the field's own description)."""
    if "anyOf" in node:
        options = [option for option in node["anyOf"] if option != {"type": "null"}]
        if len(options) != 1:
            raise UnsupportedSchemaError(f"{'.'.join(path)}: a structural schema cannot hold a union")
        node = options[0] | {key: value for key, value in node.items() if key != "anyOf"}
    if "$ref" in node:
        name = cast("str", node["$ref"]).removeprefix("#/$defs/")
        if path.count(name) > 3:
            raise UnsupportedSchemaError(f"{'.'.join(path)}: a structural schema cannot be recursive")
        node = definitions[name] | {key: value for key, value in node.items() if key != "$ref"}
    return node

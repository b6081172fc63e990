"""The chart's schema and README table, from the comments and the defaults in values.yaml (pure)."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

_BEGIN, _END = "<!-- values: begin -->", "<!-- values: end -->"
_MAX_DEFAULT = 200
_KEY = re.compile(r"^( *)([A-Za-z]+):")
_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}


class UndocumentedValueError(ValueError):
    """A value without a `# --` comment, or a comment that cannot be read."""


@dataclass(frozen=True, slots=True)
class Value:
    """One value of the chart: where it is, what it means, its default, and what its schema says beyond the type."""

    path: tuple[str, ...]
    description: str
    default: Any
    extra: dict[str, Any]


def read_values(text: str) -> tuple[Value, ...]:
    """Return all values in their order. A map is a group of values unless it has a comment of its own."""
    defaults = yaml.safe_load(text)
    comments = dict(_read_comments(text))
    return tuple(_list_values(defaults, (), comments))


def build_values_schema(text: str) -> str:
    """Return values.schema.json: strict, so that a misspelt value is refused. `global` is helm's own."""
    schema: dict[str, Any] = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "object",
        "additionalProperties": False,
        "properties": {"global": {"type": "object"}},
    }
    for value in read_values(text):
        node = schema
        for name in value.path[:-1]:
            node = node["properties"].setdefault(name, {"type": "object", "additionalProperties": False, "properties": {}})
        node["properties"][value.path[-1]] = _build_value_schema(value)
    return json.dumps(schema, indent=2) + "\n"


def build_readme(readme: str, text: str) -> str:
    """Return the README with its table of values written anew, between the two marks."""
    before, _, rest = readme.partition(_BEGIN)
    _, mark, after = rest.partition(_END)
    assert mark, f"README.md lacks {_BEGIN} and {_END}"
    rows = [
        f"| `{'.'.join(value.path)}` | {_name_type(value)} | {_describe_default(value.default)} | {value.description} |"
        for value in read_values(text)
    ]
    table = "\n".join(("| value | type | default | meaning |", "| --- | --- | --- | --- |", *rows))
    return f"{before}{_BEGIN}\n{table}\n{_END}{after}"


def _describe_default(default: object) -> str:
    """Return a default as a cell of the table; a long one is read in its file."""
    text = json.dumps(default)
    return f"`{text}`" if len(text) <= _MAX_DEFAULT else "[values.yaml](values.yaml)"


def _build_value_schema(value: Value) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": _name_type(value), "description": value.description}
    if isinstance(value.default, list):
        schema |= {"items": {"type": "string"}}
    return schema | value.extra


def _name_type(value: Value) -> str:
    return str(value.extra.get("type", _TYPES[type(value.default)]))


def _list_values(node: dict[str, Any], path: tuple[str, ...], comments: dict[tuple[str, ...], list[str]]) -> Iterator[Value]:
    for name, default in node.items():
        here = (*path, name)
        comment = comments.get(here, [])
        if isinstance(default, dict) and default and not comment:
            yield from _list_values(default, here, comments)
            continue
        description = " ".join(line for line in comment if not line.startswith("@schema ")).strip()
        if not description:
            raise UndocumentedValueError(f"{'.'.join(here)}: give it a comment that begins with `# --`")
        extras = [json.loads(line.removeprefix("@schema ")) for line in comment if line.startswith("@schema ")]
        yield Value(here, description, default, extras[0] if extras else {})


def _read_comments(text: str) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """Yield the `# --` comment above each key, line by line."""
    path: list[tuple[int, str]] = []
    comment: list[str] = []
    for line in text.splitlines():
        stripped = line.strip()
        if stripped.startswith("# -- "):
            comment = [stripped.removeprefix("# -- ")]
        elif stripped.startswith("# ") and comment:
            comment.append(stripped.removeprefix("# "))
        elif match := _KEY.match(line):
            indent = len(match[1])
            path = [*(each for each in path if each[0] < indent), (indent, match[2])]
            yield tuple(name for _, name in path), comment
            comment = []
        else:
            comment = []

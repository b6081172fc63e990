"""What the tables of constraints share: a row, and how a table is held against the schema that it is to cover."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from finetune_api.structural import JsonSchema


@dataclass(frozen=True)
class Constraint:
    """One constraint: where it stands, what it accepts and refuses, and what a refusal says beside the path."""

    path: str
    keyword: str
    accepts: tuple[dict[str, Any], ...]
    refuses: tuple[dict[str, Any], ...]
    says: str
    has_model: bool = True
    """Whether the models hold it too: they know no metadata and no kinds of lists."""


def name_constraints(constraints: Iterable[Constraint], in_schema: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Return path and keyword of each row; a row's keyword may be the beginning of a rule's message in the schema."""
    return {(each.path, _find_text(each, in_schema)) for each in constraints}


def list_constraints(path: str, node: JsonSchema) -> Iterator[tuple[str, str]]:
    """Yield path and keyword (a rule's message) of every constraint of the spec; types aside."""
    keywords = (
        "enum", "minimum", "maximum", "minLength", "maxLength", "pattern", "required", "maxItems", "minItems", "maxProperties",
    )  # fmt: skip
    yield from ((path, keyword) for keyword in keywords if keyword in node)
    if node.get("x-kubernetes-list-type") in ("set", "map"):
        yield path, "x-kubernetes-list-type"
    for rule in node.get("x-kubernetes-validations", ()):
        yield path, rule["message"]
    for key, suffix in (("items", "[0]"), ("additionalProperties", ".*")):
        if key in node:
            yield from list_constraints(f"{path}{suffix}", node[key])
    for name, child in node.get("properties", {}).items():
        if path or name == "spec":
            yield from list_constraints(f"{path}.{name}".strip("."), child)


def _find_text(constraint: Constraint, in_schema: set[tuple[str, str]]) -> str:
    texts = (text for path, text in in_schema if path == constraint.path and text.startswith(constraint.keyword))
    return next(texts, f"{constraint.keyword} (not in the schema)")

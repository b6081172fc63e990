"""What all API types share: the base model, CEL rules beside their validators, and bounded texts."""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints
from pydantic.alias_generators import to_camel


def rules(*given: tuple[str, ...]) -> dict[str, Any]:
    """Return schema extras that hold CEL rules, given as (rule, message), or (rule, message, CEL expression of the message)."""
    keywords = ("rule", "message", "messageExpression")
    return {"x-kubernetes-validations": [dict(zip(keywords, each, strict=False)) for each in given]}


class Pattern:
    """A regular expression that explains itself: a bare `pattern` in the schema would be refused with the expression alone.

    The expression must mean the same in Python and in RE2, and hold neither quotes nor backslashes.
    """

    def __init__(self, expression: str, *, message: str) -> None:
        self._expression = re.compile(expression)
        self._message = message

    def validate(self, value: str) -> str:
        """Return the value, or raise ValueError with the explanation."""
        if self._expression.fullmatch(value) is None:
            raise ValueError(f"{value[:64]!r}: {self._message}")
        return value

    def build_rule(self) -> dict[str, Any]:
        """Return the same as a CEL rule."""
        return rules((f"self.matches('^({self._expression.pattern})$')", self._message))


_OBJECT_NAME = Pattern(
    "[a-z0-9]([-a-z0-9.]*[a-z0-9])?",
    message="name must be that of a Kubernetes object: lower-case letters, digits, '-' and '.'",
)

ObjectName = Annotated[
    str,
    StringConstraints(min_length=1, max_length=253),
    AfterValidator(_OBJECT_NAME.validate),
    Field(json_schema_extra=_OBJECT_NAME.build_rule()),
]
ShortText = Annotated[str, StringConstraints(max_length=64)]
LongText = Annotated[str, StringConstraints(max_length=1024)]
MetricText = Annotated[str, StringConstraints(max_length=64)]
NameText = Annotated[str, StringConstraints(max_length=253)]


class ApiModel(BaseModel):
    """Base of every API type: camelCase in JSON, immutable in Python, unknown fields ignored for version skew."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, frozen=True, extra="ignore", use_attribute_docstrings=True
    )

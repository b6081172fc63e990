"""Generated files are those that their sources give."""

from pathlib import Path

import generate
import pytest
from generate_chart import UndocumentedValueError, build_values_schema, read_values


def test_generated_files_are_up_to_date() -> None:
    stale = [
        str(path)
        for path, text in generate.build_files().items()
        if not (generate.ROOT / path).exists() or (generate.ROOT / path).read_text(encoding="utf-8") != text
    ]

    assert [] == stale, "run `make generate`"


def test_nothing_else_lies_where_files_are_generated() -> None:
    generated = {generate.ROOT / path for path in generate.build_files()}
    found = {path for folder in ("crds", "docs/reference") for path in Path(generate.ROOT / folder).iterdir()}

    assert set() == found - generated


def test_every_value_needs_a_comment() -> None:
    with pytest.raises(UndocumentedValueError, match=r"a\.b: give it a comment"):
        read_values("a:\n  b: 1\n")


def test_values_are_read_with_their_comments() -> None:
    (first, second) = read_values('a:\n  # -- One\n  # and two.\n  # @schema {"minimum": 1}\n  b: 1\n# -- Free.\nc: {}\n')

    assert (("a", "b"), "One and two.", 1, {"minimum": 1}) == (first.path, first.description, first.default, first.extra)
    assert (("c",), "Free.", {}) == (second.path, second.description, second.default)


def test_a_plain_comment_documents_nothing() -> None:
    with pytest.raises(UndocumentedValueError, match="a: give it a comment"):
        build_values_schema("# about a\na: 1\n")

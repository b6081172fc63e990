"""Fixtures that tests of every package share."""

import difflib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

Golden = Callable[[str, str], None]


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """Compare text with the file golden/NAME beside the test; `make golden` rewrites the file instead."""

    def check(name: str, text: str) -> None:
        path = Path(request.path).parent / "golden" / name
        if os.environ.get("UPDATE_GOLDEN") == "1":  # noqa: TID251  a switch of the test run itself
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        expected = path.read_text(encoding="utf-8") if path.exists() else ""
        diff = "\n".join(difflib.unified_diff(expected.splitlines(), text.splitlines(), "golden", "actual", lineterm=""))

        assert not diff, f"{path.name} differs; read the diff, then `make golden`:\n{diff}"

    return check

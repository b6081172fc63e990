"""Log lines hold no tokens."""

import json
import logging
import sys

import pytest
from finetune_operator.logs import JsonFormatter, TextFormatter, redact

_TOKEN = "eyJhbGciOiJSUzI1NiIsImtpZCI6Ing.eyJhdWQiOlsiZmluZXR1bmUuZGV2Il19.c2lnbmF0dXJl"


def _record(message: str, *args: object, exc_info: object = None) -> logging.LogRecord:
    return logging.LogRecord("finetune_operator", logging.INFO, "f.py", 1, message, args, exc_info)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(f"token {_TOKEN} refused", "token [redacted] refused", id="service account token"),
        pytest.param("Authorization: Bearer s3cr3t-opaque", "Authorization: Bearer [redacted]", id="opaque token"),
        pytest.param("{'Authorization': 'bearer abc', 'x': 1}", "{'Authorization': 'bearer [redacted]', 'x': 1}", id="headers"),
        pytest.param("applied Job team/emoji-0a1b2c3d-1", "applied Job team/emoji-0a1b2c3d-1", id="nothing secret"),
    ],
)
def test_tokens_are_redacted(text: str, expected: str) -> None:
    assert redact(text) == expected


@pytest.mark.parametrize("formatter", [TextFormatter(), JsonFormatter()], ids=["text", "json"])
def test_tokens_in_arguments_and_tracebacks_are_redacted(formatter: logging.Formatter) -> None:
    try:
        raise ValueError(_TOKEN)
    except ValueError:
        line = formatter.format(_record("failed with %s", _TOKEN, exc_info=sys.exc_info()))

    assert _TOKEN not in line
    assert "ValueError" in line


def test_json_line_is_one_object() -> None:
    line = JsonFormatter().format(_record('a "quoted"\nmessage'))

    assert json.loads(line)["message"] == 'a "quoted"\nmessage'
    assert "\n" not in line

"""Keep the values of secret environment variables out of everything that leaves the process as text."""

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO, cast
from urllib.parse import quote

from finetune_api import names
from finetune_api.contract import TrainerReport

Redact = Callable[[str], str]

_SECRET_NAME = re.compile("SECRET|TOKEN|PASSW|CREDENTIAL|KEY|AUTH", re.IGNORECASE)
# These name files, whose paths help to find a fault.
_PATH_NAME = re.compile("_(FILE|PATH|DIR|SOCK)$", re.IGNORECASE)
_PATH_NAMES = frozenset({names.ENV_REPORT_TOKEN})
# A shorter value is part of common words, and no secret.
_LEAST_LENGTH = 6
_REDACTED = "[redacted]"


def build_redact(environment: Mapping[str, str]) -> Redact:
    """Return a function that replaces the values of secret variables in a text, in the forms that texts have them in."""
    forms = {form for name, value in environment.items() if _is_secret(name) for form in _list_forms(value)}
    if not forms:
        return lambda text: text
    # The longest first: a secret may begin like another.
    pattern = re.compile("|".join(re.escape(form) for form in sorted(forms, key=lambda form: (-len(form), form))))
    return lambda text: pattern.sub(_REDACTED, text)


def redact_report(report: TrainerReport, redact: Redact) -> TrainerReport:
    """Return a report whose free texts hold no secret; names and numbers have a closed form and stay."""
    changes: dict[str, Any] = {}
    if report.failure:
        changes["failure"] = report.failure.model_copy(update={"message": redact(report.failure.message)})
    if report.log_tail:
        changes["log_tail"] = redact(report.log_tail)
    if report.result:
        changes["result"] = report.result.model_copy(update={"warnings": tuple(map(redact, report.result.warnings))})
    return report.model_copy(update=changes)


def redact_output(redact: Redact) -> None:
    """Redact all that Python code writes to standard output and error from now on: logs, warnings, tracebacks, prints."""
    sys.stdout, sys.stderr = (cast("TextIO", _RedactedStream(stream, redact)) for stream in (sys.stdout, sys.stderr))


class _RedactedStream:
    """A text stream that redacts what is written, and is the given one otherwise."""

    def __init__(self, stream: TextIO, redact: Redact) -> None:
        self._stream = stream
        self._redact = redact

    def write(self, text: str) -> int:
        self._stream.write(self._redact(text))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  whatever a stream has
        return getattr(self._stream, name)


def _is_secret(name: str) -> bool:
    return bool(_SECRET_NAME.search(name)) and not _PATH_NAME.search(name) and name not in _PATH_NAMES


def _list_forms(value: str) -> Iterator[str]:
    """Yield a value as it stands, each of its lines, and how they look in URLs and in Python's and JSON's texts."""
    for text in (value, *value.splitlines()):
        stripped = text.strip()
        if len(stripped) >= _LEAST_LENGTH:
            yield from (stripped, quote(stripped, safe=""), json.dumps(stripped)[1:-1], repr(stripped.encode())[2:-1])
            # Beside both kinds of quotes, repr escapes one kind.
            yield from (repr(stripped)[1:-1], repr(stripped + "'\"")[1:-4])

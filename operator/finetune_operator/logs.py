"""Logging of the operator: text or JSON on standard error, with nothing secret in it."""

import json
import logging
import re
from datetime import UTC, datetime
from typing import Literal

# JSON Web Tokens (every service account token is one) and whatever follows a Bearer scheme.
_SECRETS = re.compile(r"eyJ[\w-]{8,}\.[\w-]+\.[\w-]*|(?<=[Bb]earer )[^\s'\",]+")
_REDACTED = "[redacted]"


def configure_logging(*, level: str, format: Literal["text", "json"]) -> None:
    """Set up the root logger of the process."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # Two lines per watch event at INFO, and its own words for what we log ourselves.
    logging.getLogger("kopf.objects").setLevel(logging.WARNING)
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)


class TextFormatter(logging.Formatter):
    """One line per record for people."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: ARG002, N802
        """Return the time in UTC."""
        return _format_time(record)

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        return redact(super().format(record))


class JsonFormatter(logging.Formatter):
    """One JSON object per record for machines."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        entry = {
            "time": _format_time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps({name: redact(value) for name, value in entry.items()})


def redact(text: str) -> str:
    """Return the text without tokens."""
    return _SECRETS.sub(_REDACTED, text)


def _format_time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, tz=UTC).isoformat(timespec="milliseconds")

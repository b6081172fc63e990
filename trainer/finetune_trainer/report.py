"""Deliver reports: by POST from a thread of its own, so that training never waits, and as the termination message."""

import json
import logging
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from finetune_api.contract import MAX_TERMINATION_MESSAGE_BYTES, TrainerReport

from finetune_trainer.errors import shorten

logger = logging.getLogger(__name__)

POST_TIMEOUT_SECONDS = 5.0
SECONDS_BETWEEN_POSTS = 5.0


@dataclass(frozen=True)
class Receiver:
    """Where reports go, with the names of Kubeflow Trainer's KEP-2779."""

    url: str
    ca_file: str | None
    token_file: str | None


class Poster:
    """Posts the latest report: urgent ones at once, others when the last post is old enough."""

    def __init__(self, receiver: Receiver, *, seconds_between: float = SECONDS_BETWEEN_POSTS) -> None:
        self._receiver = receiver
        self._seconds_between = seconds_between
        self._wake = threading.Condition()
        self._latest: TrainerReport | None = None
        self._urgent = False
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="reports", daemon=True)
        self._thread.start()

    def offer(self, report: TrainerReport, _phase: str, urgent: bool) -> None:  # noqa: FBT001  the signature of a progress sink
        """Take the report in place of one that is not yet posted; return at once."""
        with self._wake:
            self._latest, self._urgent = report, self._urgent or urgent
            self._wake.notify()

    def close(self) -> None:
        """Post what is left, and wait for that at most a little longer than one post may take."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(2 * POST_TIMEOUT_SECONDS + 1)

    def _run(self) -> None:
        posted = -self._seconds_between
        while True:
            with self._wake:
                while not self._closing and not self._urgent:
                    due = posted + self._seconds_between - time.monotonic() if self._latest is not None else None
                    if due is not None and due <= 0:
                        break
                    self._wake.wait(due)
                report, self._latest, self._urgent, closing = self._latest, None, False, self._closing
            if report is not None:
                post_report(report, self._receiver)
                posted = time.monotonic()
            elif closing:
                return


def post_report(report: TrainerReport, receiver: Receiver) -> bool:
    """Post one report; a failure is no reason to disturb the training, so it is only logged for debugging."""
    try:
        headers = {"Content-Type": "application/json"}
        if receiver.token_file:
            # The kubelet replaces the token before it expires.
            headers["Authorization"] = f"Bearer {Path(receiver.token_file).read_text().strip()}"
        request = urllib.request.Request(receiver.url, data=to_json(report), headers=headers, method="POST")  # noqa: S310
        context = ssl.create_default_context(cafile=receiver.ca_file) if receiver.url.startswith("https:") else None
        with urllib.request.urlopen(request, timeout=POST_TIMEOUT_SECONDS, context=context) as response:  # noqa: S310
            response.read()
    except (OSError, urllib.error.URLError, HTTPException, ValueError) as error:
        logger.debug("report not delivered: %s", error)
        return False
    return True


def to_json(report: TrainerReport) -> bytes:
    """Return the body of a report."""
    content = report.model_dump(mode="json", by_alias=True, exclude_none=True)
    return json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()


def fit_termination_message(report: TrainerReport, limit: int = MAX_TERMINATION_MESSAGE_BYTES) -> bytes:
    """Return the report as JSON of at most `limit` bytes, without the details that do not fit."""
    for candidate in _drop_details(report):
        message = to_json(candidate)
        if len(message) <= limit:
            return message
    raise AssertionError("a report without details is short")


def write_termination_message(path: Path, report: TrainerReport) -> None:
    """Write the last report where the kubelet reads it; outside a pod there is no such file."""
    try:
        if path.exists():
            path.write_bytes(fit_termination_message(report))
    except OSError as error:
        logger.warning("termination message not written to %s: %s", path, error)


def _drop_details(report: TrainerReport) -> Iterator[TrainerReport]:
    """Yield the report with less and less in it, the most dispensable first."""
    yield report
    result = report.result
    if result is not None:
        for limit, kept in ((200, 16), (80, 16), (80, 4), (80, 0)):
            warnings = tuple(shorten(warning, limit) for warning in result.warnings[:kept])
            report = report.model_copy(update={"result": result.model_copy(update={"warnings": warnings})})
            yield report
    report = report.model_copy(update={"trainer_status": report.trainer_status.model_copy(update={"metrics": ()})})
    yield report
    if report.result is not None:
        for kept in (8, 1):
            fewer = report.result.model_copy(update={"metrics": report.result.metrics[:kept]})
            yield report.model_copy(update={"result": fewer})
    for log_tail in (shorten(report.log_tail or "", 300) or None, None):
        report = report.model_copy(update={"log_tail": log_tail, "result": None})
        yield report
    if report.failure is not None:
        failure = report.failure.model_copy(update={"message": shorten(report.failure.message, 300)})
        yield report.model_copy(update={"failure": failure})

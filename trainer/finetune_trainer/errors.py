"""The errors that the trainer raises on purpose, each with its exit code.

TrainerError
|-- InvalidSpecError     64  the job asks for something impossible
|-- InvalidDataError     65  the data cannot be learnt from
|-- DivergedError        70  the loss is no longer a number
|-- PreemptedError       75  asked to stop; what was done is saved
|-- PeerLostError        76  another process of the job ended
|-- ModelNotFoundError   78  the pretrained model is not where the job says
|-- OutOfMemoryError      1  one picture at a time is already too much
`-- StorageError          1  the checkpoints or the model cannot be stored

Everything else that is raised is a bug or the machine.
"""

from collections.abc import Callable
from typing import ClassVar

from finetune_api.contract import ExitCode, FailureReport

MAX_MESSAGE_LENGTH = 1024


class TrainerError(Exception):
    """Base of the trainer's own errors: a CamelCase reason, and a message that says what to do."""

    exit_code: ClassVar[ExitCode] = ExitCode.INTERNAL_ERROR

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message

    def to_report(self, redact: Callable[[str], str]) -> FailureReport:
        """Return the failure as it is reported. What is secret goes before the text is cut: a part of it would stay."""
        return FailureReport(reason=self.reason, message=shorten(redact(self.message)))


class InvalidSpecError(TrainerError):
    """The job asks for something that cannot be done."""

    exit_code = ExitCode.INVALID_SPEC


class InvalidDataError(TrainerError):
    """The data cannot be learnt from."""

    exit_code = ExitCode.INVALID_DATA


class DivergedError(TrainerError):
    """The loss is no longer a number, or beyond all bounds."""

    exit_code = ExitCode.DIVERGED


class PreemptedError(TrainerError):
    """The process was asked to stop, and what was done is saved."""

    exit_code = ExitCode.PREEMPTED


class PeerLostError(TrainerError):
    """Another process of the job ended, or never came."""

    exit_code = ExitCode.PEER_LOST


class ModelNotFoundError(TrainerError):
    """The pretrained model is not where the job says."""

    exit_code = ExitCode.MODEL_NOT_FOUND


class OutOfMemoryError(TrainerError):
    """One picture at a time is already too much."""


class StorageError(TrainerError):
    """What was computed cannot be stored."""


def shorten(text: str, limit: int = MAX_MESSAGE_LENGTH) -> str:
    """Return `text` cut to `limit` characters, with an ellipsis where it was cut."""
    return text if len(text) <= limit else text[: limit - 3] + "..."

"""Errors of the operator.

OperatorError
    StartError          the operator cannot start: the message says what to do
    DeafWatchError      a watch misses changes that the API server has: the process must begin anew
    RewoundError        the API server has gone back to an earlier state: the process must begin anew
    LeadershipLostError another process leads, or may soon: this one must begin anew as a standby
    ApiError            the API server answered with an error, or not at all
        NotFoundError       404
        ConflictError       409: the object is not what was seen, or another manager owns a field
        RefusedError        400, 403, 422, a webhook that does not answer: refused again until somebody changes something
        UnauthorizedError   401 after the credentials were loaded again
        NotLeaderError      a write that was not sent, as this process does not lead
"""


class OperatorError(Exception):
    """Base of all errors that the operator raises itself."""


class StartError(OperatorError):
    """The operator cannot start."""


class DeafWatchError(OperatorError):
    """A watch does not show what the API server has."""


class RewoundError(OperatorError):
    """The API server has gone back to an earlier state than was seen, as after a restore of etcd from a backup.

    Nothing that was seen counts any more, and its watches bring nothing until the resourceVersions have caught up.
    """

    def __init__(self, what: str) -> None:
        super().__init__(f"the API server shows {what} as of before what was seen, as after a restore; starting anew")


class LeadershipLostError(OperatorError):
    """Another process leads, or may soon."""


class ApiError(OperatorError):
    """The API server answered with an error; status 0 means that it did not answer."""

    def __init__(self, message: str, *, status: int, reason: str) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.status} {self.reason}: {self.message}"


class NotFoundError(ApiError):
    """There is no such object."""


class ConflictError(ApiError):
    """The object is not what the request expects."""


class RefusedError(ApiError):
    """The API server refuses the request itself: invalid, forbidden, or over a quota."""


class UnauthorizedError(ApiError):
    """The API server does not accept the credentials."""


class NotLeaderError(ApiError):
    """A write was not sent, as this process does not lead."""


_BY_STATUS: dict[int, type[ApiError]] = {
    400: RefusedError,
    401: UnauthorizedError,
    403: RefusedError,
    404: NotFoundError,
    409: ConflictError,
    422: RefusedError,
}


def build_api_error(status: int, *, reason: str, message: str) -> ApiError:
    """Return the error for an HTTP status."""
    kind = RefusedError if "failed calling webhook" in message else _BY_STATUS.get(status, ApiError)
    return kind(message, status=status, reason=reason)

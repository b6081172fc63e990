"""The progress receiver: trainers POST their state over HTTPS, as in Kubeflow Trainer's KEP-2779.

A report counts only when its token was made for this receiver and belongs to a pod of the very FineTuneJob that it is about.
"""

import asyncio
import hashlib
import json
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from datetime import datetime
from http import HTTPStatus
from typing import Protocol

from aiohttp import web
from finetune_api import names
from finetune_api.contract import TrainerReport
from pydantic import ValidationError

from finetune_operator.errors import ApiError
from finetune_operator.forward import HEADER, ForwardError
from finetune_operator.metrics import REPORTS_RECEIVED, Metrics
from finetune_operator.observed import PodView
from finetune_operator.policies.progress import receive
from finetune_operator.store import Store
from finetune_operator.views import Key, RawObject, Record, Reviewed

logger = logging.getLogger(__name__)

_MAX_BODY_BYTES = 64 * 1024
_MAX_TOKEN_BYTES = 16 * 1024
_CACHE_SECONDS = 60.0
_MAX_CACHED = 16_384
# Each unknown token costs a request to the API server; a flood of them must not take its place from the reconciles.
_MAX_REVIEWS = 32
_RETRY_AFTER_SECONDS = "5"


class TokenReviewer(Protocol):
    """Who knows whom a token belongs to."""

    async def review_token(self, token: str) -> Reviewed | None:
        """Return the owner of a valid token, or None."""


class ReportForwarder(Protocol):
    """Who hands reports on to the process that leads."""

    async def forward(self, path: str, *, authorization: str, body: bytes) -> tuple[int, bytes]:
        """Return the leader's status and answer. Raises ForwardError when there is none."""


class ReportError(Exception):
    """A report is not accepted; answered as a metav1.Status."""

    def __init__(self, status: HTTPStatus, message: str, *, result: str, reason: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.result = result
        self.reason = reason


class ReportReceiver:
    """Checks reports and puts the accepted ones into the store."""

    def __init__(
        self,
        *,
        store: Store,
        reviewer: TokenReviewer,
        enqueue: Callable[[Key], None],
        metrics: Metrics,
        clock: Callable[[], datetime],
        is_leading: Callable[[], bool] = lambda: True,
        forwarder: ReportForwarder | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        body_seconds: float = 10.0,
    ) -> None:
        self._store = store
        self._reviewer = reviewer
        self._enqueue = enqueue
        self._metrics = metrics
        self._clock = clock
        self._is_leading = is_leading
        self._forwarder = forwarder
        self._monotonic = monotonic
        self._body_seconds = body_seconds
        self._cache: OrderedDict[bytes, tuple[float, Reviewed | None]] = OrderedDict()
        self._num_reviews = 0

    def build_app(self) -> web.Application:
        """Return the web application."""
        app = web.Application(client_max_size=_MAX_BODY_BYTES, middlewares=[self._answer_errors])
        app.router.add_post(names.report_path("{namespace}", "{name}"), self._receive)
        return app

    async def _receive(self, request: web.Request) -> web.Response:
        if not self._is_leading():
            return await self._hand_on(request)
        key = request.match_info["namespace"], request.match_info["name"]
        pod = self._find_pod(key, await self._review(_read_token(request)))
        content, report = _parse(await self._read_body(request))
        attempt = self._store.children.find((key[0], pod.content.child))
        if attempt is None:
            raise _forbidden("the Job of the token's pod is not known")
        received = receive(
            self._store.find_report(key),
            report,
            child=attempt.content,
            received_at=self._clock(),
            monotonic=self._monotonic(),
        )
        self._store.put_report(key, received)
        self._enqueue(key)
        self._metrics.count(REPORTS_RECEIVED, result="accepted")
        return web.json_response(content)

    async def _read_body(self, request: web.Request) -> bytes:
        """Return the body, or give up on a sender that lets us wait."""
        try:
            async with asyncio.timeout(self._body_seconds):
                return await request.read()
        except TimeoutError as error:
            message = f"the body did not arrive within {self._body_seconds:g} s"
            raise ReportError(HTTPStatus.REQUEST_TIMEOUT, message, result="malformed", reason="Timeout") from error

    async def _hand_on(self, request: web.Request) -> web.Response:
        """Answer what the leader answers; it checks the token."""
        if self._forwarder is None or HEADER in request.headers:
            raise _no_leader("this replica does not lead")
        authorization = request.headers.get("Authorization", "")[: _MAX_TOKEN_BYTES + len("Bearer ")]
        try:
            status, body = await self._forwarder.forward(
                request.rel_url.raw_path, authorization=authorization, body=await self._read_body(request)
            )
        except ForwardError as error:
            raise _no_leader(str(error)) from error
        self._metrics.count(REPORTS_RECEIVED, result="forwarded")
        headers = {"Retry-After": _RETRY_AFTER_SECONDS} if status == HTTPStatus.SERVICE_UNAVAILABLE else {}
        return web.Response(status=status, body=body, content_type="application/json", headers=headers)

    def _find_pod(self, key: Key, reviewed: Reviewed) -> Record[PodView]:
        """Return the pod that the token was made for, if it works for the FineTuneJob of this key."""
        namespace, name = key
        if not reviewed.username.startswith(f"system:serviceaccount:{namespace}:") or reviewed.pod is None:
            raise _forbidden(f"the token does not belong to a pod in namespace {namespace}")
        job = self._store.jobs.find(key)
        if job is None or not job.content.is_ours:
            message = f"there is no FineTuneJob {namespace}/{name} of this operator"
            raise ReportError(HTTPStatus.NOT_FOUND, message, result="not_found", reason="NotFound")
        pod = self._store.pods.find((namespace, reviewed.pod))
        if pod is None or pod.uid != reviewed.pod_uid or pod.owner != key or pod.owner_uid != job.uid:
            raise _forbidden(f"the token's pod does not belong to FineTuneJob {namespace}/{name}")
        if pod.content.index != 0:
            # All trainers of an attempt have the same to tell, and the first one alone publishes.
            raise _forbidden("the reports of an attempt come from its first pod, the one with index 0")
        return pod

    async def _review(self, token: str) -> Reviewed:
        """Return whom a token belongs to, from the cache if it was asked within a minute."""
        digest = hashlib.sha256(token.encode()).digest()
        expires_at, reviewed = self._cache.get(digest, (0.0, None))
        if self._monotonic() >= expires_at:
            reviewed = await self._ask(token)
            self._cache[digest] = self._monotonic() + _CACHE_SECONDS, reviewed
            self._cache.move_to_end(digest)
            while len(self._cache) > _MAX_CACHED:
                self._cache.popitem(last=False)
        if reviewed is None:
            raise _unauthorized(f"the token is not valid for audience {names.REPORT_AUDIENCE}")
        return reviewed

    async def _ask(self, token: str) -> Reviewed | None:
        if self._num_reviews >= _MAX_REVIEWS:
            message = "too many tokens are being checked; try again later"
            raise ReportError(HTTPStatus.TOO_MANY_REQUESTS, message, result="throttled", reason="TooManyRequests")
        self._num_reviews += 1
        try:
            return await self._reviewer.review_token(token)
        finally:
            self._num_reviews -= 1

    @web.middleware
    async def _answer_errors(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Answer with a metav1.Status whatever goes wrong."""
        try:
            return await handler(request)
        except ReportError as error:
            return self._refuse(error)
        except web.HTTPRequestEntityTooLarge:
            message = f"a report has at most {_MAX_BODY_BYTES} bytes"
            return self._refuse(
                ReportError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message, result="too_large", reason="RequestEntityTooLarge")
            )
        except web.HTTPException as error:
            # The router's own: an unknown path or method.
            message = f"POST to {names.report_path('NAMESPACE', 'NAME')}"
            return self._refuse(ReportError(HTTPStatus(error.status), message, result="not_found", reason="NotFound"))
        except ApiError as error:
            logger.warning("cannot check a report's token: %s", error)
            message = "the token cannot be checked at this time; try again later"
            return self._refuse(ReportError(HTTPStatus.SERVICE_UNAVAILABLE, message, result="error", reason="ServiceUnavailable"))

    def _refuse(self, error: ReportError) -> web.Response:
        self._metrics.count(REPORTS_RECEIVED, result=error.result)
        status: RawObject = {
            "apiVersion": "v1",
            "kind": "Status",
            "metadata": {},
            "status": "Failure",
            "message": error.message,
            "reason": error.reason,
            "code": error.status.value,
        }
        is_temporary = error.status in (HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.TOO_MANY_REQUESTS)
        headers = {"Retry-After": _RETRY_AFTER_SECONDS} if is_temporary else {}
        return web.json_response(status, status=error.status.value, headers=headers)


def _read_token(request: web.Request) -> str:
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token or len(token) > _MAX_TOKEN_BYTES:
        raise _unauthorized("send the pod's projected token as `Authorization: Bearer TOKEN`")
    return token.strip()


def _parse(body: bytes) -> tuple[object, TrainerReport]:
    try:
        content = json.loads(body)
    except ValueError as error:
        message = "the body is not JSON"
        raise ReportError(HTTPStatus.BAD_REQUEST, message, result="malformed", reason="BadRequest") from error
    try:
        return content, TrainerReport.model_validate_json(body)
    except ValidationError as error:
        message = "; ".join(
            f"{'.'.join(map(str, each['loc'])) or 'body'}: {each['msg']}" for each in error.errors(include_url=False)[:8]
        )
        raise ReportError(HTTPStatus.UNPROCESSABLE_ENTITY, message, result="invalid", reason="Invalid") from error


def _unauthorized(message: str) -> ReportError:
    return ReportError(HTTPStatus.UNAUTHORIZED, message, result="unauthorized", reason="Unauthorized")


def _forbidden(message: str) -> ReportError:
    return ReportError(HTTPStatus.FORBIDDEN, message, result="forbidden", reason="Forbidden")


def _no_leader(message: str) -> ReportError:
    return ReportError(HTTPStatus.SERVICE_UNAVAILABLE, message, result="no_leader", reason="ServiceUnavailable")

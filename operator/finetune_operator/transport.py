"""The connection to the API server: credentials, TLS, limits and repeated requests. The only importer of `kubernetes`."""

import asyncio
import json
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, Protocol, cast
from urllib.parse import urlencode

import aiohttp
from aiohttp.abc import AbstractStreamWriter
from aiohttp.connector import Connection
from kubernetes.aio import config as kubernetes_config
from kubernetes.aio.client import ApiClient, Configuration
from kubernetes.aio.config import kube_config

from finetune_operator.errors import ApiError, StartError, build_api_error
from finetune_operator.metrics import API_REQUEST_SECONDS, API_REQUESTS, Metrics, classify_code
from finetune_operator.throttle import TokenBucket
from finetune_operator.views import RawObject

JSON = "application/json"
TOKEN_REVIEWS = "/apis/authentication.k8s.io/v1/tokenreviews"  # noqa: S105  a path

_USER_AGENT = "finetune-operator"
_TIMEOUT_SECONDS = 30
_MAX_TRIES = 5
_METHODS = {"get": "GET", "list": "GET", "create": "POST", "update": "PUT", "patch": "PATCH", "delete": "DELETE"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientSettings:
    """How the API server is reached, and how hard it may be used."""

    requests_per_second: float
    burst: int
    connections: int
    identity: str = ""
    """Name of this process among its replicas, told to the API server, whose audit log has it."""


class Gate(Protocol):
    """Who knows whether this process may write."""

    def check(self) -> None:
        """Raise NotLeaderError unless a write may be sent at this very time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An answer of the API server."""

    status: int
    content: bytes
    retry_after: float

    def parse(self) -> RawObject:
        """Return the object in the answer. Raises the ApiError that the answer stands for."""
        try:
            parsed = json.loads(self.content)
        except ValueError as error:
            text = self.content[:256].decode(errors="replace")
            raise build_api_error(self.status, reason="NotJson", message=text) from error
        if 200 <= self.status <= 299:
            return cast("RawObject", parsed)
        raise build_api_error(self.status, reason=parsed.get("reason") or "Unknown", message=parsed.get("message") or "")


class Transport:
    """Requests to the API server, as many at a time and a second as it was told."""

    def __init__(
        self, configuration: Configuration, *, settings: ClientSettings, metrics: Metrics, gate: Gate | None = None
    ) -> None:
        self._settings = settings
        self._gate = gate
        self._metrics = metrics
        self._bucket = TokenBucket(rate=settings.requests_per_second, burst=settings.burst, clock=time.monotonic)
        self._configuration = configuration
        self._api = _open_client(configuration, gate)
        self._reloading = asyncio.Lock()

    @classmethod
    async def connect(cls, settings: ClientSettings, *, metrics: Metrics, gate: Gate | None = None) -> "Transport":
        """Load the credentials of the kubeconfig, if there is one, or of the pod's service account.

        Every write asks the gate first, if there is one, at the last moment before it is sent.
        """
        return cls(await _load_configuration(settings), settings=settings, metrics=metrics, gate=gate)

    async def close(self) -> None:
        """Close all connections."""
        await self._api.close()

    @property
    def server(self) -> str:
        """Return the URL of the API server."""
        return self._configuration.host

    async def open_watch_session(self) -> aiohttp.ClientSession:
        """Return a session for watches, whose owner closes it. Each request reads the token anew, as tokens rotate."""

        async def authorize(request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
            request.headers.update(await self._build_headers())
            return await handler(request)

        async def begin_anew(request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
            response = await handler(request)
            if response.status == HTTPStatus.GONE and "continue" in request.url.query:
                response.close()
                # The rest of the list has expired. kopf ends for that answer, and lists anew after one that was cut off.
                raise aiohttp.ClientPayloadError(f"{request.url.path}: the list has expired; listing anew")
            return response

        connector = aiohttp.TCPConnector(limit=0, ssl=self._api.rest_client.ssl_context, socket_factory=_open_socket)
        return aiohttp.ClientSession(connector=connector, middlewares=(authorize, begin_anew))

    async def reload(self) -> None:
        """Load the credentials again, after the API server refused them."""
        stale = self._api
        async with self._reloading:
            if self._api is not stale:
                return
            self._configuration = await _load_configuration(self._settings)
            self._api = _open_client(self._configuration, self._gate)
            await stale.close()

    async def request(
        self,
        verb: str,
        path: str,
        *,
        resource: str,
        query: Mapping[str, str] | None = None,
        body: RawObject | None = None,
        content_type: str = JSON,
        accept: str = JSON,
    ) -> RawObject:
        """Make a request, and again when the API server is too busy or the credentials were replaced; return the object answered.

        Verb and resource are the words of RBAC, for the metrics. Raises the ApiError that the answer stands for, or one with
        status 0 when there was none.
        """
        url = path + (f"?{urlencode(query)}" if query else "")
        is_reloaded = False
        for tries_left in reversed(range(_MAX_TRIES)):
            await self._bucket.wait()
            answer = await self._send(verb, url, resource=resource, body=body, content_type=content_type, accept=accept)
            if answer.status == 429 and tries_left:
                self._bucket.block(answer.retry_after)
            elif answer.status == 401 and tries_left and not is_reloaded:
                await self.reload()
                is_reloaded = True
            else:
                break
        return answer.parse()

    async def _send(
        self, verb: str, url: str, *, resource: str, body: RawObject | None, content_type: str, accept: str
    ) -> Answer:
        headers = await self._build_headers() | {"Accept": accept, "Content-Type": content_type}
        status, started_at = 0, time.monotonic()
        try:
            response = await self._api.call_api(
                _METHODS[verb],
                self.server + url,
                header_params=headers,
                body=body,
                _request_timeout=aiohttp.ClientTimeout(total=_TIMEOUT_SECONDS),
            )
            content = await response.read()
            status = response.status
            return Answer(status=status, content=content, retry_after=_parse_seconds(response.headers.get("Retry-After")))
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ApiError(f"{verb} {url}: {error!r}", status=0, reason="NoAnswer") from error
        finally:
            self._metrics.count(API_REQUESTS, verb=verb, resource=resource, code=classify_code(status))
            self._metrics.observe(API_REQUEST_SECONDS, time.monotonic() - started_at, verb=verb)

    async def _build_headers(self) -> dict[str, str]:
        headers = {"User-Agent": "/".join(filter(None, (_USER_AGENT, self._settings.identity)))}
        if token := await self._configuration.get_api_key_with_prefix("BearerToken", alias="authorization"):
            headers["Authorization"] = token
        return headers


async def _load_configuration(settings: ClientSettings) -> Configuration:
    configuration = Configuration()
    configuration.connection_pool_maxsize = settings.connections
    try:
        if _has_kubeconfig():
            await kubernetes_config.load_kube_config(client_configuration=configuration, persist_config=False)
        else:
            kubernetes_config.load_incluster_config(client_configuration=configuration)
    except kubernetes_config.ConfigException as error:
        raise StartError(f"no credentials for an API server: {error}; set KUBECONFIG or run in a pod") from error
    return configuration


def _open_client(configuration: Configuration, gate: Gate | None) -> ApiClient:
    # With trust_env aiohttp reads ~/.netrc in a thread, twice for each request.
    configuration.client_session_kwargs = {"trust_env": False} | ({} if gate is None else {"request_class": _guard(gate)})
    return ApiClient(configuration)


def _guard(gate: Gate) -> type[aiohttp.ClientRequest]:
    """Return requests that ask the gate when they have a connection and nothing lies between them and the wire.

    Asked any earlier, a write could wait for its turn, or for a connection, until the process no longer leads.
    """

    class GuardedRequest(aiohttp.ClientRequest):
        async def send(self, conn: Connection) -> aiohttp.ClientResponse:
            if self._is_write():
                gate.check()
            return await super().send(conn)

        # Up to Python 3.11 this is a task, which begins later than send() ends; head and body leave together in it.
        async def write_bytes(self, writer: AbstractStreamWriter, conn: Connection, content_length: int | None = None) -> None:
            try:
                if self._is_write():
                    gate.check()
            except ApiError as error:
                if conn.protocol is not None:
                    conn.protocol.set_exception(error)
                conn.close()
                return
            await super().write_bytes(writer, conn, content_length)

        def _is_write(self) -> bool:
            # To check a token changes nothing, though it is a POST.
            return self.method != "GET" and not self.url.path.endswith(TOKEN_REVIEWS)

    return GuardedRequest


def _has_kubeconfig() -> bool:
    """Return whether there is a kubeconfig, which the client finds through KUBECONFIG; without one we run in a pod."""
    paths = (Path(part) for part in kube_config.KUBE_CONFIG_DEFAULT_LOCATION.split(":") if part)
    return any(path.expanduser().is_file() for path in paths)


def _open_socket(address: tuple[Any, ...]) -> socket.socket:
    """Return a socket that notices within a minute that the other end is gone, whatever lies between."""
    family, kind, protocol, _, _ = address
    opened = socket.socket(family, kind, protocol)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 50_000)):
        if hasattr(socket, option):  # macOS lacks some of them
            opened.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return opened


def _parse_seconds(value: str | None) -> float:
    """Return the seconds of a Retry-After header; the API server sends no dates."""
    return float(value) if value and value.isdecimal() else 1.0

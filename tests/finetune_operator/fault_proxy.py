"""A proxy between an operator and the API server that does what networks and busy servers do, on demand.

    with FaultProxy(api, folder=tmp_path) as proxy:
        proxy.route(tmp_path / "kubeconfig")                     # the operator goes through the proxy from its next start on
        proxy.plan(Fault(match=Match(verb="patch", resource="jobs"), nth=2, action=Drop()))
        proxy.requests                                           # what has passed, in order
        proxy.swallow(Swallow(resource="pods", type="DELETED"))  # one event of a watch does not arrive
        proxy.cut_watches(); proxy.freeze_watches(); proxy.pin(version)

It speaks TLS on both sides with a certificate of its own, and passes the operator's credentials on, so that the API server's
audit log still tells who did what.
"""

import asyncio
import base64
import json
import re
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import aiohttp
from aiohttp import web
from harness import write_certificate

T = TypeVar("T")

WRITES = frozenset({"create", "update", "patch", "delete"})
_PATH = re.compile(
    r"^/(?:api|apis/[^/]+)/v[^/]+(?:/namespaces/(?P<namespace>[^/]+)(?=/.))?/(?P<resource>[^/]+)(?:/(?P<name>[^/]+))?(?:/(?P<sub>[^/]+))?$"
)
_HOP_BY_HOP = frozenset({"connection", "content-length", "transfer-encoding", "host", "keep-alive", "content-encoding"})
# A line of a watch is one object.
_LINE_BYTES = 1 << 22


@dataclass(frozen=True)
class Request:
    """A request as the API server's audit log would name it; `resource` has the subresource, as in finetunejobs/status."""

    verb: str
    resource: str
    namespace: str
    name: str
    query: str

    @property
    def is_write(self) -> bool:
        return self.verb in WRITES


@dataclass(frozen=True, kw_only=True)
class Match:
    """Which requests a fault is about; what is not given does not matter."""

    verb: str | frozenset[str] | None = None
    resource: str | None = None
    name: str | None = None
    query: str = ""
    """What the query has somewhere in it, as in `continue=`."""

    def fits(self, request: Request) -> bool:
        verbs = frozenset({self.verb}) if isinstance(self.verb, str) else self.verb
        return (
            (verbs is None or request.verb in verbs)
            and self.resource in (None, request.resource)
            and (self.name is None or request.name.startswith(self.name))
            and self.query in request.query
        )


class Action:
    """What happens to a request."""


@dataclass(frozen=True)
class Kill(Action):
    """Call this, which kills the operator, before the request is passed on (which it then is not), or after it took effect."""

    kill: Callable[[], object]
    is_after: bool = False


@dataclass(frozen=True)
class Drop(Action):
    """Cut the connection, by default after the request took effect; the operator cannot tell."""

    is_forwarded: bool = True


@dataclass(frozen=True)
class Delay(Action):
    """Pass the request on late."""

    seconds: float


@dataclass(frozen=True)
class Answer(Action):
    """Answer in the API server's place."""

    status: int
    reason: str = ""
    message: str = "by the fault proxy"
    retry_after: int | None = None


@dataclass(frozen=True)
class Expire(Action):
    """Answer a watch as the API server does when the version it starts from is no longer known."""


@dataclass(kw_only=True)
class Fault:
    """Do something to the nth request that matches, then to every so-manieth, up to `times` of them (None: for ever)."""

    match: Match
    action: Action
    nth: int = 1
    every: int = 1
    times: int | None = 1
    seen: int = 0
    struck: int = 0

    def strikes(self, request: Request) -> bool:
        if not self.match.fits(request):
            return False
        self.seen += 1
        if self.times is not None and self.struck >= self.times:
            return False
        is_struck = self.seen >= self.nth and (self.seen - self.nth) % self.every == 0
        self.struck += is_struck
        return is_struck


@dataclass(kw_only=True)
class Swallow:
    """An event of a watch that does not arrive: by the resource of the watch, the type, and the start of the object's name."""

    resource: str | None = None
    type: str | None = None
    name: str = ""
    nth: int = 1
    times: int | None = 1
    seen: int = 0
    swallowed: list[str] = field(default_factory=list)

    def strikes(self, request: Request, event: dict[str, Any]) -> bool:
        name = event["object"].get("metadata", {}).get("name", "")
        fits = self.resource in (None, request.resource) and self.type in (None, event["type"]) and name.startswith(self.name)
        if not fits or event["type"] in ("BOOKMARK", "ERROR"):
            return False
        self.seen += 1
        is_struck = self.seen >= self.nth and (self.times is None or self.seen < self.nth + self.times)
        if is_struck:
            self.swallowed.append(f"{event['type']} {name}")
        return is_struck


class FaultProxy:
    """The proxy, served by a thread of its own."""

    def __init__(self, api: Any, *, folder: Path) -> None:
        self._upstream: str = api.server
        self._trusted: str = api.ca
        self._folder = folder / "proxy"
        self._folder.mkdir()
        self._faults: list[Fault] = []
        self._swallows: list[Swallow] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault proxy", daemon=True)
        self._watches: dict[int, tuple[web.BaseRequest, Request]] = {}
        self._is_frozen: Match | None = None
        self._pinned: int | None = None
        self.hold_bookmarks = False
        self.chunk: int | None = None
        """How long the parts of lists are, in place of what the operator asks for."""
        self.requests: list[Request] = []
        self.ended: list[tuple[str, int]] = []
        """The resource and the code of each watch that the API server has ended with an error."""
        self.port = 0

    def __enter__(self) -> "FaultProxy":
        certificate, self._key = write_certificate(self._folder, name="localhost")
        self._certificate = certificate
        self._thread.start()
        self._call(self._start())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._call(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        self._loop.close()

    @property
    def server(self) -> str:
        return f"https://localhost:{self.port}"

    @property
    def writes(self) -> list[Request]:
        """Return the writes that have come, in order."""
        return [request for request in self.requests if request.is_write]

    def route(self, kubeconfig: Path) -> None:
        """Have whoever reads a kubeconfig (in JSON) go through the proxy."""
        config = json.loads(kubeconfig.read_text(encoding="utf-8"))
        authority = base64.b64encode(self._certificate.read_bytes()).decode()
        config["clusters"][0]["cluster"] = {"server": self.server, "certificate-authority-data": authority}
        kubeconfig.write_text(json.dumps(config), encoding="utf-8")

    def plan(self, *faults: Fault) -> None:
        """Have these happen, besides what is planned; the first that strikes decides."""
        self._faults.extend(faults)

    def swallow(self, *events: Swallow) -> None:
        """Have these events not arrive."""
        self._swallows.extend(events)

    def heal(self) -> None:
        """Let everything pass from now on; what was held back arrives, and what was lost stays lost."""
        self._faults.clear()
        self._swallows.clear()
        self.hold_bookmarks = False
        self._is_frozen = None
        self._pinned = None

    def count_watches(self, resource: str | None = None) -> int:
        """Return how many watches are open."""
        return sum(resource in (None, request.resource) for _, request in list(self._watches.values()))

    def cut_watches(self, resource: str | None = None) -> int:
        """Cut the watches that are open, without a word, and return how many that were."""
        return self._call(self._cut(resource))

    def freeze_watches(self, resource: str | None = None) -> None:
        """Let no watch deliver anything, without ending it, until heal()."""
        self._is_frozen = Match(resource=resource)

    def pin(self, version: int) -> None:
        """Show lists and watches as they were at a resourceVersion, as an API server does that lags behind, until heal().

        The lists are real: the API server makes them from etcd's history. Single objects are read as they are.
        """
        self._pinned = version

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        future: Future[T] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return future.result(60)

    async def _start(self) -> None:
        upstream = ssl.create_default_context(cadata=self._trusted)
        # The test's own certificate of the API server names addresses as well as names.
        self._connector = aiohttp.TCPConnector(limit=0, ssl=upstream)
        self._session = aiohttp.ClientSession(
            connector=self._connector,
            timeout=aiohttp.ClientTimeout(total=None),
            read_bufsize=_LINE_BYTES,
            skip_auto_headers=("Content-Type", "User-Agent"),
        )
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self._certificate, self._key)
        # A client that is gone ends what is done for it, or each watch of a killed operator would stay.
        self._runner = web.ServerRunner(web.Server(self._handle, handler_cancellation=True), shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=context)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def _stop(self) -> None:
        await self._cut(None)
        await self._runner.cleanup()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        # On a busy machine the end of a TLS connection takes longer than its loop lasts.
        await self._connector.close(abort_ssl=True)
        await self._session.close()
        await asyncio.sleep(0.2)  # each transport tells of its end in a turn of the loop after that

    async def _cut(self, resource: str | None) -> int:
        cut = [raw for raw, request in self._watches.values() if resource in (None, request.resource)]
        for raw in cut:
            _abort(raw)
        return len(cut)

    async def _handle(self, raw: web.BaseRequest) -> web.StreamResponse:
        request = parse_request(raw.method, raw.path, raw.query_string)
        body = await raw.read()
        self.requests.append(request)
        struck = [fault for fault in self._faults if fault.strikes(request)]
        action = struck[0].action if struck else None
        match action:
            case Kill(kill=kill, is_after=False):
                kill()
                return _abort(raw)
            case Kill(kill=kill):
                await self._forward(raw, request, body=body)
                kill()
                return _abort(raw)
            case Drop(is_forwarded=is_forwarded):
                if is_forwarded:
                    await self._forward(raw, request, body=body)
                return _abort(raw)
            case Answer():
                return _answer(action)
            case Expire():
                return _expire()
            case Delay(seconds=seconds):
                await asyncio.sleep(seconds)
            case _:
                pass
        if request.verb == "watch":
            return await self._relay(raw, request)
        try:
            return await self._forward(raw, request, body=body)
        except aiohttp.ClientError:
            return _abort(raw)

    async def _forward(self, raw: web.BaseRequest, request: Request, *, body: bytes) -> web.Response:
        """Pass a request on, and return the whole answer."""
        address = self._address(raw, request)
        async with self._session.request(raw.method, address, headers=_keep(raw.headers), data=body or None) as answer:
            return web.Response(status=answer.status, headers=_keep(answer.headers), body=await answer.read())

    async def _relay(self, raw: web.BaseRequest, request: Request) -> web.StreamResponse:
        """Pass a watch on, event by event."""
        try:
            async with self._session.get(self._upstream + raw.path_qs, headers=_keep(raw.headers)) as answer:
                stream = web.StreamResponse(status=answer.status, headers=_keep(answer.headers))
                await stream.prepare(raw)
                self._watches[id(raw)] = raw, request
                async for line in self._filter(request, answer.content):
                    await stream.write(line)
                await stream.write_eof()
                return stream
        except (aiohttp.ClientError, ConnectionError):
            return _abort(raw)
        finally:
            self._watches.pop(id(raw), None)

    async def _filter(self, request: Request, lines: aiohttp.StreamReader) -> AsyncIterator[bytes]:
        async for line in lines:
            event = json.loads(line)
            if event["type"] == "ERROR":
                self.ended.append((request.resource, event["object"]["code"]))
            while self._holds(request, event):  # noqa: ASYNC110  the thread that ends it has no asyncio.Event
                await asyncio.sleep(0.02)
            if self.hold_bookmarks and event["type"] == "BOOKMARK":
                continue
            # All of them count, so none is left out once one has struck.
            if sum(swallow.strikes(request, event) for swallow in self._swallows):
                continue
            yield line

    def _holds(self, request: Request, event: dict[str, Any]) -> bool:
        if self._is_frozen is not None and self._is_frozen.fits(request):
            return True
        version = event["object"].get("metadata", {}).get("resourceVersion", "0")
        return self._pinned is not None and int(version) > self._pinned

    def _address(self, raw: web.BaseRequest, request: Request) -> str:
        if request.verb == "list" and self.chunk is not None:
            return self._upstream + re.sub(r"([?&]limit)=\d+", rf"\1={self.chunk}", raw.path_qs)
        if self._pinned is None or request.verb != "list" or "continue=" in raw.query_string:
            return self._upstream + raw.path_qs
        separator = "&" if raw.query_string else "?"
        return f"{self._upstream}{raw.path_qs}{separator}resourceVersion={self._pinned}&resourceVersionMatch=Exact"


def parse_request(method: str, path: str, query: str) -> Request:
    """Return what a request is, in the audit log's words."""
    found = _PATH.match(path)
    if found is None:
        return Request(verb=method.lower(), resource=path, namespace="", name="", query=query)
    parts = {key: value or "" for key, value in found.groupdict().items()}
    if method == "GET":
        verb = "watch" if re.search(r"(^|&)watch=(true|1)", query) else "get" if parts["name"] else "list"
    else:
        verb = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}[method]
    resource = parts["resource"] + (f"/{parts['sub']}" if parts["sub"] else "")
    return Request(verb=verb, resource=resource, namespace=parts["namespace"], name=parts["name"], query=query)


def _keep(headers: Any) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.lower() not in _HOP_BY_HOP}


def _answer(answer: Answer) -> web.Response:
    headers = {} if answer.retry_after is None else {"Retry-After": str(answer.retry_after)}
    body = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": answer.status}
    body |= {"reason": answer.reason, "message": answer.message}
    return web.json_response(body, status=answer.status, headers=headers)


def _expire() -> web.Response:
    status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 410, "reason": "Expired"}
    event = {"type": "ERROR", "object": status | {"message": "too old resource version"}}
    return web.json_response(event)


def _abort(raw: web.BaseRequest) -> web.Response:
    """Cut the connection of a request; the answer then goes nowhere."""
    if raw.transport is not None:
        raw.transport.abort()
    return web.Response()

"""/healthz and /readyz, answered from a thread of their own, so that a busy event loop delays no probe but is noticed."""

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_BEAT_SECONDS = 0.5
_MAX_LAG_SECONDS = 5.0
# kopf replaces no watcher, but it takes a moment at the start until all of them are there.
_START_SECONDS = 30.0


@dataclass(slots=True, kw_only=True)
class Health:
    """What the probes are told. The event loop writes it, the thread of the server reads it."""

    watchers: frozenset[str]
    """Names of the tasks that must be alive once the operator is synced."""
    max_audit_age_seconds: float
    read_audit_age: Callable[[], float]
    observe_lag: Callable[[float], None] = lambda _seconds: None
    """Is told by how much each beat is late."""
    clock: Callable[[], float] = time.monotonic
    is_synced: bool = False
    beat_at: float = field(init=False)
    started_at: float = field(init=False)
    missing: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        self.beat_at = self.started_at = self.clock()

    async def beat(self) -> None:
        """Show for ever that the event loop turns and which watchers are alive."""
        while True:
            self.take_pulse(frozenset(task.get_name() for task in asyncio.all_tasks()))
            await asyncio.sleep(_BEAT_SECONDS)
            self.observe_lag(max(0.0, self.clock() - self.beat_at - _BEAT_SECONDS))

    def take_pulse(self, tasks: frozenset[str]) -> None:
        """Note the time and the tasks that are alive at it."""
        self.beat_at = self.clock()
        self.missing = self.watchers - tasks

    def find_problem(self) -> str | None:
        """Return why the process should be restarted, or None."""
        now = self.clock()
        if now - self.beat_at > _MAX_LAG_SECONDS:
            return f"the event loop has not turned for {now - self.beat_at:.0f} s"
        if self.missing and now - self.started_at > _START_SECONDS:
            return f"not running: {', '.join(sorted(self.missing))}"
        if self.is_synced and self.read_audit_age() > self.max_audit_age_seconds:
            return f"the last audit was {self.read_audit_age():.0f} s ago"
        return None


class HealthServer:
    """Serves the probes."""

    def __init__(self, health: Health, *, address: str, port: int) -> None:
        self._server = ThreadingHTTPServer((address, port), _build_handler(health))
        self._thread = threading.Thread(target=self._server.serve_forever, name="health", daemon=True)

    @property
    def port(self) -> int:
        """Return the port that is listened on."""
        return int(self._server.server_address[1])

    def start(self) -> None:
        """Start to answer."""
        self._thread.start()

    def stop(self) -> None:
        """Stop to answer."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _build_handler(health: Health) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 5

        def do_GET(self) -> None:
            problem = health.find_problem()
            if self.path == "/readyz" and problem is None and not health.is_synced:
                problem = "the objects of the cluster are not all seen yet"
            if self.path not in ("/healthz", "/readyz"):
                self._answer(HTTPStatus.NOT_FOUND, "only /healthz and /readyz are here")
            elif problem:
                self._answer(HTTPStatus.SERVICE_UNAVAILABLE, problem)
            else:
                self._answer(HTTPStatus.OK, "ok")

        def _answer(self, status: HTTPStatus, text: str) -> None:
            body = f"{text}\n".encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/plain; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler

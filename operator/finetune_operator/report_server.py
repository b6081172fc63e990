"""Serves the progress receiver over HTTPS to a bounded number of connections at a time."""

import asyncio
import logging
import socket
import ssl
import time
from contextlib import suppress
from pathlib import Path

from aiohttp import web

logger = logging.getLogger(__name__)

# A TLS connection takes 256 KiB of memory at once (asyncio.sslproto), and any pod may open as many as it likes.
_MAX_CONNECTIONS = 256
_FULL_SECONDS = 0.02
_HANDSHAKE_SECONDS = 10.0
_IDLE_SECONDS = 5.0
# When there is no room, connections as old as this make some: a report takes a moment.
_MAX_AGE_SECONDS = 30.0
_BACKLOG = 1024


class ReportServer:
    """Serves a web application over HTTPS. Connections beyond the limit wait in the kernel until others have ended."""

    def __init__(
        self,
        app: web.Application,
        *,
        address: str,
        port: int,
        certificate: Path,
        key: Path,
        max_connections: int = _MAX_CONNECTIONS,
        max_age_seconds: float = _MAX_AGE_SECONDS,
    ) -> None:
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0, keepalive_timeout=_IDLE_SECONDS)
        self._address = address
        self._port = port
        self._context = build_tls_context(certificate, key)
        self._max_connections = max_connections
        self._max_age_seconds = max_age_seconds
        self._opened_at: dict[web.RequestHandler, float] = {}
        self._handshakes: set[asyncio.Task[None]] = set()
        self._listening: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        """Return the port that is listened on."""
        assert self._listening is not None, "start() has not been called"
        return int(self._listening.getsockname()[1])

    async def start(self) -> None:
        """Start to listen."""
        await self._runner.setup()
        family = socket.AF_INET6 if ":" in self._address else socket.AF_INET
        self._listening = socket.create_server((self._address, self._port), family=family, backlog=_BACKLOG)
        self._listening.settimeout(0)
        self._accepting = asyncio.create_task(self._accept(self._listening), name="report server")

    async def stop(self) -> None:
        """Close all connections."""
        if self._accepting is not None:
            for task in (self._accepting, *self._handshakes):
                task.cancel()
            await asyncio.gather(self._accepting, *self._handshakes, return_exceptions=True)
            self._accepting = None
        if self._listening is not None:
            self._listening.close()
        await self._runner.cleanup()

    async def _accept(self, listening: socket.socket) -> None:
        """Accept connections for as long as there is room for them."""
        loop = asyncio.get_running_loop()
        while True:
            if not self._has_room():
                await asyncio.sleep(_FULL_SECONDS)
                continue
            try:
                connection, _ = await loop.sock_accept(listening)
            except OSError as error:
                # No file descriptor is left, for example; the client waits.
                logger.warning("cannot accept a connection: %s", error)
                await asyncio.sleep(1)
                continue
            handshake = asyncio.create_task(self._serve(connection))
            self._handshakes.add(handshake)
            handshake.add_done_callback(self._handshakes.discard)

    async def _serve(self, connection: socket.socket) -> None:
        """Shake hands and hand the connection to the application; a client that fails at that has only itself to tell."""
        server = self._runner.server
        assert server is not None, "the runner was set up"
        with suppress(OSError, TimeoutError):
            _, handler = await asyncio.get_running_loop().connect_accepted_socket(
                server, connection, ssl=self._context, ssl_handshake_timeout=_HANDSHAKE_SECONDS
            )
            self._opened_at[handler] = time.monotonic()

    def _has_room(self) -> bool:
        """Return whether another connection may come; if not, end those that have been open for too long."""
        server = self._runner.server
        handlers = frozenset(server.connections if server else ())
        self._opened_at = {handler: at for handler, at in self._opened_at.items() if handler in handlers}
        if len(self._handshakes) + len(handlers) < self._max_connections:
            return True
        for handler, at in self._opened_at.items():
            if time.monotonic() - at > self._max_age_seconds:
                handler.force_close()
        return False


def build_tls_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """Return a server context that takes up a renewed certificate with the next connection."""
    front = current = _load_context(certificate, key)
    loaded = _stamp(certificate, key)

    def choose(connection: ssl.SSLObject, _name: str | None, _front: ssl.SSLContext) -> None:
        nonlocal current, loaded
        stamp = _stamp(certificate, key)
        if stamp != loaded:
            try:
                current, loaded = _load_context(certificate, key), stamp
                logger.info("loaded the renewed certificate %s", certificate)
            except (OSError, ssl.SSLError) as error:
                # Half of a pair that is being replaced; the next connection finds the whole.
                logger.warning("cannot load the renewed certificate %s: %s", certificate, error)
        connection.context = current

    front.sni_callback = choose
    return front


def _load_context(certificate: Path, key: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(certificate, key)
    return context


def _stamp(*files: Path) -> tuple[tuple[int, int], ...]:
    """Return what changes when one of the files does; () when one is missing for a moment."""
    try:
        return tuple((found.st_ino, found.st_mtime_ns) for found in (file.stat() for file in files))
    except OSError:
        return ()

"""The server of the progress receiver: a bounded number of connections, whatever clients do with theirs."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from finetune_operator.report_server import ReportServer

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Start = Callable[..., Any]


@pytest.fixture
async def start(certificate: tuple[Path, Path]) -> AsyncIterator[Start]:
    servers: list[ReportServer] = []

    async def answer(_: web.Request) -> web.Response:
        return web.Response(text="hello")

    async def begin(**limits: float) -> ReportServer:
        app = web.Application()
        app.router.add_get("/", answer)
        server = ReportServer(app, address="127.0.0.1", port=0, certificate=certificate[0], key=certificate[1], **limits)  # type: ignore[arg-type]
        await server.start()
        servers.append(server)
        return server

    yield begin
    for server in servers:
        await server.stop()


@pytest.fixture
def certificate(tmp_path: Path, certify: Callable[..., tuple[Path, Path]]) -> tuple[Path, Path]:
    return certify(tmp_path, name="localhost")


async def test_connections_beyond_the_limit_wait_until_others_end(start: Start) -> None:
    server = await start(max_connections=2)
    idle = [await _connect(server.port) for _ in range(2)]
    third = asyncio.create_task(_ask(server.port))
    _, waiting = await asyncio.wait([third], timeout=0.3)
    await _close(idle[0][1])
    answer = await asyncio.wait_for(third, 10)
    await _close(idle[1][1])

    assert waiting
    assert answer == "HTTP/1.1 200 OK"


async def test_connections_that_are_held_make_room_after_a_while(start: Start) -> None:
    server = await start(max_connections=2, max_age_seconds=0.2)
    held = [await _connect(server.port) for _ in range(2)]
    answer = await asyncio.wait_for(_ask(server.port), 10)
    ends = [await asyncio.wait_for(reader.read(), 10) for reader, _ in held]
    for _, writer in held:
        await _close(writer)

    assert answer == "HTTP/1.1 200 OK"
    assert ends == [b"", b""]


async def test_clients_that_fail_to_shake_hands_disturb_nobody(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    server = await start(max_connections=4)
    plain = [(await asyncio.open_connection("127.0.0.1", server.port))[1] for _ in range(3)]
    plain[0].write(b"GET / HTTP/1.1\r\n\r\n")
    answers = [await _ask(server.port) for _ in range(8)]
    for writer in plain:
        await _close(writer)

    assert answers == ["HTTP/1.1 200 OK"] * 8
    assert not caplog.records


async def test_ended_server_leaves_no_connection(start: Start) -> None:
    server = await start()
    reader, writer = await _connect(server.port)
    port = server.port
    await server.stop()
    end = await asyncio.wait_for(reader.read(), 10)
    await _close(writer)

    assert end == b""
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", port)


async def _connect(port: int) -> Connection:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return await asyncio.open_connection("127.0.0.1", port, ssl=context)


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


async def _ask(port: int) -> str:
    """Return the first line of the answer."""
    reader, writer = await _connect(port)
    writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    line = await reader.readline()
    await _close(writer)
    return line.decode().strip()

"""Hand reports on to the process that leads: the Service picks any replica, and the leader alone keeps progress.

The leader tells its URL in the Lease. Whoever could write a wrong one there gets no token: the certificate must be good for the
name by which trainers know the receiver.
"""

import ssl
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
from yarl import URL

HEADER = "X-Finetune-Forwarded-By"
_TIMEOUT_SECONDS = 5.0
_MAX_IN_FLIGHT = 64


class ForwardError(Exception):
    """There is no leader, or it does not answer."""


class Forwarder:
    """Sends reports to the leader, one hop and no further."""

    def __init__(self, *, find_leader: Callable[[], str | None], report_url: str, ca_file: Path, identity: str) -> None:
        self._find_leader = find_leader
        self._server_name = urlsplit(report_url).hostname
        self._ca_file = ca_file
        self._identity = identity
        self._session: aiohttp.ClientSession | None = None

    async def forward(self, path: str, *, authorization: str, body: bytes) -> tuple[int, bytes]:
        """Return the leader's status and answer. Raises ForwardError when there is none."""
        leader = self._find_leader()
        if leader is None:
            raise ForwardError("no replica leads at this time")
        headers = {"Authorization": authorization, "Content-Type": "application/json", HEADER: self._identity}
        try:
            async with self._open().post(
                URL(leader + path, encoded=True),
                data=body,
                headers=headers,
                server_hostname=self._server_name,
                allow_redirects=False,
            ) as answer:
                return answer.status, await answer.read()
        except (aiohttp.ClientError, ValueError, TimeoutError, OSError) as error:
            raise ForwardError(f"the leader at {leader} does not answer: {error!r}") from error

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            context = ssl.create_default_context(cafile=self._ca_file)
            connector = aiohttp.TCPConnector(ssl=context, limit=_MAX_IN_FLIGHT, keepalive_timeout=15)
            self._session = aiohttp.ClientSession(
                connector=connector, timeout=aiohttp.ClientTimeout(total=_TIMEOUT_SECONDS), trust_env=False
            )
        return self._session

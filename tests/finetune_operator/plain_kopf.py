"""Plain kopf: `kopf run` with a script of hazards/, as anybody would start it, and a proxy with the faults of watches."""

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from fault_proxy import FaultProxy, Request
from harness import Team, find_port, wait_until

HAZARDS = Path(__file__).parent / "hazards"


class PlainKopf:
    """A process of `kopf run`, limited to one namespace."""

    def __init__(self, *scripts: str, team: Team, kubeconfig: Path, log: Path, **environment: str) -> None:
        self._scripts = scripts
        self._team = team
        self._environment = environment | {"KUBECONFIG": str(kubeconfig)}
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self.health_url = f"http://127.0.0.1:{find_port()}/healthz"

    def start(self) -> "PlainKopf":
        scripts = [str(HAZARDS / f"{each}.py") for each in self._scripts]
        options = ["--standalone", "--namespace", self._team.namespace, "--liveness", self.health_url]
        command = [sys.executable, "-m", "kopf", "run", *options, *scripts]
        with self._log.open("ab") as log:
            environment = os.environ | self._environment  # noqa: TID251  the script's own is added to that of the test
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        return self

    def stop(self) -> None:
        """End the process in any state it is in."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait(timeout=30)

    @property
    def exit_code(self) -> int | None:
        """Return the exit status, or None while the process runs."""
        assert self._process is not None
        return self._process.poll()

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8")

    @property
    def lines(self) -> list[str]:
        return self.log.splitlines()

    def wait_for(self, line: str, *, seconds: float = 240) -> str:
        """Wait for a line that begins like this, and return it."""

        def find() -> str | None:
            found = next((each for each in self.lines if each.startswith(line)), None)
            if found is None and self.exit_code is not None:
                pytest.fail(f"kopf has ended: {self.log}")
            return found

        return str(wait_until(find, what=f"{line!r} in {self._log}", seconds=seconds))


class WatchProxy(FaultProxy):
    """A fault proxy that also lets versions expire and cuts a watch after some events."""

    def __init__(self, api: Any, *, folder: Path) -> None:
        super().__init__(api, folder=folder)
        self._expired: set[str] = set()
        self._cuts: dict[str, int] = {}
        self.num_expired = 0

    def expire(self, resource: str) -> None:
        """Have the next watch of a resource begin at a version that the API server no longer has: it answers 410 by itself."""
        self._expired.add(resource)

    def cut_after(self, resource: str, *, events: int) -> None:
        """Cut the next watch of a resource, once, when it has delivered so many events."""
        self._cuts[resource] = events

    async def _relay(self, raw: web.BaseRequest, request: Request) -> web.StreamResponse:
        if request.resource in self._expired:
            self._expired.discard(request.resource)
            self.num_expired += 1
            raw = raw.clone(rel_url=raw.rel_url.update_query(resourceVersion="1"))
        return await super()._relay(raw, request)

    async def _filter(self, request: Request, lines: aiohttp.StreamReader) -> AsyncIterator[bytes]:
        left = self._cuts.pop(request.resource, None)
        async for line in super()._filter(request, lines):
            if left == 0:
                raise ConnectionResetError
            left = None if left is None else left - 1
            yield line

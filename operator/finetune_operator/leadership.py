"""Whether this process leads, as its main loop sees it: by election, or always where that is off."""

import asyncio
import socket
import uuid
from collections.abc import Awaitable, Callable
from functools import partial

from finetune_operator.election import ElectionThread
from finetune_operator.gate import WriteGate
from finetune_operator.leader import Elector, LeaseStore
from finetune_operator.lease import Timing
from finetune_operator.settings import Settings

_STOP_SECONDS = 5.0


class Leadership:
    """The election of one process, begun and ended with it."""

    def __init__(self, settings: Settings, *, connect: Callable[[str], Awaitable[LeaseStore]]) -> None:
        is_elected = settings.leader_election
        # A container that is restarted keeps its host name, but not the right of the process before it.
        self.identity = f"{socket.gethostname()}_{uuid.uuid4().hex[:8]}" if is_elected else ""
        self.gate = WriteGate() if is_elected else WriteGate(open_until=float("inf"))
        self.begun = asyncio.Event()
        """Set when this process has become the leader."""
        loop = asyncio.get_running_loop()
        self._elector = Elector(
            key=(settings.lease_namespace, settings.lease_name),
            identity=self.identity,
            report_url=_build_url(settings.pod_ip or settings.bind_address, settings.report_port),
            timing=Timing(
                lease_seconds=settings.lease_seconds,
                renew_seconds=settings.renew_seconds,
                retry_seconds=settings.lease_retry_seconds,
            ),
            gate=self.gate,
            on_lead=partial(loop.call_soon_threadsafe, self.begun.set),
        )
        self._thread = ElectionThread(self._elector, connect=lambda: connect(self.identity)) if is_elected else None

    @property
    def is_leading(self) -> bool:
        """Return whether this process may write at this very time."""
        return self.gate.is_open

    def find_leader(self) -> str | None:
        """Return where another process that leads receives reports."""
        return self._elector.leader_url

    def count_transitions(self) -> int:
        """Return how often the leader has changed, by the Lease."""
        return self._elector.transitions

    async def run(self) -> None:
        """Take part in the election until stop(). Raises LeadershipLostError when another process leads, or may soon."""
        if self._thread is not None:
            self._thread.start()
            # Who waits may be cancelled; the thread still has its end to tell.
            await asyncio.shield(asyncio.wrap_future(self._thread.ended))

    def let_lead(self) -> None:
        """Take the Lease when it is free, as this process has seen all there is."""
        if self._thread is None:
            self.begun.set()
        else:
            self._thread.let_lead()

    async def stop(self) -> None:
        """Write no more from here on, and let another process lead at once."""
        self.gate.close()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.stop, _STOP_SECONDS)


def _build_url(address: str, port: int) -> str:
    return f"https://{f'[{address}]' if ':' in address else address}:{port}"

"""A thread for the election, with an event loop and a connection of its own, so that work on the main loop delays no renewal."""

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future

from finetune_operator.errors import ApiError
from finetune_operator.leader import Elector, LeaseStore

_RELEASE_SECONDS = 3.0


class ElectionThread:
    """Runs an elector in a thread of its own until it is stopped or the Lease is lost."""

    def __init__(self, elector: Elector, *, connect: Callable[[], Awaitable[LeaseStore]]) -> None:
        self._elector = elector
        self._connect = connect
        self._loop = asyncio.new_event_loop()
        self._wake = asyncio.Event()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="leader election", daemon=True)
        self.ended: Future[None] = Future()
        """Done when the thread has ended; it has the error of one that failed."""

    def start(self) -> None:
        """Begin to watch the Lease."""
        self._thread.start()

    def let_lead(self) -> None:
        """Begin to take the Lease when it is free: this process is ready to lead."""
        self._elector.may_lead = True
        self._rouse()

    def stop(self, seconds: float) -> None:
        """Release the Lease if it is ours, and wait for the thread to end, for so long at most."""
        self._is_stopping = True
        self._rouse()
        if self._thread.is_alive():
            self._thread.join(seconds)

    def _rouse(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the thread has ended
            self._loop.call_soon_threadsafe(self._wake.set)

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._elect())
        except BaseException as error:  # noqa: BLE001  the one who waits for the future gets it
            self.ended.set_exception(error)
        else:
            self.ended.set_result(None)
        finally:
            self._loop.close()

    async def _elect(self) -> None:
        leases = await self._connect()
        try:
            while not self._is_stopping:
                await self._elector.step(leases)
                await self._pause(self._elector.find_wait())
            with contextlib.suppress(ApiError, TimeoutError):
                async with asyncio.timeout(_RELEASE_SECONDS):
                    await self._elector.release(leases)
        finally:
            await leases.close()

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._wake.wait(), seconds)
        self._wake.clear()

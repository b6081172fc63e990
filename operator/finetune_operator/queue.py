"""A work queue of keys with the semantics of client-go's.

A key is handed out once however often it was added, and never to two workers at a time: what is added while it is being
worked on comes again after that. Delayed adds keep the earliest time; retries back off exponentially per key.

Unlike there, the flows that keys belong to take turns, so that many keys of one do not hold up the keys of another.
"""

import asyncio
import heapq
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

_BASE_SECONDS = 0.05
_LIMIT_SECONDS = 300.0


class QueueClosedError(Exception):
    """The queue hands out no more keys."""


class _Flow(Generic[K]):
    """The keys of one flow that wait for a worker."""

    def __init__(self) -> None:
        self.urgent: deque[K] = deque()
        self.ready: deque[K] = deque()

    def __len__(self) -> int:
        return len(self.urgent) + len(self.ready)


class WorkQueue(Generic[K]):
    """A deduplicating queue with delays, backoff and turns."""

    def __init__(
        self,
        *,
        clock: Callable[[], float],
        find_flow: Callable[[K], Hashable] = lambda _: None,
        jitter: Callable[[], float] = random.random,
        observe_wait: Callable[[float], None] = lambda _: None,
    ) -> None:
        self._clock = clock
        self._jitter = jitter
        self._observe_wait = observe_wait
        self._find_flow = find_flow
        self._flows: OrderedDict[Hashable, _Flow[K]] = OrderedDict()  # those with keys, in the order of their turns
        self._dirty: dict[K, float] = {}  # to be worked on, with the time since when
        self._in_flight: set[K] = set()
        self._due: dict[K, float] = {}
        self._schedule: list[tuple[float, int, K]] = []  # entries that differ from _due are stale
        self._sequence = 0
        self._failures: dict[K, int] = {}
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    def __len__(self) -> int:
        """Return the number of keys that wait for a worker."""
        return sum(map(len, self._flows.values()))

    @property
    def has_urgent(self) -> bool:
        """Return whether an urgent key waits for a worker."""
        return any(flow.urgent for flow in self._flows.values())

    @property
    def num_in_flight(self) -> int:
        """Return the number of keys that are being worked on."""
        return len(self._in_flight)

    def add(self, key: K, *, is_urgent: bool = False) -> None:
        """Have the key worked on as soon as possible, an urgent one before those of its flow that are not."""
        if self._closed or key in self._dirty:
            return
        self._dirty[key] = self._clock()
        if key not in self._in_flight:
            self._put(key, is_urgent=is_urgent)

    def add_after(self, key: K, seconds: float) -> None:
        """Have the key worked on after a delay, or earlier if an earlier time is set already."""
        if seconds <= 0:
            self.add(key)
            return
        due = self._clock() + seconds
        if self._closed or due >= self._due.get(key, float("inf")):
            return
        self._due[key] = due
        self._sequence += 1
        heapq.heappush(self._schedule, (due, self._sequence, key))
        self._set_timer()

    def retry(self, key: K) -> float:
        """Have the key worked on after its backoff, and return that: twice as long each time until forget()."""
        failures = self._failures.get(key, 0)
        self._failures[key] = failures + 1
        # The exponent is bounded, as 2.0**1100 is an error.
        seconds = min(_LIMIT_SECONDS, _BASE_SECONDS * 2.0 ** min(failures, 64)) * (0.5 + 0.5 * self._jitter())
        self.add_after(key, seconds)
        return seconds

    def forget(self, key: K) -> None:
        """Begin the backoff of the key anew."""
        self._failures.pop(key, None)

    def take(self) -> K | None:
        """Hand out the next key, or None if there is none at this time. done() must follow."""
        self._promote()
        if not self._flows:
            return None
        name, flow = self._flows.popitem(last=False)
        key = (flow.urgent or flow.ready).popleft()
        if flow:
            self._flows[name] = flow
        self._observe_wait(self._clock() - self._dirty.pop(key))
        self._in_flight.add(key)
        return key

    async def get(self) -> K:
        """Wait for the next key and hand it out. done() must follow. Raises QueueClosedError after close()."""
        while not self._closed:
            if (key := self.take()) is not None:
                return key
            await self._wait()
        raise QueueClosedError

    def done(self, key: K) -> None:
        """End the work on a key."""
        self._in_flight.discard(key)
        if key in self._dirty and not self._closed:
            self._put(key)

    def close(self) -> None:
        """Hand out no more keys; work in flight goes on."""
        self._closed = True
        self._flows.clear()
        self._schedule.clear()
        if self._timer is not None:
            self._timer.cancel()
        self._wake(len(self._waiters))

    def _put(self, key: K, *, is_urgent: bool = False) -> None:
        """Let the key wait for a worker; a flow that had none takes the last turn."""
        flow = self._flows.setdefault(self._find_flow(key), _Flow())
        (flow.urgent if is_urgent else flow.ready).append(key)
        self._wake(1)

    def _promote(self) -> None:
        """Add the keys whose delay is over."""
        now = self._clock()
        while self._schedule and self._schedule[0][0] <= now:
            due, _, key = heapq.heappop(self._schedule)
            if self._due.get(key) == due:
                del self._due[key]
                self.add(key)

    async def _wait(self) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        self._set_timer()
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
            else:
                self._wake(1)  # the key that this worker was woken for is another one's
            raise

    def _set_timer(self) -> None:
        """Wake a waiting worker when the next delay is over."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._schedule and self._waiters:
            seconds = max(0.0, self._schedule[0][0] - self._clock())
            self._timer = asyncio.get_running_loop().call_later(seconds, self._promote_and_rearm)

    def _promote_and_rearm(self) -> None:
        self._promote()
        self._set_timer()

    def _wake(self, count: int) -> None:
        while count > 0 and self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                count -= 1

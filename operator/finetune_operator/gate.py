"""The gate that every write passes: open until a fixed time after the last renewal of the Lease.

Each request asks it at the last moment, so a process that was stopped for a while finds it shut when it goes on.
"""

import time
from collections.abc import Callable

from finetune_operator.errors import NotLeaderError

_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def read_clock() -> float:
    """Return the seconds of a clock that nobody can set and that goes on while the machine sleeps."""
    return time.clock_gettime(_CLOCK)


class WriteGate:
    """Lets writes pass while this process leads. One thread sets it, another one asks it."""

    def __init__(self, *, open_until: float = float("-inf"), clock: Callable[[], float] = read_clock) -> None:
        self._open_until = open_until
        self._clock = clock

    @property
    def is_open(self) -> bool:
        """Return whether a write may be sent at this very time."""
        return self._clock() < self._open_until

    def check(self) -> None:
        """Raise NotLeaderError unless a write may be sent at this very time."""
        if not self.is_open:
            raise NotLeaderError("this process does not lead, or no longer", status=0, reason="NotLeader")

    def open_until(self, time: float) -> None:
        """Let writes pass until this time."""
        self._open_until = time

    def close(self) -> None:
        """Let no write pass."""
        self._open_until = float("-inf")

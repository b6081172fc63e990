"""A token bucket that keeps the rate of requests below a limit, and turns for keys that share one."""

import asyncio
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class TokenBucket:
    """Lets `rate` requests a second pass, and `burst` at once after a pause."""

    def __init__(self, *, rate: float, burst: int, clock: Callable[[], float]) -> None:
        self._rate = rate
        self._burst = burst
        self._clock = clock
        self._tokens = float(burst)
        self._filled_at = clock()
        self._blocked_until = 0.0

    def reserve(self) -> float:
        """Take one token and return the seconds after which it may be used."""
        now = self._fill()
        self._tokens -= 1
        return max(0.0, -self._tokens / self._rate, self._blocked_until - now)

    def take(self) -> bool:
        """Take one token if there is one, and return whether there was."""
        self._fill()
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    def block(self, seconds: float) -> None:
        """Let nothing pass for a while, because the server asked for that."""
        self._blocked_until = max(self._blocked_until, self._clock() + seconds)

    async def wait(self) -> None:
        """Wait for the turn of one request."""
        seconds = self.reserve()
        if seconds > 0:
            await asyncio.sleep(seconds)

    def _fill(self) -> float:
        """Put in what has come since the last time, and return the time."""
        now = self._clock()
        self._tokens = min(self._burst, self._tokens + (now - self._filled_at) * self._rate)
        self._filled_at = now
        return now


class Turns(Generic[K]):
    """Turns of keys at a token bucket: a key has at most one, and whatever comes up until then shares it."""

    def __init__(self, *, rate: float, clock: Callable[[], float]) -> None:
        self._bucket = TokenBucket(rate=rate, burst=max(1, round(rate / 10)), clock=clock)
        self._clock = clock
        self._due: dict[K, float] = {}
        self._taken_at: dict[K, float] = {}

    def take(self, key: K) -> float:
        """Take the turn of a key and return 0 if it has come, else return the seconds until then."""
        if key not in self._due:
            self._due[key] = self._clock() + self._bucket.reserve()
        seconds = self._due[key] - self._clock()
        if seconds > 0:
            return seconds
        del self._due[key]
        self._taken_at[key] = self._clock()
        return 0.0

    def seconds_since(self, key: K) -> float:
        """Return how long ago the last turn of a key came; infinity if it had none."""
        return self._clock() - self._taken_at.get(key, float("-inf"))

    def forget(self, key: K) -> None:
        """Give up the turn of a key that is gone."""
        self._due.pop(key, None)
        self._taken_at.pop(key, None)

"""Draw batches ahead in threads. A batch is a function of its step, so the number of threads changes nothing but the waiting."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from torch import Tensor

Batch = tuple[Tensor, Tensor]
_AHEAD_PER_WORKER = 2


class Prefetcher:
    """Gives the batch of each step; without workers it is drawn when it is asked for."""

    def __init__(self, draw: Callable[[int], Batch], *, num_workers: int) -> None:
        self._draw = draw
        self._ahead = _AHEAD_PER_WORKER * num_workers
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="batches") if num_workers else None
        self._pending: dict[int, Future[Batch]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._forget()
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)

    def get(self, step: int) -> Batch:
        """Return the batch of a step."""
        if self._threads is None:
            return self._draw(step)
        if step not in self._pending:
            self._forget()
        for number in range(step, step + self._ahead):
            if number not in self._pending:
                self._pending[number] = self._threads.submit(self._draw, number)
        return self._pending.pop(step).result()

    def _forget(self) -> None:
        for future in self._pending.values():
            future.cancel()
        self._pending.clear()

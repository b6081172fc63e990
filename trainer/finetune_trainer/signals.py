"""Notice SIGTERM: the handler only sets a flag, and every loop asks for it. A thread sees to it that the end comes in time."""

import contextlib
import os
import select
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import TypeVar

from finetune_api.contract import ExitCode

from finetune_trainer.errors import PreemptedError

# Between the moment at which the trainer leaves by itself and the SIGKILL of the kubelet.
SECONDS_BEFORE_KILL = 5.0
_SECONDS_BETWEEN_CHECKS = 0.2

Result = TypeVar("Result")


class StopFlag:
    """Whether the process was asked to stop."""

    def __init__(self) -> None:
        self.grace_seconds = 30.0
        """Time from the first signal to SIGKILL."""
        self._signal: int | None = None

    @contextlib.contextmanager
    def installed(self, signals: Sequence[signal.Signals] = (signal.SIGTERM,)) -> Iterator[None]:
        """Set the flag on the first of `signals`; leave at once on the second, or when the grace period is nearly over.

        Python runs its handlers between two instructions, which a long call into a library delays. The wake-up descriptor is
        written by the C handler itself, so the thread that reads it also ends a process that hangs in such a call.
        """
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        before = {number: signal.signal(number, self._receive) for number in signals}
        earlier = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        watcher = threading.Thread(target=self._watch, args=(reader, frozenset(signals)), name="signals", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(earlier)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(writer)
            watcher.join()
            os.close(reader)

    def check(self) -> None:
        """Raise PreemptedError if the process was asked to stop."""
        if self._signal is not None:
            name = signal.Signals(self._signal).name
            raise PreemptedError("Preempted", f"stopped by {name}; what was done is saved, and a restart goes on from there")

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self._signal = number

    def _watch(self, reader: int, signals: frozenset[int]) -> None:
        """Leave by force on a second signal or at the end of the grace period; an end of file means that all is over."""
        while (first := os.read(reader, 1)) and first[0] not in signals:
            pass
        if not first:
            return
        ready, _, _ = select.select([reader], [], [], max(1.0, self.grace_seconds - SECONDS_BEFORE_KILL))
        if not ready or os.read(reader, 1):
            os._exit(ExitCode.PREEMPTED)


def run_interruptibly(action: Callable[[], Result], check: Callable[[], None]) -> Result:
    """Return what `action` gives, and call `check` while it runs in a thread; a check that raises abandons it."""
    results: list[Result] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(action())
        except BaseException as error:  # noqa: BLE001  raised again in the thread that waits
            errors.append(error)

    thread = threading.Thread(target=work, name="interruptible", daemon=True)
    thread.start()
    while thread.is_alive():
        check()
        thread.join(_SECONDS_BETWEEN_CHECKS)
    if errors:
        raise errors[0]
    return results[0]

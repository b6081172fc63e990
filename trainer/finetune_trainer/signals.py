"""Notice SIGTERM: the handler only sets a flag, and every loop asks for it."""

import os
import signal
from collections.abc import Sequence
from types import FrameType

from finetune_api.contract import ExitCode

from finetune_trainer.errors import PreemptedError


class StopFlag:
    """Whether the process was asked to stop."""

    def __init__(self) -> None:
        self._signal: int | None = None

    def install(self, signals: Sequence[signal.Signals] = (signal.SIGTERM,)) -> None:
        """Set the flag on the first of `signals`, and leave at once on the second."""
        for number in signals:
            signal.signal(number, self._receive)

    def check(self) -> None:
        """Raise PreemptedError if the process was asked to stop."""
        if self._signal is not None:
            name = signal.Signals(self._signal).name
            raise PreemptedError("Preempted", f"stopped by {name}; finished stages are kept, so a restart goes on from them")

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self._signal is not None:
            os._exit(ExitCode.PREEMPTED)
        self._signal = number

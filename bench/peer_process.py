"""Run a peer's script in a process group of its own, and read what it tells about itself."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

Moment = Callable[["Process"], bool]
"""Whether the time has come to send the signal."""


@dataclass(frozen=True)
class Told:
    """What a run said until it ended."""

    exit_code: int
    seconds: float
    phase: str
    start: int | None
    """The step that it began from, if it came so far."""
    step: int
    """The last step that it did."""
    versions: dict[str, str]
    error: str
    """The last line that it wrote, if it failed."""


class Process:
    """A running script with its workers: a process group that is gone when the block is left."""

    def __init__(self, command: Sequence[str | Path], output: Path) -> None:
        self.output = output
        self.log = output.with_suffix(".log")
        with self.log.open("w") as log:
            self.popen = subprocess.Popen([*command, output], stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        self.started = time.monotonic()

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self.send(signal.SIGKILL)
        self.popen.wait()

    @property
    def seconds(self) -> float:
        """The time since the start."""
        return time.monotonic() - self.started

    def send(self, number: signal.Signals) -> None:
        """Send SIGKILL to the process and its workers, any other signal to the process alone."""
        with suppress(ProcessLookupError):
            if number is signal.SIGKILL:
                os.killpg(self.popen.pid, number)
            else:
                self.popen.send_signal(number)

    def wait_for(self, moment: Moment) -> bool:
        """Wait until the moment has come, and tell whether the process still ran then."""
        while self.popen.poll() is None:
            if moment(self):
                return True
            time.sleep(0.002)
        return False

    def read(self) -> Told:
        """Return what the script has said so far."""
        code = self.popen.poll() or 0
        return read_log(self.log.read_text(), exit_code=code if code >= 0 else 128 - code, seconds=self.seconds)

    def finish(self, seconds: float) -> Told:
        """Wait until the process ends, by SIGKILL when the time is over, and return what it said."""
        with suppress(subprocess.TimeoutExpired):
            self.popen.wait(seconds)
        self.send(signal.SIGKILL)
        self.popen.wait()
        return self.read()


def read_log(log: str, *, exit_code: int, seconds: float) -> Told:
    """Return what the script said."""
    lines = log[: log.rfind("\n") + 1].splitlines()  # a last one may be half written
    told = [line.split(" ", 2)[1:] for line in lines if line.startswith("[told] ")]
    said = dict(told)
    start = int(said["from"]) if "from" in said else None
    return Told(
        exit_code,
        seconds,
        said.get("phase", "imports"),
        start,
        int(said.get("step", start or 0)),
        json.loads(said.get("versions", "{}")),
        lines[-1] if lines and exit_code != 0 else "",
    )

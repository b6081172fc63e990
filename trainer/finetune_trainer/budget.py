"""The wall-clock budget of the trainer process, measured from the start of the process itself."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Budget:
    """How much time there is, and how much of it has passed."""

    training_seconds: int | None
    started: float
    clock: Callable[[], float] = time.monotonic

    def elapsed_seconds(self) -> float:
        """Return the seconds since the process started."""
        return self.clock() - self.started

    def remaining_seconds(self) -> float | None:
        """Return the seconds that are left, negative when over, or None without a budget."""
        return None if self.training_seconds is None else self.training_seconds - self.elapsed_seconds()


def read_process_start(stat: Path = Path("/proc/self/stat")) -> float:
    """Return when this process started, on the scale of time.monotonic(): imports take seconds and count as well."""
    if not stat.exists():
        return time.monotonic()
    # Field 22 is the start in ticks since boot; field 2, the name, may hold spaces: https://man7.org/linux/man-pages/man5/proc_pid_stat.5.html
    ticks = int(stat.read_text().rpartition(")")[2].split()[19])
    age_seconds = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - max(0.0, age_seconds)

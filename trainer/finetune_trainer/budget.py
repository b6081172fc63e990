"""The wall-clock budget of a run: the time of this process, measured from its very start, and that of the attempts before."""

import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from finetune_trainer.durable import write_file

logger = logging.getLogger(__name__)


@dataclass
class Budget:
    """How much time there is, and how much of it has passed."""

    training_seconds: int | None
    started: float
    clock: Callable[[], float] = time.monotonic
    used_seconds: float = 0.0
    """What earlier attempts of the run took."""

    def elapsed_seconds(self) -> float:
        """Return the seconds that the run took so far."""
        return self.used_seconds + self.clock() - self.started

    def remaining_seconds(self) -> float | None:
        """Return the seconds that are left, negative when over, or None without a budget."""
        return None if self.training_seconds is None else self.training_seconds - self.elapsed_seconds()


class ElapsedFile:
    """The time that a run took so far, on disk: kept at intervals, so that a kill loses no more than one."""

    def __init__(self, path: Path, budget: Budget, *, run: str, interval_seconds: float) -> None:
        self._path = path
        self._budget = budget
        self._run = run
        self._interval_seconds = interval_seconds
        self._written = budget.clock()

    def read(self) -> float:
        """Return the seconds that earlier attempts of the run took, 0 if nothing is known of any."""
        try:
            content = json.loads(self._path.read_bytes())
            return float(content["elapsedSeconds"]) if content["run"] == self._run else 0.0
        except (OSError, ValueError, KeyError, TypeError):
            return 0.0

    def beat(self) -> None:
        """Write the time if the interval is over."""
        if self._budget.clock() - self._written >= self._interval_seconds:
            self.write()

    def write(self) -> None:
        """Write the time; a full disk is no reason to stop."""
        self._written = self._budget.clock()
        content = {"run": self._run, "elapsedSeconds": round(self._budget.elapsed_seconds(), 3)}
        try:
            write_file(self._path, json.dumps(content).encode())
        except OSError as error:
            logger.warning("the elapsed time is not kept in %s: %s", self._path, error)

    def remove(self) -> None:
        """Forget the time, once the run is over."""
        self._path.unlink(missing_ok=True)


def read_process_start(stat: Path = Path("/proc/self/stat")) -> float:
    """Return when this process started, on the scale of time.monotonic(): imports take seconds and count as well."""
    if not stat.exists():
        return time.monotonic()
    # Field 22 is the start in ticks since boot; field 2, the name, may hold spaces: https://man7.org/linux/man-pages/man5/proc_pid_stat.5.html
    ticks = int(stat.read_text().rpartition(")")[2].split()[19])
    age_seconds = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - max(0.0, age_seconds)

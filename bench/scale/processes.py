"""Processes beside the control plane: how they are started and stopped, and what they use."""

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

_STOP_SECONDS = 60


@contextlib.contextmanager
def run_process(
    command: Sequence[str], *, log: Path, environment: Mapping[str, str] | None = None, folder: Path | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program and stop it at the end, whatever happens."""
    variables = os.environ | dict(environment or {})  # noqa: TID251  programs are configured this way
    with log.open("ab") as file:
        # In a session of its own, so that Ctrl-C reaches this process alone and everything is stopped in order.
        process = subprocess.Popen(
            command, env=variables, stdout=file, stderr=file, cwd=folder, start_new_session=True, stdin=subprocess.DEVNULL
        )
    try:
        yield process
    finally:
        stop_process(process)


def stop_process(process: subprocess.Popen[bytes], number: int = signal.SIGTERM) -> int:
    """Stop a process if it runs, by force if it does not listen, and return its exit status."""
    if process.poll() is None:
        process.send_signal(number)
    try:
        return process.wait(timeout=_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait(timeout=_STOP_SECONDS)


def read_cpu(pid: int) -> float:
    """Return the CPU time that a process has used, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def read_peak_memory(pid: int) -> float:
    """Return the largest resident memory that a process has had, in MiB."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def read_pids(cluster: Path) -> dict[str, int]:
    """Return the process ids of a local cluster's programs by name."""
    return {path.stem: int(json.loads(path.read_text())["pid"]) for path in sorted((cluster / "processes").glob("*.json"))}


class CpuMeter:
    """CPU and wall time of processes since it was made."""

    def __init__(self, pids: Mapping[str, int]) -> None:
        self._pids = dict(pids)
        self._before = {name: read_cpu(pid) for name, pid in pids.items()}
        self._started_at = time.monotonic()

    def read(self) -> dict[str, float]:
        """Return the CPU seconds by name."""
        return {name: read_cpu(pid) - self._before[name] for name, pid in self._pids.items()}

    @property
    def seconds(self) -> float:
        """Return the wall time since it was made."""
        return time.monotonic() - self._started_at


class PeakCores:
    """The largest share of a core that a process used within five seconds, sampled by a thread while the block runs."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.cores = 0.0

    def __enter__(self) -> "PeakCores":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        before, since = read_cpu(self._pid), time.monotonic()
        while not self._stop.wait(5):
            with contextlib.suppress(OSError):
                cpu, now = read_cpu(self._pid), time.monotonic()
                self.cores = max(self.cores, (cpu - before) / (now - since))
                before, since = cpu, now

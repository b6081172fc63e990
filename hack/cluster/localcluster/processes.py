"""Start, recognise and stop the cluster's own processes by process id and start time."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from localcluster.errors import ClusterError
from localcluster.files import write_json
from localcluster.paths import Instance
from localcluster.shell import say, tail

STOP_SECONDS = 20.0
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class ProcessRecord:
    """One process, told from a later one with the same id by its start time and the boot of the machine."""

    pid: int
    start_ticks: int
    boot_id: str


@dataclass(frozen=True)
class Component:
    """One program of the cluster: how to start it and how to see that it serves."""

    name: str
    command: tuple[str, ...]
    is_healthy: Callable[[], bool]
    timeout_seconds: float = 60.0


def ensure_running(instance: Instance, component: Component) -> bool:
    """Start a program unless it runs, wait until it serves, and say whether it had to be started."""
    started = False
    if not is_running(instance, component.name):
        _start(instance, component)
        started = True
    _wait_until_healthy(instance, component)
    return started


def is_running(instance: Instance, name: str) -> bool:
    """Say whether the recorded process of a program is alive."""
    record = read_record(instance, name)
    return record is not None and is_alive(record)


def stop(instance: Instance, name: str) -> None:
    """Stop a program, first asking, then by force, and forget its record; one whose record is lost is found by its command."""
    recorded = read_record(instance, name)
    # The work tree, and the records in it, may have been deleted and cloned again meanwhile.
    found = find_processes(lambda command: is_program_of(instance, name, command))
    for record in {*found, *((recorded,) if recorded else ())}:
        if is_alive(record):
            say(f"stopping {name} (process {record.pid})")
            stop_process(record)
    _record_path(instance, name).unlink(missing_ok=True)


def stop_process(record: ProcessRecord, *, grace_seconds: float = STOP_SECONDS) -> None:
    """End one process that is still the recorded one."""
    for signal_number, seconds in ((signal.SIGTERM, grace_seconds), (signal.SIGKILL, STOP_SECONDS)):
        if not is_alive(record):
            return
        _signal(record.pid, signal_number)
        if _wait(lambda: not is_alive(record), seconds=seconds):
            return
    raise ClusterError(f"process {record.pid} does not end, not even by SIGKILL")


def read_record(instance: Instance, name: str) -> ProcessRecord | None:
    """Return the record of a program, None without one or with a half-written one."""
    try:
        return ProcessRecord(**json.loads(_record_path(instance, name).read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def is_alive(record: ProcessRecord) -> bool:
    """Say whether the very process of the record still runs."""
    if record.boot_id != boot_id():
        return False
    return read_start_ticks(record.pid) == record.start_ticks


def record_of(pid: int) -> ProcessRecord | None:
    """Return a record of a process that runs, None when it is gone."""
    ticks = read_start_ticks(pid)
    return None if ticks is None else ProcessRecord(pid, ticks, boot_id())


def read_start_ticks(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot, None when it is gone."""
    try:
        return parse_start_ticks(Path(f"/proc/{pid}/stat").read_text())
    except (FileNotFoundError, ProcessLookupError):
        return None


def parse_start_ticks(stat: str) -> int | None:
    """Read the start time from a line of /proc/PID/stat, None for a zombie."""
    # The second field, the program's name in parentheses, may itself hold spaces and parentheses.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in {"Z", "X"} else int(fields[19])


def boot_id() -> str:
    """Return what tells this boot of the machine from any other."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def find_processes(is_wanted: Callable[[Sequence[str]], bool]) -> tuple[ProcessRecord, ...]:
    """Return the other processes whose command line is wanted."""
    pids = (int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit())
    records = (record_of(pid) for pid in pids if pid != os.getpid() and is_wanted(_read_command(pid)))
    return tuple(record for record in records if record is not None)


def is_program_of(instance: Instance, name: str, command: Sequence[str]) -> bool:
    """Say whether a command line is that of a cluster's program: it has the name and files of the cluster's folder."""
    return bool(command) and Path(command[0]).name == name and any(f"{instance.folder}/" in word for word in command[1:])


def read_log_tail(instance: Instance, name: str) -> str:
    """Return the end of a program's log."""
    try:
        return tail((instance.logs / f"{name}.log").read_text(errors="replace"))
    except FileNotFoundError:
        return "(no log)"


def _start(instance: Instance, component: Component) -> None:
    instance.logs.mkdir(parents=True, exist_ok=True)
    with (instance.logs / f"{component.name}.log").open("wb") as log:
        process = subprocess.Popen(
            component.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=instance.folder,
            start_new_session=True,
        )
    record = record_of(process.pid)
    if record is not None:
        write_json(_record_path(instance, component.name), asdict(record))


def _wait_until_healthy(instance: Instance, component: Component) -> None:
    since = time.monotonic()
    while not component.is_healthy():
        waited = time.monotonic() - since
        if not is_running(instance, component.name):
            raise ClusterError(f"{component.name} ended:\n{read_log_tail(instance, component.name)}")
        if waited > component.timeout_seconds:
            raise ClusterError(
                f"{component.name} is not healthy after {waited:.0f} s:\n{read_log_tail(instance, component.name)}"
            )
        time.sleep(POLL_SECONDS)


def _record_path(instance: Instance, name: str) -> Path:
    return instance.processes / f"{name}.json"


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _wait(is_done: Callable[[], bool], *, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not is_done():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def _read_command(pid: int) -> Sequence[str]:
    try:
        text = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ()
    return text.rstrip("\0").split("\0") if text else ()

"""Operator processes that start in a moment: forked from a process that has loaded the program and done nothing else.

    with Nursery() as nursery:
        operator = build_operator(team, tls=tls, folder=tmp_path, spawn=nursery.spawn)

To load the program takes 1.4 s of a core, which is most of what a start costs. All else is as with a start of its own: a process
with its own memory, sockets, environment and log, which ends by its exit status or by a signal. All of them end with the test
run, however that ends.
"""

import gc
import importlib
import json
import os
import queue
import selectors
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from kubernetes.aio.config import kube_config


class Nursling:
    """A process of a nursery, to be used as a subprocess.Popen."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._ended = threading.Event()

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired(f"operator {self.pid}", timeout or 0)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        # An id is not given to another process within moments of an end.
        if self.returncode is None:
            os.kill(self.pid, number)

    def end(self, status: int) -> None:
        """Take in that the process has ended."""
        self.returncode = status
        self._ended.set()


class Nursery:
    """The process that forks them, as the test run sees it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._started: queue.Queue[Nursling] = queue.Queue()
        self._running: dict[int, Nursling] = {}
        self._asking = threading.Lock()
        self._thread = threading.Thread(target=self._listen, name="nursery", daemon=True)

    def __enter__(self) -> "Nursery":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._thread.join(60)
        self._process.stdout.close()

    def spawn(self, environment: Mapping[str, str], log: Path) -> Nursling:
        """Start an operator with this added to the environment; it writes into a log."""
        request = json.dumps({"environment": dict(environment), "log": str(log)})
        with self._asking:
            assert self._process.stdin is not None
            self._process.stdin.write(request.encode() + b"\n")
            self._process.stdin.flush()
            return self._started.get(timeout=240)

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            told: dict[str, int] = json.loads(line)
            if "status" in told:
                self._running.pop(told["pid"]).end(told["status"])
            else:
                nursling = self._running[told["pid"]] = Nursling(told["pid"])
                self._started.put(nursling)


def main() -> None:
    """Fork an operator for each line of the input, tell when each has ended, and end all of them with the input."""
    program = importlib.import_module("finetune_operator.__main__")
    # What is loaded is never freed, so a collection need not touch it in each child.
    gc.freeze()
    ends, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(wakeup)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    # The test run decides what follows an interruption, and closes the input.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    running: set[int] = set()
    with selectors.DefaultSelector() as selector:
        selector.register(0, selectors.EVENT_READ)
        selector.register(ends, selectors.EVENT_READ)
        pending = b""
        while True:
            ready = {key.fd for key, _ in selector.select()}
            if ends in ready:
                os.read(ends, 4096)
                _tell_ends(running)
            if 0 in ready:
                if not (chunk := os.read(0, 1 << 16)):
                    break
                *requests, pending = (pending + chunk).split(b"\n")
                for request in requests:
                    running.add(_fork(program, json.loads(request)))
    for pid in running:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _fork(program: Any, request: dict[str, Any]) -> int:
    pid = os.fork()
    if pid == 0:
        _become_operator(program, request)
    _tell(pid=pid)
    return pid


def _become_operator(program: Any, request: dict[str, Any]) -> None:
    """Run the program in the child, which never returns from here."""
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.closerange(3, 256)
        os.environ.update(request["environment"])  # noqa: TID251  the environment of a process that begins
        # The client reads the variable as it is loaded.
        kube_config.KUBE_CONFIG_DEFAULT_LOCATION = request["environment"]["KUBECONFIG"]
        status = program.main()
    except BaseException:  # noqa: BLE001  nothing may go on to run the nursery's loop
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _tell_ends(running: set[int]) -> None:
    for pid in tuple(running):
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            running.discard(pid)
            _tell(pid=pid, status=os.waitstatus_to_exitcode(status))


def _tell(**what: int) -> None:
    os.write(1, json.dumps(what).encode() + b"\n")


if __name__ == "__main__":
    main()

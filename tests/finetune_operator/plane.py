"""What befalls a control plane of a module's own: programs that hang, die, and come back from a backup."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from etcd import Etcd
from fault_life import read_pid
from harness import wait_until

_ROOT = Path(__file__).parents[2]
_PROGRAMS = ("kube-scheduler", "kube-controller-manager", "kube-apiserver", "etcd")


class Plane:
    """The processes of the control plane that a kubeconfig belongs to."""

    def __init__(self, kubeconfig: Path) -> None:
        self._kubeconfig = kubeconfig
        self._data = kubeconfig.parent / "etcd"

    @contextlib.contextmanager
    def freeze(self, program: str) -> Iterator[None]:
        """Have a program hang for as long as the block runs."""
        pid = read_pid(self._kubeconfig, program)
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    def restart(self, *programs: str) -> None:
        """Kill programs, and start them again; return when they serve."""
        self._kill(*programs)
        self._start()

    def back_up(self, folder: Path) -> Path:
        """Copy what etcd has, as it is at an instant, and return where to."""
        copy = folder / "backup"
        with self.freeze("etcd"):
            shutil.copytree(self._data, copy)
        return copy

    def restore(self, backup: Path, *, is_revision_bumped: bool = False) -> None:
        """Take everything back to a backup, as administrators do: all programs of the control plane are started anew.

        The revision may go on from beyond where it was, with no history before it, as by `etcdutl snapshot restore
        --bump-revision --mark-compacted`; else resourceVersions go back.
        """
        etcd = Etcd(self._kubeconfig)
        revision = etcd.read_revision()
        command = Path(f"/proc/{read_pid(self._kubeconfig, 'etcd')}/cmdline").read_text(encoding="utf-8").split("\0")[:-1]
        self._kill(*_PROGRAMS)
        shutil.rmtree(self._data)
        shutil.copytree(backup, self._data)
        if is_revision_bumped:
            with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
                wait_until(etcd.read_revision, what="etcd serves")
                etcd.age(revision + 100 - etcd.read_revision())
                etcd.compact()
                process.terminate()
        self._start()

    def _kill(self, *programs: str) -> None:
        for program in programs:
            pid = read_pid(self._kubeconfig, program)
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda pid=pid: _has_ended(pid), what=f"{program} has ended")

    def _start(self) -> None:
        """Start what does not run."""
        command = [sys.executable, str(_ROOT / "hack" / "cluster"), "up", "--name", self._kubeconfig.parent.name]
        subprocess.run([*command, "--mode", "control-plane"], check=True, cwd=_ROOT)


def _has_ended(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return True
    return stat.rpartition(")")[2].split()[0] in ("Z", "X")

"""Prometheus and promtool: those of the machine, else the Debian package's, unpacked into the cache without installing it.

An installed package would start a server of its own wherever systemd runs.
"""

import os
import shutil
import tempfile
from pathlib import Path

from localcluster.environment import child_environment
from localcluster.errors import ClusterError
from localcluster.locks import locked
from localcluster.paths import cache_folder
from localcluster.shell import run, say, try_run

PROGRAMS = ("prometheus", "promtool")
NO_APT = "{name}: not found. Put Prometheus 2.42 or later (https://prometheus.io/download/) on PATH."


def ensure_prometheus(name: str) -> str:
    """Return the path of one of its programs, fetching the package where the machine has none."""
    if found := shutil.which(name):
        return found
    folder = cache_folder() / "prometheus"
    if not (folder / name).exists():
        if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
            raise ClusterError(NO_APT.format(name=name))
        with locked(cache_folder() / "prometheus.lock"):
            if not (folder / name).exists():
                _fetch(folder)
    return str(folder / name)


def _fetch(folder: Path) -> None:
    say("fetching Prometheus")
    environment = child_environment(DEBIAN_FRONTEND="noninteractive")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".prometheus-") as scratch:
        # apt drops its rights to a user of its own, which cannot write into a folder of root's.
        command = ["apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", "prometheus"]
        if try_run(command, cwd=Path(scratch), env=environment).returncode != 0 and os.geteuid() == 0:
            run(["apt-get", "update", "-qq"], env=environment)
        if not list(Path(scratch).glob("*.deb")):
            run(command, cwd=Path(scratch), env=environment)
        (package,) = Path(scratch).glob("prometheus_*.deb")
        run(["dpkg-deb", "-x", package, Path(scratch) / "tree"])
        (Path(scratch) / "tree" / "usr" / "bin").replace(folder)

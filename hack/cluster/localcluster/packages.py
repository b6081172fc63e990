"""Install the Debian packages that a node and the building of images need."""

import os
import shutil
from pathlib import Path

from localcluster.environment import child_environment
from localcluster.errors import ClusterError
from localcluster.shell import run, say

# Each package with a file or program that shows it is there.
NODE_PACKAGES = {
    "containerd": "containerd",
    "runc": "runc",
    "containernetworking-plugins": "/usr/lib/cni/bridge",
    "iptables": "iptables-save",
    "iproute2": "ip",
    "conntrack": "conntrack",
    "ethtool": "ethtool",
    "gcc": "gcc",
    "libc6-dev": "/usr/include/stdio.h",
}
BUILD_PACKAGES = {"buildah": "buildah", "debootstrap": "debootstrap"}
NEEDS_ROOT = (
    "A node needs root on Debian or Ubuntu. Without that, take `--mode control-plane`, which runs anywhere but runs no pods, "
    "or a cluster of your own (kind, minikube): point KUBECONFIG at it and load both images into it."
)


def ensure_packages(packages: dict[str, str]) -> None:
    """Install the packages that are missing, or say what to do instead."""
    missing = [name for name, sign in packages.items() if shutil.which(sign) is None and not Path(sign).exists()]
    if os.geteuid() != 0:
        raise ClusterError(NEEDS_ROOT)
    if not missing:
        return
    if shutil.which("apt-get") is None:
        raise ClusterError(f"missing: {', '.join(missing)}. {NEEDS_ROOT}")
    say(f"installing {' '.join(missing)}")
    environment = child_environment(DEBIAN_FRONTEND="noninteractive")
    run(["apt-get", "update", "-qq"], env=environment)
    run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing], env=environment)

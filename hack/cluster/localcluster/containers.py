"""containerd: its configuration, and the removal of every container, mount and cgroup that it left."""

import os
import shutil
import signal
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from localcluster.network import CNI_CONFIG, CNI_PLUGINS
from localcluster.paths import CONTAINERD_SOCKET, CONTAINERD_STATE, Instance, cache_folder
from localcluster.processes import Component, find_processes, is_running, stop_process
from localcluster.shell import run, say, try_run

PAUSE_IMAGE = "docker.io/library/finetune-pause:1"
NAMESPACE = "k8s.io"
CGROUPS = Path("/sys/fs/cgroup")
UNMOUNT_ROUNDS = 3


def containerd_component(instance: Instance) -> Component:
    """Return how to start containerd; its images live in the cache and outlive the cluster."""
    config = instance.folder / "containerd.toml"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(_config())
    return Component(
        "containerd",
        ("containerd", f"--config={config}", "--log-level=warn"),
        is_containerd_running,
    )


def is_containerd_running() -> bool:
    """Say whether the machine's containerd answers."""
    return CONTAINERD_SOCKET.exists() and try_run([*ctr(), "version"]).returncode == 0


def ctr() -> list[str]:
    """Return the start of a command to containerd, in the kubelet's namespace."""
    return ["ctr", "--address", str(CONTAINERD_SOCKET), "--namespace", NAMESPACE]


def content_folder() -> Path:
    """Return where containerd keeps the layers of images, by digest."""
    return cache_folder() / "containerd" / "io.containerd.content.v1.content" / "blobs" / "sha256"


def remove_containers(instance: Instance) -> None:
    """Kill and delete all containers through a containerd that runs."""
    if not is_running(instance, "containerd"):
        return
    tasks = try_run([*ctr(), "tasks", "list", "--quiet"]).stdout.split()
    containers = try_run([*ctr(), "containers", "list", "--quiet"]).stdout.split()
    if containers:
        say(f"removing {len(containers)} containers")
    for task in tasks:
        try_run([*ctr(), "tasks", "kill", "--all", "--signal", "SIGKILL", task])
    for task in tasks:
        try_run([*ctr(), "tasks", "delete", "--force", task])
    for container in containers:
        try_run([*ctr(), "containers", "delete", container])


def remove_remains(kubelet_roots: Iterable[Path]) -> None:
    """Remove what containers left on the machine: shims, processes, cgroups and mounts."""
    for shim in find_processes(is_own_shim):
        stop_process(shim, grace_seconds=0)
    _empty_cgroups()
    for folder in (CONTAINERD_STATE, *kubelet_roots):
        unmount_below(folder)
    shutil.rmtree(CONTAINERD_STATE, ignore_errors=True)


def is_own_shim(command: Sequence[str]) -> bool:
    """Say whether a command line is that of a container's shim which belongs to the machine's node."""
    is_shim = bool(command) and Path(command[0]).name.startswith("containerd-shim")
    return is_shim and str(CONTAINERD_SOCKET) in command


def unmount_below(folder: Path) -> None:
    """Unmount all that is mounted at or below a folder, the deepest first."""
    for _ in range(UNMOUNT_ROUNDS):
        points = mounts_below(Path("/proc/self/mountinfo").read_text(), folder)
        if not points:
            return
        for point in points:
            try_run(["umount", point])
    for point in mounts_below(Path("/proc/self/mountinfo").read_text(), folder):
        run(["umount", "--lazy", point])


def mounts_below(mountinfo: str, folder: Path) -> tuple[str, ...]:
    """Return the mount points at or below a folder, the deepest first."""
    points = (_unescape(line.split()[4]) for line in mountinfo.splitlines())
    own = {point for point in points if point == str(folder) or point.startswith(f"{folder}/")}
    return tuple(sorted(own, key=lambda point: (-point.count("/"), point)))


def pod_cgroups() -> tuple[Path, ...]:
    """Return the roots of the kubelet's cgroups, of version 2 or of each controller of version 1."""
    candidates = (CGROUPS / "kubepods", *sorted(CGROUPS.glob("*/kubepods")))
    return tuple(path for path in candidates if path.is_dir())


def _empty_cgroups() -> None:
    for root in pod_cgroups():
        deadline = time.monotonic() + 10
        while _kill_members(root) and time.monotonic() < deadline:
            time.sleep(0.05)
        for folder, _, _ in os.walk(root, topdown=False):
            _remove_folder(Path(folder))


def _kill_members(root: Path) -> int:
    num_killed = 0
    for procs in root.rglob("cgroup.procs"):
        for pid in _read_pids(procs):
            num_killed += 1
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
    return num_killed


def _read_pids(procs: Path) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in procs.read_text().split())
    except OSError:
        return ()


def _remove_folder(folder: Path) -> None:
    # A cgroup stays busy for a moment after its last process has ended.
    for _ in range(50):
        if not folder.exists():
            return
        try:
            folder.rmdir()
        except OSError:
            time.sleep(0.02)


def _unescape(point: str) -> str:
    return point.replace(r"\040", " ").replace(r"\011", "\t").replace(r"\134", "\\")


def _config() -> str:
    return f"""version = 2
root = "{cache_folder() / "containerd"}"
state = "{CONTAINERD_STATE}"
disabled_plugins = [
  "io.containerd.internal.v1.opt",
  "io.containerd.snapshotter.v1.aufs",
  "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.zfs",
]

[grpc]
  address = "{CONTAINERD_SOCKET}"

[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE_IMAGE}"
  # A machine may lack CAP_SYS_RESOURCE, without which no score may be lowered and every sandbox would fail.
  restrict_oom_score_adj = true
  disable_apparmor = true
  netns_mounts_under_state_dir = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{CNI_PLUGINS}"
    conf_dir = "{CNI_CONFIG}"
"""

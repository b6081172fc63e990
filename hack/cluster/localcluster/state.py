"""What a cluster remembers between commands: its mode, its ports and the boot of the machine it was started on."""

import json
import socket
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

from localcluster.files import write_json
from localcluster.paths import Instance

# The default cluster has fixed ports, so that a tunnel or a bookmark keeps working.
MAIN_PORTS = {
    "apiserver": 16443,
    "etcd": 16379,
    "etcd-peer": 16380,
    "controller-manager": 16257,
    "scheduler": 16259,
    "coredns": 16053,
    "coredns-health": 16054,
    "coredns-ready": 16055,
    "proxy-health": 16256,
    "proxy-metrics": 16249,
    "kubelet": 16250,
    "kubelet-health": 16248,
}


@dataclass(frozen=True)
class ClusterState:
    """The state file of one cluster."""

    mode: str
    ports: dict[str, int]
    boot_id: str
    node_ip: str


def read_state(instance: Instance) -> ClusterState | None:
    """Return the state of a cluster, None where there is none or it was written by half."""
    try:
        return ClusterState(**json.loads((instance.folder / "state.json").read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def write_state(instance: Instance, state: ClusterState) -> None:
    """Remember the state of a cluster."""
    write_json(instance.folder / "state.json", asdict(state))


def choose_ports(
    preferred: Mapping[str, int], *, is_free: Callable[[int], bool], any_free_port: Callable[[], int]
) -> dict[str, int]:
    """Return a port for each name: the preferred one where it is free, else any free one, none of them twice."""
    chosen: dict[str, int] = {}
    for name, port in preferred.items():
        while port in chosen.values() or not is_free(port):
            port = any_free_port()
        chosen[name] = port
    return chosen


def preferred_ports(name: str) -> dict[str, int]:
    """Return the ports a new cluster would like to have."""
    return dict(MAIN_PORTS) if name == "main" else dict.fromkeys(MAIN_PORTS, 0)


def is_free_port(port: int) -> bool:
    """Say whether a TCP port can be listened on now."""
    if port == 0:
        return False
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError:
            return False
    return True


def find_free_port() -> int:
    """Return a TCP port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])

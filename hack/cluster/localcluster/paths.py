"""Where everything lies: the work tree, the caches outside it, and what belongs to the machine."""

from dataclasses import dataclass
from pathlib import Path

from localcluster.environment import cache_home

WORK_TREE = Path(__file__).resolve().parents[3]
GO_MODULE = WORK_TREE / "hack" / "cluster" / "go"
GO_TOOLS_MODULE = WORK_TREE / "hack" / "cluster" / "go-tools"
KWOK_MODULE = WORK_TREE / "hack" / "kwok"
KSTATUS_MODULE = WORK_TREE / "hack" / "kstatus"
LOCAL = WORK_TREE / ".local"
CLUSTERS = LOCAL / "clusters"
IMAGES_FILE = LOCAL / "images.json"

# A machine carries one node at a time, whichever clone of the repository started it, and sockets need short paths.
MACHINE = Path("/run/finetune-cluster")
CONTAINERD_STATE = MACHINE / "containerd"
CONTAINERD_SOCKET = CONTAINERD_STATE / "containerd.sock"
CNI_STATE = MACHINE / "cni"
NODE_OWNER = MACHINE / "node.json"


def cache_folder() -> Path:
    """Return the folder for what is expensive to make and shared by all clones."""
    return cache_home() / "finetune-operator"


@dataclass(frozen=True)
class Instance:
    """One cluster, known by the folder that holds its whole state."""

    folder: Path

    @property
    def name(self) -> str:
        """Return the name that commands take."""
        return self.folder.name

    @property
    def kubeconfig(self) -> Path:
        """Return the administrator's kubeconfig."""
        return self.folder / "kubeconfig"

    @property
    def logs(self) -> Path:
        """Return the folder of the log files, one for each program."""
        return self.folder / "logs"

    @property
    def pki(self) -> Path:
        """Return the folder of certificates and keys."""
        return self.folder / "pki"

    @property
    def processes(self) -> Path:
        """Return the folder of the process records."""
        return self.folder / "processes"

    @property
    def volumes(self) -> Path:
        """Return the folder of the host directories behind volumes, which outlives the cluster."""
        return self.folder / "volumes"

    @property
    def kubelet_root(self) -> Path:
        """Return the folder in which the kubelet mounts pods' volumes."""
        return self.folder / "kubelet"


def instance_named(name: str) -> Instance:
    """Return the cluster of this work tree with a name."""
    return Instance(CLUSTERS / name)

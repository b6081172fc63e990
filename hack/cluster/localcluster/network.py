"""The node's network: its address, the pods' bridge, and the firewall rules made on the way."""

import shutil
import socket
from pathlib import Path

from localcluster.controlplane import POD_RANGE
from localcluster.files import write_json
from localcluster.paths import CNI_STATE
from localcluster.shell import run, try_run

BRIDGE = "finetune0"
NODE_POD_RANGE = "10.88.0.0/24"
CNI_PLUGINS = "/usr/lib/cni"
CNI_CONFIG = CNI_STATE / "net.d"
MASQUERADE = ("POSTROUTING", "-s", POD_RANGE, "!", "-d", POD_RANGE, "-j", "MASQUERADE")
COMMENT = "finetune-cluster"
# An address for documentation: nothing connects to it where there is no network at all.
NO_NETWORK = "192.0.2.10"
IPTABLES = ("iptables", "ip6tables")


def node_address() -> str:
    """Return the address of this machine towards the world."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # Connecting a datagram socket sends nothing; it only picks a route.
            probe.connect(("198.51.100.1", 9))
        except OSError:
            return NO_NETWORK
        return str(probe.getsockname()[0])


def prepare_network() -> None:
    """Write the pods' network configuration and let the machine forward and masquerade for them."""
    write_json(CNI_CONFIG / "10-finetune.conflist", _cni_config())
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1\n")
    rule = [*MASQUERADE, "-m", "comment", "--comment", COMMENT]
    if try_run(["iptables", "-w", "-t", "nat", "-C", *rule]).returncode != 0:
        run(["iptables", "-w", "-t", "nat", "-A", *rule])


def remove_network() -> None:
    """Remove the bridge with its pods' ends, and the rules of kubelet, kube-proxy and this cluster."""
    shutil.rmtree(CNI_STATE, ignore_errors=True)
    if Path(f"/sys/class/net/{BRIDGE}").exists():
        for port in Path(f"/sys/class/net/{BRIDGE}/brif").iterdir():
            try_run(["ip", "link", "delete", port.name])
        run(["ip", "link", "delete", BRIDGE])
    for program in IPTABLES:
        _remove_rules(program)


def has_own_rules(rules: str) -> bool:
    """Say whether the text of iptables-save holds a rule or chain of the cluster."""
    return any(_is_own(line) for line in rules.splitlines())


def without_own_rules(rules: str) -> str:
    """Return the text of iptables-save without the chains and rules of the cluster."""
    return "".join(f"{line}\n" for line in rules.splitlines() if not _is_own(line))


def _is_own(line: str) -> bool:
    if line.startswith(":"):
        return line.startswith(":KUBE-")
    return line.startswith("-A ") and (" KUBE-" in line or f"--comment {COMMENT}" in line)


def _remove_rules(program: str) -> None:
    if shutil.which(f"{program}-save") is None:
        return
    saved = try_run([f"{program}-save"])
    if saved.returncode == 0 and has_own_rules(saved.stdout):
        run([f"{program}-restore", "-w"], stdin=without_own_rules(saved.stdout))


def _cni_config() -> dict[str, object]:
    bridge = {
        "type": "bridge",
        "bridge": BRIDGE,
        "isGateway": True,
        "hairpinMode": True,
        "ipam": {
            "type": "host-local",
            "dataDir": str(CNI_STATE / "addresses"),
            "ranges": [[{"subnet": NODE_POD_RANGE}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        },
    }
    return {"cniVersion": "0.4.0", "name": "finetune", "plugins": [bridge]}

"""The node: containerd, kubelet, kube-proxy and CoreDNS, and the claim of a machine by one cluster."""

import json
from pathlib import Path

from localcluster.binaries import binary
from localcluster.containers import containerd_component, remove_containers, remove_remains
from localcluster.controlplane import NODE_NAME, POD_RANGE, kubeconfig_of
from localcluster.errors import ClusterError
from localcluster.files import write_json, write_text
from localcluster.kubectl import apply, wait_for
from localcluster.network import prepare_network, remove_network
from localcluster.objects import DNS_SERVICE_IP, system_objects
from localcluster.packages import NODE_PACKAGES, ensure_packages
from localcluster.paths import CONTAINERD_SOCKET, NODE_OWNER, Instance
from localcluster.pause import ensure_pause_image
from localcluster.probes import answers_ok
from localcluster.processes import Component, ensure_running, is_running, stop
from localcluster.shell import say
from localcluster.state import ClusterState

NAMES = ("containerd", "coredns", "kubelet", "kube-proxy")
RESOLV_CONF = Path("/etc/resolv.conf")
CONTAINER_LOG_LINKS = Path("/var/log/containers")


def prepare_machine() -> None:
    """Install what a node needs."""
    ensure_packages(NODE_PACKAGES)


def owner_of_machine() -> Path | None:
    """Return the folder of the cluster that holds the machine's node."""
    try:
        return Path(str(json.loads(NODE_OWNER.read_text())["folder"]))
    except (FileNotFoundError, ValueError, KeyError):
        return None


def claim_machine(instance: Instance) -> None:
    """Make this cluster the one with the node; take over the remains of a dead one, refuse beside a living one."""
    owner = owner_of_machine()
    if owner == instance.folder:
        return
    if owner is not None:
        other = Instance(owner)
        if any(is_running(other, name) for name in NAMES):
            raise ClusterError(
                f"a node runs on this machine already, of the cluster in {owner}; take that one down first: "
                f"python3 {owner.parents[2]}/hack/cluster down --name {owner.name}"
            )
        say(f"cleaning what the dead node of {owner} left")
        clean_machine(other)
    write_json(NODE_OWNER, {"folder": str(instance.folder)})


def ensure_containerd(instance: Instance) -> None:
    """Start containerd unless it runs, after cleaning what an earlier one left."""
    if not is_running(instance, "containerd"):
        for name in ("kubelet", "containerd"):
            stop(instance, name)
        remove_remains((instance.kubelet_root,))
        remove_network()
    # Before containerd, which watches the folder of the network's configuration from its start.
    prepare_network()
    if ensure_running(instance, containerd_component(instance)):
        say("started containerd")
    ensure_pause_image()


def ensure_node(instance: Instance, state: ClusterState) -> None:
    """Start what does not run of the node and wait until it is ready."""
    ensure_containerd(instance)
    apply(instance, system_objects(state))
    # In this order: kube-proxy waits for its node to be registered.
    for component in (_coredns(instance, state), _kubelet(instance, state), _kube_proxy(instance, state)):
        if ensure_running(instance, component):
            say(f"started {component.name}")
    words = ("wait", "--for=condition=Ready", f"node/{NODE_NAME}", "--timeout=1s")
    wait_for(instance, *words, what="the node is not ready", timeout_seconds=90)


def clean_machine(instance: Instance) -> None:
    """Remove all that a node put on the machine, in order, whether it still runs or died."""
    stop(instance, "kubelet")
    remove_containers(instance)
    for name in ("kube-proxy", "coredns", "containerd"):
        stop(instance, name)
    remove_remains((instance.kubelet_root,))
    remove_network()
    _remove_log_links(instance)


def release_machine() -> None:
    """Let another cluster have the machine's node."""
    NODE_OWNER.unlink(missing_ok=True)


def _remove_log_links(instance: Instance) -> None:
    # The kubelet links every log here, whatever folder it is told to keep logs in.
    if not CONTAINER_LOG_LINKS.is_dir():
        return
    for link in CONTAINER_LOG_LINKS.iterdir():
        if link.is_symlink() and link.readlink().is_relative_to(instance.folder):
            link.unlink()


def _coredns(instance: Instance, state: ClusterState) -> Component:
    ports = state.ports
    corefile = instance.folder / "Corefile"
    forward = f"    forward . {RESOLV_CONF}\n" if _has_name_server() else ""
    write_text(
        corefile,
        f""".:{ports["coredns"]} {{
    errors
    health 127.0.0.1:{ports["coredns-health"]}
    ready 127.0.0.1:{ports["coredns-ready"]}
    cache 5
    kubernetes cluster.local in-addr.arpa ip6.arpa {{
        kubeconfig {kubeconfig_of(instance, "coredns")}
        ttl 5
        fallthrough in-addr.arpa ip6.arpa
    }}
{forward}}}
""",
    )
    command = (binary("coredns"), "-conf", str(corefile))
    return Component("coredns", command, lambda: answers_ok(f"http://127.0.0.1:{ports['coredns-ready']}/ready"))


def _has_name_server() -> bool:
    return RESOLV_CONF.exists() and any(line.startswith("nameserver") for line in RESOLV_CONF.read_text().splitlines())


def _kube_proxy(instance: Instance, state: ClusterState) -> Component:
    config = instance.folder / "kube-proxy.json"
    value = {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "iptables",
        "clusterCIDR": POD_RANGE,
        "hostnameOverride": NODE_NAME,
        "clientConnection": {"kubeconfig": kubeconfig_of(instance, "kube-proxy")},
        "healthzBindAddress": f"127.0.0.1:{state.ports['proxy-health']}",
        "metricsBindAddress": f"127.0.0.1:{state.ports['proxy-metrics']}",
        # Zeros leave the machine's own limits of connection tracking alone.
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
        "iptables": {"minSyncPeriod": "0.2s", "syncPeriod": "30s", "localhostNodePorts": False},
        "nodePortAddresses": ["primary"],
    }
    write_json(config, value)
    command = (binary("kube-proxy"), f"--config={config}")
    return Component("kube-proxy", command, lambda: answers_ok(f"http://127.0.0.1:{state.ports['proxy-health']}/healthz"))


def _kubelet(instance: Instance, state: ClusterState) -> Component:
    config = instance.folder / "kubelet.json"
    write_json(config, _kubelet_config(instance, state))
    instance.kubelet_root.mkdir(parents=True, exist_ok=True)
    command = (
        binary("kubelet"),
        f"--config={config}",
        f"--kubeconfig={kubeconfig_of(instance, 'kubelet')}",
        f"--root-dir={instance.kubelet_root}",
        f"--cert-dir={instance.kubelet_root / 'pki'}",
        f"--hostname-override={NODE_NAME}",
        f"--node-ip={state.node_ip}",
    )
    health = f"http://127.0.0.1:{state.ports['kubelet-health']}/healthz"
    return Component("kubelet", command, lambda: answers_ok(health))


def _kubelet_config(instance: Instance, state: ClusterState) -> dict[str, object]:
    resolv_conf = RESOLV_CONF if RESOLV_CONF.exists() else instance.folder / "resolv.conf"
    if resolv_conf != RESOLV_CONF:
        write_text(resolv_conf, "")
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(instance.pki / "ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "port": state.ports["kubelet"],
        "healthzPort": state.ports["kubelet-health"],
        "containerRuntimeEndpoint": f"unix://{CONTAINERD_SOCKET}",
        "podLogsDir": str(instance.folder / "pod-logs"),
        "volumePluginDir": str(instance.folder / "volume-plugins"),
        "clusterDNS": [DNS_SERVICE_IP],
        "clusterDomain": "cluster.local",
        "resolvConf": str(resolv_conf),
        "cgroupDriver": "cgroupfs",
        "failSwapOn": False,
        "failCgroupV1": False,
        "localStorageCapacityIsolation": False,
        "oomScoreAdj": 0,
        # A node that shares its disk with a work tree must neither evict pods nor delete the images built for it.
        "evictionHard": {
            "memory.available": "50Mi",
            "nodefs.available": "1%",
            "nodefs.inodesFree": "1%",
            "imagefs.available": "1%",
            "imagefs.inodesFree": "1%",
        },
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "imageMinimumGCAge": "8760h",
        "maxPods": 110,
    }

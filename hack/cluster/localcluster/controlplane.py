"""The control plane: etcd, kube-apiserver, kube-controller-manager and kube-scheduler as plain processes."""

from localcluster.binaries import binary
from localcluster.certs import ClientIdentity, ensure_certificates
from localcluster.files import write_json
from localcluster.kubeconfig import write_kubeconfig
from localcluster.kubectl import wait_for
from localcluster.paths import Instance
from localcluster.probes import answers_ok
from localcluster.processes import Component, ensure_running
from localcluster.shell import say
from localcluster.state import ClusterState

NAMES = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler")
SERVICE_RANGE = "10.96.0.0/16"
API_SERVICE_IP = "10.96.0.1"
POD_RANGE = "10.88.0.0/16"
NODE_NAME = "local-node"
CLIENTS = (
    ClientIdentity("admin", "admin", "system:masters"),
    ClientIdentity("kubelet-client", "kube-apiserver-kubelet-client", "system:masters"),
    ClientIdentity("kube-controller-manager", "system:kube-controller-manager"),
    ClientIdentity("kube-scheduler", "system:kube-scheduler"),
    ClientIdentity("kube-proxy", "system:kube-proxy"),
    ClientIdentity("coredns", "system:coredns"),
    ClientIdentity("kubelet", f"system:node:{NODE_NAME}", "system:nodes"),
)
SERVER_NAMES = (
    "kubernetes",
    "kubernetes.default",
    "kubernetes.default.svc",
    "kubernetes.default.svc.cluster.local",
    "localhost",
)
# The default of 20 requests a second would cap the creation of Jobs at about five a second.
RAISED_LIMITS = ("--kube-api-qps=500", "--kube-api-burst=1000")
AUDIT_POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    # The content of Leases tells who led when.
    "rules": [
        {"level": "Request", "resources": [{"group": "coordination.k8s.io", "resources": ["leases"]}]},
        {"level": "Metadata"},
    ],
}


def ensure_control_plane(instance: Instance, state: ClusterState, *, has_audit_log: bool) -> None:
    """Start what does not run of the control plane and wait until it serves."""
    _write_identities(instance, state)
    for component in _components(instance, state, has_audit_log=has_audit_log):
        if ensure_running(instance, component):
            say(f"started {component.name}")
    # Pods cannot be created in a namespace before its service account exists.
    words = ("get", "serviceaccount", "default", "--namespace=default", "--output=name")
    wait_for(instance, *words, what="no default service account", timeout_seconds=60)


def kubeconfig_of(instance: Instance, client: str) -> str:
    """Return the path of a client's kubeconfig."""
    return str(instance.pki / f"{client}.kubeconfig")


def _write_identities(instance: Instance, state: ClusterState) -> None:
    ips = ("127.0.0.1", API_SERVICE_IP, state.node_ip)
    ensure_certificates(instance.pki, clients=CLIENTS, server_names=SERVER_NAMES, server_ips=ips)
    write_json(instance.folder / "audit-policy.json", AUDIT_POLICY)
    server = f"https://127.0.0.1:{state.ports['apiserver']}"
    for client in CLIENTS:
        write_kubeconfig(instance.pki / f"{client.name}.kubeconfig", server=server, pki=instance.pki, client=client.name)
    write_kubeconfig(instance.kubeconfig, server=server, pki=instance.pki, client="admin")


def _components(instance: Instance, state: ClusterState, *, has_audit_log: bool) -> tuple[Component, ...]:
    ports = state.ports
    return (
        Component("etcd", _etcd(instance, state), lambda: answers_ok(f"http://127.0.0.1:{ports['etcd']}/health")),
        Component(
            "kube-apiserver",
            _apiserver(instance, state, has_audit_log=has_audit_log),
            lambda: answers_ok(f"https://127.0.0.1:{ports['apiserver']}/readyz"),
        ),
        Component(
            "kube-controller-manager",
            _controller_manager(instance, state),
            lambda: answers_ok(f"https://127.0.0.1:{ports['controller-manager']}/healthz"),
        ),
        Component(
            "kube-scheduler",
            _scheduler(instance, state),
            lambda: answers_ok(f"https://127.0.0.1:{ports['scheduler']}/healthz"),
        ),
    )


def _etcd(instance: Instance, state: ClusterState) -> tuple[str, ...]:
    client, peer = (f"http://127.0.0.1:{state.ports[name]}" for name in ("etcd", "etcd-peer"))
    return (
        binary("etcd"),
        "--name=local",
        f"--data-dir={instance.folder / 'etcd'}",
        f"--listen-client-urls={client}",
        f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=local={peer}",
        # The data of a local cluster need not outlive the machine; syncing them costs more than all the rest.
        "--unsafe-no-fsync",
        "--quota-backend-bytes=4294967296",
        "--log-level=warn",
    )


def _apiserver(instance: Instance, state: ClusterState, *, has_audit_log: bool) -> tuple[str, ...]:
    pki = instance.pki
    audit = (
        f"--audit-policy-file={instance.folder / 'audit-policy.json'}",
        f"--audit-log-path={instance.folder / 'audit.log'}",
        "--audit-log-format=json",
        "--audit-log-maxsize=500",
        "--audit-log-maxbackup=4",
    )
    return (
        binary("kube-apiserver"),
        f"--etcd-servers=http://127.0.0.1:{state.ports['etcd']}",
        f"--secure-port={state.ports['apiserver']}",
        f"--advertise-address={state.node_ip}",
        f"--tls-cert-file={pki / 'apiserver.crt'}",
        f"--tls-private-key-file={pki / 'apiserver.key'}",
        f"--client-ca-file={pki / 'ca.crt'}",
        f"--service-account-key-file={pki / 'sa.pub'}",
        f"--service-account-signing-key-file={pki / 'sa.key'}",
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
        "--authorization-mode=Node,RBAC",
        # With the second, who sets blockOwnerDeletion needs a right on the owner's finalizers, as on OpenShift.
        "--enable-admission-plugins=NodeRestriction,OwnerReferencesPermissionEnforcement",
        f"--service-cluster-ip-range={SERVICE_RANGE}",
        "--allow-privileged",
        # By its address: the name of the node is in no DNS.
        "--kubelet-preferred-address-types=InternalIP",
        f"--kubelet-client-certificate={pki / 'kubelet-client.crt'}",
        f"--kubelet-client-key={pki / 'kubelet-client.key'}",
        "--max-requests-inflight=1000",
        "--max-mutating-requests-inflight=500",
        *(audit if has_audit_log else ()),
    )


def _controller_manager(instance: Instance, state: ClusterState) -> tuple[str, ...]:
    pki = instance.pki
    kubeconfig = kubeconfig_of(instance, "kube-controller-manager")
    return (
        binary("kube-controller-manager"),
        *_shared_flags(kubeconfig, port=state.ports["controller-manager"]),
        f"--service-account-private-key-file={pki / 'sa.key'}",
        f"--root-ca-file={pki / 'ca.crt'}",
        f"--cluster-signing-cert-file={pki / 'ca.crt'}",
        f"--cluster-signing-key-file={pki / 'ca.key'}",
        "--allocate-node-cidrs",
        f"--cluster-cidr={POD_RANGE}",
        "--use-service-account-credentials",
        "--concurrent-job-syncs=50",
        "--concurrent-gc-syncs=50",
    )


def _scheduler(instance: Instance, state: ClusterState) -> tuple[str, ...]:
    kubeconfig = kubeconfig_of(instance, "kube-scheduler")
    return (binary("kube-scheduler"), *_shared_flags(kubeconfig, port=state.ports["scheduler"]))


def _shared_flags(kubeconfig: str, *, port: int) -> tuple[str, ...]:
    return (
        f"--kubeconfig={kubeconfig}",
        f"--authentication-kubeconfig={kubeconfig}",
        f"--authorization-kubeconfig={kubeconfig}",
        "--authentication-tolerate-lookup-failure=true",
        "--bind-address=127.0.0.1",
        f"--secure-port={port}",
        "--leader-elect=false",
        *RAISED_LIMITS,
    )

"""The objects a node needs in the cluster: DNS, the default storage class, and volumes on the host."""

from pathlib import Path

from localcluster.state import ClusterState

DNS_SERVICE_IP = "10.96.0.10"
STORAGE_CLASS = "standard"

Manifest = dict[str, object]


def system_objects(state: ClusterState) -> tuple[Manifest, ...]:
    """Return the cluster's DNS as a Service of a process on the host, its rights, and the default storage class."""
    return (*_dns_service(state), *_dns_rights(), _storage_class())


def volume_name(claim: str, *, namespace: str) -> str:
    """Return the name of the volume behind a claim."""
    return f"{namespace}-{claim}"


def volume_objects(claim: str, *, namespace: str, size: str, folder: Path) -> tuple[Manifest, ...]:
    """Return a claim, the volume bound to it, and the namespace of both."""
    name = volume_name(claim, namespace=namespace)
    modes = ["ReadWriteOnce", "ReadWriteMany", "ReadOnlyMany"]
    volume: Manifest = {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": name},
        "spec": {
            "capacity": {"storage": size},
            "accessModes": modes,
            "storageClassName": STORAGE_CLASS,
            "persistentVolumeReclaimPolicy": "Retain",
            "claimRef": {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "name": claim, "namespace": namespace},
            "hostPath": {"path": str(folder), "type": "Directory"},
        },
    }
    volume_claim: Manifest = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": claim, "namespace": namespace},
        "spec": {
            "accessModes": ["ReadWriteMany"],
            "storageClassName": STORAGE_CLASS,
            "volumeName": name,
            "resources": {"requests": {"storage": size}},
        },
    }
    return ({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}}, volume, volume_claim)


def _dns_service(state: ClusterState) -> tuple[Manifest, ...]:
    metadata = {"name": "kube-dns", "namespace": "kube-system", "labels": {"kubernetes.io/service-name": "kube-dns"}}
    protocols = {"dns": "UDP", "dns-tcp": "TCP"}
    service: Manifest = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata,
        "spec": {
            "clusterIP": DNS_SERVICE_IP,
            "ports": [{"name": name, "port": 53, "protocol": protocol} for name, protocol in protocols.items()],
        },
    }
    port = state.ports["coredns"]
    endpoints: Manifest = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": metadata,
        "addressType": "IPv4",
        "endpoints": [{"addresses": [state.node_ip], "conditions": {"ready": True}}],
        "ports": [{"name": name, "port": port, "protocol": protocol} for name, protocol in protocols.items()],
    }
    return service, endpoints


def _dns_rights() -> tuple[Manifest, ...]:
    verbs = ["list", "watch"]
    role: Manifest = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRole",
        "metadata": {"name": "system:coredns"},
        "rules": [
            {"apiGroups": [""], "resources": ["services", "namespaces"], "verbs": verbs},
            {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": verbs},
        ],
    }
    binding: Manifest = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": "system:coredns"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "system:coredns"},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "system:coredns"}],
    }
    return role, binding


def _storage_class() -> Manifest:
    return {
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {
            "name": STORAGE_CLASS,
            "annotations": {"storageclass.kubernetes.io/is-default-class": "true"},
        },
        # Claims are served by `python3 hack/cluster volume`, not by a provisioner.
        "provisioner": "kubernetes.io/no-provisioner",
    }

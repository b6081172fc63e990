"""Write kubeconfig files with their certificates inside."""

import base64
from pathlib import Path

from localcluster.files import write_json


def write_kubeconfig(path: Path, *, server: str, pki: Path, client: str) -> None:
    """Write the kubeconfig of one client of the API server (JSON, which is YAML as well)."""
    cluster = {"server": server, "certificate-authority-data": _encoded(pki / "ca.crt")}
    user = {
        "client-certificate-data": _encoded(pki / f"{client}.crt"),
        "client-key-data": _encoded(pki / f"{client}.key"),
    }
    value = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "local", "cluster": cluster}],
        "users": [{"name": client, "user": user}],
        "contexts": [{"name": "local", "context": {"cluster": "local", "user": client}}],
        "current-context": "local",
    }
    write_json(path, value, mode=0o600)


def _encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()

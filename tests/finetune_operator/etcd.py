"""What tests do to the etcd behind an API server, through its JSON gateway: write past all validation, compact."""

import base64
import json
import urllib.request
from pathlib import Path
from typing import Any


class Etcd:
    """The etcd of the control plane that a kubeconfig belongs to."""

    def __init__(self, kubeconfig: Path) -> None:
        ports = json.loads((kubeconfig.parent / "state.json").read_text(encoding="utf-8"))["ports"]
        self._url = f"http://127.0.0.1:{ports['etcd']}/v3"

    def put(self, resource: str, raw: dict[str, Any]) -> None:
        """Store a custom resource as another version of its schema might have let in."""
        metadata = raw["metadata"]
        name = "/".join(filter(None, (metadata.get("namespace"), metadata["name"])))
        key, value = f"/registry/finetune.dev/{resource}/{name}", json.dumps(raw)
        self._call("kv/put", {"key": _encode(key), "value": _encode(value)})

    def delete(self, resource: str, name: str) -> None:
        """Remove a custom resource."""
        self._call("kv/deleterange", {"key": _encode(f"/registry/finetune.dev/{resource}/{name}")})

    def compact(self) -> int:
        """Forget all history, and return the revision from which on it is kept."""
        revision = self.read_revision()
        self._call("kv/compaction", {"revision": str(revision), "physical": True})
        return revision

    def read_revision(self) -> int:
        """Return the revision of the latest change."""
        return int(self._call("kv/range", {"key": _encode("/")})["header"]["revision"])

    def age(self, revisions: int) -> None:
        """Have many revisions go by, in which nothing happens that concerns an API server."""
        for number in range(revisions):
            self._call("kv/put", {"key": _encode("/age"), "value": _encode(str(number))})

    def _call(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(f"{self._url}/{path}", json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read())


def _encode(text: str) -> str:
    return base64.b64encode(text.encode()).decode()

"""Talk to a cluster's API server through kubectl."""

import json
import subprocess
import time
from collections.abc import Sequence

from localcluster.binaries import binary
from localcluster.errors import ClusterError
from localcluster.paths import Instance
from localcluster.shell import run, try_run


def apply(instance: Instance, objects: Sequence[dict[str, object]]) -> None:
    """Apply manifests."""
    manifest = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)})
    run([*_kubectl(instance), "apply", "--server-side", "--force-conflicts", "-f", "-"], stdin=manifest)


def try_kubectl(instance: Instance, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a kubectl command that may fail."""
    return try_run([*_kubectl(instance), *words])


def wait_for(instance: Instance, *words: str, what: str, timeout_seconds: float) -> None:
    """Wait until a kubectl command succeeds and prints something."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        result = try_kubectl(instance, *words)
        if result.returncode == 0 and result.stdout.strip():
            return
        if time.monotonic() > deadline:
            raise ClusterError(f"{what} after {timeout_seconds:.0f} s: {result.stdout}{result.stderr}")
        time.sleep(0.2)


def _kubectl(instance: Instance) -> list[str]:
    return [binary("kubectl"), "--kubeconfig", str(instance.kubeconfig)]

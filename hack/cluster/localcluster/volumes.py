"""Host directories that pods see through a PersistentVolumeClaim."""

import os
from pathlib import Path

from localcluster.kubectl import apply, try_kubectl, wait_for
from localcluster.objects import volume_name, volume_objects
from localcluster.paths import Instance

# The user of the project's images.
OWNER = 65532


def ensure_volume(instance: Instance, claim: str, *, namespace: str, size: str) -> Path:
    """Make a claim with a host directory behind it, and return the directory."""
    folder = instance.volumes / namespace / claim
    folder.mkdir(parents=True, exist_ok=True)
    if os.geteuid() == 0:
        os.chown(folder, OWNER, OWNER)
    folder.chmod(0o775)
    name = volume_name(claim, namespace=namespace)
    if try_kubectl(instance, "get", "persistentvolume", name, "--output=jsonpath={.status.phase}").stdout == "Released":
        # Its claim was deleted; a volume that remembers the old claim would never bind to another.
        try_kubectl(instance, "delete", "persistentvolume", name)
    apply(instance, volume_objects(claim, namespace=namespace, size=size, folder=folder))
    # A pod that is created before would wait for the scheduler's next try, some twenty seconds later.
    bound = ("wait", "--namespace", namespace, "--for=jsonpath={.status.phase}=Bound", f"pvc/{claim}", "--timeout=30s")
    wait_for(instance, *bound, what=f"claim {claim} is not bound", timeout_seconds=40)
    return folder

"""FineTuneJobs and plain Jobs by the thousand."""

from collections.abc import Sequence
from typing import Any

from bench.scale.client import Client

API = "/apis/finetune.dev/v1alpha1"
BATCH = "/apis/batch/v1"


def finetunejobs(namespace: str) -> str:
    """Return the path of the FineTuneJobs of a namespace."""
    return f"{API}/namespaces/{namespace}/finetunejobs"


def jobs(namespace: str) -> str:
    """Return the path of the Jobs of a namespace."""
    return f"{BATCH}/namespaces/{namespace}/jobs"


def number(prefix: str, count: int) -> list[str]:
    """Return names; the prefix says how the pods end."""
    return [f"{prefix}{index:05d}" for index in range(count)]


def apply_finetunejob(client: Client, namespace: str, name: str, **spec: Any) -> None:
    """Apply a FineTuneJob that asks for one accelerator."""
    body = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "task": "image-classification",
            "dataset": {"uri": "pvc://datasets/pictures"},
            "accelerator": {"nvidia": {"count": 1}},
            "output": {"uri": f"pvc://models/{name}"},
            **spec,
        },
    }
    client.apply(f"{finetunejobs(namespace)}/{name}", body)


def copy_as_plain_job(child: dict[str, Any]) -> dict[str, Any]:
    """Return the operator's Job without what ties it to a FineTuneJob, so that the same pod runs without the operator (pure)."""
    template = child["spec"]["template"]
    metadata = {"annotations": template["metadata"].get("annotations") or {}, "labels": {"bench": "plain"}}
    kept = ("completionMode", "completions", "parallelism", "backoffLimit", "podReplacementPolicy")
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "spec": {key: child["spec"][key] for key in kept} | {"template": {"metadata": metadata, "spec": template["spec"]}},
    }


def create_plain_job(client: Client, namespace: str, name: str, *, job: dict[str, Any]) -> None:
    """Create one plain Job."""
    client.create(jobs(namespace), job | {"metadata": {"name": name, "namespace": namespace}})


def count_unfinished_jobs(client: Client, namespace: str) -> int:
    """Return 0 when every Job of a namespace has completed its one pod, else 1, as counting all would cost too much."""
    return len(client.get(f"{jobs(namespace)}?limit=1&fieldSelector=status.successful%3D0")["items"])


def list_states(client: Client, namespace: str) -> Sequence[str]:
    """Return the STATE of every FineTuneJob."""
    return [read_state(each) for each in client.list(finetunejobs(namespace))]


def read_state(job: dict[str, Any]) -> str:
    """Return the STATE of a FineTuneJob (pure)."""
    conditions = (job.get("status") or {}).get("conditions") or ()
    return next((str(each["reason"]) for each in conditions if each["type"] == "Ready"), "")

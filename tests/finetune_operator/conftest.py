"""Objects as the API server sends them, cut to the fields that matter."""

from datetime import UTC, datetime
from typing import Any

import pytest

NOW = datetime(2026, 1, 1, tzinfo=UTC)
SPEC = {
    "task": "image-classification",
    "dataset": {"uri": "pvc://datasets/emoji"},
    "output": {"uri": "pvc://models/emoji"},
}


class Objects:
    """Builders of raw objects with valid defaults."""

    def job(
        self,
        name: str = "emoji",
        *,
        uid: str | None = None,
        version: int = 1,
        namespace: str = "team",
        generation: int = 1,
        spec: dict[str, Any] | None = None,
        status: dict[str, Any] | None = None,
        **metadata: Any,
    ) -> dict[str, Any]:
        return {
            "apiVersion": "finetune.dev/v1alpha1",
            "kind": "FineTuneJob",
            "metadata": {
                "name": name,
                "namespace": namespace,
                "uid": uid or f"uid-{namespace}-{name}",
                "resourceVersion": str(version),
                "generation": generation,
                "creationTimestamp": "2026-01-01T00:00:00Z",
                **metadata,
            },
            "spec": SPEC if spec is None else spec,
            **({"status": status} if status else {}),
        }

    def child(
        self,
        name: str = "emoji-0a1b2c3d-1",
        *,
        job: str = "emoji",
        job_uid: str | None = None,
        uid: str | None = None,
        version: int = 1,
        namespace: str = "team",
        attempt: int = 1,
        status: dict[str, Any] | None = None,
        **metadata: Any,
    ) -> dict[str, Any]:
        labels = _labels(job, job_uid=job_uid or f"uid-{namespace}-{job}", attempt=attempt)
        return {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {
                "name": name,
                "namespace": namespace,
                "uid": uid or f"uid-{namespace}-{name}",
                "resourceVersion": str(version),
                "labels": labels,
                **metadata,
            },
            "status": status or {},
        }

    def pod(
        self,
        name: str = "emoji-0a1b2c3d-1-0-x7x7x",
        *,
        child: str = "emoji-0a1b2c3d-1",
        job: str = "emoji",
        job_uid: str | None = None,
        uid: str | None = None,
        version: int = 1,
        namespace: str = "team",
        status: dict[str, Any] | None = None,
        **metadata: Any,
    ) -> dict[str, Any]:
        return {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": name,
                "namespace": namespace,
                "uid": uid or f"uid-{namespace}-{name}",
                "resourceVersion": str(version),
                "labels": _labels(job, job_uid=job_uid or f"uid-{namespace}-{job}", attempt=1),
                "ownerReferences": [{"apiVersion": "batch/v1", "kind": "Job", "name": child, "uid": "j", "controller": True}],
                **metadata,
            },
            "spec": {"nodeName": "node-1", "containers": [{"name": "trainer", "image": "trainer:1"}]},
            "status": status or {"phase": "Pending"},
        }


def _labels(job: str, *, job_uid: str, attempt: int) -> dict[str, str]:
    return {
        "app.kubernetes.io/managed-by": "finetune-operator",
        "finetune.dev/job": job,
        "finetune.dev/job-uid": job_uid,
        "finetune.dev/run": "0a1b2c3d",
        "finetune.dev/attempt": str(attempt),
        "finetune.dev/pod-shape": "5e6f7a8b",
    }


@pytest.fixture
def objects() -> Objects:
    return Objects()

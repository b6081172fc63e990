"""The ResourceClaimTemplate from which each pod gets devices by Dynamic Resource Allocation (pure)."""

import hashlib
from typing import Any

from finetune_api import names

from finetune_operator.manifests.owner import build_owner
from finetune_operator.observed import JobView
from finetune_operator.policies.accelerator import DeviceRequest

CLAIM = "accelerator"
"""Name of the claim in a pod, and of its one request."""


def build_claim_template(job: JobView, devices: DeviceRequest) -> dict[str, Any]:
    """Return the template: one for all attempts that claim the same, as it cannot be changed."""
    exactly = {"deviceClassName": devices.device_class, "allocationMode": "ExactCount", "count": devices.count}
    return {
        "apiVersion": "resource.k8s.io/v1",
        "kind": "ResourceClaimTemplate",
        "metadata": {
            "name": name_claim_template(job, devices),
            "namespace": job.namespace,
            "labels": {names.LABEL_MANAGED_BY: names.MANAGED_BY, names.LABEL_JOB: job.name},
            "ownerReferences": [build_owner(job)],
        },
        "spec": {"spec": {"devices": {"requests": [{"name": CLAIM, "exactly": exactly}]}}},
    }


def name_claim_template(job: JobView, devices: DeviceRequest) -> str:
    """Return the name, which holds a hash of what is claimed."""
    content = hashlib.sha256(f"{devices.device_class} {devices.count}".encode()).hexdigest()[:8]
    return f"{names.service_name(job.name, job.uid)}-{content}"

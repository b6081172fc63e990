"""The headless Service by which the pods of a FineTuneJob find each other (pure)."""

from typing import Any

from finetune_api import names

from finetune_operator.manifests.owner import build_owner
from finetune_operator.observed import JobView


def build_service(job: JobView) -> dict[str, Any]:
    """Return the Service: one for all attempts of a FineTuneJob, which needs no change between them."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": names.service_name(job.name, job.uid),
            "namespace": job.namespace,
            "labels": {names.LABEL_MANAGED_BY: names.MANAGED_BY, names.LABEL_JOB: job.name},
            "ownerReferences": [build_owner(job)],
        },
        "spec": {
            "clusterIP": "None",
            "selector": {names.LABEL_JOB_UID: job.uid},
            # Trainers meet before any of them is ready.
            "publishNotReadyAddresses": True,
        },
    }

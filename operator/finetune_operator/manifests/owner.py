"""The reference from a child to its FineTuneJob (pure)."""

from typing import Any

from finetune_api import names

from finetune_operator.observed import JobView


def build_owner(job: JobView) -> dict[str, Any]:
    """Return the ownerReference, by which the garbage collector removes a child with its FineTuneJob."""
    return {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "name": job.name,
        "uid": job.uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }

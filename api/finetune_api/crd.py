"""The CustomResourceDefinitions; `python -m finetune_api.crd` prints them."""

import json
from typing import Any

from finetune_api import names
from finetune_api.base import ApiModel
from finetune_api.profile import FineTuneProfile
from finetune_api.structural import build_structural_schema
from finetune_api.v1alpha1 import FineTuneJob

_COLUMNS = (
    ("STATE", "string", '.status.conditions[?(@.type=="Ready")].reason', "What the job is doing, or why it is not."),
    ("PROGRESS", "integer", ".status.trainerStatus.progressPercentage", "Percentage of the training that is done."),
    ("ETA", "integer", ".status.trainerStatus.estimatedRemainingSeconds", "Seconds that are probably left."),
    ("METRIC", "string", ".status.metric", "The main metric of the task."),
    ("AGE", "date", ".metadata.creationTimestamp", "Time since the job was created."),
)


_PROFILE_COLUMNS = (
    ("DEFAULT", "boolean", ".spec.isDefault", "Whether jobs without a profileRef have this profile."),
    ("IMAGE", "string", ".spec.image", "The trainer's image."),
    ("AGE", "date", ".metadata.creationTimestamp", "Time since the profile was created."),
)


def build_crds() -> tuple[dict[str, Any], ...]:
    """Return all CustomResourceDefinitions as manifests."""
    return build_crd(), build_profile_crd()


def build_crd() -> dict[str, Any]:
    """Return the CustomResourceDefinition of FineTuneJob as a manifest."""
    kinds = {
        "kind": names.KIND,
        "listKind": f"{names.KIND}List",
        "plural": names.PLURAL,
        "singular": names.SINGULAR,
        "shortNames": [names.SHORT_NAME],
        "categories": ["all"],
    }
    version = _build_version(FineTuneJob, columns=_COLUMNS) | {"subresources": {"status": {}}}
    return _build(kinds, version, scope="Namespaced")


def build_profile_crd() -> dict[str, Any]:
    """Return the CustomResourceDefinition of FineTuneProfile as a manifest."""
    kinds = {
        "kind": names.PROFILE_KIND,
        "listKind": f"{names.PROFILE_KIND}List",
        "plural": names.PROFILE_PLURAL,
        "singular": names.PROFILE_SINGULAR,
        "shortNames": [names.PROFILE_SHORT_NAME],
    }
    return _build(kinds, _build_version(FineTuneProfile, columns=_PROFILE_COLUMNS), scope="Cluster")


def _build(kinds: dict[str, Any], version: dict[str, Any], *, scope: str) -> dict[str, Any]:
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{kinds['plural']}.{names.GROUP}"},
        "spec": {
            "group": names.GROUP,
            "names": kinds,
            "scope": scope,
            "conversion": {"strategy": "None"},
            "versions": [version],
        },
    }


def _build_version(model: type[ApiModel], *, columns: tuple[tuple[str, str, str, str], ...]) -> dict[str, Any]:
    return {
        "name": names.VERSION,
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": _build_root_schema(model)},
        "additionalPrinterColumns": [
            {"name": name, "type": kind, "jsonPath": path, "description": description}
            for name, kind, path, description in columns
        ],
    }


def _build_root_schema(model: type[ApiModel]) -> dict[str, Any]:
    schema = build_structural_schema(model.model_json_schema(by_alias=True, mode="validation"))
    schema["properties"] = {
        "apiVersion": {"type": "string", "description": "apiVersion is the version of the API that the object is written in."},
        "kind": {"type": "string", "description": f"kind is {model.__name__}."},
        "metadata": {"type": "object"},
    } | schema["properties"]
    return schema


def main() -> None:
    """Print the CustomResourceDefinitions as YAML (JSON values, which are YAML)."""
    print("\n---\n".join(json.dumps(crd, indent=2) for crd in build_crds()))


if __name__ == "__main__":
    main()

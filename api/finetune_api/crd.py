"""The CustomResourceDefinition of FineTuneJob; `python -m finetune_api.crd` prints it."""

import json
from typing import Any

from finetune_api import names
from finetune_api.structural import build_structural_schema
from finetune_api.v1alpha1 import FineTuneJob

_COLUMNS = (
    ("STATE", "string", '.status.conditions[?(@.type=="Ready")].reason', "What the job is doing, or why it is not."),
    ("PROGRESS", "integer", ".status.trainerStatus.progressPercentage", "Percentage of the training that is done."),
    ("ETA", "integer", ".status.trainerStatus.estimatedRemainingSeconds", "Seconds that are probably left."),
    ("METRIC", "string", ".status.metric", "The main metric of the task."),
    ("AGE", "date", ".metadata.creationTimestamp", "Time since the job was created."),
)


def build_crd() -> dict[str, Any]:
    """Return the CustomResourceDefinition as a manifest."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{names.PLURAL}.{names.GROUP}"},
        "spec": {
            "group": names.GROUP,
            "names": {
                "kind": names.KIND,
                "listKind": f"{names.KIND}List",
                "plural": names.PLURAL,
                "singular": names.SINGULAR,
                "shortNames": [names.SHORT_NAME],
                "categories": ["all"],
            },
            "scope": "Namespaced",
            "conversion": {"strategy": "None"},
            "versions": [_build_version()],
        },
    }


def _build_version() -> dict[str, Any]:
    return {
        "name": names.VERSION,
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": _build_root_schema()},
        "subresources": {"status": {}},
        "additionalPrinterColumns": [
            {"name": name, "type": kind, "jsonPath": path, "description": description}
            for name, kind, path, description in _COLUMNS
        ],
    }


def _build_root_schema() -> dict[str, Any]:
    schema = build_structural_schema(FineTuneJob.model_json_schema(by_alias=True, mode="validation"))
    schema["properties"] = {
        "apiVersion": {"type": "string", "description": "apiVersion is the version of the API that the object is written in."},
        "kind": {"type": "string", "description": "kind is FineTuneJob."},
        "metadata": {"type": "object"},
    } | schema["properties"]
    return schema


def main() -> None:
    """Print the CustomResourceDefinition as YAML (JSON values, which are YAML)."""
    print(json.dumps(build_crd(), indent=2))


if __name__ == "__main__":
    main()

"""Every status of a FineTuneJob that tests come across, by its shape: all that GitOps tools judge it by.

`make golden` adds those of the pure tests to the corpus, and the same with UPDATE_GOLDEN=1 those of the other tests. To drop
what does not occur any more, delete the file first.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from finetune_api.v1alpha1 import FineTuneJobStatus
from pydantic import ValidationError

CORPUS = Path(__file__).parent / "corpus.json"

_GENERATION = 2


class Shape(NamedTuple):
    """The conditions as type, status and reason, and how the status stands to its object."""

    conditions: tuple[tuple[str, str, str], ...]
    is_stale: bool = False
    """Whether the spec has changed since the status was written."""
    is_deleted: bool = False
    """Whether the object is being deleted."""

    @property
    def state(self) -> str:
        """Return the STATE column."""
        return next((reason for kind, _, reason in self.conditions if kind == "Ready"), "")

    def has(self, kind: str) -> bool:
        """Return whether a condition is True."""
        return any((kind, "True") == each[:2] for each in self.conditions)

    def build(self) -> dict[str, Any]:
        """Return an object of this shape, as the API server would send it."""
        observed = _GENERATION - self.is_stale if self.conditions else -1
        conditions = [
            {"type": kind, "status": status, "reason": reason, "message": f"{reason}.", "observedGeneration": observed}
            | {"lastTransitionTime": "2026-01-01T00:00:00Z"}
            for kind, status, reason in self.conditions
        ]
        deletion = {"deletionTimestamp": "2026-01-01T00:00:00Z"} if self.is_deleted else {}
        return {
            "apiVersion": "finetune.dev/v1alpha1",
            "kind": "FineTuneJob",
            "metadata": {"name": "emoji", "namespace": "team", "generation": _GENERATION} | deletion,
            "spec": {},
            "status": {"observedGeneration": observed} | ({"conditions": conditions} if conditions else {}),
        }


SEEN: set[Shape] = set()


def record(status: FineTuneJobStatus, *, generation: int) -> None:
    """Remember the shape of a status that a decision was made from, or led to."""
    conditions = tuple((each.type, each.status.value, each.reason) for each in status.conditions)
    SEEN.add(Shape(conditions, is_stale=bool(conditions) and status.observed_generation != generation))


def record_object(item: dict[str, Any], *, manager: str) -> None:
    """Remember the shape of an object of the API server whose status this manager wrote, or nobody."""
    metadata = item["metadata"]
    writers = {each["manager"] for each in metadata.get("managedFields", ()) if each.get("subresource") == "status"}
    if not writers <= {manager}:
        return
    try:
        status = FineTuneJobStatus.model_validate(item.get("status") or {})
    except ValidationError:
        return  # a test has written it past all validation
    conditions = tuple((each.type, each.status.value, each.reason) for each in status.conditions)
    is_stale = bool(conditions) and status.observed_generation != metadata.get("generation")
    SEEN.add(Shape(conditions, is_stale=is_stale, is_deleted="deletionTimestamp" in metadata))


def read_corpus() -> set[Shape]:
    """Return the shapes that earlier runs of the tests have come across."""
    lines = json.loads(CORPUS.read_text(encoding="utf-8")) if CORPUS.exists() else []
    return {
        Shape(tuple((kind, *each.split("/", 1)) for kind, each in line["conditions"].items()), line["isStale"], line["isDeleted"])
        for line in lines
    }


def write_corpus(shapes: set[Shape]) -> None:
    """Keep shapes for later runs, one a line."""
    lines = [
        json.dumps(
            {
                "conditions": {kind: f"{status}/{reason}" for kind, status, reason in each.conditions},
                "isStale": each.is_stale,
                "isDeleted": each.is_deleted,
            }
        )
        for each in sorted(shapes)
    ]
    CORPUS.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")

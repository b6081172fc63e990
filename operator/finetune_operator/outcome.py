"""What one reconcile decides: effects as plain values, carried out by cluster.py in the order of the fields."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from finetune_api.v1alpha1 import FineTuneJobStatus

from finetune_operator.observed import ChildView


@dataclass(frozen=True, slots=True, kw_only=True)
class Deletion:
    """Deletion of a child Job, with everything it owns gone before it (foreground)."""

    name: str
    uid: str
    resource_version: str


class EventType(StrEnum):
    """Type of an events.k8s.io/v1 Event."""

    NORMAL = "Normal"
    WARNING = "Warning"


@dataclass(frozen=True, slots=True, kw_only=True)
class EventNote:
    """An event to record on the FineTuneJob."""

    type: EventType
    reason: str
    action: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What to do, in this order. An empty outcome is a reconcile that found nothing to do."""

    confirm: ChildView | None = None
    """A child Job that ended while its pods, as they were seen, do not show how: the API server itself must show the same, or
    the view is refreshed and the key reconciled again."""
    delete: tuple[Deletion, ...] = ()
    adopt: tuple[ChildView, ...] = ()
    """Child Jobs that have lost their ownerReference, without which nothing would remove them with their FineTuneJob."""
    absent: tuple[str, ...] = ()
    """Child Jobs that the API server itself must not know any more before anything is applied: a guard against acting on
    a stale view. If one is still there, the view is refreshed and the key reconciled again."""
    apply: tuple[dict[str, Any], ...] = ()
    status: FineTuneJobStatus | None = None
    """The whole new status, or None when it is unchanged."""
    is_only_progress: bool = False
    """Whether the new status carries nothing but progress, and can wait while many others are written."""
    events: tuple[EventNote, ...] = ()
    inspect: ChildView | None = None
    """A child Job that has no pod, whose events may tell why."""
    requeue_after: float | None = None
    """Seconds after which to reconcile again without an event."""

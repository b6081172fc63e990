"""All that one reconcile may know, as immutable views of what the cluster showed."""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from finetune_api.contract import TrainerReport
from finetune_api.v1alpha1 import FineTuneJobSpec, FineTuneJobStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class JobView:
    """A FineTuneJob: its parsed spec, or the reason why it cannot be parsed."""

    namespace: str
    name: str
    uid: str
    generation: int
    resource_version: str
    deleting: bool
    spec: FineTuneJobSpec | None
    spec_error: str | None
    status: FineTuneJobStatus

    @property
    def key(self) -> tuple[str, str]:
        """Return namespace and name."""
        return self.namespace, self.name


class ChildState(StrEnum):
    """How far a child Job is."""

    ACTIVE = "Active"
    COMPLETE = "Complete"
    FAILED = "Failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildView:
    """A child Job: one attempt of one run."""

    name: str
    uid: str
    resource_version: str
    run: str
    attempt: int
    pod_shape: str
    deleting: bool
    state: ChildState
    reason: str
    message: str
    finished_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PodView:
    """A trainer pod: where it is, what it waits for, and how its container ended."""

    name: str
    uid: str
    resource_version: str
    child: str
    """Name of the child Job."""
    phase: str
    node: str | None
    deleting: bool
    image: str
    scheduled: bool
    unscheduled_reason: str | None
    unscheduled_message: str | None
    waiting_reason: str | None
    waiting_message: str | None
    started_at: datetime | None
    """When the trainer container started, also after it ended."""
    finished_at: datetime | None
    exit_code: int | None
    termination_reason: str | None
    termination_message: str | None
    """Content of the termination message file: a TrainerReport, or the end of the log."""
    pod_reason: str | None
    """`status.reason` of the pod, such as Evicted."""
    pod_message: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceivedReport:
    """The last report that the receiver accepted for a FineTuneJob."""

    run: str
    attempt: int
    received_at: datetime
    report: TrainerReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """Everything that the store holds for one FineTuneJob beside the object itself."""

    children: tuple[ChildView, ...] = ()
    pods: tuple[PodView, ...] = ()
    report: ReceivedReport | None = None

    def pods_of(self, child: ChildView) -> tuple[PodView, ...]:
        """Return the pods of one attempt."""
        return tuple(pod for pod in self.pods if pod.child == child.name)

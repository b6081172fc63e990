"""All that one reconcile may know, as immutable views of what the cluster showed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from finetune_api import names
from finetune_api.contract import TrainerReport
from finetune_api.profile import FineTuneProfileSpec
from finetune_api.v1alpha1 import FineTuneJobSpec, FineTuneJobStatus

from finetune_operator.policies.pace import Pace
from finetune_operator.snapshot import Snapshot


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
    queue_labels: Mapping[str, str] = field(default_factory=dict)
    """The labels for the queue that is to admit the job's attempts."""
    topology: Mapping[str, str] = field(default_factory=dict)
    """The annotations that tell a queue how close the pods must be."""

    @property
    def queue(self) -> str | None:
        """Return the queue that is to admit the attempts, or None if they need no admission."""
        return self.queue_labels.get(names.LABEL_QUEUE)

    @property
    def queue_request(self) -> str:
        """Return queue and priority as one text, by which a change of them is seen; empty without a queue."""
        return "/".join(self.queue_labels[label] for label in sorted(self.queue_labels, reverse=True)) if self.queue else ""

    @property
    def key(self) -> tuple[str, str]:
        """Return namespace and name."""
        return self.namespace, self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileView:
    """A FineTuneProfile: its parsed spec, or the reason why it cannot be parsed."""

    name: str
    generation: int
    is_default: bool
    spec: FineTuneProfileSpec | None
    spec_error: str | None = None


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
    created_at: datetime
    finished_at: datetime | None
    nodes: int = 1
    """Number of pods, which are all needed at once."""
    is_resized: bool = False
    """Whether somebody has given the Job another number of pods than its trainers are configured for."""
    is_owned: bool = True
    """Whether it goes with its FineTuneJob; somebody may have removed its ownerReference."""
    snapshot: Snapshot = field(default_factory=Snapshot)
    suspended: bool = False
    """Whether it may have no pods, as its queue has not admitted it, or has evicted it."""
    suspended_at: datetime | None = None
    """Since when the Job controller has it stopped, if it does."""
    queue: str | None = None
    """The queue that it is in, which may be one that the cluster's administrator chose."""
    queue_request: str = ""
    """The queue and the priority that it was created for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PodView:
    """A trainer pod: where it is, what it waits for, and how its container ended."""

    name: str
    uid: str
    resource_version: str
    child: str
    """Name of the child Job."""
    child_uid: str = ""
    """Its uid: a run that returns has Jobs of the same names once more. Empty when no Job owns the pod."""
    run: str
    attempt: int
    index: int = 0
    """Number of the pod within its attempt; the trainer of the first one reports and publishes."""
    created_at: datetime | None = None
    phase: str
    node: str | None
    deleting: bool
    deletion_due: datetime | None = None
    """When the pod must have stopped at the latest, if it is being deleted: the grace period is over then."""
    deleted_at: datetime | None = None
    """When somebody asked for its deletion."""
    image: str
    node_selector: Mapping[str, str] = field(default_factory=dict)
    """Labels that the pod's node must have."""
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
    disruption_reason: str | None = None
    """Reason of the condition DisruptionTarget: who ended the pod for a cause that is not its own."""
    disruption_message: str | None = None
    disrupted_at: datetime | None = None

    @property
    def is_ended(self) -> bool:
        """Return whether the trainer in it has ended, so that it writes nothing any more."""
        return self.phase in ("Succeeded", "Failed") or self.exit_code is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class PodRefusal:
    """What a look at the events of a Job without a pod has found."""

    child_uid: str
    checked_at: datetime
    message: str | None
    """Why the API server refuses the pod, or None if nothing tells of that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceivedReport:
    """The last report that the receiver accepted for a FineTuneJob."""

    run: str
    attempt: int
    received_at: datetime
    report: TrainerReport
    pace: Pace | None = None
    """How fast this attempt was seen to be."""
    seconds_left: float | None = None
    """How long the rest probably took at the time of the receipt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """Everything that the store holds for one FineTuneJob beside the object itself."""

    children: tuple[ChildView, ...] = ()
    pods: tuple[PodView, ...] = ()
    former_pods: tuple[PodView, ...] = ()
    """Pods that are gone, as they were seen last: how an attempt ended may be known from them alone."""
    report: ReceivedReport | None = None
    refusal: PodRefusal | None = None
    profiles: tuple[ProfileView, ...] = ()
    """All FineTuneProfiles of the cluster."""

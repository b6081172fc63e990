"""Project what the API server sends into slim records, and records into the views that decisions are made on (pure)."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, Generic, TypeVar

from finetune_api import names
from finetune_api.profile import FineTuneProfileSpec
from finetune_api.v1alpha1 import FineTuneJobSpec, FineTuneJobStatus, ManagedBy
from pydantic import BaseModel, ValidationError

from finetune_operator.observed import ChildState, ChildView, JobView, PodView, ProfileView
from finetune_operator.snapshot import parse_snapshot

Key = tuple[str, str]
"""Namespace and name; the namespace of a cluster-scoped object is empty."""
RawObject = Mapping[str, Any]
"""An object as the API server sends it."""

Content = TypeVar("Content")
Spec = TypeVar("Spec", bound=BaseModel)


class Kind(StrEnum):
    """The watched kinds, by their plural names."""

    FINETUNEJOB = names.PLURAL
    JOB = "jobs"
    POD = "pods"
    FINETUNEPROFILE = names.PROFILE_PLURAL

    @property
    def is_ours(self) -> bool:
        """Return whether it is one of our custom resources, all of whose objects count, whatever their labels."""
        return self in (Kind.FINETUNEJOB, Kind.FINETUNEPROFILE)

    def list_scopes(self, namespaces: tuple[str, ...]) -> tuple[str | None, ...]:
        """Return the namespaces to look into when only these are watched; None is the whole cluster."""
        return (None,) if self is Kind.FINETUNEPROFILE else namespaces or (None,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Record(Generic[Content]):
    """What is kept of one object."""

    namespace: str
    name: str
    uid: str
    version: int
    """resourceVersion as the number that it is: https://kubernetes.io/docs/reference/using-api/api-concepts/#resource-versions"""
    owner: Key
    """The FineTuneJob that the object belongs to; a FineTuneJob belongs to itself."""
    owner_uid: str
    content: Content

    @property
    def key(self) -> Key:
        """Return namespace and name."""
        return self.namespace, self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class JobContent:
    """A FineTuneJob with its parts as JSON, a tenth of their size as models."""

    generation: int
    created_at: datetime
    deleting: bool
    state: str
    """Reason of the Ready condition."""
    spec: bytes
    status: bytes
    progress_at: datetime | None
    """When the progress that the status shows was received."""
    profile: str | None
    """Name of the profile that the spec names."""
    queue_labels: Mapping[str, str]
    topology: Mapping[str, str]
    is_ours: bool
    """Whether spec.managedBy leaves the object to this operator."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """The objects of one kind that the API server has: keys and resourceVersions by uid."""

    version: int
    """resourceVersion of the list itself."""
    objects: Mapping[str, tuple[Key, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reviewed:
    """Whom a token belongs to."""

    username: str
    pod: str | None
    pod_uid: str | None


def project_job(raw: RawObject) -> Record[JobContent]:
    """Return the record of a FineTuneJob, one that another version of the schema let in and nobody can read included."""
    metadata, spec, status = raw["metadata"], _read_object(raw, "spec"), _read_object(raw, "status")
    labels, annotations = metadata.get("labels") or {}, metadata.get("annotations") or {}
    ready = _find_condition(status, "Ready")
    content = JobContent(
        generation=metadata.get("generation", 0),
        created_at=datetime.fromisoformat(metadata["creationTimestamp"]),
        deleting="deletionTimestamp" in metadata,
        state=_read_text(ready, "reason") or "",
        spec=_dump(raw.get("spec") or {}),
        status=_dump(status),
        progress_at=_read_time(_read_object(status, "trainerStatus"), "lastUpdatedTime"),
        profile=_read_text(_read_object(spec, "profileRef"), "name"),
        queue_labels={label: labels[label] for label in (names.LABEL_QUEUE, names.LABEL_QUEUE_PRIORITY) if labels.get(label)},
        topology={name: value for name, value in annotations.items() if name.startswith(names.ANNOTATION_PREFIX_TOPOLOGY)},
        is_ours=spec.get("managedBy", ManagedBy.OPERATOR) == ManagedBy.OPERATOR,
    )
    return _build_record(metadata, owner=metadata["name"], owner_uid=metadata["uid"], content=content)


def project_profile(raw: RawObject) -> Record[ProfileView]:
    """Return the record of a FineTuneProfile; one that cannot be parsed is still the default if it says so."""
    metadata, fields = raw["metadata"], _read_object(raw, "spec")
    spec, error = _parse_spec(FineTuneProfileSpec, _dump(raw.get("spec") or {}))
    content = ProfileView(
        name=metadata["name"],
        generation=metadata.get("generation", 0),
        is_default=fields.get("isDefault") is True,
        spec=spec,
        spec_error=error,
    )
    return _build_record(metadata, owner=metadata["name"], owner_uid=metadata["uid"], content=content)


def is_unanswered(raw: RawObject) -> bool:
    """Return whether a FineTuneJob was changed by its user since its status was written."""
    return bool(raw["metadata"].get("generation") != _read_object(raw, "status").get("observedGeneration"))


def project_child(raw: RawObject) -> Record[ChildView] | None:
    """Return the record of a child Job, or None for a Job that does not carry the labels of one."""
    metadata = raw["metadata"]
    labels = metadata.get("labels") or {}
    if names.LABEL_JOB not in labels or labels.get(names.LABEL_MANAGED_BY) != names.MANAGED_BY:
        return None
    spec, status = raw.get("spec") or {}, raw.get("status") or {}
    completions = spec.get("completions") or 1
    nodes = _read_nodes(spec) or completions
    state, condition = _find_end(status)
    stopped = _find_condition(status, "Suspended")
    finished_at = status.get("completionTime") or condition.get("lastTransitionTime")
    content = ChildView(
        name=metadata["name"],
        uid=metadata["uid"],
        resource_version=metadata["resourceVersion"],
        run=labels.get(names.LABEL_RUN, ""),
        attempt=_parse_number(labels, names.LABEL_ATTEMPT),
        pod_shape=labels.get(names.LABEL_POD_SHAPE, ""),
        deleting="deletionTimestamp" in metadata,
        state=state,
        reason=condition.get("reason", ""),
        message=condition.get("message", ""),
        created_at=datetime.fromisoformat(metadata["creationTimestamp"]),
        finished_at=datetime.fromisoformat(finished_at) if finished_at else None,
        nodes=nodes,
        is_resized=(completions, spec.get("parallelism", nodes)) != (nodes, nodes),
        is_owned=labels.get(names.LABEL_JOB_UID) in {each.get("uid") for each in metadata.get("ownerReferences") or ()},
        suspended=bool(spec.get("suspend")),
        suspended_at=_parse_time(stopped.get("lastTransitionTime")) if stopped.get("status") == "True" else None,
        queue=labels.get(names.LABEL_QUEUE) or None,
        queue_request=(metadata.get("annotations") or {}).get(names.ANNOTATION_QUEUE, ""),
        snapshot=parse_snapshot(metadata.get("annotations") or {}),
    )
    return _build_record(metadata, owner=labels[names.LABEL_JOB], owner_uid=labels.get(names.LABEL_JOB_UID, ""), content=content)


def is_passing(raw: RawObject, *, job_uid: str) -> bool:
    """Return whether a Job whose name a FineTuneJob needs is its own, or goes without anybody's help."""
    metadata = raw["metadata"]
    child = project_child(raw)
    if "deletionTimestamp" in metadata or (child is not None and child.owner_uid == job_uid):
        return True
    # The garbage collector is about to remove what a deleted FineTuneJob of the same name has left behind.
    owners = (each for each in metadata.get("ownerReferences") or () if each.get("kind") == names.KIND)
    return any(each.get("uid") != job_uid for each in owners)


def project_pod(raw: RawObject) -> Record[PodView] | None:
    """Return the record of a trainer pod, or None for a pod that does not carry the labels of one."""
    metadata, spec, status = raw["metadata"], raw.get("spec") or {}, raw.get("status") or {}
    labels = metadata.get("labels") or {}
    if names.LABEL_JOB not in labels:
        return None
    controller = next(_list_controllers(metadata), {})
    placement, disruption = _find_condition(status, "PodScheduled"), _find_condition(status, "DisruptionTarget")
    state = _find_container(status.get("containerStatuses")).get("state") or {}
    waiting, terminated = state.get("waiting") or {}, state.get("terminated") or {}
    started_at = (state.get("running") or terminated).get("startedAt")
    is_unscheduled = placement.get("status") == "False"
    is_disrupted = disruption.get("status") == "True"
    content = PodView(
        name=metadata["name"],
        uid=metadata["uid"],
        resource_version=metadata["resourceVersion"],
        child=controller.get("name", ""),
        child_uid=controller.get("uid", ""),
        run=labels.get(names.LABEL_RUN, ""),
        attempt=_parse_number(labels, names.LABEL_ATTEMPT),
        index=_parse_number(labels, names.LABEL_INDEX),
        created_at=_parse_time(metadata.get("creationTimestamp")),
        phase=status.get("phase", ""),
        node=spec.get("nodeName"),
        deleting="deletionTimestamp" in metadata,
        deletion_due=_parse_time(metadata.get("deletionTimestamp")),
        deleted_at=_find_deletion(metadata),
        image=_find_container(spec.get("containers")).get("image", ""),
        node_selector=spec.get("nodeSelector") or {},
        scheduled=placement.get("status") == "True",
        unscheduled_reason=_parse_reason(placement.get("reason")) if is_unscheduled else None,
        unscheduled_message=placement.get("message") if is_unscheduled else None,
        waiting_reason=_parse_reason(waiting.get("reason")),
        waiting_message=waiting.get("message"),
        started_at=_parse_time(started_at),
        finished_at=_parse_time(terminated.get("finishedAt")),
        exit_code=terminated.get("exitCode"),
        termination_reason=terminated.get("reason"),
        termination_message=terminated.get("message"),
        pod_reason=_parse_reason(status.get("reason")),
        pod_message=status.get("message"),
        disruption_reason=(disruption.get("reason") or "DisruptionTarget") if is_disrupted else None,
        disruption_message=disruption.get("message") if is_disrupted else None,
        disrupted_at=_parse_time(disruption.get("lastTransitionTime")) if is_disrupted else None,
    )
    return _build_record(metadata, owner=labels[names.LABEL_JOB], owner_uid=labels.get(names.LABEL_JOB_UID, ""), content=content)


def build_job_view(record: Record[JobContent]) -> JobView:
    """Return the view of a FineTuneJob, with its spec parsed or the reason why it cannot be."""
    spec, error = _parse_spec(FineTuneJobSpec, record.content.spec)
    return JobView(
        namespace=record.namespace,
        name=record.name,
        uid=record.uid,
        generation=record.content.generation,
        resource_version=str(record.version),
        deleting=record.content.deleting,
        spec=spec,
        spec_error=error,
        status=_parse_status(record.content.status),
        queue_labels=record.content.queue_labels,
        topology=record.content.topology,
    )


def _parse_spec(model: type[Spec], spec: bytes) -> tuple[Spec | None, str | None]:
    try:
        return model.model_validate_json(spec), None
    except ValidationError as error:
        return None, "; ".join(_describe(each["loc"], each["msg"]) for each in error.errors(include_url=False))


def _describe(location: tuple[int | str, ...], message: str) -> str:
    return f"{'.'.join(('spec', *map(str, location)))}: {message.removeprefix('Value error, ')}"


def _parse_status(status: bytes) -> FineTuneJobStatus:
    """Return the status; one that cannot be parsed counts as none, as it is derived from the rest anyway."""
    try:
        return FineTuneJobStatus.model_validate_json(status)
    except ValidationError:
        return FineTuneJobStatus()


def _build_record(metadata: RawObject, *, owner: str, owner_uid: str, content: Content) -> Record[Content]:
    namespace = metadata.get("namespace", "")
    return Record(
        namespace=namespace,
        name=metadata["name"],
        uid=metadata["uid"],
        version=int(metadata["resourceVersion"]),
        owner=(namespace, owner),
        owner_uid=owner_uid,
        content=content,
    )


def _read_object(raw: RawObject, field: str) -> RawObject:
    value = raw.get(field)
    return value if isinstance(value, Mapping) else {}


def _read_text(raw: RawObject, field: str) -> str | None:
    value = raw.get(field)
    return value if isinstance(value, str) else None


def _read_time(raw: RawObject, field: str) -> datetime | None:
    try:
        time = datetime.fromisoformat(_read_text(raw, field) or "")
    except ValueError:
        return None
    return time if time.tzinfo else None


def _find_end(status: RawObject) -> tuple[ChildState, RawObject]:
    for state in (ChildState.COMPLETE, ChildState.FAILED):
        condition = _find_condition(status, state.value)
        if condition.get("status") == "True":
            return state, condition
    return ChildState.ACTIVE, {}


def _find_condition(status: RawObject, type: str) -> RawObject:
    conditions = status.get("conditions")
    listed = conditions if isinstance(conditions, list) else ()
    return next((each for each in listed if isinstance(each, Mapping) and each.get("type") == type), {})


def _find_container(containers: list[RawObject] | None) -> RawObject:
    return next((each for each in containers or () if each.get("name") == names.CONTAINER), {})


def _read_nodes(spec: RawObject) -> int | None:
    """Return the number of pods that the trainers of a Job are configured for, or None if nothing tells of it."""
    containers = ((spec.get("template") or {}).get("spec") or {}).get("containers")
    variables = _find_container(containers).get("env") or ()
    config = next((each.get("value") for each in variables if each.get("name") == names.ENV_TRAINER_CONFIG), None)
    try:
        return int(json.loads(config or "")["world"]["nodes"])
    except (KeyError, TypeError, ValueError):
        return None


def _list_controllers(metadata: RawObject) -> Iterator[RawObject]:
    return (each for each in metadata.get("ownerReferences") or () if each.get("controller") and each["kind"] == "Job")


def _find_deletion(metadata: RawObject) -> datetime | None:
    """Return when a deletion was asked for: the deletionTimestamp is when its grace period is over."""
    due = _parse_time(metadata.get("deletionTimestamp"))
    return due - timedelta(seconds=metadata.get("deletionGracePeriodSeconds") or 0) if due else None


def _parse_number(labels: Mapping[str, str], label: str) -> int:
    number = labels.get(label, "")
    return int(number) if number.isdecimal() else 0


def _parse_reason(value: str | None) -> str | None:
    """Return a reason that a condition may have as well: the kubelet's OutOfnvidia.com/gpu may not be one."""
    return re.sub("[^A-Za-z0-9]", "", value) or None if value else None


def _parse_time(value: str | None) -> datetime | None:
    """Return the time; the epoch stands for "never": the kubelet reports it for containers that could not be started."""
    time = datetime.fromisoformat(value) if value else None
    return None if time == datetime(1970, 1, 1, tzinfo=UTC) else time


def _dump(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()

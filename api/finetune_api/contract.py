"""What operator and trainer promise each other: the configuration, the report, and the exit codes.

The operator writes a TrainerConfig into the pod template (one environment variable, JSON), so it is a snapshot by nature.
The trainer answers with TrainerReports, posted while it runs, and once as the container's termination message.
"""

import hashlib
import json
from enum import IntEnum, StrEnum
from pathlib import PurePosixPath
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints
from pydantic.alias_generators import to_camel

from finetune_api import names
from finetune_api.v1alpha1 import (
    CheckpointStatus,
    DatasetFormat,
    FineTuneJobSpec,
    Hyperparameters,
    MethodType,
    OutputStatus,
    Result,
    Task,
    TrainerStatus,
)

# The kubelet keeps this much of a termination message:
# https://kubernetes.io/docs/tasks/debug/debug-application/determine-reason-pod-failure/
MAX_TERMINATION_MESSAGE_BYTES = 4096

# A report may have as many metrics as KEP-2779 allows; so many of them, the steps among them, are kept.
MAX_REPORTED_METRICS = 256
MAX_METRICS = 32
STEP_METRICS = frozenset({"current_step", "total_steps", "currentStep", "totalSteps"})


class ExitCode(IntEnum):
    """Exit codes of the trainer. Every other code is a bug or the machine."""

    COMPLETE = 0
    """The model is published."""
    INTERNAL_ERROR = 1
    """A bug or the machine; the log says more."""
    INVALID_SPEC = 64
    """The spec asks for something that cannot be done."""
    INVALID_DATA = 65
    """The data cannot be learned from: no pictures, one class only, a missing file."""
    DIVERGED = 70
    """The loss became infinite or not a number."""
    PREEMPTED = 75
    """The pod was asked to stop, and what was done so far is saved."""
    PEER_LOST = 76
    """Another trainer process of the job ended; its pod tells why."""
    MODEL_NOT_FOUND = 78
    """The pretrained model is not where the spec says."""


# A retry would meet the same spec, data and model again.
NEVER_RETRIED = frozenset({ExitCode.INVALID_SPEC, ExitCode.INVALID_DATA, ExitCode.MODEL_NOT_FOUND})


class ContractModel(BaseModel):
    """Base of what crosses between the programs: camelCase, immutable, and unknown fields refused (one image pair)."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, frozen=True, extra="forbid", use_attribute_docstrings=True
    )


class DeviceType(StrEnum):
    """What torch computes on."""

    CPU = "cpu"
    CUDA = "cuda"
    XLA = "xla"
    HPU = "hpu"


class Backend(StrEnum):
    """How the processes of a job exchange gradients."""

    GLOO = "gloo"
    NCCL = "nccl"
    XLA = "xla"
    HCCL = "hccl"


class World(ContractModel):
    """The processes of one attempt, and where they meet."""

    nodes: int = 1
    processes_per_node: int = 1
    device: DeviceType | None = None
    """The device that must be there; None takes the best one that is."""
    backend: Backend = Backend.GLOO
    rendezvous_host: str | None = None
    """Host name of the pod with index 0; None when there is one pod."""
    rendezvous_port: int = names.PORT_RENDEZVOUS

    @property
    def size(self) -> int:
        """Return the number of processes."""
        return self.nodes * self.processes_per_node


class TrainerConfig(ContractModel):
    """All that a trainer needs to know: the spec's training fields with every location resolved to a path."""

    namespace: str
    name: str
    uid: str = ""
    """uid of the FineTuneJob; empty without a cluster."""
    generation: int = 0
    """metadata.generation of the FineTuneJob when the attempt began: a run that returns counts its attempts from 1 once more."""
    run: str
    attempt: int
    task: Task
    model_uri: str
    model_path: str | None = None
    """Folder of the mounted model; None for models that the trainer finds itself (timm://)."""
    dataset_uri: str
    dataset_path: str
    dataset_format: DatasetFormat
    validation_fraction: float
    test_fraction: float
    method: MethodType
    hyperparameters: Hyperparameters
    training_seconds: int | None = None
    output_uri: str
    output_path: str
    checkpoint_path: str
    """Folder for checkpoints, or an s3:// URL."""
    checkpoint_interval_seconds: int = 60
    checkpoint_keep: int = 2
    micro_batch_divisor: int = 1
    """Into how many parts each batch is split; more than 1 after an attempt that ran out of memory."""
    grace_seconds: int = 60
    """Time from SIGTERM to SIGKILL."""
    world: World = World()

    @property
    def work_path(self) -> str:
        """Return the folder for features and checkpoints: beside the output, so that it outlives the pod."""
        return str(PurePosixPath(self.output_path) / ".finetune")


class FailureReport(ContractModel):
    """Why the trainer gives up."""

    reason: Annotated[str, StringConstraints(max_length=64, pattern="^[A-Z][A-Za-z0-9]*$")]
    message: Annotated[str, StringConstraints(max_length=1024)]


class TimeLeft(ContractModel):
    """What the trainer of this project knows of its remaining time, and nobody can tell from its steps."""

    after_steps_seconds: Annotated[float, Field(ge=0)] | None = None
    """What comes after the last step: selection, evaluation, publishing."""
    budget_seconds: Annotated[float, Field(ge=0)] | None = None
    """What the budget has left; the run ends with it."""


def keep_most_telling(status: object) -> object:
    """Return a raw trainerStatus with at most as many metrics as the status of a FineTuneJob holds, in their order."""
    if not isinstance(status, dict):
        return status
    metrics = status.get("metrics")
    if not isinstance(metrics, list) or not MAX_METRICS < len(metrics) <= MAX_REPORTED_METRICS:
        return status
    steps = [each for each in metrics if isinstance(each, dict) and each.get("name") in STEP_METRICS][:MAX_METRICS]
    others = [each for each in metrics if each not in steps]
    return {**status, "metrics": [*others[: MAX_METRICS - len(steps)], *steps]}


class TrainerReport(BaseModel):
    """The state of a trainer: progress while it runs, the result or the failure in its last report.

    Unknown fields are ignored, as trainers that are not ours report too.
    """

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, frozen=True, extra="ignore")

    trainer_status: Annotated[TrainerStatus, BeforeValidator(keep_most_telling)]
    time_left: TimeLeft | None = None
    output: OutputStatus | None = None
    result: Result | None = None
    failure: FailureReport | None = None
    checkpoint: CheckpointStatus | None = None
    log_tail: Annotated[str | None, Field(max_length=1024)] = None


def build_trainer_config(
    spec: FineTuneJobSpec,
    *,
    namespace: str,
    name: str,
    attempt: int,
    uid: str = "",
    generation: int = 0,
    micro_batch_divisor: int = 1,
    grace_seconds: int = 60,
    training_seconds: int | None = None,
    world: World | None = None,
    dataset_path: str | None = None,
    output_path: str | None = None,
) -> TrainerConfig:
    """Return the configuration of one attempt, with `pvc://` URIs resolved to mount paths unless paths are given.

    `training_seconds` is the budget of a spec that gives none.
    """
    output_path = output_path or resolve_mount(spec.output.uri, mount=names.OUTPUT_MOUNT)
    return TrainerConfig(
        namespace=namespace,
        name=name,
        uid=uid,
        generation=generation,
        run=compute_run(spec),
        attempt=attempt,
        task=spec.task,
        model_uri=spec.model.uri,
        model_path=resolve_mount(spec.model.uri, mount=names.MODEL_MOUNT) if claim_of(spec.model.uri) else None,
        dataset_uri=spec.dataset.uri,
        dataset_path=dataset_path or resolve_mount(spec.dataset.uri, mount=names.DATASET_MOUNT),
        dataset_format=spec.dataset.format,
        validation_fraction=spec.dataset.validation_fraction,
        test_fraction=spec.dataset.test_fraction,
        method=spec.method.type,
        hyperparameters=spec.hyperparameters,
        training_seconds=spec.budget.training_seconds or training_seconds,
        output_uri=spec.output.uri,
        output_path=output_path,
        checkpoint_path=_resolve_checkpoints(spec.checkpoint.uri, output_path=output_path),
        checkpoint_interval_seconds=spec.checkpoint.interval_seconds,
        checkpoint_keep=spec.checkpoint.keep,
        micro_batch_divisor=micro_batch_divisor,
        grace_seconds=grace_seconds,
        world=world or World(),
    )


def _resolve_checkpoints(uri: str | None, *, output_path: str) -> str:
    """Return where checkpoints go: the mounted claim, the URL of the object store, or a folder beside the output."""
    if uri is None:
        return str(PurePosixPath(output_path) / ".finetune" / "checkpoints")
    return resolve_mount(uri, mount=names.CHECKPOINT_MOUNT) if claim_of(uri) else uri


def claim_of(uri: str) -> str | None:
    """Return the claim that a `pvc://CLAIM/PATH` URI names, or None for other schemes."""
    scheme, _, rest = uri.partition("://")
    return rest.split("/", 1)[0] if scheme == "pvc" else None


def resolve_mount(uri: str, *, mount: str) -> str:
    """Return the path that a `pvc://CLAIM/PATH` URI has when its claim is mounted at `mount`."""
    _, _, path = uri.removeprefix("pvc://").partition("/")
    return str(PurePosixPath(mount) / path)


def compute_run(spec: FineTuneJobSpec) -> str:
    """Return the run: 8 hexadecimal digits of the hash of the fields that shape the training and its result.

    Defaults stay out of the hash, so that a field added in a later version of the API starts no new runs.
    """
    return _digest(spec.model_dump(mode="json", by_alias=True, exclude_defaults=True, exclude=_NOT_OF_THE_RUN))


_NOT_OF_THE_RUN = {"suspend", "run_policy", "resources", "checkpoint", "profile_ref", "accelerator", "nodes", "managed_by"}


def compute_pod_shape(spec: FineTuneJobSpec) -> str:
    """Return 8 hexadecimal digits of the hash of what the pods request; a change of it replaces the attempt, not the run.

    Defaults other than those of the resources stay out of the hash, as in a run's.
    """
    shape = spec.resources.model_dump(mode="json", by_alias=True)
    shape |= spec.model_dump(mode="json", by_alias=True, exclude_defaults=True, include={"profile_ref", "accelerator"})
    return _digest(shape if spec.num_nodes == 1 else shape | {"nodes": spec.num_nodes})


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]

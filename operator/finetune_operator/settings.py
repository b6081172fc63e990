"""Settings of the operator: the only reader of the environment."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from finetune_api import names
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from finetune_operator.accelerator_classes import AcceleratorClasses
from finetune_operator.lease import MAX_LEASE_SECONDS

_PREFIX = "FINETUNE_"


class Settings(BaseModel):
    """All settings. Each is the environment variable FINETUNE_ and its name in capitals; charts/ sets them from values."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    trainer_image: str
    """Image of the trainer pods."""
    trainer_image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """When the kubelet pulls that image."""
    trainer_termination_grace_seconds: Annotated[int, Field(ge=1)] = 60
    """How long a trainer may take to save and leave after SIGTERM."""

    accelerators: Annotated[AcceleratorClasses, Field(default_factory=dict)]
    """Accelerator classes by name, as a JSON object: docs/accelerators/add-a-class.md. None leaves the CPU."""

    namespaces: tuple[str, ...] = ()
    """Namespaces to watch, separated by commas. None means all of them."""

    report_url: str
    """Base URL at which trainer pods reach the report receiver, such as https://finetune-operator.finetune.svc:10443."""
    report_ca_file: Path
    """File with the CA certificate (PEM) that trainer pods shall trust."""
    tls_certificate_file: Path
    """File with the receiver's certificate chain (PEM)."""
    tls_key_file: Path
    """File with the receiver's private key (PEM)."""
    bind_address: str = "0.0.0.0"  # noqa: S104  a server in a pod listens on the pod's address
    """Address that the servers listen on."""
    report_port: int = names.PORT_REPORTS
    """Port of the report receiver (HTTPS)."""
    metrics_port: int = names.PORT_METRICS
    """Port of /metrics (HTTP)."""
    health_port: int = names.PORT_HEALTH
    """Port of /healthz and /readyz (HTTP)."""

    leader_election: bool = True
    """Whether replicas elect the one that writes, by a Lease. Without it there must never be two operators."""
    lease_namespace: str = ""
    """Namespace of the Lease: the operator's own."""
    lease_name: str = "finetune-operator"
    """Name of the Lease."""
    lease_seconds: Annotated[int, Field(ge=2, le=MAX_LEASE_SECONDS)] = 15
    """How long a Lease must stay unchanged until another replica takes it over."""
    renew_seconds: Annotated[float, Field(gt=0)] = 10
    """How long after its last renewal of the Lease the leader still writes; then it ends and begins anew."""
    lease_retry_seconds: Annotated[float, Field(gt=0)] = 2
    """Time between two renewals of the Lease, and between two looks at it."""
    pod_ip: str = ""
    """Address at which other replicas reach this one, to hand on reports. Empty means bind_address."""

    workers: Annotated[int, Field(ge=1, le=256)] = 16
    """Reconciles in flight."""
    api_requests_per_second: Annotated[float, Field(gt=0)] = 500
    """Rate of requests to the API server that the operator does not exceed."""
    api_burst: Annotated[int, Field(ge=1)] = 500
    """Requests above that rate that are allowed at once."""
    api_connections: Annotated[int, Field(ge=1)] = 64
    """Requests to the API server in flight."""
    audit_seconds: Annotated[float, Field(gt=0)] = 300
    """Time between two comparisons of what was seen with what the API server has."""
    deaf_seconds: Annotated[float, Field(gt=0)] = 60
    """How long a change that such a comparison knows of may take to arrive by a watch, before the process ends to start anew."""

    retry_base_seconds: Annotated[float, Field(gt=0)] = 10
    """Delay before the first retry of a failed attempt. Each further retry waits twice as long; every job up to half longer by
    a share of its own, so that those which failed together do not come back together."""
    retry_limit_seconds: Annotated[float, Field(gt=0)] = 360
    """Longest delay before a retry, without that share."""
    progress_seconds: Annotated[float, Field(gt=0)] = 10
    """Usual time between two status writes of one FineTuneJob that only carry progress: the next report after it is written as it
    comes, or an earlier one after half as long again when no other has come."""
    progress_writes_per_second: Annotated[float, Field(gt=0)] = 100
    """Rate of status writes that only carry progress, over all FineTuneJobs. Beyond it they wait their turn."""
    evidence_seconds: Annotated[float, Field(gt=0)] = 10
    """How long to wait for the pod of a finished Job to show how it ended."""

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Lowest level that is logged."""
    log_format: Literal["text", "json"] = "text"
    """Format of the log."""

    @field_validator("accelerators", mode="before")
    @classmethod
    def _parse_json(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value)
        except ValueError as error:
            raise ValueError(f"this is no JSON: {error}") from error

    @model_validator(mode="after")
    def _check_lease(self) -> Self:
        if self.leader_election and not self.lease_namespace:
            raise ValueError("leader election needs FINETUNE_LEASE_NAMESPACE; or set FINETUNE_LEADER_ELECTION to false")
        if not self.lease_seconds > self.renew_seconds > self.lease_retry_seconds:
            raise ValueError("lease_seconds must be more than renew_seconds, and that more than lease_retry_seconds")
        return self

    @field_validator("namespaces", mode="before")
    @classmethod
    def _split_at_commas(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


class TrainerSettings(BaseModel):
    """The settings that shape decisions and manifests, with files already read."""

    model_config = ConfigDict(frozen=True)

    image: str
    image_pull_policy: str = "IfNotPresent"
    termination_grace_seconds: int = 60
    report_url: str
    report_ca: str
    """The CA certificate itself (PEM)."""
    accelerators: Annotated[AcceleratorClasses, Field(default_factory=dict)]
    retry_base_seconds: float = 10
    retry_limit_seconds: float = 360
    progress_seconds: float = 10
    evidence_seconds: float = 10


def load_settings(environment: Mapping[str, str] | None = None) -> Settings:
    """Return the settings from the environment. Raises pydantic.ValidationError that names each wrong or missing one."""
    source = os.environ if environment is None else environment  # noqa: TID251  this is the one reader
    values = {key.removeprefix(_PREFIX).lower(): value for key, value in source.items() if key.startswith(_PREFIX)}
    return Settings.model_validate({name: value for name, value in values.items() if name in Settings.model_fields})


def load_trainer_settings(settings: Settings) -> TrainerSettings:
    """Return the settings for decisions and manifests, with the CA certificate read from its file."""
    return TrainerSettings(
        image=settings.trainer_image,
        image_pull_policy=settings.trainer_image_pull_policy,
        termination_grace_seconds=settings.trainer_termination_grace_seconds,
        report_url=settings.report_url.rstrip("/"),
        report_ca=settings.report_ca_file.read_text(encoding="ascii"),
        accelerators=settings.accelerators,
        retry_base_seconds=settings.retry_base_seconds,
        retry_limit_seconds=settings.retry_limit_seconds,
        progress_seconds=settings.progress_seconds,
        evidence_seconds=settings.evidence_seconds,
    )

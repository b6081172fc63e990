"""FineTuneProfile `finetune.dev/v1alpha1`, cluster-scoped: what an administrator gives to, and asks of, FineTuneJobs."""

from enum import StrEnum
from typing import Annotated, Self

from pydantic import AfterValidator, ConfigDict, Field, StringConstraints, model_validator

from finetune_api.accelerator import MEMBERS, Accelerator
from finetune_api.base import ApiModel, ObjectName, Pattern, rules

_ENV_NAME = Pattern(
    "[A-Za-z_][A-Za-z0-9_]*", message="name must be that of an environment variable: letters, digits and '_', no digit first"
)
_PRICE = Pattern(
    "[0-9]{1,6}([.][0-9]{1,4})?", message="pricePerAcceleratorHour must be a decimal number with at most 4 places, such as 2.49"
)
Price = Annotated[
    str, StringConstraints(max_length=12), AfterValidator(_PRICE.validate), Field(json_schema_extra=_PRICE.build_rule())
]
_VOLUME_NAME = Pattern("[a-z0-9]([-a-z0-9]*[a-z0-9])?", message="name must be lower-case letters, digits and '-'")
_MOUNT_PATH = Pattern("/[A-Za-z0-9._/-]+", message="mountPath must be an absolute path, such as /mnt/shared")
# Paths and variables that the operator itself fills in.
_RESERVED_MOUNTS = (
    "/mnt/dataset", "/mnt/model", "/mnt/output", "/mnt/checkpoint", "/var/run/finetune", "/tmp", "/dev", "/proc", "/sys",  # noqa: S108
)  # fmt: skip
_RESERVED_VARIABLES = ("FINETUNE_", "KUBEFLOW_", "PET_", "MASTER_", "JOB_COMPLETION_INDEX")
_MOUNT = (
    "!" + str(list(_RESERVED_MOUNTS)) + ".exists(p, self.mountPath == p || self.mountPath.startsWith(p + '/'))",
    f"mountPath is one of the trainer's own: {', '.join(_RESERVED_MOUNTS)}",
)
_VARIABLE = (
    "!" + str(list(_RESERVED_VARIABLES)) + ".exists(p, self.name.startsWith(p))",
    f"name begins like a variable of the operator's own: {', '.join(_RESERVED_VARIABLES)}",
)
_SOURCE = ("has(self.claimName) != has(self.configMapName)", "give either claimName or configMapName")

_MOUNTED_ONCE = (
    "!has(self.volumes) || self.volumes.all(v, self.volumes.exists_one(w, w.mountPath == v.mountPath))",
    "two volumes have the same mountPath",
)
# As the API server checks the tolerations of a pod, so that no pod is refused for those of its profile.
_KEYLESS = (
    "has(self.key) || (has(self.operator) && self.operator == 'Exists')",
    "a toleration without a key tolerates all taints; give it the operator Exists, or a key",
)
_VALUELESS = (
    "!has(self.value) || !has(self.operator) || self.operator == 'Equal'",
    "a toleration with the operator Exists has no value; remove it, or give the operator Equal",
)
_LIMITED = (
    "!has(self.tolerationSeconds) || (has(self.effect) && self.effect == 'NoExecute')",
    "tolerationSeconds needs the effect NoExecute",
)

LabelText = Annotated[str, StringConstraints(max_length=63)]
LabelKey = Annotated[str, StringConstraints(max_length=317)]


class TolerationOperator(StrEnum):
    """How a toleration compares with a taint."""

    EXISTS = "Exists"
    EQUAL = "Equal"


class TaintEffect(StrEnum):
    """What a taint does to pods that do not tolerate it."""

    NO_SCHEDULE = "NoSchedule"
    PREFER_NO_SCHEDULE = "PreferNoSchedule"
    NO_EXECUTE = "NoExecute"


class Toleration(ApiModel):
    """A taint that the pods tolerate, as in a pod's spec."""

    model_config = ConfigDict(json_schema_extra=rules(_KEYLESS, _VALUELESS, _LIMITED))

    key: LabelKey | None = None
    """key is the taint's key. Default: all, with operator Exists."""
    operator: TolerationOperator = TolerationOperator.EQUAL
    """operator is `Exists` or `Equal`."""
    value: LabelText | None = None
    """value is the taint's value, for operator Equal."""
    effect: TaintEffect | None = None
    """effect is the taint's effect. Default: all."""
    toleration_seconds: Annotated[int, Field(ge=0)] | None = None
    """tolerationSeconds is for how long a taint with the effect NoExecute is tolerated. Default: for ever."""

    @model_validator(mode="after")
    def _be_one_that_a_pod_may_have(self) -> Self:
        if self.key is None and self.operator is not TolerationOperator.EXISTS:
            raise ValueError(_KEYLESS[1])
        if self.value is not None and self.operator is TolerationOperator.EXISTS:
            raise ValueError(_VALUELESS[1])
        if self.toleration_seconds is not None and self.effect is not TaintEffect.NO_EXECUTE:
            raise ValueError(_LIMITED[1])
        return self


class ProfileVolume(ApiModel):
    """A volume for every trainer pod."""

    model_config = ConfigDict(json_schema_extra=rules(_SOURCE, _MOUNT))

    name: Annotated[
        str,
        StringConstraints(max_length=40),
        AfterValidator(_VOLUME_NAME.validate),
        Field(json_schema_extra=_VOLUME_NAME.build_rule()),
    ]
    """name identifies the volume in the profile."""
    mount_path: Annotated[
        str,
        StringConstraints(max_length=255),
        AfterValidator(_MOUNT_PATH.validate),
        Field(json_schema_extra=_MOUNT_PATH.build_rule()),
    ]
    """mountPath is where it appears in the trainer's container."""
    claim_name: ObjectName | None = None
    """claimName names a PersistentVolumeClaim in the namespace of each FineTuneJob."""
    config_map_name: ObjectName | None = None
    """configMapName names a ConfigMap in the namespace of each FineTuneJob."""
    read_only: bool = True
    """readOnly says whether the trainer may only read it."""

    @model_validator(mode="after")
    def _have_one_source_and_a_free_path(self) -> Self:
        if (self.claim_name is None) == (self.config_map_name is None):
            raise ValueError(_SOURCE[1])
        if any(f"{self.mount_path}/".startswith(f"{path}/") for path in _RESERVED_MOUNTS):
            raise ValueError(_MOUNT[1])
        return self


class EnvironmentVariable(ApiModel):
    """An environment variable of the trainer."""

    model_config = ConfigDict(json_schema_extra=rules(_VARIABLE))

    name: Annotated[
        str,
        StringConstraints(max_length=128),
        AfterValidator(_ENV_NAME.validate),
        Field(json_schema_extra=_ENV_NAME.build_rule()),
    ]
    """name is the name of the variable."""
    value: Annotated[str, StringConstraints(max_length=1024)]
    """value is its value. Everybody who may read profiles or pods can read it."""

    @model_validator(mode="after")
    def _leave_the_operators_own(self) -> Self:
        if self.name.startswith(_RESERVED_VARIABLES):
            raise ValueError(_VARIABLE[1])
        return self


class AcceleratorKind(StrEnum):
    """Members of spec.accelerator."""

    CPU = "cpu"
    NVIDIA = "nvidia"
    AMD = "amd"
    GAUDI = "gaudi"
    NEURON = "neuron"
    TPU = "tpu"
    DEVICE_CLASS = "deviceClass"
    CUSTOM = "custom"


assert set(MEMBERS) | {"cpu"} == {kind.value for kind in AcceleratorKind}, "a member of the accelerator has no kind"


class Limits(ApiModel):
    """What a job with this profile may ask for."""

    accelerators: Annotated[
        tuple[AcceleratorKind, ...], Field(max_length=8, json_schema_extra={"x-kubernetes-list-type": "set"})
    ] = ()
    """accelerators are the kinds that are allowed. Default: all."""
    max_accelerators: Annotated[int, Field(ge=0, le=100_000)] | None = None
    """maxAccelerators is the largest number of accelerators of a job, over all its pods."""
    max_nodes: Annotated[int, Field(ge=1, le=1024)] | None = None
    """maxNodes is the largest number of pods of a job."""


class ProfileScheme(StrEnum):
    """Schemes of URIs in a FineTuneJob."""

    PVC = "pvc"
    S3 = "s3"
    TIMM = "timm"


class ProfileBudget(ApiModel):
    """The budget of jobs that give none."""

    training_seconds: Annotated[int, Field(ge=10, le=31_536_000)] | None = None
    """trainingSeconds is the budget of a job that gives none, as in a FineTuneJob. A run keeps the one that it began with."""


class FineTuneProfileSpec(ApiModel):
    """What the jobs with this profile get, and what they may ask for."""

    model_config = ConfigDict(json_schema_extra=rules(_MOUNTED_ONCE))

    is_default: bool = False
    """isDefault, when true, makes this the profile of jobs without a profileRef. Of several, the first by name is taken."""
    image: Annotated[str, StringConstraints(max_length=512)] | None = None
    """image is the trainer's image. Default: the operator's setting."""
    accelerator: Accelerator = Accelerator()
    """accelerator is what jobs compute on that name no accelerator of their own."""
    limits: Limits = Limits()
    """limits are what a job may ask for. A job beyond them is shown as ProfileViolated and gets no pods."""
    node_selector: Annotated[dict[LabelKey, LabelText], Field(max_length=16, default_factory=dict)]
    """nodeSelector are labels that the pods' nodes must have."""
    tolerations: Annotated[
        tuple[Toleration, ...], Field(max_length=16, json_schema_extra={"x-kubernetes-list-type": "atomic"})
    ] = ()
    """tolerations are taints that the pods tolerate."""
    priority_class_name: ObjectName | None = None
    """priorityClassName is the priority class of the pods."""
    volumes: Annotated[
        tuple[ProfileVolume, ...],
        Field(max_length=8, json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]}),
    ] = ()
    """volumes are mounted into every trainer's container."""
    environment: Annotated[
        tuple[EnvironmentVariable, ...],
        Field(max_length=32, json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]}),
    ] = ()
    """environment are environment variables of every trainer's container."""
    allowed_uri_schemes: Annotated[
        tuple[ProfileScheme, ...], Field(max_length=8, json_schema_extra={"x-kubernetes-list-type": "set"})
    ] = ()
    """allowedUriSchemes are the schemes that a job's URIs may have. Default: all."""
    budget: ProfileBudget = ProfileBudget()
    """budget is for jobs that give none."""
    price_per_accelerator_hour: Price | None = None
    """pricePerAcceleratorHour is what an accelerator costs in an hour, in a currency of your choice; status.usage.cost follows
    from it."""

    @model_validator(mode="after")
    def _mount_each_path_once(self) -> Self:
        if len({volume.mount_path for volume in self.volumes}) < len(self.volumes):
            raise ValueError(_MOUNTED_ONCE[1])
        return self


class FineTuneProfile(ApiModel):
    """A FineTuneProfile holds an administrator's defaults and limits for FineTuneJobs."""

    spec: FineTuneProfileSpec = FineTuneProfileSpec()
    """spec is what jobs with this profile get, and what they may ask for."""

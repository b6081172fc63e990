"""What a trainer pod computes on: one block of the spec for every kind of accelerator, and the shapes of TPU slices.

What a member needs of a node (resource names, labels, taints) is not here but in the operator's accelerator classes, which the
chart's values hold.
"""

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Self

from pydantic import AfterValidator, ConfigDict, Field, StringConstraints, model_validator

from finetune_api.base import ApiModel, ObjectName, Pattern, rules

_PRODUCT = Pattern(
    "[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?",
    message="product must be the value of the node label that names the product, such as NVIDIA-H100-80GB-HBM3",
)
_MIG_PROFILE = Pattern(
    "[1-7]g[.][1-9][0-9]{0,2}gb([.]me)?",
    message="profile must be a MIG profile as in the resource's name, such as 1g.10gb or 1g.10gb.me",
)
Product = Annotated[
    str, StringConstraints(max_length=63), AfterValidator(_PRODUCT.validate), Field(json_schema_extra=_PRODUCT.build_rule())
]
MigProfile = Annotated[
    str,
    StringConstraints(max_length=16),
    AfterValidator(_MIG_PROFILE.validate),
    Field(json_schema_extra=_MIG_PROFILE.build_rule()),
]
Count = Annotated[int, Field(ge=1, le=64)]


class Mig(ApiModel):
    """Slices of an NVIDIA GPU that is partitioned by Multi-Instance GPU."""

    profile: MigProfile
    """profile is the size of a slice, such as `1g.10gb`: the pod requests `nvidia.com/mig-1g.10gb`."""
    count: Count = 1
    """count is the number of slices in each pod. Each has a process of its own."""


_NVIDIA = ("has(self.count) != has(self.mig)", "give either count, the number of whole GPUs, or mig, slices of a GPU")


class NvidiaGpu(ApiModel):
    """NVIDIA GPUs, or slices of them."""

    model_config = ConfigDict(json_schema_extra=rules(_NVIDIA))

    count: Count | None = None
    """count is the number of whole GPUs in each pod. Each has a process of its own."""
    product: Product | None = None
    """product is the kind of GPU, as in the node label nvidia.com/gpu.product. Default: any."""
    mig: Mig | None = None
    """mig asks for slices instead of whole GPUs."""

    @model_validator(mode="after")
    def _be_whole_or_sliced(self) -> Self:
        if (self.count is None) == (self.mig is None):
            raise ValueError(_NVIDIA[1])
        return self


class AmdGpu(ApiModel):
    """AMD GPUs."""

    count: Count = 1
    """count is the number of GPUs in each pod. Each has a process of its own."""
    product: Product | None = None
    """product is the kind of GPU, as in the node label amd.com/gpu.product-name. Default: any."""


class Gaudi(ApiModel):
    """Intel Gaudi accelerators."""

    count: Count = 1
    """count is the number of accelerators in each pod. Each has a process of its own."""


_NEURON = ("has(self.devices) != has(self.cores)", "give either devices, whole Neuron devices, or cores, single NeuronCores")


class Neuron(ApiModel):
    """AWS Trainium or Inferentia."""

    model_config = ConfigDict(json_schema_extra=rules(_NEURON))

    devices: Count | None = None
    """devices is the number of whole Neuron devices in each pod. Each of their cores has a process of its own."""
    cores: Annotated[int, Field(ge=1, le=256)] | None = None
    """cores is the number of single NeuronCores in each pod. Each has a process of its own."""

    @model_validator(mode="after")
    def _be_devices_or_cores(self) -> Self:
        if (self.devices is None) == (self.cores is None):
            raise ValueError(_NEURON[1])
        return self


class TpuType(StrEnum):
    """Kinds of TPU slices: values of the node label cloud.google.com/gke-tpu-accelerator."""

    V4 = "tpu-v4-podslice"
    V5E = "tpu-v5-lite-podslice"
    V5P = "tpu-v5p-slice"
    V6E = "tpu-v6e-slice"


@dataclass(frozen=True)
class TpuShape:
    """The slices that a kind of TPU comes in."""

    topologies: tuple[str, ...]
    """The topologies by name. Larger ones of three dimensions are multiples of 4 in ascending order, up to `max_chips`."""
    max_chips: int
    is_cube: bool
    """Whether topologies have three dimensions."""

    def list_hosts(self, topology: str) -> tuple[int, ...]:
        """Return the numbers of hosts that a topology may have, the fewest first; () if there is no such topology.

        A host has 4 chips, but for slices of one host of v5e and v6e, which have 1, 4 or 8.
        """
        if not self._has(topology):
            return ()
        chips = count_chips(topology)
        if chips < 4:
            return (1,)
        return (1, 2) if chips == 8 and not self.is_cube else (chips // 4,)

    def _has(self, topology: str) -> bool:
        if topology in self.topologies:
            return True
        sides = [int(side) for side in topology.split("x")]
        is_regular = sides == sorted(sides) and all(side % 4 == 0 for side in sides)
        return self.is_cube and len(sides) == 3 and is_regular and math.prod(sides) <= self.max_chips

    def describe(self) -> str:
        """Return the topologies in words."""
        larger = f", or AxBxC of multiples of 4 with A <= B <= C and at most {self.max_chips} chips" if self.is_cube else ""
        return ", ".join(self.topologies) + larger


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
# https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus
TPU_SHAPES = {
    TpuType.V4: TpuShape(_CUBE, 4096, is_cube=True),
    TpuType.V5E: TpuShape(_FLAT, 256, is_cube=False),
    TpuType.V5P: TpuShape(_CUBE, 6144, is_cube=True),
    TpuType.V6E: TpuShape(_FLAT, 256, is_cube=False),
}


def count_chips(topology: str) -> int:
    """Return the number of chips of a topology such as 4x4."""
    return math.prod(int(side) for side in topology.split("x"))


_TOPOLOGY = Pattern(
    "[1-9][0-9]{0,2}x[1-9][0-9]{0,2}(x[1-9][0-9]{0,2})?",
    message="topology must be the sides of the slice, such as 2x4 or 2x2x4",
)
Topology = Annotated[
    str,
    StringConstraints(max_length=11),
    AfterValidator(_TOPOLOGY.validate),
    Field(json_schema_extra=_TOPOLOGY.build_rule()),
]


def _build_topology_rule(kind: TpuType, shape: TpuShape) -> tuple[str, str]:
    """Return the CEL rule that a topology exists for a kind of TPU."""
    named = f"self.topology in {list(shape.topologies)}".replace('"', "'")
    sides = "self.topology.split('x')"
    larger = (
        f"{sides}.size() == 3 && {sides}.all(s, int(s) % 4 == 0) && int({sides}[0]) <= int({sides}[1]) && "
        f"int({sides}[1]) <= int({sides}[2]) && int({sides}[0]) * int({sides}[1]) * int({sides}[2]) <= {shape.max_chips}"
    )
    exists = f"{named} || ({larger})" if shape.is_cube else named
    return f"self.type != '{kind.value}' || {exists}", _describe_topologies(kind, shape)


def _describe_topologies(kind: TpuType, shape: TpuShape) -> str:
    return f"topology of type {kind.value} must be one of {shape.describe()}"


class Tpu(ApiModel):
    """A slice of Google TPUs. All hosts of the slice run one pod each, which has all chips of its host."""

    model_config = ConfigDict(json_schema_extra=rules(*(_build_topology_rule(*each) for each in TPU_SHAPES.items())))

    type: TpuType
    """type is the kind of TPU, as in the node label cloud.google.com/gke-tpu-accelerator."""
    topology: Topology
    """topology is the shape of the slice, such as `2x4` or `2x2x4`. It decides on the number of hosts."""

    @model_validator(mode="after")
    def _exist(self) -> Self:
        shape = TPU_SHAPES[self.type]
        if not shape.list_hosts(self.topology):
            raise ValueError(_describe_topologies(self.type, shape))
        return self

    @property
    def hosts(self) -> tuple[int, ...]:
        """Return the numbers of hosts that the slice may have, the fewest first."""
        return TPU_SHAPES[self.type].list_hosts(self.topology)


class DeviceClass(ApiModel):
    """Devices by Dynamic Resource Allocation: the pods get a ResourceClaimTemplate of resource.k8s.io/v1."""

    name: ObjectName
    """name is the name of the cluster's DeviceClass, such as gpu.nvidia.com."""
    count: Count = 1
    """count is the number of devices in each pod. Each has a process of its own."""


class CustomAccelerator(ApiModel):
    """Accelerators of a class that the cluster's administrator has added to the operator."""

    class_name: ObjectName
    """className is the name of the accelerator class in the operator's settings."""
    count: Count = 1
    """count is the number of accelerators in each pod."""


MEMBERS = ("nvidia", "amd", "gaudi", "neuron", "tpu", "deviceClass", "custom")
_ONE = (
    "[" + ", ".join(f"has(self.{name})" for name in MEMBERS) + "].filter(is_set, is_set).size() <= 1",
    f"accelerator has more than one of {', '.join(MEMBERS)}; give one, or none for CPU",
)


class Accelerator(ApiModel):
    """What each trainer pod computes on: one member, or none for CPU."""

    model_config = ConfigDict(json_schema_extra=rules(_ONE))

    nvidia: NvidiaGpu | None = None
    """nvidia asks for NVIDIA GPUs, or for MIG slices of them."""
    amd: AmdGpu | None = None
    """amd asks for AMD GPUs."""
    gaudi: Gaudi | None = None
    """gaudi asks for Intel Gaudi accelerators."""
    neuron: Neuron | None = None
    """neuron asks for AWS Trainium or Inferentia."""
    tpu: Tpu | None = None
    """tpu asks for a slice of Google TPUs."""
    device_class: DeviceClass | None = None
    """deviceClass asks for devices by Dynamic Resource Allocation."""
    custom: CustomAccelerator | None = None
    """custom asks for accelerators of a class that the cluster's administrator has added."""

    @model_validator(mode="after")
    def _have_one_member(self) -> Self:
        if len(self.model_dump(exclude_none=True)) > 1:
            raise ValueError(_ONE[1])
        return self

    @property
    def is_none(self) -> bool:
        """Return whether the pods compute on their CPU."""
        return not self.model_dump(exclude_none=True)

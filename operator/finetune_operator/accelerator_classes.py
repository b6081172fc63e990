"""Accelerator classes: what a kind of accelerator needs of pods and nodes, as data that an administrator may change.

The chart's value `accelerators` holds them, those of the members of spec.accelerator included.
"""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Self

from finetune_api.base import ObjectName
from finetune_api.contract import Backend, DeviceType
from finetune_api.profile import EnvironmentVariable, Toleration
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel

PARAMETERS = frozenset({"product", "profile", "type", "topology"})
"""Fields of spec.accelerator that a class may refer to, in braces."""

_TAKEN_VARIABLES = frozenset({"HOME"})
_TAKEN_RESOURCES = frozenset({"cpu", "memory"})
_PLACEHOLDER = re.compile(r"{([^{}]*)}")


def _check_placeholders(text: str) -> str:
    unknown = set(_PLACEHOLDER.findall(text)) - PARAMETERS
    if unknown:
        raise ValueError(f"{{{min(unknown)}}} is unknown; what may stand in braces: {', '.join(sorted(PARAMETERS))}")
    return text


def _check_environment(environment: dict[str, str]) -> dict[str, str]:
    for name, value in environment.items():
        EnvironmentVariable(name=name, value=value)
    if taken := _TAKEN_VARIABLES & set(environment):
        raise ValueError(f"{min(taken)} is set by the operator")
    return environment


def _check_resources(resources: dict[str, str]) -> dict[str, str]:
    if taken := _TAKEN_RESOURCES & set(resources):
        raise ValueError(f"{min(taken)} is for the job to say, in spec.resources")
    return resources


Template = Annotated[str, Field(min_length=1), AfterValidator(_check_placeholders)]


class ClassToleration(Toleration):
    """A taint that the pods of a class tolerate."""

    model_config = ConfigDict(extra="forbid")


class AcceleratorClass(BaseModel):
    """What one kind of accelerator needs. The settings hold it in camelCase."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, frozen=True, extra="forbid", use_attribute_docstrings=True
    )

    resource: Template | None = None
    """Extended resource of which the pod requests one for each accelerator."""
    device_class: ObjectName | None = None
    """DeviceClass of Dynamic Resource Allocation, instead of an extended resource."""
    processes_per_accelerator: Annotated[int, Field(ge=1, le=64)] = 1
    """Trainer processes for each accelerator, such as the cores of a Neuron device."""
    device: DeviceType
    """What torch computes on."""
    backend: Backend
    """How the processes exchange gradients."""
    node_selector: dict[str, Template] = Field(default_factory=dict)
    """Labels that the nodes must have. One that refers to a field that the job leaves out is left out."""
    tolerations: tuple[ClassToleration, ...] = ()
    """Taints that the pods tolerate."""
    extra_resources: Annotated[dict[str, str], AfterValidator(_check_resources)] = Field(default_factory=dict)
    """Further resources of each pod, such as huge pages."""
    environment: Annotated[dict[str, str], AfterValidator(_check_environment)] = Field(default_factory=dict)
    """Environment variables of the trainer."""

    @model_validator(mode="after")
    def _have_one_way_to_allocate(self) -> Self:
        if (self.resource is None) == (self.device_class is None):
            raise ValueError("give either resource or deviceClass")
        return self

    def fill_resource(self, parameters: Mapping[str, str]) -> str | None:
        """Return the extended resource's name; None if there is none, or it refers to a field that is not given."""
        return _fill(self.resource, parameters) if self.resource else None

    def fill_node_selector(self, parameters: Mapping[str, str]) -> dict[str, str]:
        """Return the node labels, without those that refer to a field that is not given."""
        filled = {label: _fill(value, parameters) for label, value in self.node_selector.items()}
        return {label: value for label, value in filled.items() if value is not None}


def _fill(template: str, parameters: Mapping[str, str]) -> str | None:
    if not set(_PLACEHOLDER.findall(template)) <= set(parameters):
        return None
    return _PLACEHOLDER.sub(lambda match: parameters[match[1]], template)


def _check_device_classes(classes: dict[str, AcceleratorClass]) -> dict[str, AcceleratorClass]:
    counts = Counter(each.device_class for each in classes.values() if each.device_class)
    for name, count in counts.items():
        if count > 1:
            raise ValueError(f"{count} classes have the deviceClass {name}; give it to one")
    return classes


AcceleratorClasses = Annotated[dict[ObjectName, AcceleratorClass], AfterValidator(_check_device_classes)]

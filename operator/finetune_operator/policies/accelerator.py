"""What one block of the spec means for the pods (pure): how many, on which nodes, with what, and how many processes in each.

The accelerator classes are the table; this module reads it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from finetune_api.accelerator import Neuron, NvidiaGpu, Tpu, count_chips
from finetune_api.contract import Backend, DeviceType, World
from finetune_api.v1alpha1 import FineTuneJobSpec

from finetune_operator.accelerator_classes import AcceleratorClass

CLASS_NOT_FOUND = "AcceleratorClassNotFound"

_MI = 2**20
_UNITS = {"Mi": _MI, "Gi": 2**30, "Ti": 2**40, "M": 10**6, "G": 10**9, "T": 10**12}
# NCCL and its like exchange data between the processes of a pod through /dev/shm, and 64 MiB are too few for them. This is the
# size that NVIDIA advises: https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/troubleshooting.html
_SHARED_MI_PER_PROCESS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRequest:
    """Devices that each pod claims by Dynamic Resource Allocation."""

    device_class: str
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PodShape:
    """The pods of an attempt, as far as the accelerator decides on them."""

    nodes: int
    processes_per_node: int
    device: DeviceType
    backend: Backend
    accelerators: int = 0
    """Number of accelerators in each pod."""
    resources: Mapping[str, str] = field(default_factory=dict)
    """Resources by name, beside cpu and memory."""
    devices: DeviceRequest | None = None
    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[Mapping[str, object], ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    shared_memory: str | None = None
    """Size of /dev/shm; None leaves the container runtime's 64 MiB."""

    def build_world(self, *, rendezvous_host: str | None) -> World:
        """Return what the trainers need to know of it."""
        return World(
            nodes=self.nodes,
            processes_per_node=self.processes_per_node,
            device=self.device,
            backend=self.backend,
            rendezvous_host=rendezvous_host,
        )


def shape_pods(spec: FineTuneJobSpec, classes: Mapping[str, AcceleratorClass]) -> PodShape:
    """Return the shape of the pods. The accelerator of the spec must have a class: explain_missing_class says whether."""
    request = _read_request(spec)
    if request is None:
        # Never more than one process: threads use the CPUs of a pod better than processes do.
        return PodShape(nodes=spec.num_nodes, processes_per_node=1, device=DeviceType.CPU, backend=Backend.GLOO)
    found = request.find_class(classes)
    assert found is not None, f"no class for {request}"
    resource = found.fill_resource(request.parameters)
    processes = request.count * found.processes_per_accelerator
    return PodShape(
        nodes=spec.num_nodes,
        processes_per_node=processes,
        device=found.device,
        backend=found.backend,
        accelerators=request.count,
        resources=({resource: str(request.count)} if resource else {}) | found.extra_resources,
        devices=DeviceRequest(device_class=found.device_class, count=request.count) if found.device_class else None,
        node_selector=found.fill_node_selector(request.parameters),
        tolerations=tuple(each.model_dump(mode="json", by_alias=True, exclude_none=True) for each in found.tolerations),
        environment=found.environment,
        shared_memory=_size_shared_memory(processes, memory=spec.resources.memory),
    )


def explain_missing_class(spec: FineTuneJobSpec, classes: Mapping[str, AcceleratorClass]) -> str | None:
    """Return why the accelerator of the spec cannot be had from these classes, or None if it can."""
    request = _read_request(spec)
    if request is None or request.find_class(classes) is not None:
        return None
    if request.device_class:
        known = sorted(each.device_class for each in classes.values() if each.device_class)
        what = f"no accelerator class has the deviceClass {request.device_class}; those of the operator have"
    else:
        known = sorted(name for name, each in classes.items() if each.fill_resource({}) or each.device_class)
        what = f"the operator has no accelerator class {request.class_name} for this; it has"
    return f"{what} {', '.join(known) or 'none'}: correct spec.accelerator, or ask the administrator to add the class"


@dataclass(frozen=True, slots=True)
class _Request:
    """One member of spec.accelerator in common terms."""

    class_name: str
    count: int
    parameters: Mapping[str, str] = field(default_factory=dict)
    device_class: str | None = None

    def find_class(self, classes: Mapping[str, AcceleratorClass]) -> AcceleratorClass | None:
        """Return the class; one whose resource needs more than the request gives is none."""
        if self.device_class:
            return next((each for each in classes.values() if each.device_class == self.device_class), None)
        found = classes.get(self.class_name)
        return found if found and (found.device_class or found.fill_resource(self.parameters)) else None


def _read_request(spec: FineTuneJobSpec) -> _Request | None:
    given = spec.accelerator
    requests = (
        given.nvidia and _read_nvidia(given.nvidia),
        given.amd and _Request("amd", given.amd.count, _list_given(product=given.amd.product)),
        given.gaudi and _Request("gaudi", given.gaudi.count),
        given.neuron and _read_neuron(given.neuron),
        given.tpu and _read_tpu(given.tpu, nodes=spec.num_nodes),
        given.device_class and _Request("", given.device_class.count, device_class=given.device_class.name),
        given.custom and _Request(given.custom.class_name, given.custom.count),
    )
    return next((each for each in requests if each), None)


def _read_nvidia(gpu: NvidiaGpu) -> _Request:
    if gpu.mig:
        return _Request("mig", gpu.mig.count, _list_given(product=gpu.product, profile=gpu.mig.profile))
    return _Request("nvidia", gpu.count or 1, _list_given(product=gpu.product))


def _read_neuron(neuron: Neuron) -> _Request:
    return _Request("neuron", neuron.devices) if neuron.devices else _Request("neuroncore", neuron.cores or 1)


def _read_tpu(tpu: Tpu, *, nodes: int) -> _Request:
    """Return the chips of one host: a pod has to take all of them."""
    return _Request("tpu", count_chips(tpu.topology) // nodes, {"type": tpu.type.value, "topology": tpu.topology})


def _list_given(**fields: str | None) -> dict[str, str]:
    return {name: value for name, value in fields.items() if value is not None}


def _size_shared_memory(processes: int, *, memory: str) -> str:
    """Return the size of /dev/shm: it counts as the pod's memory once it is used, so it may fill no more than half of that."""
    match = re.fullmatch("([0-9]+)([A-Za-z]+)", memory)
    assert match, f"the API lets no memory like {memory} pass"
    half_mi = int(match[1]) * _UNITS[match[2]] // 2 // _MI
    return f"{max(1, min(processes * _SHARED_MI_PER_PROCESS, half_mi))}Mi"

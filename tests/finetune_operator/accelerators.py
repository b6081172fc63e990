"""Every kind of accelerator: what a job asks for, what its pods become, and the nodes that they fit on."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from finetune_operator.accelerator_classes import AcceleratorClass, AcceleratorClasses
from pydantic import TypeAdapter

_VALUES = Path(__file__).resolve().parents[2] / "charts" / "finetune-operator" / "values.yaml"

CHART_CLASSES: dict[str, Any] = yaml.safe_load(_VALUES.read_text(encoding="utf-8"))["accelerators"]
# A class that an administrator added.
CUSTOM_CLASSES: dict[str, Any] = {
    "npu": {
        "resource": "corp.test/npu",
        "processesPerAccelerator": 2,
        "device": "cpu",
        "backend": "gloo",
        "nodeSelector": {"corp.test/pool": "npu"},
        "tolerations": [{"key": "corp.test/npu", "value": "lab", "effect": "NoSchedule"}],
        "environment": {"NPU_LOG": "warn"},
    }
}
RAW_CLASSES = CHART_CLASSES | CUSTOM_CLASSES
CLASSES: dict[str, AcceleratorClass] = TypeAdapter(AcceleratorClasses).validate_python(RAW_CLASSES)

_PRODUCT = "NVIDIA-H100-80GB-HBM3"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One accelerator."""

    name: str
    accelerator: dict[str, Any]
    spec: dict[str, Any] = field(default_factory=dict)
    nodes: int = 1
    processes: int
    device: str
    backend: str
    resources: dict[str, str] = field(default_factory=dict)
    """What a node that fits has of extended resources."""
    labels: dict[str, str] = field(default_factory=dict)
    """What a node that fits has of labels."""
    taint: str | None = None
    """Key of the taint that such nodes have."""


def _tpu(name: str, type: str, topology: str, *, hosts: int, chips: int, spec: dict[str, Any] | None = None) -> Case:
    return Case(
        name=name,
        accelerator={"tpu": {"type": type, "topology": topology}},
        spec=spec or {},
        nodes=hosts,
        processes=chips,
        device="xla",
        backend="xla",
        resources={"google.com/tpu": str(chips)},
        labels={"cloud.google.com/gke-tpu-accelerator": type, "cloud.google.com/gke-tpu-topology": topology},
        taint="google.com/tpu",
    )


def _gpu(name: str, accelerator: dict[str, Any], *, processes: int, backend: str = "nccl", **node: Any) -> Case:
    return Case(name=name, accelerator=accelerator, processes=processes, device="cuda", backend=backend, **node)


_NVIDIA_NODE = {"resources": {"nvidia.com/gpu": "8"}, "labels": {"nvidia.com/gpu.product": _PRODUCT}, "taint": "nvidia.com/gpu"}
_NEURON_NODE = {"device": "xla", "backend": "xla", "taint": "aws.amazon.com/neuron"}
_GAUDI_RESOURCES = {"habana.ai/gaudi": "8", "hugepages-2Mi": "16Gi"}

CASES = (
    Case(name="cpu", accelerator={}, processes=1, device="cpu", backend="gloo"),
    Case(name="cpu-nodes", accelerator={}, spec={"nodes": 2}, nodes=2, processes=1, device="cpu", backend="gloo"),
    _gpu("nvidia-1", {"nvidia": {"count": 1}}, processes=1, **_NVIDIA_NODE),
    _gpu("nvidia-2", {"nvidia": {"count": 2, "product": _PRODUCT}}, processes=2, **_NVIDIA_NODE),
    _gpu("nvidia-8", {"nvidia": {"count": 8, "product": _PRODUCT}}, processes=8, **_NVIDIA_NODE),
    _gpu(
        "mig",
        {"nvidia": {"mig": {"profile": "1g.10gb", "count": 2}}},
        processes=2,
        backend="gloo",
        resources={"nvidia.com/mig-1g.10gb": "7"},
        taint="nvidia.com/gpu",
    ),
    _gpu(
        "amd",
        {"amd": {"count": 2, "product": "AMD_Instinct_MI300X_OAM"}},
        processes=2,
        resources={"amd.com/gpu": "8"},
        labels={"amd.com/gpu.product-name": "AMD_Instinct_MI300X_OAM"},
        taint="amd.com/gpu",
    ),
    Case(
        name="gaudi",
        accelerator={"gaudi": {"count": 8}},
        processes=8,
        device="hpu",
        backend="hccl",
        resources=_GAUDI_RESOURCES,
        taint="habana.ai/gaudi",
    ),
    Case(
        name="neuron-devices",
        accelerator={"neuron": {"devices": 1}},
        processes=2,
        resources={"aws.amazon.com/neuron": "16", "aws.amazon.com/neuroncore": "32"},
        **_NEURON_NODE,
    ),
    Case(
        name="neuron-cores",
        accelerator={"neuron": {"cores": 4}},
        processes=4,
        resources={"aws.amazon.com/neuron": "16", "aws.amazon.com/neuroncore": "32"},
        **_NEURON_NODE,
    ),
    _tpu("tpu-v5e", "tpu-v5-lite-podslice", "2x2", hosts=1, chips=4),
    _tpu("tpu-v5e-hosts", "tpu-v5-lite-podslice", "2x4", hosts=2, chips=4, spec={"nodes": 2}),
    _tpu("tpu-v6e", "tpu-v6e-slice", "2x4", hosts=1, chips=8),
    _tpu("tpu-v6e-hosts", "tpu-v6e-slice", "4x4", hosts=4, chips=4),
    _tpu("tpu-v4", "tpu-v4-podslice", "2x2x1", hosts=1, chips=4),
    _tpu("tpu-v5p-hosts", "tpu-v5p-slice", "2x2x4", hosts=4, chips=4),
    _gpu("dra", {"deviceClass": {"name": "gpu.nvidia.com", "count": 2}}, processes=2, taint="nvidia.com/gpu"),
    Case(
        name="custom",
        accelerator={"custom": {"className": "npu", "count": 3}},
        processes=6,
        device="cpu",
        backend="gloo",
        resources={"corp.test/npu": "4"},
        labels={"corp.test/pool": "npu"},
        taint="corp.test/npu",
    ),
)

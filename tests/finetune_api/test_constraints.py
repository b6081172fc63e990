"""Every constraint of a FineTuneJob's spec, held by the models and by a real kube-apiserver alike: one table for both."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
from constraint_table import Constraint, list_constraints, name_constraints
from finetune_api.crd import build_crd
from finetune_api.v1alpha1 import FineTuneJob
from pydantic import ValidationError

PATH = "/apis/finetune.dev/v1alpha1/namespaces/default/finetunejobs?dryRun=All&fieldValidation=Strict"

# Values that a spec gets, by dotted path; None removes a field.
Change = dict[str, Any]


def _field(path: str, keyword: str, *, accepts: tuple[Any, ...], refuses: tuple[Any, ...], says: str) -> Constraint:
    return Constraint(
        path=path,
        keyword=keyword,
        accepts=tuple({path: value} for value in accepts),
        refuses=tuple({path: value} for value in refuses),
        says=says,
    )


def _range(path: str, low: float, high: float, *, step: float = 1) -> tuple[Constraint, Constraint]:
    return (
        _field(path, "minimum", accepts=(low,), refuses=(low - step, -1), says=f"greater than or equal to {low}"),
        _field(path, "maximum", accepts=(high,), refuses=(high + step,), says=f"less than or equal to {high}"),
    )


_RULES = "spec.runPolicy.failureRules"


def _rule(**fields: Any) -> Change:
    """Return one failure rule, the smallest but for these fields; None removes one."""
    rule = {"name": "rule", "onExitCodes": [3], "action": "Retry"} | fields
    return {_RULES: [{key: value for key, value in rule.items() if value is not None}]}


def _secret(name: str, *, uri: str = "s3://bucket") -> Change:
    return {"spec.checkpoint": {"uri": uri, "secretRef": {"name": name}}}


_PVC_ACCEPTS = ("pvc://data", "pvc://my-data/a", "pvc://d/A_b.c-d/0/e")
_PVC_REFUSES = (
    "",
    "s3://bucket/data",
    "pvc://",
    "pvc:///a",
    "pvc://Data/a",
    "pvc://-data",
    "pvc://data/",
    "pvc://data//a",
    "pvc://data/../secret",
    "pvc://data/.hidden",
    "pvc://data/a b",
    "pvc://data/a\n",
    "/mnt/data",
)
_LONG = "pvc://data/" + "a" * 501

_NAME_SAYS = "name must be that of a Kubernetes object: lower-case letters, digits, '-' and '.'"


def _object_name(path: str, *, beside: Change | None = None) -> tuple[Constraint, ...]:
    """Return the rows of a field that holds the name of a Kubernetes object, and of its parent that needs it."""
    parent, _, name = path.rpartition(".")

    def change(value: str | None) -> Change:
        return {parent: (beside or {}) | ({} if value is None else {name: value})}

    return (
        Constraint(
            path=parent, keyword="required", accepts=(change("a"),), refuses=(change(None),), says=f"{path}: Required value"
        ),
        Constraint(
            path=path,
            keyword="name must be",
            accepts=(change("gold"), change("gpu.nvidia.com"), change("0")),
            refuses=(change("Gold"), change("-gold"), change("my gold"), change("gold/a")),
            says=_NAME_SAYS,
        ),
        Constraint(
            path=path,
            keyword="minLength",
            accepts=(change("a"),),
            refuses=(change(""),),
            says="should be at least 1 chars long",
        ),
        Constraint(
            path=path,
            keyword="maxLength",
            accepts=(change("a" * 253),),
            refuses=(change("a" * 254),),
            says="may not be more than 253",
        ),
    )


def _count(path: str, high: int = 64, *, beside: Change | None = None) -> tuple[Constraint, ...]:
    """Return the rows of a number of accelerators."""
    parent, _, name = path.rpartition(".")

    def change(value: int) -> Change:
        return {parent: (beside or {}) | {name: value}}

    return (
        Constraint(
            path=path,
            keyword="minimum",
            accepts=(change(1),),
            refuses=(change(0), change(-1)),
            says="greater than or equal to 1",
        ),
        Constraint(
            path=path,
            keyword="maximum",
            accepts=(change(high),),
            refuses=(change(high + 1),),
            says=f"less than or equal to {high}",
        ),
    )


def _product(path: str) -> tuple[Constraint, ...]:
    """Return the rows of the name of a product."""
    parent, _, name = path.rpartition(".")

    def change(value: str) -> Change:
        return {parent: {"count": 1, name: value}}

    return (
        Constraint(
            path=path,
            keyword="product must be",
            accepts=(change("NVIDIA-H100-80GB-HBM3"), change("AMD_Instinct_MI300X_OAM"), change("a")),
            refuses=(change(""), change("NVIDIA H100"), change("-H100"), change("H100/80GB")),
            says="product must be the value of the node label that names the product",
        ),
        Constraint(
            path=path,
            keyword="maxLength",
            accepts=(change("A" * 63),),
            refuses=(change("A" * 64),),
            says="may not be more than 63",
        ),
    )


def _tpu(type: str | None, topology: str | None, **spec: Any) -> Change:
    given = {"type": type, "topology": topology}
    tpu = {"spec.accelerator.tpu": {key: value for key, value in given.items() if value is not None}}
    return tpu | {f"spec.{key}": value for key, value in spec.items()}


def _topologies(type: str, *, accepts: tuple[str, ...], refuses: tuple[str, ...], says: str) -> Constraint:
    return Constraint(
        path="spec.accelerator.tpu",
        keyword=f"topology of type {type} must be",
        accepts=tuple(_tpu(type, each) for each in accepts),
        refuses=tuple(_tpu(type, each) for each in refuses),
        says=f"topology of type {type} must be one of {says}",
    )


_FLAT_SAYS = "1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16"
_FLAT = tuple(_FLAT_SAYS.split(", "))
_NOT_FLAT = ("2x1", "4x2", "8x4", "3x3", "16x32", "2x2x1")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "8x8x12")
_NOT_CUBES = ("1x1", "2x2", "4x4", "1x1x1", "2x4x2", "2x2x8", "4x8x4", "4x4x6")
_CUBE_SAYS = "2x2x1, 2x2x2, 2x2x4, 2x4x4, or AxBxC of multiples of 4 with A <= B <= C and at most {} chips"
_MIG = "spec.accelerator.nvidia.mig"
_V6E = "tpu-v6e-slice"
_V4 = "tpu-v4-podslice"

_ACCELERATORS = (
    Constraint(
        path="spec.accelerator",
        keyword="accelerator has more than one",
        accepts=(
            {"spec.accelerator": {}},
            {"spec.accelerator": {"nvidia": {"count": 1}}},
            {"spec.accelerator": {"amd": {}}},
            {"spec.accelerator": {"gaudi": {}}},
            {"spec.accelerator": {"neuron": {"devices": 1}}},
            {"spec.accelerator": {"custom": {"className": "npu"}}},
        ),
        refuses=(
            {"spec.accelerator": {"nvidia": {"count": 1}, "amd": {"count": 1}}},
            {"spec.accelerator": {"gaudi": {}, "custom": {"className": "npu"}}},
            {"spec.accelerator": {"amd": {}, "deviceClass": {"name": "gpu.amd.com"}, "neuron": {"cores": 1}}},
        ),
        says="accelerator has more than one of nvidia, amd, gaudi, neuron, tpu, deviceClass, custom; give one, or none for CPU",
    ),
    Constraint(
        path="spec.accelerator.nvidia",
        keyword="give either count",
        accepts=(
            {"spec.accelerator.nvidia": {"count": 2, "product": "Tesla-T4"}},
            {_MIG: {"profile": "1g.10gb"}},
            {"spec.accelerator.nvidia": {"mig": {"profile": "1g.10gb"}, "product": "NVIDIA-H100-80GB-HBM3"}},
        ),
        refuses=(
            {"spec.accelerator.nvidia": {}},
            {"spec.accelerator.nvidia": {"product": "Tesla-T4"}},
            {"spec.accelerator.nvidia": {"count": 1, "mig": {"profile": "1g.10gb"}}},
        ),
        says="give either count, the number of whole GPUs, or mig, slices of a GPU",
    ),
    *_count("spec.accelerator.nvidia.count"),
    *_product("spec.accelerator.nvidia.product"),
    Constraint(
        path=_MIG,
        keyword="required",
        accepts=({_MIG: {"profile": "1g.10gb"}},),
        refuses=({_MIG: {"count": 1}},),
        says=f"{_MIG}.profile: Required value",
    ),
    *_count(f"{_MIG}.count", beside={"profile": "1g.10gb"}),
    _field(
        f"{_MIG}.profile",
        "profile must be",
        accepts=("1g.5gb", "1g.10gb", "1g.10gb.me", "7g.80gb", "3g.40gb", "2g.141gb"),
        refuses=("", "1g", "10gb", "8g.80gb", "1g.10gb+me", "1c.1g.10gb", "1G.10GB", "mig-1g.10gb"),
        says="profile must be a MIG profile as in the resource's name, such as 1g.10gb or 1g.10gb.me",
    ),
    _field(
        f"{_MIG}.profile", "maxLength", accepts=("7g.141gb.me",), refuses=("7g.141gb.me.me.me",), says="may not be more than 16"
    ),
    *_count("spec.accelerator.amd.count"),
    *_product("spec.accelerator.amd.product"),
    *_count("spec.accelerator.gaudi.count"),
    Constraint(
        path="spec.accelerator.neuron",
        keyword="give either devices",
        accepts=({"spec.accelerator.neuron.devices": 1}, {"spec.accelerator.neuron.cores": 1}),
        refuses=({"spec.accelerator.neuron": {}}, {"spec.accelerator.neuron": {"devices": 1, "cores": 2}}),
        says="give either devices, whole Neuron devices, or cores, single NeuronCores",
    ),
    *_count("spec.accelerator.neuron.devices"),
    *_count("spec.accelerator.neuron.cores", 256),
    Constraint(
        path="spec.accelerator.tpu",
        keyword="required",
        accepts=(_tpu(_V6E, "4x4"),),
        refuses=(_tpu(_V6E, None), _tpu(None, "4x4")),
        says="Required value",
    ),
    Constraint(
        path="spec.accelerator.tpu.type",
        keyword="enum",
        accepts=(_tpu(_V6E, "4x4"), _tpu(_V4, "2x2x1")),
        refuses=(_tpu("v6e", "4x4"), _tpu("tpu-v3-slice", "4x4"), _tpu("", "4x4")),
        says='supported values: "tpu-v4-podslice", "tpu-v5-lite-podslice", "tpu-v5p-slice", "tpu-v6e-slice"',
    ),
    Constraint(
        path="spec.accelerator.tpu.topology",
        keyword="topology must be",
        accepts=(_tpu(_V6E, "16x16"), _tpu("tpu-v5p-slice", "16x16x24")),
        refuses=(_tpu(_V6E, ""), _tpu(_V6E, "4"), _tpu(_V6E, "4x"), _tpu(_V6E, "4x04"), _tpu(_V6E, "4X4"), _tpu(_V6E, "2x2x2x2")),
        says="topology must be the sides of the slice, such as 2x4 or 2x2x4",
    ),
    Constraint(
        path="spec.accelerator.tpu.topology",
        keyword="maxLength",
        accepts=(_tpu("tpu-v5p-slice", "16x16x24"),),
        refuses=(_tpu("tpu-v5p-slice", "1000x100x100"),),
        says="may not be more than 11",
    ),
    _topologies("tpu-v5-lite-podslice", accepts=_FLAT, refuses=_NOT_FLAT, says=_FLAT_SAYS),
    _topologies(_V6E, accepts=_FLAT, refuses=_NOT_FLAT, says=_FLAT_SAYS),
    _topologies(_V4, accepts=(*_CUBES, "16x16x16"), refuses=(*_NOT_CUBES, "16x16x20"), says=_CUBE_SAYS.format(4096)),
    _topologies("tpu-v5p-slice", accepts=(*_CUBES, "16x16x24"), refuses=(*_NOT_CUBES, "16x16x28"), says=_CUBE_SAYS.format(6144)),
    *_object_name("spec.accelerator.deviceClass.name"),
    *_count("spec.accelerator.deviceClass.count", beside={"name": "gpu.nvidia.com"}),
    *_object_name("spec.accelerator.custom.className"),
    *_count("spec.accelerator.custom.count", beside={"className": "npu"}),
)


def _nodes(change: Change, says: str) -> Constraint:
    """Return a row of hosts that contradict a topology; what is accepted has no accelerator, another one, or the right number."""
    return Constraint(
        path="spec",
        keyword="nodes contradicts",
        accepts=(
            {"spec.nodes": 3},
            {"spec.nodes": 3, "spec.accelerator.nvidia.count": 1},
            _tpu(_V6E, "4x4"),
            _tpu(_V6E, "1x1", nodes=1),
            _tpu(_V6E, "2x4", nodes=1),
            _tpu(_V6E, "2x4", nodes=2),
            _tpu(_V6E, "4x4", nodes=4),
            _tpu(_V4, "2x2x2", nodes=2),
            _tpu(_V4, "8x8x8", nodes=128),
        ),
        refuses=(change,),
        says=says,
    )


_SCALE = (
    *_range("spec.nodes", 1, 1024),
    _nodes(
        _tpu(_V6E, "4x4", nodes=2), "nodes 2 contradicts accelerator.tpu.topology, whose hosts are 4; remove nodes or correct it"
    ),
    _nodes(_tpu(_V6E, "2x4", nodes=4), "nodes 4 contradicts accelerator.tpu.topology, whose hosts are 1 or 2; remove nodes"),
    _nodes(_tpu(_V6E, "2x2", nodes=2), "nodes 2 contradicts accelerator.tpu.topology, whose hosts are 1; remove nodes"),
    _nodes(_tpu(_V4, "2x2x2", nodes=1), "nodes 1 contradicts accelerator.tpu.topology, whose hosts are 2; remove nodes"),
    *_object_name("spec.profileRef.name"),
    _field(
        "spec.managedBy",
        "enum",
        accepts=("finetune.dev/operator", "kueue.x-k8s.io/multikueue"),
        refuses=("", "kueue", "finetune-operator"),
        says='supported values: "finetune.dev/operator", "kueue.x-k8s.io/multikueue"',
    ),
)

# Path and message of rules that compare an object with what it was.
_TRANSITIONS = {("spec.managedBy", "managedBy cannot be changed; delete the FineTuneJob and create it again")}

CONSTRAINTS = (
    *_ACCELERATORS,
    *_SCALE,
    Constraint(path="", keyword="required", accepts=({},), refuses=({"spec": None},), says="spec: Required value"),
    Constraint(
        path="",
        keyword="metadata.name must be",
        accepts=({"metadata.name": "a"}, {"metadata.name": "a" * 45}, {"metadata.name": "a-1"}),
        refuses=({"metadata.name": "a" * 46}, {"metadata.name": "1a"}, {"metadata.name": "a.b"}),
        says="at most 45 lower-case letters, digits and hyphens",
        has_model=False,
    ),
    Constraint(
        path="spec",
        keyword="required",
        accepts=({},),
        refuses=({"spec.task": None}, {"spec.dataset": None}, {"spec.output": None}),
        says="Required value",
    ),
    _field(
        "spec.task",
        "enum",
        accepts=("image-classification",),
        refuses=("text", "", "Image-Classification"),
        says='supported values: "image-classification"',
    ),
    _field(
        "spec.model.uri",
        "uri must be",
        accepts=("timm://resnet18", "timm://vit_base_patch16_224.augreg2_in21k_ft_in1k", *_PVC_ACCEPTS),
        refuses=("resnet18", "timm://", "timm://a/b", "hf://org/model", "pvc://models/../x"),
        says="uri must be timm://NAME, such as timm://resnet18, or pvc://CLAIM/PATH",
    ),
    _field("spec.model.uri", "maxLength", accepts=(_LONG,), refuses=(_LONG + "a",), says="may not be more than 512"),
    Constraint(
        path="spec.dataset",
        keyword="required",
        accepts=({},),
        refuses=({"spec.dataset": {}},),
        says="spec.dataset.uri: Required value",
    ),
    _field("spec.dataset.uri", "uri must be", accepts=_PVC_ACCEPTS, refuses=_PVC_REFUSES, says="uri must be pvc://CLAIM/PATH"),
    _field("spec.dataset.uri", "maxLength", accepts=(_LONG,), refuses=(_LONG + "a",), says="may not be more than 512"),
    _field(
        "spec.dataset.format",
        "enum",
        accepts=("imagefolder", "csv"),
        refuses=("parquet", ""),
        says='supported values: "imagefolder", "csv"',
    ),
    _field("spec.dataset.validationFraction", "minimum", accepts=(0.05,), refuses=(0.04,), says="greater than or equal to 0.05"),
    _field("spec.dataset.validationFraction", "maximum", accepts=(0.5,), refuses=(0.51, 1), says="less than or equal to 0"),
    Constraint(
        path="spec.dataset",
        keyword="validationFraction is below",
        accepts=({"spec.dataset.validationFraction": 0.05},),
        refuses=({"spec.dataset.validationFraction": 0}, {"spec.dataset.validationFraction": -1}),
        says="validationFraction is below 0.05; models are chosen on this share of the data, so give 0.05 or more",
    ),
    *_range("spec.dataset.testFraction", 0, 0.5, step=0.01),
    Constraint(
        path="spec.dataset",
        keyword="validationFraction + testFraction",
        accepts=(
            {"spec.dataset.validationFraction": 0.4, "spec.dataset.testFraction": 0.5},
            {"spec.dataset.validationFraction": 0.5, "spec.dataset.testFraction": 0.4},
        ),
        refuses=(
            {"spec.dataset.validationFraction": 0.5, "spec.dataset.testFraction": 0.5},
            {"spec.dataset.validationFraction": 0.41, "spec.dataset.testFraction": 0.5},
        ),
        says="validationFraction + testFraction is over 0.9; leave at least a tenth of the data for training",
    ),
    _field(
        "spec.method.type",
        "enum",
        accepts=("auto", "probe", "full"),
        refuses=("lora", ""),
        says='supported values: "auto", "probe", "full"',
    ),
    *_range("spec.hyperparameters.epochs", 1, 10_000),
    *_range("spec.hyperparameters.maxSteps", 1, 10_000_000),
    _field("spec.hyperparameters.learningRate", "minimum", accepts=(1e-9,), refuses=(0, -0.1), says="should be greater than 0"),
    _field("spec.hyperparameters.learningRate", "maximum", accepts=(10, 0.5), refuses=(10.1,), says="less than or equal to 10"),
    *_range("spec.hyperparameters.batchSize", 1, 65_536),
    *_range("spec.hyperparameters.imageSize", 32, 1024),
    _field(
        "spec.hyperparameters.precision",
        "enum",
        accepts=("auto", "fp32", "bf16"),
        refuses=("fp16", ""),
        says='supported values: "auto", "fp32", "bf16"',
    ),
    *_range("spec.hyperparameters.seed", 0, 2_147_483_647),
    Constraint(
        path="spec.hyperparameters",
        keyword="epochs and maxSteps",
        accepts=({"spec.hyperparameters.epochs": 5}, {"spec.hyperparameters.maxSteps": 5}),
        refuses=({"spec.hyperparameters.epochs": 5, "spec.hyperparameters.maxSteps": 5},),
        says="epochs and maxSteps are both set; give one of them",
    ),
    Constraint(
        path="spec",
        keyword="method.type probe",
        accepts=(
            {"spec.method.type": "probe", "spec.hyperparameters": {"seed": 1, "imageSize": 64, "batchSize": 8}},
            {"spec.method.type": "full", "spec.hyperparameters.epochs": 5},
            {"spec.method.type": "auto", "spec.hyperparameters.maxSteps": 5},
            {"spec.hyperparameters.learningRate": 0.1},
        ),
        refuses=(
            {"spec.method.type": "probe", "spec.hyperparameters.epochs": 5},
            {"spec.method.type": "probe", "spec.hyperparameters.maxSteps": 5},
            {"spec.method.type": "probe", "spec.hyperparameters.learningRate": 0.1},
        ),
        says="hyperparameters epochs, maxSteps and learningRate do not apply; remove them or choose method.type full",
    ),
    _field(
        "spec.resources.cpu",
        "cpu must be",
        accepts=("1", "64", "1.5", "10.25", "0.5", "0.05", "0.001", "0.50", "500m", "1m"),
        refuses=("", "0", "0.0", "0.000", "0m", "-1", "2 cores", "1.2345", "1e3", "05", "two", "1m\n"),
        says="cpu must be a number of cores over zero, such as 2, 1.5 or 500m",
    ),
    _field("spec.resources.cpu", "maxLength", accepts=("999999m",), refuses=("1" * 17,), says="may not be more than 16"),
    _field(
        "spec.resources.memory",
        "memory must be",
        accepts=("4Gi", "512Mi", "1Ti", "900M", "4G", "1T"),
        refuses=("", "0", "4", "4096", "0Gi", "4gb", "4 Gi", "1.5Gi", "-4Gi", "lots"),
        says="memory must be a whole number with a unit of Mi, Gi, Ti, M, G or T, such as 4Gi",
    ),
    _field(
        "spec.resources.memory", "maxLength", accepts=("999999999Mi",), refuses=("1" * 20 + "G",), says="may not be more than 20"
    ),
    *_range("spec.budget.trainingSeconds", 10, 31_536_000),
    _field(
        "spec.checkpoint.uri",
        "uri must be",
        accepts=(*_PVC_ACCEPTS, "s3://bucket", "s3://my.bucket-1/a/b.c"),
        refuses=(
            *(each for each in _PVC_REFUSES if each != "s3://bucket/data"),
            "s3://",
            "s3://ab",
            "s3://bucket/",
            "gs://bucket",
        ),
        says="uri must be pvc://CLAIM/PATH, a folder in a PersistentVolumeClaim, or s3://BUCKET/PATH",
    ),
    _field("spec.checkpoint.uri", "maxLength", accepts=(_LONG,), refuses=(_LONG + "a",), says="may not be more than 512"),
    *_range("spec.checkpoint.intervalSeconds", 1, 86_400),
    *_range("spec.checkpoint.keep", 1, 20),
    Constraint(
        path="spec.checkpoint.secretRef",
        keyword="required",
        accepts=({"spec.checkpoint": {"uri": "s3://bucket", "secretRef": {"name": "keys"}}},),
        refuses=({"spec.checkpoint": {"uri": "s3://bucket", "secretRef": {}}},),
        says="spec.checkpoint.secretRef.name: Required value",
    ),
    Constraint(
        path="spec.checkpoint.secretRef.name",
        keyword="name must be",
        accepts=(_secret("keys"), _secret("my-keys.v1"), _secret("0")),
        refuses=(_secret("Keys"), _secret("-keys"), _secret("my keys"), _secret("keys/a")),
        says="name must be that of a Kubernetes object: lower-case letters, digits, '-' and '.'",
    ),
    Constraint(
        path="spec.checkpoint.secretRef.name",
        keyword="minLength",
        accepts=(_secret("k"),),
        refuses=(_secret(""),),
        says="should be at least 1 chars long",
    ),
    Constraint(
        path="spec.checkpoint.secretRef.name",
        keyword="maxLength",
        accepts=(_secret("k" * 253),),
        refuses=(_secret("k" * 254),),
        says="may not be more than 253",
    ),
    Constraint(
        path="spec.checkpoint",
        keyword="secretRef is set",
        accepts=(_secret("keys"),),
        refuses=({"spec.checkpoint": {"secretRef": {"name": "keys"}}}, _secret("keys", uri="pvc://checkpoints")),
        says="secretRef is set, and uri is not s3://BUCKET/PATH; only object stores need a Secret",
    ),
    Constraint(
        path="spec.output",
        keyword="required",
        accepts=({},),
        refuses=({"spec.output": {}},),
        says="spec.output.uri: Required value",
    ),
    _field("spec.output.uri", "uri must be", accepts=_PVC_ACCEPTS, refuses=_PVC_REFUSES, says="uri must be pvc://CLAIM/PATH"),
    _field("spec.output.uri", "maxLength", accepts=(_LONG,), refuses=(_LONG + "a",), says="may not be more than 512"),
    Constraint(
        path="spec",
        keyword="output.uri lies inside",
        accepts=(
            {"spec.dataset.uri": "pvc://x/a", "spec.output.uri": "pvc://x/b"},
            {"spec.dataset.uri": "pvc://x/a", "spec.output.uri": "pvc://x/ab"},
            {"spec.dataset.uri": "pvc://x/a/b", "spec.output.uri": "pvc://x/a"},
        ),
        refuses=(
            {"spec.dataset.uri": "pvc://x/a", "spec.output.uri": "pvc://x/a"},
            {"spec.dataset.uri": "pvc://x/a", "spec.output.uri": "pvc://x/a/b"},
            {"spec.dataset.uri": "pvc://x", "spec.output.uri": "pvc://x/a"},
        ),
        says="output.uri lies inside dataset.uri",
    ),
    *_range("spec.runPolicy.backoffLimit", 0, 100),
    *_range("spec.runPolicy.startDeadlineSeconds", 1, 31_536_000),
    *_range("spec.runPolicy.activeDeadlineSeconds", 1, 31_536_000),
    *_range("spec.runPolicy.ttlSecondsAfterFinished", 0, 31_536_000),
    Constraint(
        path=_RULES,
        keyword="maxItems",
        accepts=({_RULES: [_rule(name=f"rule {number}")[_RULES][0] for number in range(16)]},),
        refuses=({_RULES: [_rule(name=f"rule {number}")[_RULES][0] for number in range(17)]},),
        says="must have at most 16 items",
    ),
    Constraint(
        path=_RULES,
        keyword="x-kubernetes-list-type",
        accepts=({_RULES: [_rule(name=name)[_RULES][0] for name in ("a", "b")]},),
        refuses=({_RULES: [_rule(name=name)[_RULES][0] for name in ("a", "a")]},),
        says="Duplicate value",
        has_model=False,
    ),
    Constraint(
        path=f"{_RULES}[0]",
        keyword="required",
        accepts=(_rule(),),
        refuses=(_rule(name=None), _rule(action=None)),
        says="Required value",
    ),
    Constraint(
        path=f"{_RULES}[0]",
        keyword="a failure rule needs",
        accepts=(_rule(), _rule(onExitCodes=None, onReasons=["OOMKilled"]), _rule(onReasons=["OOMKilled"])),
        refuses=(_rule(onExitCodes=None), _rule(onExitCodes=[]), _rule(onExitCodes=[], onReasons=[])),
        says="a failure rule needs onExitCodes or onReasons; without them it would match nothing",
    ),
    Constraint(
        path=f"{_RULES}[0].name",
        keyword="minLength",
        accepts=(_rule(name="r"),),
        refuses=(_rule(name=""),),
        says="should be at least 1 chars long",
    ),
    Constraint(
        path=f"{_RULES}[0].name",
        keyword="maxLength",
        accepts=(_rule(name="r" * 63),),
        refuses=(_rule(name="r" * 64),),
        says="may not be more than 63",
    ),
    Constraint(
        path=f"{_RULES}[0].action",
        keyword="enum",
        accepts=(_rule(action="Retry"), _rule(action="RetryFree"), _rule(action="Fail")),
        refuses=(_rule(action="Ignore"), _rule(action=""), _rule(action="retry")),
        says='supported values: "Retry", "RetryFree", "Fail"',
    ),
    Constraint(
        path=f"{_RULES}[0].onExitCodes",
        keyword="maxItems",
        accepts=(_rule(onExitCodes=list(range(1, 33))),),
        refuses=(_rule(onExitCodes=list(range(1, 34))),),
        says="must have at most 32 items",
    ),
    Constraint(
        path=f"{_RULES}[0].onExitCodes",
        keyword="x-kubernetes-list-type",
        accepts=(_rule(onExitCodes=[1, 2]),),
        refuses=(_rule(onExitCodes=[1, 1]),),
        says="Duplicate value",
        has_model=False,
    ),
    Constraint(
        path=f"{_RULES}[0].onExitCodes[0]",
        keyword="minimum",
        accepts=(_rule(onExitCodes=[1]),),
        refuses=(_rule(onExitCodes=[0]), _rule(onExitCodes=[-9])),
        says="greater than or equal to 1",
    ),
    Constraint(
        path=f"{_RULES}[0].onExitCodes[0]",
        keyword="maximum",
        accepts=(_rule(onExitCodes=[255]),),
        refuses=(_rule(onExitCodes=[256]),),
        says="less than or equal to 255",
    ),
    Constraint(
        path=f"{_RULES}[0].onReasons",
        keyword="maxItems",
        accepts=(_rule(onReasons=[f"Cause{number}" for number in range(32)]),),
        refuses=(_rule(onReasons=[f"Cause{number}" for number in range(33)]),),
        says="must have at most 32 items",
    ),
    Constraint(
        path=f"{_RULES}[0].onReasons",
        keyword="x-kubernetes-list-type",
        accepts=(_rule(onReasons=["A", "B"]),),
        refuses=(_rule(onReasons=["A", "A"]),),
        says="Duplicate value",
        has_model=False,
    ),
    Constraint(
        path=f"{_RULES}[0].onReasons[0]",
        keyword="a reason is",
        accepts=(_rule(onReasons=["OOMKilled"]), _rule(onReasons=["E2"])),
        refuses=(_rule(onReasons=[""]), _rule(onReasons=["out of memory"]), _rule(onReasons=["oomKilled"])),
        says="a reason is one CamelCase word, such as OOMKilled",
    ),
    Constraint(
        path=f"{_RULES}[0].onReasons[0]",
        keyword="maxLength",
        accepts=(_rule(onReasons=["A" * 64]),),
        refuses=(_rule(onReasons=["A" * 65]),),
        says="may not be more than 64",
    ),
)


def _params(kind: str, *, only_models: bool = False) -> list[Any]:
    return [
        pytest.param(*((constraint, change) if kind == "refuses" else (change,)), id=_name(constraint, change))
        for constraint in CONSTRAINTS
        if constraint.has_model or not only_models
        for change in getattr(constraint, kind)
    ]


def _name(constraint: Constraint, change: Change) -> str:
    values = ",".join(str(value)[:24] for value in change.values())
    return f"{constraint.path}-{constraint.keyword}-{values!r}".replace(" ", "_")


@pytest.mark.parametrize("change", _params("accepts", only_models=True))
def test_models_accept(change: Change) -> None:
    FineTuneJob.model_validate(build_job(change))


@pytest.mark.parametrize(("constraint", "change"), _params("refuses", only_models=True))
def test_models_refuse(constraint: Constraint, change: Change) -> None:
    with pytest.raises(ValidationError) as error:
        FineTuneJob.model_validate(build_job(change))

    places = {".".join(map(str, each["loc"])) for each in error.value.errors()}
    assert any(place.startswith(constraint.path.replace("[0]", ".0")) for place in places), places


@pytest.mark.apiserver
@pytest.mark.parametrize("change", _params("accepts"))
def test_the_api_server_accepts(api: Any, change: Change) -> None:
    status, answer = api.request("POST", PATH, build_job(change))

    assert 201 == status, answer["message"]


@pytest.mark.apiserver
@pytest.mark.parametrize(("constraint", "change"), _params("refuses"))
def test_the_api_server_refuses_and_says_what_is_allowed(api: Any, constraint: Constraint, change: Change) -> None:
    status, answer = api.request("POST", PATH, build_job(change))

    assert 422 == status, answer
    assert constraint.says in answer["message"]
    assert constraint.path.removesuffix("[0]") in answer["message"]
    assert "should match" not in answer["message"], "a person cannot read a regular expression"


def test_the_table_has_every_constraint_of_the_schema() -> None:
    schema = build_crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    in_schema = set(list_constraints("", schema))
    in_table = name_constraints(CONSTRAINTS, in_schema)

    assert in_schema == in_table | _TRANSITIONS
    assert all(constraint.accepts and constraint.refuses for constraint in CONSTRAINTS)


@pytest.mark.apiserver
@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param({}, {"managedBy": "kueue.x-k8s.io/multikueue"}, id="the default to another"),
        pytest.param({"managedBy": "kueue.x-k8s.io/multikueue"}, {"managedBy": "finetune.dev/operator"}, id="another to ours"),
        pytest.param({"managedBy": "kueue.x-k8s.io/multikueue"}, {"managedBy": None}, id="removed"),
    ],
)
def test_the_manager_of_a_job_cannot_be_changed(api: Any, before: Change, after: Change) -> None:
    path = PATH.partition("?")[0]
    job = build_job({f"spec.{key}": value for key, value in before.items()})
    name = api.create(path, job)["metadata"]["name"]
    merge = "application/merge-patch+json"
    refused = api.request("PATCH", f"{path}/{name}", {"spec": after}, type=merge)
    same = api.request("PATCH", f"{path}/{name}", {"spec": before | {"suspend": True}}, type=merge)
    api.delete(f"{path}/{name}")

    assert (422, 200) == (refused[0], same[0])
    assert "spec.managedBy" in refused[1]["message"]
    assert "managedBy cannot be changed; delete the FineTuneJob and create it again" in refused[1]["message"]


@pytest.mark.apiserver
def test_the_api_server_refuses_every_wrong_type(api: Any) -> None:
    schema = build_crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    wrong = {"string": 7, "integer": "seven", "number": "seven", "boolean": "yes", "object": "all", "array": "all"}
    for path, kind in _list_types("spec", schema["properties"]["spec"]):
        status, answer = api.request("POST", PATH, build_job({path: wrong[kind]}))

        assert 422 == status, path
        assert f"{path}: Invalid value" in answer["message"]
        assert f"must be of type {kind}" in answer["message"]


def build_job(change: Change) -> dict[str, Any]:
    """Return the smallest FineTuneJob with a change."""
    job: dict[str, Any] = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "pets"},
        "spec": {
            "task": "image-classification",
            "dataset": {"uri": "pvc://datasets/pets"},
            "output": {"uri": "pvc://models/pets"},
        },
    }
    for path, value in copy.deepcopy(change).items():
        *parents, last = path.split(".")
        node = job
        for parent in parents:
            node = node.setdefault(parent, {})
        if value is None:
            del node[last]
        else:
            node[last] = value
    return job


def _list_types(path: str, node: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield path, node["type"]
    for name, child in node.get("properties", {}).items():
        yield from _list_types(f"{path}.{name}", child)

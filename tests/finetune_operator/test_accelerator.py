"""From spec.accelerator and the accelerator classes to the shape of the pods."""

import json
from pathlib import Path
from typing import Any

import pytest
from accelerators import CASES, CHART_CLASSES, CLASSES, RAW_CLASSES, Case
from finetune_api.v1alpha1 import FineTuneJobSpec
from finetune_operator.accelerator_classes import AcceleratorClass, AcceleratorClasses
from finetune_operator.outcome import Outcome
from finetune_operator.policies.accelerator import PodShape, explain_missing_class, shape_pods
from finetune_operator.reconcile import reconcile
from pydantic import TypeAdapter, ValidationError
from world import SETTINGS, SPEC, World

_SPEC = {"task": "image-classification", "dataset": {"uri": "pvc://data"}, "output": {"uri": "pvc://models"}}
_SCHEMA = Path(__file__).resolve().parents[2] / "charts" / "finetune-operator" / "values.schema.json"
_NPU: dict[str, Any] = {"resource": "corp.test/npu", "device": "cpu", "backend": "gloo"}


def _spec(accelerator: dict[str, Any], **fields: Any) -> FineTuneJobSpec:
    return FineTuneJobSpec.model_validate(_SPEC | {"accelerator": accelerator} | fields)


def _shape(accelerator: dict[str, Any], **fields: Any) -> PodShape:
    return shape_pods(_spec(accelerator, **fields), CLASSES)


def _parse(**classes: Any) -> dict[str, AcceleratorClass]:
    return TypeAdapter(AcceleratorClasses).validate_python(classes)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_nodes_processes_device_and_backend(case: Case) -> None:
    shape = _shape(case.accelerator, **case.spec)

    assert (case.nodes, case.processes) == (shape.nodes, shape.processes_per_node)
    assert (case.device, case.backend) == (shape.device, shape.backend)


@pytest.mark.parametrize(
    ("accelerator", "resources"),
    [
        pytest.param({}, {}, id="cpu"),
        pytest.param({"nvidia": {"count": 8}}, {"nvidia.com/gpu": "8"}, id="nvidia"),
        pytest.param({"nvidia": {"mig": {"profile": "3g.40gb", "count": 2}}}, {"nvidia.com/mig-3g.40gb": "2"}, id="mig"),
        pytest.param(
            {"nvidia": {"mig": {"profile": "1g.10gb.me"}}}, {"nvidia.com/mig-1g.10gb.me": "1"}, id="mig with media engine"
        ),
        pytest.param({"amd": {}}, {"amd.com/gpu": "1"}, id="amd"),
        pytest.param({"gaudi": {"count": 2}}, {"habana.ai/gaudi": "2", "hugepages-2Mi": "9500Mi"}, id="gaudi"),
        pytest.param({"neuron": {"devices": 16}}, {"aws.amazon.com/neuron": "16"}, id="neuron devices"),
        pytest.param({"neuron": {"cores": 3}}, {"aws.amazon.com/neuroncore": "3"}, id="neuron cores"),
        pytest.param({"tpu": {"type": "tpu-v6e-slice", "topology": "1x1"}}, {"google.com/tpu": "1"}, id="one chip"),
        pytest.param({"tpu": {"type": "tpu-v6e-slice", "topology": "16x16"}}, {"google.com/tpu": "4"}, id="a host of many"),
        pytest.param({"deviceClass": {"name": "gpu.nvidia.com", "count": 4}}, {}, id="devices are claimed, not requested"),
        pytest.param({"custom": {"className": "npu", "count": 3}}, {"corp.test/npu": "3"}, id="custom"),
        pytest.param(
            {"custom": {"className": "nvidia", "count": 2}}, {"nvidia.com/gpu": "2"}, id="custom by a class of the chart"
        ),
    ],
)
def test_resources(accelerator: dict[str, Any], resources: dict[str, str]) -> None:
    assert resources == _shape(accelerator).resources


def test_cpu_pods_have_one_process_whatever_their_cpus() -> None:
    assert 1 == _shape({}, resources={"cpu": "64", "memory": "256Gi"}, nodes=3).processes_per_node


def test_a_job_by_device_class_claims_devices() -> None:
    shape = _shape({"custom": {"className": "nvidia-dra", "count": 2}})

    assert shape == _shape({"deviceClass": {"name": "gpu.nvidia.com", "count": 2}})
    assert shape.devices is not None
    assert ("gpu.nvidia.com", 2) == (shape.devices.device_class, shape.devices.count)


@pytest.mark.parametrize(
    ("nodes", "chips"),
    [pytest.param(None, 8, id="one host"), pytest.param(1, 8, id="one host as given"), pytest.param(2, 4, id="two")],
)
def test_nodes_decide_where_a_topology_has_two_kinds_of_hosts(nodes: int | None, chips: int) -> None:
    shape = _shape({"tpu": {"type": "tpu-v5-lite-podslice", "topology": "2x4"}}, nodes=nodes)

    assert ({"google.com/tpu": str(chips)}, chips) == (shape.resources, shape.processes_per_node)


@pytest.mark.parametrize(
    ("accelerator", "labels"),
    [
        pytest.param({"nvidia": {"count": 1}}, {}, id="any product"),
        pytest.param({"nvidia": {"count": 1, "product": "Tesla-T4"}}, {"nvidia.com/gpu.product": "Tesla-T4"}, id="a product"),
        pytest.param(
            {"nvidia": {"mig": {"profile": "1g.10gb"}, "product": "NVIDIA-H100-80GB-HBM3"}},
            {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"},
            id="slices of a product",
        ),
        pytest.param(
            {"tpu": {"type": "tpu-v4-podslice", "topology": "2x2x4"}},
            {"cloud.google.com/gke-tpu-accelerator": "tpu-v4-podslice", "cloud.google.com/gke-tpu-topology": "2x2x4"},
            id="a slice",
        ),
    ],
)
def test_node_labels(accelerator: dict[str, Any], labels: dict[str, str]) -> None:
    assert labels == _shape(accelerator).node_selector


@pytest.mark.parametrize(
    ("count", "memory", "size"),
    [
        pytest.param(1, "64Gi", "1024Mi", id="one process"),
        pytest.param(8, "64Gi", "8192Mi", id="eight processes"),
        pytest.param(8, "4Gi", "2048Mi", id="half of the pod's memory at most"),
        pytest.param(8, "3G", "1430Mi", id="decimal units"),
        pytest.param(1, "1Mi", "1Mi", id="never nothing"),
    ],
)
def test_shared_memory(count: int, memory: str, size: str) -> None:
    assert size == _shape({"nvidia": {"count": count}}, resources={"memory": memory}).shared_memory


def test_cpu_pods_keep_the_runtimes_shared_memory() -> None:
    assert _shape({}).shared_memory is None


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_no_class_is_missing(case: Case) -> None:
    assert explain_missing_class(_spec(case.accelerator), CLASSES) is None


@pytest.mark.parametrize(
    ("accelerator", "words"),
    [
        pytest.param({"custom": {"className": "ipu"}}, "no accelerator class ipu for this; it has amd, ", id="unknown class"),
        pytest.param({"custom": {"className": "mig"}}, "no accelerator class mig for this; it has amd, ", id="class with fields"),
        pytest.param(
            {"deviceClass": {"name": "gpu.corp.test"}},
            "no accelerator class has the deviceClass gpu.corp.test; those of the operator have gaudi.intel.com, ",
            id="unknown device class",
        ),
    ],
)
def test_a_missing_class_is_explained_with_those_that_exist(accelerator: dict[str, Any], words: str) -> None:
    message = explain_missing_class(_spec(accelerator), CLASSES)

    assert words in str(message)
    assert "mig," not in str(message), "it cannot be had as a custom class"


@pytest.mark.parametrize("case", [case for case in CASES if case.accelerator], ids=lambda case: case.name)
def test_without_classes_there_is_the_cpu_alone(case: Case) -> None:
    assert "none: correct spec.accelerator" in str(explain_missing_class(_spec(case.accelerator), {}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        pytest.param({"resource": None}, "give either resource or deviceClass", id="nothing to allocate"),
        pytest.param({"deviceClass": "npu.corp.test"}, "give either resource or deviceClass", id="two ways to allocate"),
        pytest.param({"device": "gpu"}, "npu.device", id="unknown device"),
        pytest.param({"backend": "mpi"}, "npu.backend", id="unknown backend"),
        pytest.param({"processes": 2}, "npu.processes", id="unknown field"),
        pytest.param({"processesPerAccelerator": 0}, "npu.processesPerAccelerator", id="no process"),
        pytest.param({"resource": "corp.test/npu-{size}"}, "{size} is unknown", id="unknown placeholder"),
        pytest.param({"nodeSelector": {"pool": "{Product}"}}, "{Product} is unknown", id="unknown placeholder in a label"),
        pytest.param({"extraResources": {"memory": "1Gi"}}, "memory is for the job to say", id="memory"),
        pytest.param({"environment": {"HOME": "/"}}, "HOME is set by the operator", id="variable of the operator"),
        pytest.param({"environment": {"FINETUNE_X": "1"}}, "a variable of the operator's own", id="reserved variable"),
        pytest.param({"environment": {"A B": "1"}}, "must be that of an environment variable", id="no variable"),
        pytest.param({"tolerations": [{"keys": "a"}]}, "npu.tolerations.0.keys", id="unknown field of a toleration"),
    ],
)
def test_a_wrong_class_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as error:
        _parse(npu={key: value for key, value in (_NPU | fields).items() if value is not None})

    told = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.value.errors()]
    assert any(message in each and "npu" in each for each in told), told


def test_two_classes_of_one_device_class_are_refused() -> None:
    claim = {"deviceClass": "gpu.corp.test", "device": "cuda", "backend": "nccl"}

    with pytest.raises(ValidationError, match=r"2 classes have the deviceClass gpu\.corp\.test"):
        _parse(a=claim, b=claim)


def test_a_name_that_no_job_could_refer_to_is_refused() -> None:
    with pytest.raises(ValidationError, match="name must be that of a Kubernetes object"):
        _parse(**{"My NPU": _NPU})


def test_the_chart_knows_every_field_of_a_class() -> None:
    schema = json.loads(_SCHEMA.read_text(encoding="utf-8"))["properties"]["accelerators"]["additionalProperties"]
    fields = {str(field.alias): field.is_required() for field in AcceleratorClass.model_fields.values()}

    assert set(fields) == set(schema["properties"])
    assert {name for name, is_required in fields.items() if is_required} == set(schema["required"])


def test_every_class_of_the_chart_is_used_by_a_case_or_claims_devices() -> None:
    used = {"nvidia", "mig", "amd", "gaudi", "neuron", "neuroncore", "tpu"}

    assert used == {name for name, each in CHART_CLASSES.items() if "resource" in each}
    assert set(CHART_CLASSES) < set(RAW_CLASSES)


def _reconcile(world: World, **classes: AcceleratorClass) -> Outcome:
    settings = SETTINGS.model_copy(update={"accelerators": classes})
    return reconcile(world.job, world.observed, now=world.now, settings=settings)


def test_a_job_without_its_class_waits_and_says_so() -> None:
    world = World(spec=SPEC | {"accelerator": {"custom": {"className": "npu"}}}).settle()

    assert ("AcceleratorClassNotFound", {}) == (world.state, world.children)
    assert "the operator has no accelerator class npu for this; it has" in world.message
    assert [("Warning", "AcceleratorClassNotFound")] == world.events
    assert Outcome() == world.wait(3600).reconcile(), "nothing to do and no time to look again, until something changes"


def test_a_job_starts_when_its_class_is_there() -> None:
    world = World(spec=SPEC | {"accelerator": {"custom": {"className": "npu"}}}).settle()

    (manifest,) = _reconcile(world, npu=CLASSES["npu"]).apply
    assert "Job" == manifest["kind"]


def test_a_class_that_goes_leaves_running_attempts_alone() -> None:
    world = World(spec=SPEC | {"accelerator": {"custom": {"className": "npu"}}}).settle()
    world.carry_out(_reconcile(world, npu=CLASSES["npu"]))
    world.run()

    assert "Running" == world.state
    assert ("Retrying", "AcceleratorClassNotFound") == (world.exit(1).state, world.wait(3600).settle().state)


def test_a_job_without_its_class_fails_at_its_start_deadline() -> None:
    spec = SPEC | {"accelerator": {"custom": {"className": "npu"}}, "runPolicy": {"startDeadlineSeconds": 60}}
    world = World(spec=spec).settle().wait(60).settle()

    assert ("Failed", "AcceleratorClassNotFound") == (world.state, world.cause[1])


def test_another_accelerator_mends_it() -> None:
    world = World(spec=SPEC | {"accelerator": {"custom": {"className": "npu"}}}).settle().change(accelerator={}).settle()

    assert ("Pending", 1) == (world.state, len(world.children))


def test_devices_are_claimed_before_the_job_and_the_service_is_there() -> None:
    accelerator = {"deviceClass": {"name": "gpu.nvidia.com"}}
    world = World(spec=SPEC | {"accelerator": accelerator, "nodes": 2})

    kinds = [each["kind"] for each in _reconcile(world, **CLASSES).apply]
    assert ["ResourceClaimTemplate", "Service", "Job"] == kinds

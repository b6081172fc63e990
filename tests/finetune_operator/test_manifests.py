"""The child Job as YAML, and the promises it keeps."""

from collections.abc import Callable
from typing import Any

import pytest
import yaml
from accelerators import CASES, CLASSES, Case
from finetune_api.contract import TrainerConfig
from finetune_api.v1alpha1 import FineTuneJobSpec
from finetune_operator.manifests.claim import build_claim_template
from finetune_operator.manifests.job import build_job
from finetune_operator.manifests.service import build_service
from finetune_operator.policies.accelerator import DeviceRequest, shape_pods
from finetune_operator.settings import TrainerSettings
from world import build_view

_SETTINGS = TrainerSettings(
    image="trainer:1", report_url="https://operator.finetune.svc:10443", report_ca="-- CA --\n", accelerators=CLASSES
)


_JOB = build_view(uid="0b6e")


_DEVICES = DeviceRequest(device_class="gpu.nvidia.com", count=2)


def _build(settings: TrainerSettings = _SETTINGS, micro_batch_divisor: int = 1, **fields: Any) -> dict[str, Any]:
    spec = FineTuneJobSpec.model_validate(
        {"task": "image-classification", "dataset": {"uri": "pvc://data/pictures"}, "output": {"uri": "pvc://models/out"}}
        | fields
    )
    shape = shape_pods(spec, settings.accelerators)
    return build_job(_JOB, spec, attempt=2, shape=shape, micro_batch_divisor=micro_batch_divisor, settings=settings)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        pytest.param("job-minimal.yaml", {}, id="fewest fields"),
        pytest.param(
            "job-own-model.yaml",
            {
                "model": {"uri": "pvc://models/base"},
                "method": {"type": "full"},
                "hyperparameters": {"maxSteps": 50, "imageSize": 128, "seed": 3},
                "resources": {"cpu": "500m", "memory": "1Gi"},
                "budget": {"trainingSeconds": 120},
            },
            id="own model, steps and a budget",
        ),
        pytest.param(
            "job-checkpoints.yaml",
            {"checkpoint": {"uri": "pvc://checkpoints/emoji", "intervalSeconds": 30, "keep": 5}},
            id="checkpoints on a volume of their own",
        ),
        pytest.param(
            "job-object-store.yaml",
            {"checkpoint": {"uri": "s3://bucket/emoji", "secretRef": {"name": "keys"}}},
            id="checkpoints in an object store",
        ),
        pytest.param("job-many-nodes.yaml", {"nodes": 4}, id="many nodes"),
    ],
)
def test_job_is_the_golden_one(golden: Callable[[str, str], None], name: str, fields: dict[str, Any]) -> None:
    golden(name, yaml.safe_dump(_build(**fields), sort_keys=False))


def test_service_is_the_golden_one_and_has_the_pods(golden: Callable[[str, str], None]) -> None:
    service = build_service(_JOB)
    template = _build(nodes=4)["spec"]["template"]

    golden("service.yaml", yaml.safe_dump(service, sort_keys=False))
    assert service["metadata"]["name"] == template["spec"]["subdomain"]
    assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_job_on_each_accelerator_is_the_golden_one(golden: Callable[[str, str], None], case: Case) -> None:
    job = _build(accelerator=case.accelerator, **case.spec)

    golden(f"accelerator-{case.name}.yaml", yaml.safe_dump(job, sort_keys=False))


def test_claim_template_is_the_golden_one(golden: Callable[[str, str], None]) -> None:
    golden("claim-template.yaml", yaml.safe_dump(build_claim_template(_JOB, _DEVICES), sort_keys=False))


def test_pods_claim_from_the_template_of_their_job() -> None:
    pod = _build(accelerator={"deviceClass": {"name": "gpu.nvidia.com", "count": 2}})["spec"]["template"]["spec"]

    (claim,) = pod["resourceClaims"]
    assert build_claim_template(_JOB, _DEVICES)["metadata"]["name"] == claim["resourceClaimTemplateName"]
    assert [{"name": claim["name"]}] == pod["containers"][0]["resources"]["claims"]


@pytest.mark.parametrize(
    "devices",
    [
        pytest.param(DeviceRequest(device_class="gpu.nvidia.com", count=3), id="another count"),
        pytest.param(DeviceRequest(device_class="gpu.amd.com", count=2), id="another class"),
    ],
)
def test_other_devices_have_a_template_of_their_own(devices: DeviceRequest) -> None:
    others = build_claim_template(_JOB, devices)

    assert build_claim_template(_JOB, _DEVICES)["metadata"]["name"] != others["metadata"]["name"]


def test_configuration_in_the_pod_reads_back() -> None:
    container = _build(hyperparameters={"maxSteps": 5})["spec"]["template"]["spec"]["containers"][0]
    value = next(each["value"] for each in container["env"] if each["name"] == "FINETUNE_TRAINER_CONFIG")

    config = TrainerConfig.model_validate_json(value)

    assert ("/mnt/dataset/pictures", "/mnt/output/out", 5, 2) == (
        config.dataset_path,
        config.output_path,
        config.hyperparameters.max_steps,
        config.attempt,
    )


def test_only_the_output_is_writable() -> None:
    mounts = _build(model={"uri": "pvc://models/base"})["spec"]["template"]["spec"]["containers"][0]["volumeMounts"]

    assert ["/mnt/output", "/tmp"] == [each["mountPath"] for each in mounts if not each.get("readOnly")]


def test_a_claim_that_serves_twice_is_one_volume() -> None:
    pod = _build(model={"uri": "pvc://models/base"}, dataset={"uri": "pvc://models/data"})["spec"]["template"]["spec"]

    claims = [each["persistentVolumeClaim"]["claimName"] for each in pod["volumes"] if "persistentVolumeClaim" in each]
    mounts = {each["mountPath"]: each["name"] for each in pod["containers"][0]["volumeMounts"]}
    assert ["models"] == claims
    assert ("model", "model", "model") == (mounts["/mnt/model"], mounts["/mnt/dataset"], mounts["/mnt/output"])


def test_checkpoints_beside_the_output_need_no_second_volume() -> None:
    pod = _build(checkpoint={"uri": "pvc://models/checkpoints"})["spec"]["template"]["spec"]

    claims = [each["persistentVolumeClaim"]["claimName"] for each in pod["volumes"] if "persistentVolumeClaim" in each]
    mounts = {each["mountPath"]: each["name"] for each in pod["containers"][0]["volumeMounts"]}
    assert ["data", "models"] == claims
    assert ("output", "output") == (mounts["/mnt/output"], mounts["/mnt/checkpoint"])


def test_trainer_is_told_its_grace_period_and_its_micro_batch() -> None:
    settings = _SETTINGS.model_copy(update={"termination_grace_seconds": 90})
    template = _build(settings=settings, micro_batch_divisor=4)["spec"]["template"]["spec"]
    value = next(each["value"] for each in template["containers"][0]["env"] if each["name"] == "FINETUNE_TRAINER_CONFIG")

    config = TrainerConfig.model_validate_json(value)

    assert (90, 90, 4) == (template["terminationGracePeriodSeconds"], config.grace_seconds, config.micro_batch_divisor)

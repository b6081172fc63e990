"""Every constraint of a FineTuneProfile, held by the models and by a real kube-apiserver alike: one table for both."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from constraint_table import Constraint, list_constraints, name_constraints
from finetune_api.crd import build_profile_crd
from finetune_api.profile import FineTuneProfile, FineTuneProfileSpec
from pydantic import ValidationError

_PATH = "/apis/finetune.dev/v1alpha1/finetuneprofiles?dryRun=All&fieldValidation=Strict"

Spec = dict[str, Any]


def _volume(**fields: Any) -> Spec:
    return {"volumes": [{"name": "cache", "mountPath": "/mnt/cache", "claimName": "cache"} | fields]}


def _variable(name: str, value: str = "") -> Spec:
    return {"environment": [{"name": name, "value": value}]}


def _toleration(**fields: Any) -> Spec:
    return {"tolerations": [fields]}


def _limit(**fields: Any) -> Spec:
    return {"limits": fields}


def _objects(path: str, *, build: Any) -> Iterator[Constraint]:
    """Yield the constraints of a name of a Kubernetes object."""
    yield Constraint(path, "minLength", (build("a"),), (build(""),), "should be at least 1 chars long")
    yield Constraint(path, "maxLength", (build("a" * 253),), (build("a" * 254),), "may not be more than 253")
    refuses = (build("-a"), build("A"), build("a_b"))
    yield Constraint(path, "name must be that", (build("a-b.c"),), refuses, "name must be that of a Kubernetes object")


_SECONDS = "tolerationSeconds"
_MANY_VOLUMES = [{"name": f"v{number}", "mountPath": f"/v/{number}", "claimName": "c"} for number in range(9)]
_MANY_VARIABLES = [{"name": f"V{number}", "value": ""} for number in range(33)]
_SCHEMES = ["pvc", "s3", "timm"]

CONSTRAINTS = (
    Constraint(
        "spec",
        "two volumes have",
        ({"volumes": _MANY_VOLUMES[:8]},),
        ({"volumes": [_MANY_VOLUMES[0], _MANY_VOLUMES[0] | {"name": "other"}]},),
        "two volumes have the same mountPath",
    ),
    Constraint("spec.image", "maxLength", ({"image": "a" * 512},), ({"image": "a" * 513},), "may not be more than 512"),
    Constraint(
        "spec.accelerator",
        "accelerator has more",
        ({"accelerator": {}}, {"accelerator": {"nvidia": {"count": 1}}}),
        ({"accelerator": {"nvidia": {"count": 1}, "amd": {}}},),
        "accelerator has more than one",
    ),
    Constraint(
        "spec.limits.accelerators",
        "maxItems",
        (_limit(accelerators=["cpu", "nvidia", "amd", "gaudi", "neuron", "tpu", "deviceClass", "custom"]),),
        (_limit(accelerators=["cpu"] * 9),),
        "must have at most 8 items",
    ),
    Constraint(
        "spec.limits.accelerators",
        "x-kubernetes-list-type",
        (_limit(accelerators=["cpu", "tpu"]),),
        (_limit(accelerators=["tpu", "tpu"]),),
        "Duplicate value",
        has_model=False,
    ),
    Constraint(
        "spec.limits.accelerators[0]",
        "enum",
        (_limit(accelerators=["cpu"]),),
        (_limit(accelerators=["gpu"]),),
        "supported values",
    ),
    Constraint(
        "spec.limits.maxAccelerators",
        "minimum",
        (_limit(maxAccelerators=0),),
        (_limit(maxAccelerators=-1),),
        "greater than or equal to 0",
    ),
    Constraint(
        "spec.limits.maxAccelerators",
        "maximum",
        (_limit(maxAccelerators=100_000),),
        (_limit(maxAccelerators=100_001),),
        "less than or equal to 100000",
    ),
    Constraint("spec.limits.maxNodes", "minimum", (_limit(maxNodes=1),), (_limit(maxNodes=0),), "greater than or equal to 1"),
    Constraint(
        "spec.limits.maxNodes", "maximum", (_limit(maxNodes=1024),), (_limit(maxNodes=1025),), "less than or equal to 1024"
    ),
    Constraint(
        "spec.nodeSelector",
        "maxProperties",
        ({"nodeSelector": {f"label{number}": "x" for number in range(16)}},),
        ({"nodeSelector": {f"label{number}": "x" for number in range(17)}},),
        "must have at most 16 items",
    ),
    Constraint(
        "spec.nodeSelector.*",
        "maxLength",
        ({"nodeSelector": {"a": "x" * 63}},),
        ({"nodeSelector": {"a": "x" * 64}},),
        "may not be more than 63",
    ),
    Constraint(
        "spec.tolerations",
        "maxItems",
        ({"tolerations": [{"operator": "Exists"}] * 16},),
        ({"tolerations": [{"operator": "Exists"}] * 17},),
        "must have at most 16 items",
    ),
    Constraint(
        "spec.tolerations[0]",
        "a toleration without a key",
        (_toleration(operator="Exists"), _toleration(key="a")),
        (_toleration(), _toleration(operator="Equal")),
        "give it the operator Exists, or a key",
    ),
    Constraint(
        "spec.tolerations[0]",
        "a toleration with the operator Exists",
        (_toleration(key="a", value="b"), _toleration(key="a", operator="Equal", value="b")),
        (_toleration(key="a", operator="Exists", value="b"),),
        "with the operator Exists has no value",
    ),
    Constraint(
        "spec.tolerations[0]",
        "tolerationSeconds needs",
        (_toleration(key="a", effect="NoExecute", tolerationSeconds=1),),
        (_toleration(key="a", effect="NoSchedule", tolerationSeconds=1), _toleration(key="a", tolerationSeconds=1)),
        "tolerationSeconds needs the effect NoExecute",
    ),
    Constraint(
        "spec.tolerations[0].key", "maxLength", (_toleration(key="a" * 317),), (_toleration(key="a" * 318),), "more than 317"
    ),
    Constraint(
        "spec.tolerations[0].value",
        "maxLength",
        (_toleration(key="a", value="b" * 63),),
        (_toleration(key="a", value="b" * 64),),
        "may not be more than 63",
    ),
    Constraint(
        "spec.tolerations[0].operator",
        "enum",
        (_toleration(key="a", operator="Exists"),),
        (_toleration(key="a", operator="In"),),
        "supported values",
    ),
    Constraint(
        "spec.tolerations[0].effect",
        "enum",
        tuple(_toleration(key="a", effect=effect) for effect in ("NoSchedule", "PreferNoSchedule", "NoExecute")),
        (_toleration(key="a", effect="Never"),),
        "supported values",
    ),
    Constraint(
        "spec.tolerations[0].tolerationSeconds",
        "minimum",
        (_toleration(key="a", effect="NoExecute", tolerationSeconds=0),),
        (_toleration(key="a", effect="NoExecute", tolerationSeconds=-1),),
        "greater than or equal to 0",
    ),
    *_objects("spec.priorityClassName", build=lambda name: {"priorityClassName": name}),
    Constraint(
        "spec.volumes", "maxItems", ({"volumes": _MANY_VOLUMES[:8]},), ({"volumes": _MANY_VOLUMES},), "must have at most 8 items"
    ),
    Constraint(
        "spec.volumes",
        "x-kubernetes-list-type",
        ({"volumes": _MANY_VOLUMES[:2]},),
        ({"volumes": [_MANY_VOLUMES[0], _MANY_VOLUMES[1] | {"name": "v0"}]},),
        "Duplicate value",
        has_model=False,
    ),
    Constraint(
        "spec.volumes[0]",
        "required",
        (_volume(),),
        ({"volumes": [{"mountPath": "/a", "claimName": "c"}]}, {"volumes": [{"name": "a", "claimName": "c"}]}),
        "Required value",
    ),
    Constraint(
        "spec.volumes[0]",
        "give either",
        (_volume(), {"volumes": [{"name": "a", "mountPath": "/a", "configMapName": "c"}]}),
        (_volume(configMapName="c"), {"volumes": [{"name": "a", "mountPath": "/a"}]}),
        "give either claimName or configMapName",
    ),
    Constraint(
        "spec.volumes[0]",
        "mountPath is one",
        (_volume(mountPath="/mnt/datasets"), _volume(mountPath="/mnt"), _volume(mountPath="/var/run/other")),
        (
            *(_volume(mountPath=f"/mnt/{name}") for name in ("dataset", "model", "output", "checkpoint", "output/deeper")),
            *(_volume(mountPath=path) for path in ("/var/run/finetune/token", "/tmp", "/dev/shm", "/proc", "/sys")),
        ),
        "mountPath is one of the trainer's own",
    ),
    Constraint(
        "spec.volumes[0].name", "maxLength", (_volume(name="a" * 40),), (_volume(name="a" * 41),), "may not be more than 40"
    ),
    Constraint(
        "spec.volumes[0].name",
        "name must be",
        (_volume(name="a-1"),),
        (_volume(name=""), _volume(name="A"), _volume(name="a.b"), _volume(name="a-")),
        "name must be lower-case letters, digits and '-'",
    ),
    Constraint(
        "spec.volumes[0].mountPath",
        "maxLength",
        (_volume(mountPath="/" + "a" * 254),),
        (_volume(mountPath="/" + "a" * 255),),
        "may not be more than 255",
    ),
    Constraint(
        "spec.volumes[0].mountPath",
        "mountPath must be",
        (_volume(mountPath="/a/b-c.d_e"),),
        (_volume(mountPath="a"), _volume(mountPath="/"), _volume(mountPath="/a:b"), _volume(mountPath="")),
        "mountPath must be an absolute path",
    ),
    *_objects("spec.volumes[0].claimName", build=lambda name: _volume(claimName=name)),
    *_objects(
        "spec.volumes[0].configMapName",
        build=lambda name: {"volumes": [{"name": "a", "mountPath": "/a", "configMapName": name}]},
    ),
    Constraint(
        "spec.environment",
        "maxItems",
        ({"environment": _MANY_VARIABLES[:32]},),
        ({"environment": _MANY_VARIABLES},),
        "must have at most 32 items",
    ),
    Constraint(
        "spec.environment",
        "x-kubernetes-list-type",
        ({"environment": _MANY_VARIABLES[:2]},),
        ({"environment": _MANY_VARIABLES[:1] * 2},),
        "Duplicate value",
        has_model=False,
    ),
    Constraint(
        "spec.environment[0]",
        "required",
        (_variable("A"),),
        ({"environment": [{"name": "A"}]}, {"environment": [{"value": "a"}]}),
        "Required value",
    ),
    Constraint(
        "spec.environment[0]",
        "name begins like",
        (_variable("HF_HOME"), _variable("NOT_FINETUNE_"), _variable("finetune_x")),
        tuple(map(_variable, ("FINETUNE_X", "KUBEFLOW_X", "PET_X", "MASTER_ADDR", "JOB_COMPLETION_INDEX"))),
        "name begins like a variable of the operator's own",
    ),
    Constraint("spec.environment[0].name", "maxLength", (_variable("A" * 128),), (_variable("A" * 129),), "more than 128"),
    Constraint(
        "spec.environment[0].name",
        "name must be",
        (_variable("a_1"),),
        (_variable(""), _variable("1a"), _variable("a-b"), _variable("a=b")),
        "name must be that of an environment variable",
    ),
    Constraint(
        "spec.environment[0].value", "maxLength", (_variable("A", "a" * 1024),), (_variable("A", "a" * 1025),), "more than 1024"
    ),
    Constraint(
        "spec.allowedUriSchemes",
        "maxItems",
        ({"allowedUriSchemes": _SCHEMES},),
        ({"allowedUriSchemes": _SCHEMES * 3},),
        "must have at most 8 items",
    ),
    Constraint(
        "spec.allowedUriSchemes",
        "x-kubernetes-list-type",
        ({"allowedUriSchemes": _SCHEMES},),
        ({"allowedUriSchemes": ["pvc", "pvc"]},),
        "Duplicate value",
        has_model=False,
    ),
    Constraint(
        "spec.allowedUriSchemes[0]",
        "enum",
        ({"allowedUriSchemes": ["s3"]},),
        ({"allowedUriSchemes": ["hf"]},),
        "supported values",
    ),
    Constraint(
        "spec.budget.trainingSeconds",
        "minimum",
        ({"budget": {"trainingSeconds": 10}},),
        ({"budget": {"trainingSeconds": 9}},),
        "greater than or equal to 10",
    ),
    Constraint(
        "spec.budget.trainingSeconds",
        "maximum",
        ({"budget": {"trainingSeconds": 31_536_000}},),
        ({"budget": {"trainingSeconds": 31_536_001}},),
        "less than or equal to 31536000",
    ),
    Constraint(
        "spec.pricePerAcceleratorHour",
        "maxLength",
        ({"pricePerAcceleratorHour": "999999.9999"},),
        ({"pricePerAcceleratorHour": "1" * 13},),
        "may not be more than 12",
    ),
    Constraint(
        "spec.pricePerAcceleratorHour",
        "pricePerAcceleratorHour must be",
        ({"pricePerAcceleratorHour": "0"}, {"pricePerAcceleratorHour": "2.49"}),
        tuple({"pricePerAcceleratorHour": price} for price in ("", "-1", "1.23456", ".5", "1e3", "2,49", "$1")),
        "pricePerAcceleratorHour must be a decimal number",
    ),
)


def _build(spec: Spec) -> dict[str, Any]:
    return {
        "apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneProfile", "metadata": {"name": "team"}, "spec": spec
    }  # fmt: skip


def _params(kind: str, *, only_models: bool = False) -> list[Any]:
    return [
        pytest.param(
            *((each, spec) if kind == "refuses" else (spec,)), id=f"{each.path}-{each.keyword}-{number}".replace(" ", "_")
        )
        for each in CONSTRAINTS
        if each.has_model or not only_models
        for number, spec in enumerate(getattr(each, kind))
    ]


@pytest.mark.parametrize("spec", _params("accepts"))
def test_models_accept(spec: Spec) -> None:
    FineTuneProfile.model_validate(_build(spec))


@pytest.mark.parametrize(("constraint", "spec"), _params("refuses", only_models=True))
def test_models_refuse(constraint: Constraint, spec: Spec) -> None:
    with pytest.raises(ValidationError) as error:
        FineTuneProfile.model_validate(_build(spec))

    places = {".".join(map(str, each["loc"])) for each in error.value.errors()}
    assert any(place.startswith(constraint.path.replace("[0]", ".0").removesuffix(".*")) for place in places), places


@pytest.mark.apiserver
@pytest.mark.parametrize("spec", _params("accepts"))
def test_the_api_server_accepts(api: Any, spec: Spec) -> None:
    status, answer = api.request("POST", _PATH, _build(spec))

    assert 201 == status, answer["message"]


@pytest.mark.apiserver
@pytest.mark.parametrize(("constraint", "spec"), _params("refuses"))
def test_the_api_server_refuses_and_says_what_is_allowed(api: Any, constraint: Constraint, spec: Spec) -> None:
    status, answer = api.request("POST", _PATH, _build(spec))

    assert 422 == status, answer
    assert constraint.says in answer["message"]
    assert constraint.path.removesuffix("[0]").removesuffix(".*") in answer["message"]
    assert "should match" not in answer["message"], "a person cannot read a regular expression"


@pytest.mark.apiserver
def test_the_api_server_accepts_the_example(api: Any) -> None:
    example = Path(__file__).parents[2] / "examples" / "profile.yaml"
    status, answer = api.request("POST", _PATH, yaml.safe_load(example.read_text(encoding="utf-8")))

    assert 201 == status, answer["message"]


@pytest.mark.apiserver
def test_profile_without_anything_limits_nothing(api: Any) -> None:
    status, answer = api.request("POST", _PATH, _build({}))

    assert 201 == status, answer
    assert FineTuneProfileSpec() == FineTuneProfile.model_validate(answer).spec


def test_the_table_has_every_constraint_of_the_schema() -> None:
    """Those of the accelerator's members are the same as a FineTuneJob's, and in its table."""
    schema = build_profile_crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    in_schema = {each for each in list_constraints("", schema) if not each[0].startswith("spec.accelerator.")}
    in_table = name_constraints(CONSTRAINTS, in_schema)

    assert in_schema == in_table
    assert all(constraint.accepts and constraint.refuses for constraint in CONSTRAINTS)

"""The contract: configuration, run, claims, names."""

import json
import re
from typing import Any

import pytest
from finetune_api import names
from finetune_api.contract import (
    NEVER_RETRIED,
    ExitCode,
    TrainerConfig,
    TrainerReport,
    build_trainer_config,
    claim_of,
    compute_pod_shape,
    compute_run,
    resolve_mount,
)
from finetune_api.v1alpha1 import FineTuneJobSpec
from pydantic import ValidationError

_SPEC: dict[str, Any] = {
    "task": "image-classification",
    "dataset": {"uri": "pvc://datasets/pets"},
    "output": {"uri": "pvc://models/pets"},
}


def _spec(**changes: Any) -> FineTuneJobSpec:
    return FineTuneJobSpec.model_validate(_SPEC | changes)


def _config(spec: FineTuneJobSpec) -> TrainerConfig:
    return build_trainer_config(spec, namespace="team", name="pets", attempt=2)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"model": {"uri": "timm://resnet18"}}, id="model"),
        pytest.param({"dataset": {"uri": "pvc://datasets/other"}}, id="dataset uri"),
        pytest.param({"dataset": {"uri": "pvc://datasets/pets", "format": "csv"}}, id="dataset format"),
        pytest.param({"dataset": {"uri": "pvc://datasets/pets", "testFraction": 0.2}}, id="split"),
        pytest.param({"method": {"type": "full"}}, id="method"),
        pytest.param({"hyperparameters": {"seed": 1}}, id="seed"),
        pytest.param({"hyperparameters": {"epochs": 3}}, id="epochs"),
        pytest.param({"budget": {"trainingSeconds": 60}}, id="budget"),
        pytest.param({"output": {"uri": "pvc://models/other"}}, id="output"),
    ],
)
def test_a_training_field_starts_a_new_run(changes: dict[str, Any]) -> None:
    assert compute_run(_spec()) != compute_run(_spec(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"suspend": True}, id="suspend"),
        pytest.param({"runPolicy": {"backoffLimit": 9}}, id="run policy"),
        pytest.param({"resources": {"cpu": "8", "memory": "16Gi"}}, id="resources"),
        pytest.param({"method": {"type": "auto"}}, id="a default spelt out"),
        pytest.param({"hyperparameters": {"seed": 0, "precision": "auto"}}, id="defaults of an object spelt out"),
        pytest.param({"budget": {}}, id="an empty object"),
        pytest.param({"futureField": 1}, id="a field of a later version"),
    ],
)
def test_other_fields_keep_the_run(changes: dict[str, Any]) -> None:
    assert compute_run(_spec()) == compute_run(_spec(**changes))


def test_the_order_of_fields_does_not_change_the_run() -> None:
    turned = dict(reversed([*_SPEC.items(), ("hyperparameters", {"seed": 1, "imageSize": 64})]))

    assert compute_run(_spec(hyperparameters={"imageSize": 64, "seed": 1})) == compute_run(_spec(**turned))


def test_a_run_is_stable_over_versions() -> None:
    """A change of this value starts every job of every user anew."""
    assert "26886db3" == compute_run(_spec())


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"resources": {"cpu": "4"}}, id="cpu"),
        pytest.param({"resources": {"memory": "8Gi"}}, id="memory"),
        pytest.param({"nodes": 2}, id="nodes"),
        pytest.param({"accelerator": {"nvidia": {"count": 1}}}, id="accelerator"),
        pytest.param({"profileRef": {"name": "large"}}, id="profile"),
    ],
)
def test_what_the_pods_request_decides_on_their_shape_and_not_on_the_run(changes: dict[str, Any]) -> None:
    assert compute_pod_shape(_spec()) != compute_pod_shape(_spec(**changes))
    assert compute_run(_spec()) == compute_run(_spec(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"resources": {"cpu": "2", "memory": "4Gi"}}, id="default resources spelt out"),
        pytest.param({"accelerator": {}}, id="no accelerator"),
        pytest.param({"nodes": 1}, id="one node"),
        pytest.param({"hyperparameters": {"seed": 3}}, id="training settings"),
    ],
)
def test_the_rest_keeps_the_pod_shape(changes: dict[str, Any]) -> None:
    assert compute_pod_shape(_spec()) == compute_pod_shape(_spec(**changes))


def test_a_pod_shape_is_stable_over_versions() -> None:
    """A change of this value replaces the pods of every running job."""
    assert "814a87f8" == compute_pod_shape(_spec())


@pytest.mark.parametrize(
    ("uri", "claim", "path"),
    [
        pytest.param("pvc://data", "data", "/mnt/x", id="whole claim"),
        pytest.param("pvc://data/a", "data", "/mnt/x/a", id="folder"),
        pytest.param("pvc://my-data/a/b.c", "my-data", "/mnt/x/a/b.c", id="folder below"),
    ],
)
def test_claims_and_their_mounts(uri: str, claim: str, path: str) -> None:
    assert claim == claim_of(uri)
    assert path == resolve_mount(uri, mount="/mnt/x")


def test_other_schemes_have_no_claim() -> None:
    assert claim_of("timm://resnet18") is None


def test_the_configuration_resolves_claims_to_mounts() -> None:
    config = _config(_spec(model={"uri": "pvc://models/base"}))

    assert "/mnt/model/base" == config.model_path
    assert "/mnt/dataset/pets" == config.dataset_path
    assert "/mnt/output/pets" == config.output_path
    assert "/mnt/output/pets/.finetune" == config.work_path


def test_a_model_that_the_trainer_finds_itself_has_no_path() -> None:
    assert _config(_spec()).model_path is None


def test_local_paths_stand_in_for_claims() -> None:
    config = build_trainer_config(
        _spec(), namespace="team", name="pets", attempt=1, dataset_path="/home/me/pets", output_path="/home/me/out"
    )

    assert ("/home/me/pets", "/home/me/out") == (config.dataset_path, config.output_path)
    assert "pvc://datasets/pets" == config.dataset_uri


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="defaults"),
        pytest.param({"model": {"uri": "pvc://models/base"}, "budget": {"trainingSeconds": 60}}, id="model and budget"),
        pytest.param({"hyperparameters": {"learningRate": 0.1, "maxSteps": 3, "batchSize": 8}}, id="hyperparameters"),
    ],
)
def test_the_configuration_survives_its_way_to_the_trainer(changes: dict[str, Any]) -> None:
    config = _config(_spec(**changes))
    text = config.model_dump_json(by_alias=True, exclude_none=True)

    assert config == TrainerConfig.model_validate_json(text)
    assert (config.run, config.attempt) == (compute_run(_spec(**changes)), 2)
    assert len(text) < 4096


def test_the_configuration_refuses_fields_it_does_not_know() -> None:
    values = json.loads(_config(_spec()).model_dump_json(by_alias=True))

    with pytest.raises(ValidationError, match="futureField"):
        TrainerConfig.model_validate(values | {"futureField": 1})


def test_a_report_of_another_trainer_may_say_more_than_we_read() -> None:
    report = TrainerReport.model_validate({"trainerStatus": {"progressPercentage": 5, "extra": 1}, "extra": {}})

    assert 5 == report.trainer_status.progress_percentage


@pytest.mark.parametrize("percentage", [-1, 101, "much"])
def test_a_report_with_an_impossible_progress_is_refused(percentage: Any) -> None:
    with pytest.raises(ValidationError):
        TrainerReport.model_validate({"trainerStatus": {"progressPercentage": percentage}})


def test_the_users_mistakes_are_never_retried() -> None:
    assert {64, 65, 78} == set(map(int, NEVER_RETRIED))
    assert len(set(ExitCode)) == len(ExitCode.__members__)


def test_the_longest_names_fit_into_host_names() -> None:
    job = "a" * names.MAX_NAME_LENGTH
    host = f"{names.child_name(job, compute_run(_spec()), 999)}-9999"

    assert len(host) <= 63
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", host)


def test_reports_are_posted_where_kubeflow_trainers_post_them() -> None:
    expected = "/apis/trainer.kubeflow.org/v1alpha1/namespaces/team/trainjobs/pets/status"

    assert expected == names.report_path("team", "pets")

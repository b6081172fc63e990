import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from finetune_api.contract import TrainerConfig, TrainerReport
from finetune_trainer import tune
from finetune_trainer.budget import Budget
from finetune_trainer.errors import InvalidSpecError, PreemptedError
from finetune_trainer.progress import Phase, Progress
from finetune_trainer.publish import read_published
from finetune_trainer.run import run

FULL = {"method": {"type": "full"}, "hyperparameters": {"imageSize": 32, "maxSteps": 12, "batchSize": 8, "seed": 3}}


def read_metrics(output: Path) -> dict[str, Any]:
    return json.loads((output / "metrics.json").read_text())


def metric(report: TrainerReport, name: str) -> float:
    assert report.result is not None
    return next(float(item.value) for item in report.result.metrics if item.name == name)


def test_probe_publishes_a_complete_artefact(make_pictures: Any, make_config: Any, run_job: Any, tmp_path: Path) -> None:
    report = run_job(make_config(make_pictures(), method={"type": "probe"}))

    assert report.result.candidate == "probe"
    assert report.result.metrics[0].name == "test_accuracy"
    assert metric(report, "test_accuracy") > 0.5
    assert report.trainer_status.progress_percentage == 100
    assert {path.name for path in (tmp_path / "output").iterdir()} == {
        "COMPLETE", "README.md", "config.json", "manifest.json", "metrics.json", "model.safetensors", "splits.csv", ".finetune",
    }  # fmt: skip
    assert (tmp_path / "output/COMPLETE").read_text().strip() == report.output.digest


def test_frozen_weights_do_not_move_in_the_probe(
    make_pictures: Any, make_config: Any, run_job: Any, tmp_path: Path, tiny_model: Path
) -> None:
    run_job(make_config(make_pictures(), method={"type": "probe"}))

    published = safetensors.torch.load_file(tmp_path / "output/model.safetensors")
    original = safetensors.torch.load_file(tiny_model / "model.safetensors")
    assert all(torch.equal(published[f"backbone.{name}"], tensor) for name, tensor in original.items())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_result_is_never_worse_than_the_probe_on_validation(
    make_pictures: Any, make_config: Any, run_job: Any, tmp_path: Path, seed: int
) -> None:
    hyperparameters = {"imageSize": 32, "maxSteps": 6, "batchSize": 8, "learningRate": 0.5, "seed": seed}

    report = run_job(make_config(make_pictures(), method={"type": "full"}, hyperparameters=hyperparameters))

    scores = {score["name"]: score["accuracy"] for score in read_metrics(tmp_path / "output")["candidates"]}
    assert len(scores) == 6
    assert scores[report.result.candidate] >= scores["probe"]


def test_same_seed_gives_the_same_model_whatever_the_paths(
    make_pictures: Any, make_config: Any, run_job: Any, tmp_path: Path
) -> None:
    data = make_pictures()
    for number, path in enumerate(sorted(shutil.copytree(data, tmp_path / "renamed").glob("*/*"))):
        path.rename(path.with_name(f"{997 * number % 1000:03d}-{number}.png"))

    first = run_job(make_config(data, **FULL))
    second = run_job(make_config(tmp_path / "renamed", output="second", **FULL))

    assert first.result == second.result
    one, two = (safetensors.torch.load_file(tmp_path / name / "model.safetensors") for name in ("output", "second"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_other_seed_gives_another_split(make_pictures: Any, make_config: Any, run_job: Any, tmp_path: Path) -> None:
    data = make_pictures()
    for seed in (0, 1):
        run_job(make_config(data, output=str(seed), method={"type": "probe"}, hyperparameters={"imageSize": 32, "seed": seed}))

    manifests = [json.loads((tmp_path / str(seed) / "manifest.json").read_text()) for seed in (0, 1)]
    assert manifests[0]["dataset"]["sha256"] != manifests[1]["dataset"]["sha256"]


def test_one_corrupt_picture_is_reported_and_the_job_completes(make_pictures: Any, make_config: Any, run_job: Any) -> None:
    data = make_pictures()
    (data / "blue/broken.png").write_bytes((data / "blue/000.png").read_bytes()[:200])

    report = run_job(make_config(data, method={"type": "probe"}))

    assert any("blue/broken.png" in warning for warning in report.result.warnings)


def test_preempted_job_goes_on_from_its_features_and_its_probe(
    make_pictures: Any, make_config: Any, run_job: Any, tmp_path: Path
) -> None:
    config = make_config(make_pictures(), **FULL)
    v0 = tmp_path / "output/.finetune/model-v0/COMPLETE"

    def stop_after_v0() -> None:
        if v0.exists():
            raise PreemptedError("Preempted", "stopped")

    with pytest.raises(PreemptedError):
        run_job(config, check=stop_after_v0)
    assert not (tmp_path / "output/COMPLETE").exists()
    uninterrupted = run_job(make_config(tmp_path / "data", output="other", **FULL))
    probes: set[str] = set()

    def note_probes() -> None:
        probes.update(path.name for path in (tmp_path / "output/.finetune/checkpoints").glob("checkpoint-*-probe"))

    resumed = run_job(config, check=note_probes)

    details = read_metrics(tmp_path / "output")["training"]["modelV0"]
    assert details["featuresComputed"] == 0
    assert details["featuresFromCache"] == 60
    assert len(probes) == 1
    assert resumed.result == uninterrupted.result


def test_interrupted_feature_pass_keeps_what_it_has(
    make_pictures: Any, make_config: Any, run_job: Any, run_until: Any, tmp_path: Path
) -> None:
    config = make_config(make_pictures(count=50), method={"type": "probe"})

    run_until(config, Phase.FEATURES, after=2)
    run_job(config)

    details = read_metrics(tmp_path / "output")["training"]["modelV0"]
    assert details["featuresFromCache"] == 64
    assert details["featuresComputed"] == 150 - 64


def test_finished_fine_tuning_is_not_repeated(make_pictures: Any, make_config: Any, run_job: Any, tmp_path: Path) -> None:
    config = make_config(make_pictures(), **FULL)

    def stop_in_selection() -> None:
        if any(Path(config.checkpoint_path).glob("checkpoint-*-finetuned")):
            raise PreemptedError("Preempted", "stopped")

    with pytest.raises(PreemptedError):
        run_job(config, check=stop_in_selection)
    kept = json.loads(next(Path(config.checkpoint_path).glob("checkpoint-*-finetuned/state.json")).read_text())["details"]
    run_job(config)

    # The measured rate differs from run to run, so the same one means the same training.
    assert read_metrics(tmp_path / "output")["training"]["finetuning"] == kept
    assert not list(Path(config.checkpoint_path).glob("checkpoint-*"))


def test_completed_run_is_returned_at_once(make_pictures: Any, make_config: Any, run_job: Any) -> None:
    data = make_pictures()
    config = make_config(data, method={"type": "probe"})
    first = run_job(config)
    shutil.rmtree(data)

    second = run_job(config)

    assert (second.output, second.result) == (first.output, first.result)


def test_artefact_of_another_run_is_replaced(make_pictures: Any, make_config: Any, run_job: Any, tmp_path: Path) -> None:
    data = make_pictures()
    first = run_job(make_config(data, method={"type": "probe"}))
    config = make_config(data, method={"type": "probe"}, hyperparameters={"imageSize": 48})

    second = run_job(config)

    assert second.output.digest != first.output.digest
    assert read_published(tmp_path / "output", run=config.run, uri=config.output_uri) is not None


def test_artefact_is_a_model_to_start_from(make_pictures: Any, make_config: Any, run_job: Any, tmp_path: Path) -> None:
    data = make_pictures()
    run_job(make_config(data, **FULL))

    report = run_job(make_config(data, output="next", model=tmp_path / "output", method={"type": "probe"}))

    assert report.result.candidate == "probe"


def test_output_that_cannot_be_written_is_refused(make_pictures: Any, make_config: Any, run_job: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    config: TrainerConfig = make_config(make_pictures(), output="file/output")

    with pytest.raises(InvalidSpecError, match="cannot be written by user") as caught:
        run_job(config)

    assert caught.value.reason == "OutputNotWritable"
    assert str(tmp_path / "file/output") in caught.value.message


class RecordingProgress(Progress):
    """Keeps what the stages say of the fine-tuning."""

    def __init__(self) -> None:
        super().__init__(Budget(None, 0.0), (), with_finetune=True)
        self.fractions: list[float] = []

    def advance(self, fraction: float, **seconds: float | None) -> None:
        if self._phase is Phase.FINETUNE:
            self.fractions.append(fraction)
        super().advance(fraction, **seconds)


def test_progress_of_fine_tuning_follows_its_steps(make_pictures: Any, make_config: Any) -> None:
    progress = RecordingProgress()
    config = make_config(make_pictures(), **FULL | {"hyperparameters": {"imageSize": 32, "maxSteps": 30, "batchSize": 8}})

    run(config, budget=Budget(None, 0.0), check=lambda: None, progress=progress)

    assert progress.fractions == sorted(progress.fractions)
    assert (progress.fractions[0] < 0.4, progress.fractions[-1]) == (True, 1.0)


def test_budget_is_kept(make_pictures: Any, make_config: Any, run_job: Any, tmp_path: Path) -> None:
    config = make_config(make_pictures(count=40), method={"type": "full"}, budget={"trainingSeconds": 12})
    started = time.monotonic()

    report = run_job(config, budget=Budget(12, started))

    assert 8 < time.monotonic() - started < 13.2
    finetuning = read_metrics(tmp_path / "output")["training"]["finetuning"]
    assert finetuning["steps"] > 10
    assert report.result.warnings == ()


def test_budget_that_is_over_still_publishes_the_probe(make_pictures: Any, make_config: Any, run_job: Any) -> None:
    config = make_config(make_pictures(), method={"type": "full"}, budget={"trainingSeconds": 10})

    report = run_job(config, budget=Budget(10, time.monotonic() - 60))

    assert report.result.candidate == "probe"
    assert "budget" in report.result.warnings[0]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        pytest.param({}, None, id="enough of everything"),
        pytest.param({"examples_per_class": 9.0}, "examples per class", id="few examples"),
        pytest.param({"probe_accuracy": 0.999}, "nothing to gain", id="ceiling"),
        pytest.param({"seconds_left": 50.0}, "one pass over the data", id="little time"),
        pytest.param({"seconds_left": -1.0}, "budget", id="no time"),
        pytest.param({"seconds_left": None}, None, id="no budget"),
        pytest.param({"method": "full", "examples_per_class": 2.0, "seconds_left": 50.0}, None, id="full insists"),
        pytest.param({"hyperparameters": {"max_steps": 5}, "examples_per_class": 2.0}, None, id="asked-for steps insist"),
    ],
)
def test_auto_skips_fine_tuning_that_does_not_pay(change: dict[str, Any], expected: str | None) -> None:
    values: dict[str, Any] = {
        "method": "auto",
        "hyperparameters": {},
        "examples_per_class": 50.0,
        "probe_accuracy": 0.8,
        "seconds_left": 100.0,
        "step_seconds": 1.0,
        "least_steps": 60,
        **change,
    }
    method = tune.MethodType(values.pop("method"))
    hyperparameters = tune.Hyperparameters.model_validate(values.pop("hyperparameters"))

    reason = tune.find_reason_to_skip(method, hyperparameters, **values)

    assert (reason is None) if expected is None else (reason is not None and expected in reason)

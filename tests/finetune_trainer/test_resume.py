"""A run that is stopped anywhere, in any way, ends with the same bits as one that is not."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from finetune_api import names
from finetune_api.contract import ExitCode, TrainerConfig
from finetune_trainer.budget import Budget
from finetune_trainer.progress import Phase
from finetune_trainer.storage import open_storage

SPEC: dict[str, Any] = {
    "method": {"type": "full"},
    "hyperparameters": {"imageSize": 32, "maxSteps": 25, "batchSize": 16, "seed": 3},
    "checkpoint": {"intervalSeconds": 1},
}
SEED = 20260117


@pytest.fixture
def config(make_pictures: Any, make_config: Any) -> TrainerConfig:
    return make_config(make_pictures(count=30), **SPEC)


@pytest.fixture
def unbroken(config: TrainerConfig, run_job: Any, make_config: Any) -> dict[str, torch.Tensor]:
    run_job(make_config(Path(config.dataset_path), output="unbroken", **SPEC))
    return read_weights(Path(config.output_path).parent / "unbroken")


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def have_equal_bits(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def read_finetuning(config: TrainerConfig) -> dict[str, Any]:
    return json.loads((Path(config.output_path) / "metrics.json").read_text())["training"]["finetuning"]


STOPS = (
    (Phase.READ, 1), (Phase.FEATURES, 1), (Phase.PROBE, 0), (Phase.FINETUNE, 0), (Phase.FINETUNE, 1), (Phase.FINETUNE, 2),
    (Phase.FINISH, 1), (Phase.FINISH, 3), (Phase.FINISH, 6),
)  # fmt: skip


def test_stopped_in_every_phase_one_after_the_other(
    config: TrainerConfig, unbroken: dict[str, torch.Tensor], run_job: Any, run_until: Any
) -> None:
    for phase, after in STOPS:
        run_until(config, phase, after=after)
    report = run_job(config)

    assert have_equal_bits(read_weights(Path(config.output_path)), unbroken)
    assert report.checkpoint.step == 25
    assert report.result.warnings == ()


def test_number_of_workers_may_change_between_attempts(
    config: TrainerConfig, unbroken: dict[str, torch.Tensor], run_job: Any, run_until: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", logger="finetune_trainer")
    run_until(config, Phase.FINETUNE, after=1, num_workers=2)
    first = read_last_step(caplog)
    run_until(config, Phase.FINETUNE, after=1, num_workers=0)
    second = read_last_step(caplog)
    run_job(config, num_workers=1)

    assert [first, second] == [int(text.rpartition(" ")[2]) for text in caplog.messages if "goes on after step" in text]
    assert 0 < first < second < 25
    assert have_equal_bits(read_weights(Path(config.output_path)), unbroken)


def read_last_step(caplog: pytest.LogCaptureFixture) -> int:
    """Return the last step that was done: how many fit between two reports depends on the machine."""
    return [int(text.split()[1]) for text in caplog.messages if re.fullmatch("step [0-9]+ done", text)][-1]


def test_stop_loses_no_step(config: TrainerConfig, run_until: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", logger="finetune_trainer")
    run_until(config, Phase.FINETUNE, after=2)

    storage = open_storage(config.checkpoint_path)
    newest = max(name for name in storage.list_folders() if name.endswith("-steps"))
    manifest = json.loads(storage.read(f"{newest}/manifest.json"))
    step = read_last_step(caplog)
    assert (manifest["step"], manifest["samples"]) == (step, 16 * step)
    assert step > 0


def test_broken_newest_checkpoint_costs_only_the_steps_since_the_one_before(
    config: TrainerConfig, unbroken: dict[str, torch.Tensor], run_job: Any, run_until: Any
) -> None:
    run_until(config, Phase.FINETUNE, after=1)
    run_until(config, Phase.FINETUNE, after=1)
    newest = max(Path(config.checkpoint_path).glob("checkpoint-*-steps"))
    os.truncate(newest / "tensors.safetensors", 1000)

    report = run_job(config)

    assert [newest.name in text for text in report.result.warnings] == [True]
    assert have_equal_bits(read_weights(Path(config.output_path)), unbroken)


def test_other_settings_are_named_and_start_afresh(config: TrainerConfig, make_config: Any, run_job: Any, run_until: Any) -> None:
    run_until(config, Phase.FINETUNE, after=1)
    changed = make_config(Path(config.dataset_path), **SPEC | {"hyperparameters": {**SPEC["hyperparameters"], "imageSize": 40}})

    report = run_job(changed)

    assert ["hyperparameters.imageSize was 32 and is 40" in text for text in report.result.warnings] == [True]
    assert read_finetuning(changed)["steps"] == 25


def test_older_attempt_does_not_publish_over_a_newer_one(config: TrainerConfig, run_until: Any) -> None:
    run_until(config.model_copy(update={"attempt": 2}), Phase.FINETUNE)

    run_until(config, Phase.READ, after=99)

    assert not (Path(config.output_path) / "COMPLETE").exists()


def test_checkpoints_in_an_object_store(
    config: TrainerConfig, unbroken: dict[str, torch.Tensor], run_job: Any, run_until: Any, bucket: str
) -> None:
    stored = config.model_copy(update={"checkpoint_path": bucket})
    run_until(stored, Phase.FINETUNE, after=2)
    run_until(stored, Phase.FINISH, after=2)

    run_job(stored)

    assert have_equal_bits(read_weights(Path(config.output_path)), unbroken)
    assert open_storage(bucket).list_folders() == []


def test_time_of_earlier_attempts_counts(make_pictures: Any, make_config: Any, run_job: Any) -> None:
    spec = {**SPEC, "hyperparameters": {"imageSize": 32, "batchSize": 8}, "budget": {"trainingSeconds": 60}}
    config = make_config(make_pictures(), **spec)
    Path(config.work_path).mkdir(parents=True)
    elapsed = {"run": config.run, "elapsedSeconds": 59.0}
    (Path(config.work_path) / "elapsed.json").write_text(json.dumps(elapsed))

    report = run_job(config, budget=Budget(60, time.monotonic()))

    assert report.result.candidate == "probe"
    assert "used up the budget" in report.result.warnings[0]


def test_plan_under_a_budget_is_that_of_the_first_attempt(
    make_pictures: Any, make_config: Any, run_job: Any, run_until: Any
) -> None:
    spec = {**SPEC, "hyperparameters": {"imageSize": 32, "batchSize": 8}, "budget": {"trainingSeconds": 20}}
    config = make_config(make_pictures(), **spec)
    run_until(config, Phase.FINETUNE, after=1)
    plan = max(Path(config.checkpoint_path).glob("checkpoint-*-plan")) / "state.json"
    before = json.loads(plan.read_text())

    run_until(config, Phase.FINETUNE, after=1)

    newest = max(Path(config.checkpoint_path).glob("checkpoint-*-steps"))
    assert json.loads((newest / "state.json").read_text())["plan"] == before


def start(config: TrainerConfig, folder: Path) -> "subprocess.Popen[str]":
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("FINETUNE_", "KUBEFLOW_"))}  # noqa: TID251
    environment[names.ENV_TRAINER_CONFIG] = config.model_dump_json(by_alias=True)
    (folder / "termination-log").touch()
    command = [sys.executable, "-m", "finetune_trainer", "--termination-message-file", str(folder / "termination-log")]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_processes_that_are_killed_at_random_instants(
    config: TrainerConfig, unbroken: dict[str, torch.Tensor], run_job: Any, make_config: Any, tmp_path: Path
) -> None:
    generator = random.Random(SEED)
    # Timed is a run of its own: the first of a process, which `unbroken` may be, loads modules as well.
    started_at = time.monotonic()
    run_job(make_config(Path(config.dataset_path), output="timed", **SPEC))
    # Two attempts of a third of the whole run at most: each is killed while it has work left.
    longest = (time.monotonic() - started_at) / 3

    for attempt, number in enumerate((signal.SIGTERM, signal.SIGKILL), start=1):
        process = start(config.model_copy(update={"attempt": attempt}), tmp_path)
        wait_for_claim(config, attempt, process)
        time.sleep(generator.uniform(0.0, longest))
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == (ExitCode.PREEMPTED if number == signal.SIGTERM else -signal.SIGKILL), errors
    run_job(config.model_copy(update={"attempt": 3}))

    assert have_equal_bits(read_weights(tmp_path / "output"), unbroken)


def wait_for_claim(config: TrainerConfig, attempt: int, process: "subprocess.Popen[str]") -> None:
    fence = Path(config.checkpoint_path) / "fence.json"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if fence.exists() and json.loads(fence.read_text())["attempt"] == attempt:
            return
        time.sleep(0.02)

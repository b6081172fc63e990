"""Programs as users and the kubelet start them: exit codes, last words, and use of the artefact in another process."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from finetune_api import names
from finetune_api.contract import ExitCode, TrainerConfig, TrainerReport
from finetune_trainer.__main__ import main
from finetune_trainer.predict import load_model, predict_logits


def start(*arguments: str, config: str | None = None) -> "subprocess.Popen[str]":
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("FINETUNE_", "KUBEFLOW_"))}  # noqa: TID251
    if config is not None:
        environment[names.ENV_TRAINER_CONFIG] = config
    command = [sys.executable, "-W", "error::UserWarning", "-m", "finetune_trainer", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run_pod(config: TrainerConfig | str | None, folder: Path) -> tuple[int, TrainerReport, str]:
    last = folder / "termination-log"
    last.touch()
    text = config.model_dump_json(by_alias=True) if isinstance(config, TrainerConfig) else config
    process = start("--termination-message-file", str(last), config=text)
    _, errors = process.communicate(timeout=120)
    return process.returncode, TrainerReport.model_validate_json(last.read_text()), errors


def test_pod_completes_and_its_model_predicts_the_same_in_another_process(
    make_pictures: Any, make_config: Any, tmp_path: Path
) -> None:
    data = make_pictures(count=12)
    config = make_config(data, hyperparameters={"imageSize": 32, "maxSteps": 4, "batchSize": 8}, method={"type": "full"})

    code, report, errors = run_pod(config, tmp_path)

    assert code == ExitCode.COMPLETE, errors
    assert report.trainer_status.progress_percentage == 100
    assert report.result
    assert report.result.metrics[0].name == "test_accuracy"
    assert report.output
    assert (tmp_path / "output/COMPLETE").read_text().strip() == report.output.digest
    assert_logits_are_reproduced(tmp_path / "output", data)


def run_here(config: TrainerConfig, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, TrainerReport]:
    """Do what a pod does in this process, which saves the seconds that imports take."""
    last = folder / "termination-log"
    last.touch()
    monkeypatch.setenv(names.ENV_TRAINER_CONFIG, config.model_dump_json(by_alias=True))
    monkeypatch.delenv(names.ENV_REPORT_URL, raising=False)
    code = main(["--termination-message-file", str(last)])
    return code, TrainerReport.model_validate_json(last.read_text())


@pytest.fixture
def _keep_signals() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def assert_logits_are_reproduced(model_dir: Path, data: Path) -> None:
    """Predict each picture alone in a fresh process and all at once here."""
    pictures = sorted(data.glob("*/*"))[:5]
    code = (
        "import sys, json; from pathlib import Path; from finetune_trainer.predict import load_model, predict_logits\n"
        "model = load_model(Path(sys.argv[1]))\n"
        "print(json.dumps([predict_logits(model, [Path(p)])[0].tolist() for p in sys.argv[2:]]))"
    )
    command = [sys.executable, "-c", code, str(model_dir), *map(str, pictures)]
    there = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    here = predict_logits(load_model(model_dir), pictures)

    assert torch.allclose(torch.tensor(there), here, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        pytest.param(None, "InvalidSpec", id="no configuration"),
        pytest.param('{"namespace": "x"}', "InvalidSpec", id="incomplete configuration"),
    ],
)
def test_invalid_spec_is_exit_code_64(tmp_path: Path, config: str | None, reason: str) -> None:
    code, report, _ = run_pod(config, tmp_path)

    assert code == ExitCode.INVALID_SPEC
    assert report.failure
    assert report.failure.reason == reason


@pytest.mark.usefixtures("_keep_signals")
def test_output_that_cannot_be_written_is_exit_code_64(
    make_pictures: Any, make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()

    code, report = run_here(make_config(make_pictures(count=4), output="file/x"), tmp_path, monkeypatch)

    assert code == ExitCode.INVALID_SPEC
    assert report.failure
    assert report.failure.reason == "OutputNotWritable"


def test_invalid_data_is_exit_code_65(make_config: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()

    code, report, errors = run_pod(make_config(tmp_path / "empty"), tmp_path)

    assert code == ExitCode.INVALID_DATA
    assert report.failure
    assert report.failure.reason == "NoPictures"
    assert "Traceback" not in errors


def test_missing_model_is_exit_code_78(make_pictures: Any, make_config: Any, tmp_path: Path) -> None:
    config = make_config(make_pictures(count=4), model=tmp_path / "nowhere")

    code, report, _ = run_pod(config, tmp_path)

    assert code == ExitCode.MODEL_NOT_FOUND
    assert report.failure
    assert report.failure.reason == "ModelNotFound"


@pytest.mark.usefixtures("_keep_signals")
def test_bug_is_exit_code_1_with_its_traceback(
    make_pictures: Any, make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "output/.finetune").mkdir(parents=True)
    (tmp_path / "output/.finetune/features").write_text("a file where a folder belongs")

    code, report = run_here(make_config(make_pictures(count=4)), tmp_path, monkeypatch)

    assert code == ExitCode.INTERNAL_ERROR
    assert "Traceback" in capsys.readouterr().err
    assert report.failure
    assert report.failure.reason == "InternalError"
    assert report.log_tail
    assert "features" in report.log_tail


def test_sigterm_is_exit_code_75_and_the_restart_goes_on(make_pictures: Any, make_config: Any, tmp_path: Path) -> None:
    data = make_pictures(count=12)
    config = make_config(data, method={"type": "full"}, hyperparameters={"imageSize": 32, "maxSteps": 2000, "batchSize": 4})
    last = tmp_path / "termination-log"
    last.touch()
    process = start("--termination-message-file", str(last), config=config.model_dump_json(by_alias=True))
    v0 = tmp_path / "output/.finetune/model-v0/COMPLETE"
    deadline = time.monotonic() + 60
    while not v0.exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)

    process.send_signal(signal.SIGTERM)
    sent = time.monotonic()
    _, errors = process.communicate(timeout=30)

    assert process.returncode == ExitCode.PREEMPTED, errors
    assert time.monotonic() - sent < 5
    assert TrainerReport.model_validate_json(last.read_text()).failure
    assert list((tmp_path / "output/.finetune/checkpoints").glob("checkpoint-*-probe"))
    assert not (tmp_path / "output/COMPLETE").exists()


def test_sigterm_that_comes_before_everything_else_is_not_lost(make_pictures: Any, make_config: Any) -> None:
    config = make_config(make_pictures(count=4), method={"type": "probe"})
    process = start(config=config.model_dump_json(by_alias=True))
    deadline = time.monotonic() + 30
    while not has_taken_over(signal.SIGTERM, process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)

    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)

    assert process.returncode == ExitCode.PREEMPTED, errors


def has_taken_over(number: signal.Signals, pid: int) -> bool:
    """Return whether a process blocks or catches a signal."""
    lines = dict(line.split(":\t") for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)
    return any(int(lines[mask], 16) >> (number - 1) & 1 for mask in ("SigBlk", "SigCgt"))


def write_job(tmp_path: Path, **spec: Any) -> Path:
    content = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "colours"},
        "spec": {
            "task": "image-classification",
            "model": {"uri": "pvc://models/tiny"},
            "dataset": {"uri": "pvc://datasets/colours"},
            "method": {"type": "probe"},
            "hyperparameters": {"imageSize": 32},
            "output": {"uri": "pvc://models/result"},
            **spec,
        },
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "job.yaml"


@pytest.mark.usefixtures("_keep_signals")
def test_local_run_and_prediction(
    make_pictures: Any, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, output = make_pictures(count=12, noise=5.0), tmp_path / "model"

    code = main(["run", str(write_job(tmp_path)), "--output", str(output), "--data", str(data), "--model", str(tiny_model)])

    assert code == ExitCode.COMPLETE
    assert "test_accuracy" in capsys.readouterr().out
    assert main(["predict", str(output), str(data / "blue/000.png"), str(data / "green/000.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["blue", "green"]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        pytest.param(["{model}", "{text}"], ExitCode.INVALID_DATA, id="no picture"),
        pytest.param(["{text}", "{text}"], ExitCode.MODEL_NOT_FOUND, id="no model"),
    ],
)
def test_prediction_says_what_is_wrong(
    make_pictures: Any, make_config: Any, run_job: Any, tmp_path: Path, arguments: list[str], code: ExitCode
) -> None:
    run_job(make_config(make_pictures(count=4), method={"type": "probe"}))
    text = tmp_path / "text.png"
    text.write_text("no picture")

    assert main(["predict", *(argument.format(model=tmp_path / "output", text=text) for argument in arguments)]) == code


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        pytest.param({"task": "poetry"}, "spec.task", id="unknown task"),
        pytest.param({"budget": {"trainingSeconds": 0}}, "spec.budget.trainingSeconds", id="no budget"),
        pytest.param({"hyperparameters": {"imageSize": 7}}, "spec.hyperparameters.imageSize", id="tiny pictures"),
        pytest.param({"dataset": {}}, "spec.dataset.uri", id="no data"),
        pytest.param({}, "give --data DIR", id="a volume without a folder for it"),
    ],
)
def test_wrong_job_is_refused_with_the_field(tmp_path: Path, spec: dict[str, Any], expected: str) -> None:
    process = start("run", str(write_job(tmp_path, **spec)), "--output", str(tmp_path / "out"))
    _, errors = process.communicate(timeout=60)

    assert process.returncode == ExitCode.INVALID_SPEC
    assert expected in errors
    assert "Traceback" not in errors

"""Metrics of a trainer: complete, documented, served while it trains, and gone with it."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from finetune_api import names
from finetune_api.contract import ExitCode, World
from finetune_trainer.metrics import DEFINITIONS, FIELDS, PHASES, Definition, Totals, build_registry, serve
from finetune_trainer.progress import Phase
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families


def _read(page: str) -> dict[str, float]:
    """Return the values of a page by name and label."""
    samples = (sample for family in text_string_to_metric_families(page) for sample in family.samples)
    return {":".join((each.name, *each.labels.values())): each.value for each in samples}


@pytest.mark.parametrize("definition", DEFINITIONS, ids=lambda definition: definition.name)
def test_every_metric_is_documented(definition: Definition) -> None:
    assert definition.name.startswith("finetune_trainer_")
    assert definition.help[0].isupper()
    assert definition.help.endswith(".")
    assert definition.name.endswith("_total") == (definition.type == "counter")


def test_page_has_every_metric_and_no_other() -> None:
    page = generate_latest(build_registry(Totals(loss=1.0, device_memory_peak_bytes=1))).decode()
    shown = {line.split()[2] for line in page.splitlines() if line.startswith("# HELP")}

    assert shown == {each.name for each in DEFINITIONS}


def test_every_total_is_shown() -> None:
    assert {each.name for each in fields(Totals)} == {*FIELDS, "phase", "checkpoints_saved", "checkpoints_failed"}


def test_phases_are_those_of_the_progress() -> None:
    assert tuple(phase.value for phase in Phase) == PHASES


def test_what_is_not_known_is_left_out() -> None:
    values = _read(generate_latest(build_registry(Totals(phase="fine-tuning"))).decode())

    assert "finetune_trainer_loss" not in values
    assert (1.0, 0.0) == tuple(values[f"finetune_trainer_phase:{phase}"] for phase in ("fine-tuning", "fitting the probe"))


def test_port_that_is_taken_stops_nothing() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()

        serve(Totals(), port=taken.getsockname()[1], address="127.0.0.1")


def test_pod_of_two_processes_serves_metrics_until_it_is_stopped(make_pictures: Any, make_config: Any, tmp_path: Path) -> None:
    config = make_config(
        make_pictures(),
        method={"type": "full"},
        hyperparameters={"imageSize": 32, "maxSteps": 100_000, "batchSize": 12},
        checkpoint={"intervalSeconds": 1},
    ).model_copy(update={"world": World(processes_per_node=2)})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("FINETUNE_", "KUBEFLOW_"))}  # noqa: TID251
    environment |= {names.ENV_TRAINER_CONFIG: config.model_dump_json(by_alias=True), names.ENV_METRICS_PORT: str(port)}
    command = [sys.executable, "-m", "finetune_trainer", "--termination-message-file", str(tmp_path / "last")]

    with subprocess.Popen(command, env=environment) as process:
        try:
            values = _wait_for_checkpoint(process, port)
            process.send_signal(signal.SIGTERM)
            code = process.wait(120)
        finally:
            process.kill()

    assert ExitCode.PREEMPTED == code
    assert values["finetune_trainer_samples_total"] == 12 * values["finetune_trainer_steps_total"] > 0
    assert 0 < values["finetune_trainer_data_wait_seconds_total"] < values["finetune_trainer_step_seconds_total"]
    assert values["finetune_trainer_checkpoint_bytes_total"] > 0
    assert values["finetune_trainer_exchange_seconds_total"] > 0
    assert values["finetune_trainer_process_resident_memory_bytes"] > 1 << 20
    assert 1.0 == values["finetune_trainer_phase:fine-tuning"]


def _wait_for_checkpoint(process: "subprocess.Popen[bytes]", port: int) -> dict[str, float]:
    """Return the metrics once steps were taken and a checkpoint of them was saved."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert process.poll() is None
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
                values = _read(answer.read().decode())
        except (urllib.error.URLError, OSError):
            values = {}
        if values.get("finetune_trainer_steps_total") and values["finetune_trainer_checkpoints_total:saved"]:
            return values
        time.sleep(0.1)
    raise AssertionError("no steps were seen")

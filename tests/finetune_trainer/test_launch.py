"""Pods with several processes, as the kubelet starts and stops them: exit codes, last words, and who waits for whom."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from finetune_api import names
from finetune_api.contract import ExitCode, TrainerConfig, TrainerReport, World
from finetune_trainer.budget import Budget
from finetune_trainer.ending import Ending, choose_ending, read_ending, write_ending
from finetune_trainer.progress import Progress
from finetune_trainer.seat import Seat, choose_slice, list_slices, read_seat, share_cpus

SPEC: dict[str, Any] = {
    "method": {"type": "full"},
    "hyperparameters": {"imageSize": 32, "maxSteps": 6, "batchSize": 12},
    "checkpoint": {"intervalSeconds": 1},
}
SLICES = ("MIG-aaaaaaaa-0000-1111-2222-333333333333", "MIG-bbbbbbbb-0000-1111-2222-333333333333")


@contextlib.contextmanager
def start(config: TrainerConfig, folder: Path, *, index: int = 0) -> Iterator["subprocess.Popen[str]"]:
    """Start the process of a pod's container, with a termination message of its own."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("FINETUNE_", "KUBEFLOW_"))}  # noqa: TID251
    environment |= {names.ENV_TRAINER_CONFIG: config.model_dump_json(by_alias=True), "JOB_COMPLETION_INDEX": str(index)}
    last = folder / f"termination-log-{index}"
    last.touch()
    command = [sys.executable, "-W", "error::UserWarning", "-m", "finetune_trainer", "--termination-message-file", str(last)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def finish(process: "subprocess.Popen[str]", folder: Path, *, index: int = 0) -> tuple[int, TrainerReport, str]:
    """Return exit code, termination message and log of a pod that ends by itself."""
    log, _ = process.communicate(timeout=150)
    return process.returncode, TrainerReport.model_validate_json((folder / f"termination-log-{index}").read_text()), log


def wait_for(path: Path, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)


def list_workers(process: "subprocess.Popen[str]") -> list[int]:
    """Return the processes that a launcher started, in the order of their ranks."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def find_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_two_processes_in_a_pod(make_pictures: Any, make_config: Any, tmp_path: Path) -> None:
    config = make_config(make_pictures(), **SPEC).model_copy(update={"world": World(processes_per_node=2)})

    with start(config, tmp_path) as process:
        code, report, log = finish(process, tmp_path)

    assert code == ExitCode.COMPLETE, log
    assert report.output
    assert report.checkpoint
    assert report.checkpoint.step == 6
    assert (tmp_path / "output/COMPLETE").read_text().strip() == report.output.digest
    assert "rank 0 INFO" in log
    assert "rank 1" not in log


def test_invalid_data_is_exit_code_65_with_its_reason(make_config: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    config = make_config(tmp_path / "empty").model_copy(update={"world": World(processes_per_node=2)})

    with start(config, tmp_path) as process:
        code, report, log = finish(process, tmp_path)

    assert code == ExitCode.INVALID_DATA, log
    assert report.failure
    assert report.failure.reason == "NoPictures"


@pytest.mark.slow
def test_two_pods_stop_together_and_go_on(make_pictures: Any, make_config: Any, tmp_path: Path) -> None:
    world = World(nodes=2, rendezvous_host="localhost", rendezvous_port=find_port())
    hyperparameters = {"imageSize": 32, "maxSteps": 40, "batchSize": 12}
    config = make_config(make_pictures(), **SPEC | {"hyperparameters": hyperparameters}).model_copy(update={"world": world})

    # The pod with index 1 is there first, and waits for the one where all meet.
    with start(config, tmp_path, index=1) as second, start(config, tmp_path, index=0) as first:
        wait_for(Path(config.work_path) / "model-v0/COMPLETE", first)
        second.send_signal(signal.SIGTERM)
        stopped = [finish(process, tmp_path, index=index) for index, process in enumerate((first, second))]

    assert [code for code, _, _ in stopped] == [ExitCode.PREEMPTED] * 2, stopped
    assert [report.failure and report.failure.reason for _, report, _ in stopped] == ["Preempted"] * 2
    assert stopped[0][1].checkpoint
    again = config.model_copy(update={"attempt": 2})
    with start(again, tmp_path, index=0) as first, start(again, tmp_path, index=1) as second:
        ended = [finish(process, tmp_path, index=index) for index, process in enumerate((first, second))]
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert len({report.output and report.output.digest for _, report, _ in ended}) == 1
    assert json.loads((tmp_path / "output/metrics.json").read_text())["training"]["finetuning"]["steps"] == 40


def test_pod_whose_peers_never_come_can_be_stopped(make_config: Any, tmp_path: Path) -> None:
    world = World(nodes=2, rendezvous_host="localhost", rendezvous_port=find_port())
    config = make_config(tmp_path).model_copy(update={"world": world})

    with start(config, tmp_path) as process:
        deadline = time.monotonic() + 60
        while not is_listening(world.rendezvous_port):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        sent = time.monotonic()
        code, report, log = finish(process, tmp_path)

    assert code == ExitCode.PREEMPTED, log
    assert time.monotonic() - sent < 5
    assert report.failure
    assert report.failure.reason == "Preempted"


def is_listening(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def test_killed_process_stands_for_its_pod(make_pictures: Any, make_config: Any, tmp_path: Path) -> None:
    hyperparameters = {"imageSize": 32, "maxSteps": 4000, "batchSize": 12}
    config = make_config(make_pictures(), **SPEC | {"hyperparameters": hyperparameters})

    with start(config.model_copy(update={"world": World(processes_per_node=2)}), tmp_path) as process:
        wait_for(Path(config.work_path) / "model-v0/COMPLETE", process)
        os.kill(list_workers(process)[1], signal.SIGKILL)
        sent = time.monotonic()
        code, report, log = finish(process, tmp_path)

    assert code == 128 + signal.SIGKILL, log
    assert time.monotonic() - sent < 15
    assert report.failure
    assert report.failure.reason == "Killed"
    assert "process 1 " in report.failure.message


@pytest.mark.parametrize(
    ("codes", "was_told_to_stop", "expected"),
    [
        pytest.param([0, 0], False, (0, 0), id="all complete: the first one's report"),
        pytest.param([76, 65], False, (1, 65), id="a reason of its own before a lost peer"),
        pytest.param([75, 1], False, (1, 1), id="a reason of its own before being stopped for it"),
        pytest.param([65, 64], False, (1, 64), id="the first of two reasons"),
        pytest.param([75, 76], False, (1, 76), id="a peer in another pod was lost"),
        pytest.param([75, 76], True, (0, 75), id="the pod was stopped"),
        pytest.param([75, 75], False, (0, 75), id="a process was stopped"),
        pytest.param([0, 75], True, (1, 75), id="one had ended before"),
        pytest.param([76, 76], True, (0, 76), id="all lost a peer"),
        pytest.param([0, 76], False, (1, 76), id="one had ended before a peer was lost"),
    ],
)
def test_ending_of_the_pod(codes: list[int], was_told_to_stop: Any, expected: tuple[int, int]) -> None:
    # The later of two processes ended first.
    endings = [Ending(rank, code, time=10.0 - rank) for rank, code in enumerate(codes)]

    chosen = choose_ending(endings, was_told_to_stop=was_told_to_stop)

    assert (chosen.rank, chosen.code) == expected


def test_endings_are_json_files(tmp_path: Path) -> None:
    report = Progress(Budget(None, 0.0), (), with_finetune=True).report()

    write_ending(tmp_path, 1, 75, report)

    ending = read_ending(tmp_path, 1)
    assert ending
    assert (ending.rank, ending.code, ending.report) == (1, 75, report)
    assert json.loads((tmp_path / "1.json").read_text())["code"] == 75
    assert read_ending(tmp_path, 0) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(",".join(SLICES), SLICES, id="NVIDIA_VISIBLE_DEVICES"),
        pytest.param(
            f"GPU 0: NVIDIA H100 (UUID: GPU-1)\n  MIG 1g.10gb Device 0: (UUID: {SLICES[0]})\n", SLICES[:1], id="nvidia-smi"
        ),
        pytest.param(
            "MIG-GPU-aaaaaaaa-0000-1111-2222-333333333333/7/0", ("MIG-GPU-aaaaaaaa-0000-1111-2222-333333333333/7/0",), id="old"
        ),
        pytest.param("all", (), id="all"),
        pytest.param("GPU-aaaaaaaa-0000-1111-2222-333333333333", (), id="a whole GPU"),
    ],
)
def test_mig_slices(text: str, expected: tuple[str, ...]) -> None:
    assert list_slices(text) == expected


def test_each_process_gets_a_slice_and_its_share_of_the_cores() -> None:
    assert [choose_slice(SLICES, local_rank=rank) for rank in range(3)] == [*SLICES, None]
    assert [share_cpus(8, processes_per_node=number) for number in (1, 2, 3, 16)] == [8, 4, 2, 1]


def test_seat_is_read_from_what_torchrun_sets() -> None:
    environment = {"RANK": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "job-0.job", "MASTER_PORT": "29500", "HOME": "/"}

    assert read_seat(environment) == Seat(3, 1, "job-0.job", 29500)

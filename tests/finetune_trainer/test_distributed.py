"""Several processes learn what one learns, decide alike, and leave together."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import ranks
import safetensors.torch
import torch
from finetune_api.contract import ExitCode, TrainerConfig
from finetune_trainer.distributed import ALONE, StopNotice, is_connection_lost
from finetune_trainer.errors import PreemptedError
from finetune_trainer.progress import Phase

SPEC: dict[str, Any] = {
    "method": {"type": "full"},
    "hyperparameters": {"imageSize": 32, "maxSteps": 30, "batchSize": 12, "seed": 3},
    "checkpoint": {"intervalSeconds": 1},
}


@pytest.fixture
def config(make_pictures: Any, make_config: Any) -> TrainerConfig:
    return make_config(make_pictures(), **SPEC)


def have_equal_bits(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_exchanges(tmp_path: Path) -> None:
    results = ranks.call(ranks.exchange, tmp_path / "group", size=3)

    for result in results:
        assert result["agreed"] == [2.0, -1.0]
        assert result["sum"].tolist() == [3.0, 3.0]
        assert result["rows"].tolist() == [[1.0, 1.0], [2.0, 2.0], [2.0, 2.0]]
        assert json.loads(result["json"]) == {"x": [1, None, "y"]}
        assert {name: tensor.tolist() for name, tensor in result["tensors"].items()} == {"a": [0.0, 1.0, 2.0], "b": [True]}
        assert result["nothing"] == 0


@pytest.mark.parametrize("count", [pytest.param(12, id="whole batch"), pytest.param(5, id="last process has nothing")])
def test_rows_of_a_shared_batch_are_those_of_one_process(tmp_path: Path, count: int) -> None:
    results = ranks.call(ranks.map_rows, tmp_path / "group", count, 2, size=3)

    assert [result["rows"].tolist() for result in results] == [[[2.0 * number] for number in range(count)]] * 3


@pytest.mark.parametrize("counts", [pytest.param([3, 2], id="uneven parts"), pytest.param([5, 0], id="empty part")])
def test_batch_normalisation_of_parts_is_that_of_the_whole(tmp_path: Path, counts: list[int]) -> None:
    x_BCHW = torch.randn(5, 3, 4, 6, generator=torch.Generator().manual_seed(0)) * 3 + 50
    whole = ranks.run_alone(ranks.normalise, x_BCHW, [5])

    results = ranks.call(ranks.normalise, tmp_path / "group", x_BCHW, counts)

    for name in ("y", "x"):
        assert torch.allclose(torch.cat([result[name] for result in results]), whole[name], atol=1e-4)
    for name in ("weight", "bias", "mean", "var"):
        assert all(torch.allclose(result[name], whole[name], rtol=1e-4, atol=1e-2) for result in results)


@pytest.mark.parametrize(
    ("size", "options"),
    [
        pytest.param(2, {}, id="frozen statistics"),
        pytest.param(2, {"freeze_batch_statistics": False}, id="statistics of each batch"),
        pytest.param(2, {"freeze_batch_statistics": False, "parts": 3, "planned_steps": 6}, id="statistics of uneven parts"),
        pytest.param(3, {"num_train": 2}, id="batches of fewer examples than processes"),
        pytest.param(5, {"num_train": 4, "freeze_batch_statistics": False, "planned_steps": 6}, id="statistics with empty parts"),
    ],
)
def test_processes_learn_what_one_learns(tmp_path: Path, tiny_model: Path, size: int, options: dict[str, Any]) -> None:
    alone = ranks.run_alone(ranks.tune, str(tiny_model), **options)

    together = ranks.call(ranks.tune, tmp_path / "group", str(tiny_model), size=size, **options)

    assert abs(together[0]["loss"] - alone["loss"]) < 1e-5
    for result in together[1:]:
        assert have_equal_bits(result["weights"], together[0]["weights"])
        assert have_equal_bits(result["average"], together[0]["average"])


def test_process_without_memory_ends_the_job_instead_of_hanging(tmp_path: Path, tiny_model: Path) -> None:
    results = ranks.call(ranks.tune_with_little_memory, tmp_path / "group", str(tiny_model))

    assert results[0]["error"] == "connection lost"
    assert "memory ran out with each batch in 1 parts" in results[1]["error"]


def test_job_of_two_processes_publishes_what_one_process_does(
    config: TrainerConfig, make_config: Any, run_job: Any, tmp_path: Path
) -> None:
    run_job(make_config(Path(config.dataset_path), output="alone", **SPEC))

    codes = ranks.start_job(config, tmp_path / "endings").wait()
    again = ranks.start_job(config, tmp_path / "again")

    assert codes == [0, 0]
    assert_equal_results(tmp_path / "output", tmp_path / "alone")
    endings = again.wait() and again.read_endings()
    digest = (tmp_path / "output/COMPLETE").read_text().strip()
    assert [ending and ending.report and ending.report.output and ending.report.output.digest for ending in endings] == [
        digest
    ] * 2


def read_metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def assert_equal_results(one: Path, two: Path) -> None:
    """Compare loss and metrics; accuracies are those of whole pictures, so they are equal or far apart."""
    first, second = read_metrics(one), read_metrics(two)
    assert abs(first["training"]["finetuning"]["loss"] - second["training"]["finetuning"]["loss"]) < 1e-5
    assert first["training"]["finetuning"]["steps"] == second["training"]["finetuning"]["steps"]
    assert [item["name"] for item in first["candidates"]] == [item["name"] for item in second["candidates"]]
    for mine, other in zip(first["metrics"], second["metrics"], strict=True):
        assert mine["value"] == pytest.approx(other["value"], abs=1e-3), mine["name"]
    assert (one / "splits.csv").read_bytes() == (two / "splits.csv").read_bytes()


def wait_for(path: Path, processes: ranks.Ranks) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        assert all(process.is_alive() for process in processes.processes)
        time.sleep(0.01)


def stop_while_tuning(config: TrainerConfig, folder: Path, *, rank: int, number: signal.Signals) -> tuple[ranks.Ranks, float]:
    """Send a signal to one process after the first steps, and return when."""
    processes = ranks.start_job(config, folder)
    wait_for(Path(config.work_path) / "model-v0/COMPLETE", processes)
    time.sleep(0.3)
    pid = processes.processes[rank].pid
    assert pid
    os.kill(pid, number)
    return processes, time.monotonic()


@pytest.mark.parametrize("rank", [0, 1])
def test_all_leave_when_one_is_told_to_and_go_on_with_the_same_bits(
    config: TrainerConfig, make_config: Any, tmp_path: Path, rank: int
) -> None:
    unbroken = ranks.start_job(make_config(Path(config.dataset_path), output="unbroken", **SPEC), tmp_path / "unbroken-endings")
    assert unbroken.wait() == [0, 0]

    processes, sent = stop_while_tuning(config, tmp_path / "stopped", rank=rank, number=signal.SIGTERM)
    codes = processes.wait()

    assert codes == [ExitCode.PREEMPTED] * 2
    assert time.monotonic() - sent < 20
    steps = [json.loads(path.read_text())["step"] for path in Path(config.checkpoint_path).glob("*-steps/manifest.json")]
    assert 0 < max(steps) < 30
    assert ranks.start_job(config.model_copy(update={"attempt": 2}), tmp_path / "resumed").wait() == [0, 0]
    one, two = (safetensors.torch.load_file(tmp_path / name / "model.safetensors") for name in ("output", "unbroken"))
    assert have_equal_bits(one, two)


def test_process_whose_peer_is_killed_leaves_within_seconds(config: TrainerConfig, tmp_path: Path) -> None:
    processes, sent = stop_while_tuning(config, tmp_path / "endings", rank=1, number=signal.SIGKILL)
    codes = processes.wait()

    assert codes == [ExitCode.PEER_LOST, -signal.SIGKILL]
    assert time.monotonic() - sent < 10
    ending = processes.read_endings()[0]
    assert ending
    assert ending.report
    assert ending.report.failure
    assert ending.report.failure.reason == "PeerLost"


def test_number_of_processes_may_change_between_attempts(
    config: TrainerConfig, make_config: Any, run_job: Any, run_until: Any, tmp_path: Path
) -> None:
    run_job(make_config(Path(config.dataset_path), output="alone", **SPEC))

    stopped, _ = stop_while_tuning(config, tmp_path / "two", rank=0, number=signal.SIGTERM)
    assert stopped.wait() == [ExitCode.PREEMPTED] * 2
    run_until(config.model_copy(update={"attempt": 2}), Phase.FINETUNE, after=1)
    codes = ranks.start_job(config.model_copy(update={"attempt": 3}), tmp_path / "three", size=3).wait()

    assert codes == [0, 0, 0]
    assert_equal_results(tmp_path / "output", tmp_path / "alone")


def test_job_of_one_process_asks_itself_alone() -> None:
    def stop() -> None:
        raise PreemptedError("Preempted", "stopped")

    notice = StopNotice(ALONE, stop)

    for check in (notice.check, notice.check_here, notice.check_together):
        with pytest.raises(PreemptedError):
            check()
    error = RuntimeError("Connection closed by peer")
    assert is_connection_lost(error)
    assert notice.explain(error) is error

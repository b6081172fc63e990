"""Processes of one job for tests: real ones, forked from a server that has torch loaded, which saves seconds."""

import copy
import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
from finetune_api import names
from finetune_api.contract import TrainerConfig, World
from finetune_api.v1alpha1 import Hyperparameters, MethodType, Precision
from finetune_trainer.__main__ import run_in_seat
from finetune_trainer.backbone import Classifier, load_backbone
from finetune_trainer.batch_statistics import share_batch_statistics
from finetune_trainer.batches import TrainingSet
from finetune_trainer.device import Device
from finetune_trainer.distributed import ALONE, Group, is_connection_lost, join
from finetune_trainer.ending import Ending, read_ending
from finetune_trainer.errors import OutOfMemoryError
from finetune_trainer.finetune import finetune
from finetune_trainer.memory import MicroBatches
from finetune_trainer.recipe import choose_recipe
from finetune_trainer.seat import Seat
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # noqa: TID251  the store that a launcher keeps

CONTEXT = multiprocessing.get_context("forkserver")
# By names that are installed: the server does not know the path of this file.
CONTEXT.set_forkserver_preload(["finetune_trainer.run", "finetune_trainer.predict", "torchvision"])


@dataclass
class Ranks:
    """The processes of a job, and the store that its launcher keeps."""

    folder: Path
    size: int
    processes: list[ForkServerProcess] = field(default_factory=list)

    def start(self, target: Callable[..., None], *arguments: Any) -> "Ranks":
        """Start a process for each rank."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank in range(self.size):
            seat = Seat(rank, rank, "127.0.0.1", self._store.port)
            process = CONTEXT.Process(target=target, args=(seat, self.folder, *arguments), daemon=True)
            process.start()
            self.processes.append(process)
        return self

    def wait(self, timeout_seconds: float = 60) -> list[int | None]:
        """Return the exit codes once all have ended."""
        deadline = time.monotonic() + timeout_seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
        return codes

    def read_endings(self) -> list[Ending | None]:
        """Return what the processes left for their launcher."""
        return [read_ending(self.folder, rank) for rank in range(self.size)]


def start_job(config: TrainerConfig, folder: Path, *, size: int = 2) -> Ranks:
    """Start the processes of a job as a launcher does."""
    config = config.model_copy(update={"world": World(processes_per_node=size)})
    return Ranks(folder, size).start(_work, config.model_dump_json(by_alias=True))


def call(
    function: Callable[..., dict[str, Any]], folder: Path, *arguments: Any, size: int = 2, **options: Any
) -> list[dict[str, Any]]:
    """Return what a function gives in each process of a group."""
    codes = Ranks(folder, size).start(_call, function, arguments, options, size).wait()
    assert codes == [0] * size
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(size)]


def _work(seat: Seat, folder: Path, config: str) -> None:
    os.environ[names.ENV_TRAINER_CONFIG] = config  # noqa: TID251
    os.environ.pop(names.ENV_REPORT_URL, None)  # noqa: TID251
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # noqa: TID251
    os._exit(run_in_seat(seat, folder))


def _call(
    seat: Seat,
    folder: Path,
    function: Callable[..., dict[str, Any]],
    arguments: Sequence[Any],
    options: dict[str, Any],
    size: int,
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # noqa: TID251
    torch.set_num_threads(1)
    try:
        torch.save(function(join(seat, World(processes_per_node=size)), *arguments, **options), folder / f"{seat.rank}.pt")
    except BaseException:  # noqa: BLE001  the edge of the process
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def tune(
    group: Group,
    model_folder: str,
    *,
    num_train: int = 48,
    parts: int = 1,
    largest: int | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Fine-tune the tiny model on bright and dark pictures, and return the mean loss of all steps, and the weights."""
    backbone = load_backbone("pvc://models/tiny", folder=Path(model_folder), image_size=32, cache=Path(model_folder))
    torch.manual_seed(0)
    model = Classifier(copy.deepcopy(backbone.model), backbone.architecture, num_features=backbone.num_features, num_classes=2)
    # A weight that the output does not depend on, as some backbones have.
    model.backbone.unused = torch.nn.Parameter(torch.ones(3))
    if largest is not None:
        model.register_forward_hook(_limit_memory(largest))
    y = torch.arange(num_train) % 2
    noise = torch.randint(0, 100, (num_train, 32, 32, 3), generator=torch.Generator().manual_seed(0))
    tuned, last = finetune(
        model.to(memory_format=torch.channels_last),  # type: ignore[call-overload]
        TrainingSet((noise + 150 * y.view(-1, 1, 1, 1)).to(torch.uint8), torch.arange(num_train), y),
        replace(_choose_recipe(num_train), **changes),
        preprocessing=backbone.architecture.preprocessing,
        seed=1,
        device=Device("cpu", Precision.FP32),
        step_seconds=1.0,
        seconds_left=lambda: None,
        check=lambda: None,
        advance=lambda _note: None,
        memory=MicroBatches(parts, group=group),
    )
    return {"loss": last.loss, "weights": tuned.weights, "average": tuned.average}


def tune_with_little_memory(group: Group, model_folder: str) -> dict[str, Any]:
    """Run out of memory in one of the processes, and return what each of them is left with."""
    try:
        return tune(group, model_folder, largest=2 if group.rank == 1 else None)
    except OutOfMemoryError as error:
        return {"error": error.message}
    except RuntimeError as error:
        return {"error": "connection lost" if is_connection_lost(error) else str(error)}


def normalise(group: Group, x_BCHW: Tensor, counts: list[int]) -> dict[str, Any]:
    """Return what batch normalisation makes of this process's part of a batch, and the gradients."""
    start = sum(counts[: group.rank])
    x = x_BCHW[start : start + counts[group.rank]].clone().requires_grad_()
    layer = torch.nn.BatchNorm2d(x_BCHW.shape[1])
    with torch.no_grad():
        layer.weight.copy_(torch.arange(1.0, 1 + len(layer.weight)))
    with share_batch_statistics(group, Device("cpu", Precision.FP32)):
        y = layer(x)
    (y.square() * torch.arange(y.shape[3])).sum().backward()
    assert layer.weight.grad is not None
    assert layer.bias.grad is not None
    gradients = {"x": x.grad, "weight": group.sum(layer.weight.grad), "bias": group.sum(layer.bias.grad)}
    return {"y": y.detach(), **gradients, "mean": layer.running_mean, "var": layer.running_var}


def exchange(group: Group) -> dict[str, Any]:
    """Return what comes of each kind of exchange."""
    tensors = {"a": torch.arange(3.0), "b": torch.tensor([True])} if group.is_main else {}
    rows = torch.full((group.rank, 2), float(group.rank))
    return {
        "agreed": list(group.agree((float(group.rank), -1.0))),
        "sum": group.sum(torch.tensor([1.0, float(group.rank)])),
        "rows": group.gather(rows, list(range(group.size))),
        "json": json.dumps(group.broadcast_json({"x": [1, None, "y"]} if group.is_main else None)),
        "tensors": group.broadcast_tensors(tensors),
        "nothing": len(group.broadcast(b"")),
    }


def map_rows(group: Group, count: int, parts: int) -> dict[str, Any]:
    """Return the rows of a batch that is computed by all processes."""
    return {"rows": MicroBatches(parts, group=group).map(lambda batch: batch[:, None] * 2.0, torch.arange(count), share=4)}


def run_alone(function: Callable[..., dict[str, Any]], *arguments: Any, **options: Any) -> dict[str, Any]:
    """Return what a function gives in this process."""
    return function(ALONE, *arguments, **options)


def _choose_recipe(num_train: int) -> Any:
    return choose_recipe(
        num_train=num_train,
        has_batch_statistics=True,
        method=MethodType.FULL,
        training_seconds=None,
        hyperparameters=Hyperparameters(batch_size=8, max_steps=12),
        on_cpu=True,
    )


def _limit_memory(largest: int) -> Callable[..., None]:
    def hook(_module: torch.nn.Module, inputs: tuple[Tensor], _output: Tensor) -> None:
        if len(inputs[0]) > largest:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory")

    return hook

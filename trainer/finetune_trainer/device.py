"""The device that computes: the only file that knows what a device can do and how many threads there are."""

import ctypes
import importlib
import math
import os
import platform
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from finetune_api.contract import DeviceType
from finetune_api.v1alpha1 import Precision
from torch import Tensor, nn

from finetune_trainer.errors import InvalidSpecError, shorten

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 1 << 30
_FUSED = frozenset({DeviceType.CPU, DeviceType.CUDA})


@dataclass(frozen=True)
class Device:
    """A device and the number format of its arithmetic."""

    name: str
    """As torch knows it, with an index where there may be several."""
    precision: Precision

    @property
    def type(self) -> DeviceType:
        """Return what kind of device it is."""
        return DeviceType(self.name.partition(":")[0])

    @property
    def optimizer_options(self) -> dict[str, Any]:
        """Return how the optimizer computes best; counters of steps that stay on a device need no wait in each step."""
        return {"fused": True} if self.type in _FUSED else {"foreach": False, "capturable": True}

    def place(self, model: nn.Module) -> nn.Module:
        """Return the model on the device, in the memory layout that convolutions are fastest with."""
        return model.to(device=self.name, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]  # missing in the stubs

    def keep(self, tensor: Tensor) -> Tensor:
        """Return the tensor on the device if it is a GPU and takes less than a quarter of its memory, else as it is."""
        if self.type is not DeviceType.CUDA or tensor.nbytes > torch.cuda.mem_get_info()[0] / 4:
            return tensor
        return tensor.to(self.name)

    def read_peak_memory(self) -> int | None:
        """Return the most memory that torch held on a GPU; None elsewhere."""
        return torch.cuda.max_memory_reserved(self.name) if self.type is DeviceType.CUDA else None

    def autocast(self) -> AbstractContextManager[None]:
        """Return the context for forward passes in the device's precision."""
        return torch.autocast(self.type.value, dtype=torch.bfloat16, enabled=self.precision is Precision.BF16)

    def finish_step(self) -> None:
        """Have devices that only note down what is to be computed compute it."""
        if self.type is DeviceType.XLA:
            importlib.import_module("torch_xla").sync()
        elif self.type is DeviceType.HPU:
            importlib.import_module("habana_frameworks.torch.core").mark_step()

    def synchronize(self) -> None:
        """Wait until the device has done all that it was given, so that a clock can be read."""
        if self.type is DeviceType.CUDA:
            torch.cuda.synchronize()
        elif self.type is DeviceType.XLA:
            importlib.import_module("torch_xla").sync(wait=True)
        elif self.type is DeviceType.HPU:
            importlib.import_module("habana_frameworks.torch.hpu").synchronize()


def select_device(precision: Precision, wanted: DeviceType | None = None, *, local_rank: int = 0) -> Device:
    """Return the wanted device, or the fastest of this machine, with `auto` precision resolved to what is faster on it.

    A device that is wanted and missing is an InvalidSpecError: a CPU in its place would be slower by orders of magnitude.
    """
    kind = wanted or (DeviceType.CUDA if torch.cuda.is_available() else DeviceType.CPU)
    name = _FINDERS[kind](local_rank)
    if kind is DeviceType.CPU:
        # bf16 on a CPU without matrix units is emulated and slower than fp32.
        return Device(name, Precision.BF16 if precision is Precision.BF16 else Precision.FP32)
    return Device(name, Precision.FP32 if precision is Precision.FP32 else Precision.BF16)


def _find_cuda(local_rank: int) -> str:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if local_rank >= count:
        raise _missing(
            DeviceType.CUDA, f"torch {torch.__version__} finds {count} GPUs, and this is process {local_rank} of its pod"
        )
    # Where a process has a single GPU, it needs no number.
    if count > 1:
        torch.cuda.set_device(local_rank)
    return "cuda" if count == 1 else f"cuda:{local_rank}"


def _find_xla(_local_rank: int) -> str:
    try:
        return str(importlib.import_module("torch_xla").device())
    except (ImportError, RuntimeError) as error:
        raise _missing(DeviceType.XLA, str(error)) from error


def _find_hpu(_local_rank: int) -> str:
    try:
        # Each process takes a free one by itself.
        importlib.import_module("habana_frameworks.torch.core")
        importlib.import_module("habana_frameworks.torch.hpu").current_device()
    except (ImportError, RuntimeError) as error:
        raise _missing(DeviceType.HPU, str(error)) from error
    return "hpu"


def _missing(kind: DeviceType, found: str) -> InvalidSpecError:
    return InvalidSpecError(
        "DeviceMissing",
        f"spec.accelerator asks for a device of type {kind.value}, which this pod does not have ({shorten(found, 300)}); give "
        "nodes with a working driver, an image whose torch supports it, or leave spec.accelerator out",
    )


_FINDERS: dict[DeviceType, Callable[[int], str]] = {
    DeviceType.CPU: lambda _local_rank: "cpu",
    DeviceType.CUDA: _find_cuda,
    DeviceType.XLA: _find_xla,
    DeviceType.HPU: _find_hpu,
}


def prepare_arithmetic(num_threads: int) -> None:
    """Use `num_threads` threads and deterministic algorithms, and memory that stays with the process."""
    _keep_freed_memory()
    torch.set_num_threads(num_threads)
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # missing in the stubs
    torch.backends.cudnn.deterministic = True


def _keep_freed_memory() -> None:
    """Have glibc reuse freed memory: mapping every large tensor anew takes a third of the time of a small model's forward pass.

    Numbers of the options: https://man7.org/linux/man-pages/man3/mallopt.3.html
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def count_cpus(cgroup: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int:
    """Return the number of cores this process may use: the cgroup's quota rounded up, else the cores it may run on."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for folder in _list_cgroups(cgroup, membership) if (quota := _read_quota(folder)) is not None]
    return max(1, min([available, *(math.ceil(quota) for quota in quotas)]))


def _list_cgroups(cgroup: Path, membership: Path) -> list[Path]:
    """Return the folders that may limit this process: in a container its own cgroup is the root, else an ancestor may bind."""
    lines = membership.read_text().splitlines() if membership.exists() else []
    paths = [fields[2] for line in lines if len(fields := line.split(":", 2)) == 3 and fields[1] in ("", "cpu", "cpu,cpuacct")]
    relative = {part for path in paths for part in (PurePosixPath(path), *PurePosixPath(path).parents)} | {PurePosixPath("/")}
    return [
        root / part.relative_to("/") for root in (cgroup, cgroup / "cpu") for part in sorted(relative) if ".." not in part.parts
    ]


def _read_quota(folder: Path) -> float | None:
    unified, quota, period = folder / "cpu.max", folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us"
    if unified.is_file():
        amount, _, length = unified.read_text().partition(" ")
        return None if amount == "max" else int(amount) / int(length)
    if quota.is_file() and period.is_file() and int(quota.read_text()) > 0:
        return int(quota.read_text()) / int(period.read_text())
    return None

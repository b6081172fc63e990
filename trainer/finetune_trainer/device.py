"""The device that computes: the only file that knows what a device can do and how many threads there are."""

import ctypes
import math
import os
import platform
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from finetune_api.v1alpha1 import Precision
from torch import Tensor, nn

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 1 << 30


@dataclass(frozen=True)
class Device:
    """A device and the number format of its arithmetic."""

    name: str
    precision: Precision

    def place(self, model: nn.Module) -> nn.Module:
        """Return the model on the device, in the memory layout that convolutions are fastest with."""
        return model.to(device=self.name, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]  # missing in the stubs

    def keep(self, tensor: Tensor) -> Tensor:
        """Return the tensor on the device if it takes less than a quarter of its memory, else as it is."""
        if self.name == "cpu" or tensor.nbytes > torch.cuda.mem_get_info()[0] / 4:
            return tensor
        return tensor.to(self.name)

    def autocast(self) -> AbstractContextManager[None]:
        """Return the context for forward passes in the device's precision."""
        return torch.autocast(self.name, dtype=torch.bfloat16, enabled=self.precision is Precision.BF16)

    def synchronize(self) -> None:
        """Wait until the device has done all that it was given, so that a clock can be read."""
        if self.name == "cuda":
            torch.cuda.synchronize()


def select_device(precision: Precision) -> Device:
    """Return the fastest device of this machine, with `auto` precision resolved to what is faster on it."""
    if torch.cuda.is_available():
        return Device("cuda", Precision.FP32 if precision is Precision.FP32 else Precision.BF16)
    # bf16 on a CPU without matrix units is emulated and slower than fp32.
    return Device("cpu", Precision.BF16 if precision is Precision.BF16 else Precision.FP32)


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

import os
from pathlib import Path

import pytest
import torch
from finetune_api.contract import DeviceType, ExitCode
from finetune_api.v1alpha1 import Precision
from finetune_trainer.budget import Budget, read_process_start
from finetune_trainer.device import Device, count_cpus, select_device
from finetune_trainer.errors import InvalidSpecError

AVAILABLE = len(os.sched_getaffinity(0))


def write_files(root: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)


@pytest.mark.parametrize(
    ("files", "membership", "quota"),
    [
        pytest.param({"cpu.max": "100000 100000\n"}, "0::/\n", 1, id="v2: one core"),
        pytest.param({"cpu.max": "50000 100000\n"}, "0::/\n", 1, id="v2: half a core"),
        pytest.param({"cpu.max": "150000 100000\n"}, "0::/\n", 2, id="v2: rounded up"),
        pytest.param({"cpu.max": "max 100000\n"}, "0::/\n", None, id="v2: no limit"),
        pytest.param({"a/cpu.max": "100000 100000", "a/b/cpu.max": "max 100000"}, "0::/a/b\n", 1, id="v2: the parent limits"),
        pytest.param({"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, "4:cpu:/host/pod\n", 1, id="v1"),
        pytest.param({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "4:cpu:/\n", None, id="v1: no limit"),
        pytest.param(
            {"cpu/p/cpu.cfs_quota_us": "100000", "cpu/p/cpu.cfs_period_us": "100000"}, "4:cpu,cpuacct:/p\n", 1, id="v1: own group"
        ),
        pytest.param({}, "", None, id="no cgroup"),
    ],
)
def test_threads_follow_the_quota(tmp_path: Path, files: dict[str, str], membership: str, quota: int | None) -> None:
    write_files(tmp_path / "cgroup", files)
    (tmp_path / "membership").write_text(membership)

    counted = count_cpus(tmp_path / "cgroup", tmp_path / "membership")

    assert counted == min(AVAILABLE, quota or AVAILABLE)


def test_quota_above_the_cores_gives_the_cores(tmp_path: Path) -> None:
    write_files(tmp_path, {"cpu.max": "99900000 100000"})

    assert count_cpus(tmp_path, tmp_path / "none") == AVAILABLE


def test_precision_of_the_user_is_kept() -> None:
    assert select_device(Precision.FP32).precision is Precision.FP32
    assert select_device(Precision.BF16).precision is Precision.BF16


@pytest.mark.parametrize("wanted", [DeviceType.CUDA, DeviceType.XLA, DeviceType.HPU])
@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a GPU")
def test_wanted_device_that_is_missing_is_named(wanted: DeviceType) -> None:
    with pytest.raises(InvalidSpecError, match=rf"spec\.accelerator asks for a device of type {wanted.value}") as caught:
        select_device(Precision.AUTO, wanted)

    assert caught.value.reason == "DeviceMissing"
    assert caught.value.exit_code is ExitCode.INVALID_SPEC


def test_device_is_the_one_that_is_wanted() -> None:
    assert select_device(Precision.AUTO, DeviceType.CPU) == Device("cpu", Precision.FP32)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("cpu", DeviceType.CPU), ("cuda", DeviceType.CUDA), ("cuda:3", DeviceType.CUDA), ("xla:0", DeviceType.XLA)],
)
def test_type_of_a_device_is_in_its_name(name: str, expected: DeviceType) -> None:
    assert Device(name, Precision.FP32).type is expected


def test_budget_counts_from_its_start() -> None:
    now = 100.0
    budget = Budget(60, started=70.0, clock=lambda: now)

    assert budget.elapsed_seconds() == 30
    assert budget.remaining_seconds() == 30
    assert Budget(None, started=70.0).remaining_seconds() is None


def test_process_start_lies_before_now() -> None:
    age = Budget(None, read_process_start()).elapsed_seconds()

    assert 0 < age < 3600

"""What a run has used: exact to the second, over restarts, suspensions and prices."""

from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest
from finetune_api.profile import AcceleratorKind
from finetune_api.v1alpha1 import CheckpointStatus, FineTuneJobStatus, Usage
from finetune_operator.measures import measure
from finetune_operator.metrics import Metrics
from finetune_operator.policies.gang import Gang
from finetune_operator.policies.usage import begin_attempt, end_running
from finetune_operator.snapshot import Snapshot
from prometheus_client import generate_latest
from world import PUBLISHED, START, World


def _run(status: FineTuneJobStatus, snapshot: Snapshot, *, seconds: int, is_complete: bool = False) -> FineTuneJobStatus:
    """Return the status after one more attempt that ran for some seconds."""
    status = begin_attempt(status, attempt=status.attempt + 1, pod_shape="5e6f7a8b", snapshot=snapshot)
    status = status.model_copy(update={"running_since": START})
    return end_running(status, Gang(), now=START + timedelta(seconds=seconds), is_complete=is_complete)[0]


@pytest.mark.parametrize(
    ("accelerators", "price", "seconds", "expected"),
    [
        pytest.param(1, None, 10, (10, None), id="no price, no cost"),
        pytest.param(8, "2.49", 3600, (28_800, "19.9200"), id="eight for an hour"),
        pytest.param(1, "1", 1, (1, "0.0003"), id="rounded to four places"),
        pytest.param(16, "0", 3600, (57_600, "0.0000"), id="free of charge"),
        pytest.param(65_536, "999999.9999", 31_536_000, (2_066_743_296_000, "574095359942590.4640"), id="large"),
    ],
)
def test_cost_follows_from_number_time_and_price(
    accelerators: int, price: str | None, seconds: int, expected: tuple[int, str | None]
) -> None:
    usage = _run(
        FineTuneJobStatus(), Snapshot(accelerators=accelerators, price_per_accelerator_hour=price), seconds=seconds
    ).usage

    assert usage is not None
    assert expected == (usage.accelerator_seconds, usage.cost)
    assert usage == Usage.model_validate_json(usage.model_dump_json(by_alias=True))


def test_each_attempt_is_charged_by_what_it_was_begun_with() -> None:
    status = _run(FineTuneJobStatus(), Snapshot(accelerators=2, price_per_accelerator_hour="36"), seconds=100)
    status = _run(status, Snapshot(accelerators=8), seconds=100)
    status = _run(status, Snapshot(accelerators=1, price_per_accelerator_hour="3.6"), seconds=100)

    assert status.usage is not None
    assert (200 + 800 + 100, "2.1000") == (status.usage.accelerator_seconds, status.usage.cost)
    assert 300 == status.active_seconds


@pytest.mark.parametrize(("is_complete", "wasted"), [(False, 4 * 7), (True, 0)])
def test_wasted_is_what_lies_after_the_checkpoint_of_an_early_end(*, is_complete: bool, wasted: int) -> None:
    saved = CheckpointStatus(step=1, samples=1, time=START + timedelta(seconds=3), attempt=1)
    status = FineTuneJobStatus(checkpoint=saved)
    usage = _run(status, Snapshot(accelerators=4), seconds=10, is_complete=is_complete).usage

    assert usage is not None
    assert (40, wasted) == (usage.accelerator_seconds, usage.wasted_accelerator_seconds)


def test_restarts_suspensions_and_deletions_are_all_counted_once() -> None:
    world = World().put_profile(isDefault=True, pricePerAcceleratorHour="36").settle()
    world.run().wait(10).save().wait(7).disrupt()
    world.run().wait(5).drop_profile().change(suspend=True).settle().wait(2).collect()
    assert ("Suspended", 10 + 7 + 5 + 2) == (world.state, world.status.active_seconds)
    world.wait(1000).put_profile(isDefault=True, pricePerAcceleratorHour="72").change(suspend=False).settle().run().wait(20)
    world.kill(world.reconcile(), writes=0).exit(0, message=PUBLISHED)

    usage = world.status.usage
    assert usage is not None
    assert "Complete" == world.state
    assert (24 + 20, "0.6400") == (usage.accelerator_seconds, usage.cost)
    assert Decimal("0.64") == Decimal(36 * 24 + 72 * 20) / 3600
    assert world.status.active_seconds == usage.accelerator_seconds
    assert world.status.lost_seconds == usage.wasted_accelerator_seconds == 7 + 7


@pytest.mark.parametrize(
    ("spec", "profile", "accelerators", "kind"),
    [
        pytest.param({"nodes": 3}, {}, 3, "cpu", id="CPU pods"),
        pytest.param({"nodes": 2, "accelerator": {"nvidia": {"count": 8}}}, {}, 16, "nvidia", id="GPUs of two nodes"),
        pytest.param(
            {}, {"accelerator": {"tpu": {"type": "tpu-v6e-slice", "topology": "4x4"}}}, 16, "tpu", id="a slice by the profile"
        ),
    ],
)
def test_accelerators_of_all_pods_are_charged(
    spec: dict[str, Any], profile: dict[str, Any], accelerators: int, kind: str
) -> None:
    world = World().put_profile(isDefault=True, pricePerAcceleratorHour="3600", **profile).change(**spec).settle()
    world.run().wait(10).disrupt()
    world.run().wait(5).exit(0, message=PUBLISHED)

    usage = world.status.usage
    assert usage is not None
    assert "Complete" == world.state
    assert (accelerators, kind) == (usage.accelerators, usage.accelerator_kind.value)
    assert (15 * accelerators, 10 * accelerators) == (usage.accelerator_seconds, usage.wasted_accelerator_seconds)
    assert f"{15 * accelerators}.0000" == usage.cost


def test_eviction_by_a_queue_is_accounted_for_and_waiting_for_it_costs_nothing() -> None:
    world = World(labels={"kueue.x-k8s.io/queue-name": "team"}).put_profile(isDefault=True, pricePerAcceleratorHour="3600")
    world.settle().wait(500).admit().settle().run().wait(10).save().wait(3)
    world.drop_profile().evict().settle().wait(500).admit().settle().run().wait(7).exit(0, message=PUBLISHED)

    usage = world.status.usage
    assert usage is not None
    assert "Complete" == world.state
    assert (10 + 3 + 7, 3, "20.0000") == (usage.accelerator_seconds, usage.wasted_accelerator_seconds, usage.cost)


def test_waiting_costs_nothing() -> None:
    world = World().put_profile(isDefault=True, pricePerAcceleratorHour="36").settle().wait(500).settle().run()

    assert world.status.usage is not None
    assert (0, None) == (world.status.usage.accelerator_seconds, world.status.usage.cost)


def test_new_run_begins_with_nothing() -> None:
    world = World().settle().run().wait(9).disrupt()
    assert world.status.usage is not None
    assert 9 == world.status.usage.accelerator_seconds
    world.change(hyperparameters={"seed": 7}).settle().collect()

    assert world.status.usage == Usage()


def _measure(old: FineTuneJobStatus, new: FineTuneJobStatus) -> dict[str, float]:
    metrics = Metrics()
    world = World(status=old)
    measure(metrics, world.job, new, created_at=None)
    lines = generate_latest(metrics.registry).decode().splitlines()
    return {line.split()[0]: float(line.split()[1]) for line in lines if "accelerator_seconds_total{" in line}


def test_metrics_count_what_an_attempt_used_by_its_own_kind() -> None:
    before = Usage(accelerators=8, accelerator_kind=AcceleratorKind.NVIDIA, accelerator_seconds=80)
    after = Usage(accelerators=1, accelerator_seconds=240, wasted_accelerator_seconds=16)
    old = FineTuneJobStatus(run="a", usage=before, running_since=START)

    assert _measure(old, FineTuneJobStatus(run="a", usage=after)) == {
        'finetune_accelerator_seconds_total{job_namespace="team",kind="nvidia"}': 160.0,
        'finetune_wasted_accelerator_seconds_total{job_namespace="team",kind="nvidia"}': 16.0,
    }


def test_metrics_know_the_kind_of_an_attempt_that_was_never_seen_running() -> None:
    after = Usage(accelerators=4, accelerator_kind=AcceleratorKind.TPU, accelerator_seconds=40)

    assert _measure(FineTuneJobStatus(run="a"), FineTuneJobStatus(run="a", usage=after)) == {
        'finetune_accelerator_seconds_total{job_namespace="team",kind="tpu"}': 40.0,
        'finetune_wasted_accelerator_seconds_total{job_namespace="team",kind="tpu"}': 0.0,
    }

"""What random lives have used: exact to the second, in the status and in the metrics, whatever interrupted them."""

import random
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import pytest
from finetune_operator.measures import measure
from finetune_operator.metrics import Metrics
from finetune_operator.outcome import Outcome
from finetune_operator.snapshot import Snapshot
from prometheus_client import generate_latest
from world import PUBLISHED, SPEC, World

_PROFILES: tuple[dict[str, Any], ...] = (
    {"pricePerAcceleratorHour": "3600"},
    {"accelerator": {"nvidia": {"count": 8}}, "pricePerAcceleratorHour": "36"},
    {"accelerator": {"nvidia": {"count": 2}}},
)
_QUEUE = {"kueue.x-k8s.io/queue-name": "team"}


@dataclass
class MeteredWorld(World):
    """A world whose status writes are measured, as the controller does."""

    metrics: Metrics = field(default_factory=Metrics)

    def carry_out(self, outcome: Outcome, *, writes: int = 1000) -> None:
        before = self.job
        super().carry_out(outcome, writes=writes)
        if self.status != before.status:
            measure(self.metrics, before, self.status, created_at=None)

    def count(self, name: str) -> float:
        """Return a counter, summed over its labels."""
        lines = generate_latest(self.metrics.registry).decode().splitlines()
        return sum(float(line.split()[1]) for line in lines if line.startswith(f"finetune_{name}_total{{"))


@dataclass
class Ledger:
    """What the test itself has let pass."""

    used: int = 0
    wasted: int = 0
    cost: Decimal = Decimal(0)

    def add(self, snapshot: Snapshot, *, seconds: int, lost: int) -> None:
        self.used += snapshot.accelerators * seconds
        self.wasted += snapshot.accelerators * lost
        self.cost += snapshot.accelerators * seconds * Decimal(snapshot.price_per_accelerator_hour or 0) / 3600


@pytest.mark.parametrize("seed", range(60))
def test_usage_of_a_life_is_what_has_passed(seed: int) -> None:
    chance = random.Random(seed)
    spec = SPEC | {"runPolicy": {"backoffLimit": 100}, "nodes": chance.choice([1, 1, 2, 3])}
    world = MeteredWorld(spec=spec, labels=chance.choice([{}, _QUEUE]))
    ledger = Ledger()
    for _ in range(chance.randrange(8)):
        _begin(world, chance)
        snapshot = world.newest.snapshot
        seconds, lost = _train(world, chance)
        grace = chance.choice(_ENDINGS)(world, chance)
        ledger.add(snapshot, seconds=seconds + grace, lost=lost + grace)
    _begin(world, chance)
    seconds, _ = _train(world, chance)
    ledger.add(world.newest.snapshot, seconds=seconds, lost=0)
    world.exit(0, message=PUBLISHED)

    usage = world.status.usage
    assert usage is not None
    assert "Complete" == world.state
    assert (ledger.used, ledger.wasted) == (usage.accelerator_seconds, usage.wasted_accelerator_seconds)
    assert abs(ledger.cost - Decimal(usage.cost or 0)) < Decimal("0.001")
    assert ledger.used == world.count("accelerator_seconds")
    assert ledger.wasted == world.count("wasted_accelerator_seconds")


def _begin(world: World, chance: random.Random) -> None:
    """Let an attempt begin under a random profile, wait, and run."""
    world.put_profile(isDefault=True, **chance.choice(_PROFILES))
    world.change(suspend=False).settle().collect().wait(400).settle()
    world.wait(chance.randrange(1000)).settle()
    if world.newest.suspended:
        world.admit().settle()
    world.wait(chance.randrange(100)).settle().run()


def _train(world: World, chance: random.Random) -> tuple[int, int]:
    """Let trainers run, and perhaps save and go on; return how long they ran, and how long since the checkpoint."""
    seconds = lost = chance.randrange(100)
    world.wait(seconds).settle()
    for step in range(chance.randrange(3)):
        lost = chance.randrange(100)
        seconds += lost
        world.save(step + 1).wait(lost).settle()
    saved = world.report.report.checkpoint if world.report else None
    # A checkpoint that no status tells of is forgotten with the operator that has heard of it.
    while saved in (None, world.status.checkpoint) and chance.random() < 0.3:
        world.kill(world.reconcile(), writes=chance.randrange(3))
    return seconds, lost


def _disrupt(world: World, chance: random.Random) -> int:
    world.disrupt()
    return 0


def _crash(world: World, chance: random.Random) -> int:
    world.exit(chance.choice([1, 137]), index=chance.randrange(world.newest.nodes))
    return 0


def _suspend(world: World, chance: random.Random) -> int:
    return _stop(world.change(suspend=True), chance)


def _replace(world: World, chance: random.Random) -> int:
    return _stop(world.change(resources={"cpu": str(chance.randrange(3, 1000)), "memory": "1Gi"}), chance)


def _stop(world: World, chance: random.Random) -> int:
    """Let the pods take their time to end, which is in use as well; return it."""
    seconds = chance.randrange(30)
    world.settle().wait(seconds).settle().collect()
    return seconds


def _evict(world: World, chance: random.Random) -> int:
    """Let the queue evict the attempt, which goes on when it is admitted again; without a queue, let it be disrupted."""
    if world.newest.queue is None:
        return _disrupt(world, chance)
    seconds = chance.randrange(30)
    world.suspend_child().settle().wait(seconds).evict().settle()
    return seconds


_ENDINGS = (_disrupt, _crash, _suspend, _replace, _evict)

"""Random lives of a FineTuneJob: whatever happens in whatever order, some things are never so."""

import random
from collections.abc import Callable
from typing import Any

import pytest
from finetune_api.conditions import is_true
from world import PUBLISHED, SPEC, World

_LIMIT = 2
_FREE = ("Evicted", "PodDeleted", "PodLost", "QueueEvicted")
_POLICIES: tuple[dict[str, Any], ...] = (
    {},
    {"startDeadlineSeconds": 15},
    {"activeDeadlineSeconds": 30},
    {"ttlSecondsAfterFinished": 10},
    {"startDeadlineSeconds": 300, "activeDeadlineSeconds": 300, "ttlSecondsAfterFinished": 0},
)


_QUEUES: tuple[dict[str, str], ...] = ({}, {"kueue.x-k8s.io/queue-name": "a"}, {"kueue.x-k8s.io/queue-name": "b"})


def _begin(chance: random.Random) -> World:
    spec = SPEC | {"runPolicy": {"backoffLimit": _LIMIT} | chance.choice(_POLICIES), "nodes": chance.choice([1, 1, 2, 3])}
    return World(spec=spec, labels=dict(chance.choice(_QUEUES))).settle()


@pytest.mark.parametrize("seed", range(200))
def test_life_never_overlaps_attempts_and_never_exceeds_the_limit(seed: int) -> None:
    chance = random.Random(seed)
    world = _begin(chance)
    for _ in range(40):
        _happen(world, chance)
        world.settle()
        _check(world)


@pytest.mark.parametrize("seed", range(200))
def test_operator_that_is_killed_between_two_writes_repeats_and_loses_nothing(seed: int) -> None:
    chance = random.Random(seed)
    world = _begin(chance)
    for _ in range(40):
        _happen(world, chance)
        while chance.random() < 0.5:
            world.kill(world.reconcile(), writes=chance.randrange(3))
        world.settle()
        _check(world)


@pytest.mark.parametrize("seed", range(100))
def test_life_always_ends(seed: int) -> None:
    """Whatever happened, when all goes well from then on, the run ends."""
    chance = random.Random(seed)
    world = _begin(chance)
    for _ in range(20):
        _happen(world, chance)
        world.settle()
    world.change(suspend=False).settle()
    for _ in range(9):
        world.collect().wait(400).settle()
        if [child for child in world.active if not child.deleting]:
            _run(world).wait(1)
        if [child for child in world.active if not child.deleting and not child.suspended]:
            world.exit(0, message=PUBLISHED)

    assert world.state in ("Complete", "Failed")


@pytest.mark.parametrize("seed", range(50))
def test_killed_operator_comes_to_the_same_end_as_one_that_lives(seed: int) -> None:
    """Nothing but the two operators differs: one is killed at random instants, between any two of its writes."""
    ends = []
    for is_killed in (False, True):
        chance, deaths = random.Random(seed), random.Random(f"deaths {seed}")
        world = _begin(chance)
        for _ in range(6):
            world.wait(chance.choice([1, 20, 400])).settle()
            if not [child for child in world.active if not child.deleting]:
                continue
            code = chance.choice([0, 1, 65, 137])
            world.admit()
            for index in range(world.newest.nodes):
                world.pod(index, phase="Running", started_at=world.now)
            while is_killed and deaths.random() < 0.7:
                world.kill(world.reconcile(), writes=deaths.randrange(3))
            world.settle().wait(5).exit_unseen(code, message=PUBLISHED if code == 0 else None)
            while is_killed and deaths.random() < 0.7:
                world.kill(world.reconcile(), writes=deaths.randrange(3))
            world.settle()
        ends.append((world.state, world.cause, world.status.model_copy(update={"conditions": ()}), world.manifests))

    assert ends[0] == ends[1]


@pytest.mark.parametrize("seed", range(200))
def test_profiles_that_come_change_and_go_touch_no_attempt_that_runs(seed: int) -> None:
    chance = random.Random(seed)
    world = _begin(chance)
    for _ in range(40):
        if chance.random() < 0.5:
            _happen(world, chance)
            while chance.random() < 0.2:
                world.kill(world.reconcile(), writes=chance.randrange(3))
        else:
            _change_profiles(world, chance)
        world.settle()
        _check(world)
        _check_budgets(world)


def _change_profiles(world: World, chance: random.Random) -> None:
    """Change the profiles, or which of them the job has when it has no attempt, and look that no attempt notices."""
    before = (list(world.active), dict(world.pods))
    if chance.random() < 0.3:
        world.drop_profile(chance.choice("ab"))
    elif world.active or chance.random() < 0.7:
        world.put_profile(chance.choice("ab"), **chance.choice(_PROFILES), isDefault=chance.random() < 0.7)
    else:
        world.change(profileRef=chance.choice([None, {"name": "a"}, {"name": "b"}]))
    world.settle()
    if before[0]:
        assert before == (world.active, world.pods)
    assert not [child for child in world.active if child.deleting and child not in before[0]], "it was begun to be replaced"


def _check_budgets(world: World) -> None:
    budgets: dict[str, int | None] = {}
    for config in world.configs:
        if config.attempt == 1:
            budgets[config.run] = config.training_seconds
        assert budgets[config.run] == config.training_seconds, "a run keeps the budget that it began with"
    if usage := world.status.usage:
        assert usage.wasted_accelerator_seconds <= usage.accelerator_seconds <= _MOST_ACCELERATORS * world.status.active_seconds


def _check(world: World) -> None:
    status = world.status
    busy = [pod for pod in world.pods.values() if not pod.is_ended]
    assert 1 >= len(world.active)
    assert _LIMIT >= status.restarts_counted_towards_limit
    assert status.restarts_counted_towards_limit <= status.restarts
    assert status.observed_generation == world.generation
    assert status.lost_seconds <= status.active_seconds
    assert not (is_true(status.conditions, "Complete") and is_true(status.conditions, "Failed"))
    failed = [each.attempt for each in status.restart_history if each.reason != "QueueEvicted"]
    assert sorted(set(failed)) == failed, "a failed attempt counts once"
    assert not [each for each in status.restart_history if each.reason in _FREE and each.counted], "a disruption is free"
    assert 1 >= len({pod.child for pod in busy}), "two attempts at once"
    held = [child for child in world.active if child.suspended and not child.deleting]
    assert not held or busy or status.running_since is None, "an eviction is accounted for"
    names = [each["metadata"]["name"] for each in world.manifests]
    assert len(set(names)) == len(names) or world.generation > 1, "a name is used once in a run"


def _happen(world: World, chance: random.Random) -> None:
    """Let one thing happen: the first of these to everything, the second to an attempt that is under way."""
    active = [child for child in world.active if not child.deleting]
    chance.choice(_TO_AN_ATTEMPT if active and chance.random() < 0.5 else _TO_ALL)(world, chance)


def _lose_some(world: World, chance: random.Random) -> None:
    for name in [name for name in world.children if chance.random() < 0.5]:
        del world.children[name]
        world.pods = {key: pod for key, pod in world.pods.items() if pod.child != name}


def _run(world: World) -> World:
    """Let all trainers of the newest attempt run, which its queue has to admit first."""
    return world.admit().settle().run() if world.newest.suspended else world.run()


def _exit(world: World, chance: random.Random) -> None:
    _run(world).wait(chance.choice([0, 7]))
    if not world.active or world.newest.deleting:
        return
    fields = {"index": chance.randrange(world.newest.nodes), "message": chance.choice([None, PUBLISHED])}
    world.exit(chance.choice([0, 1, 65, 75, 76, 137]), **fields)


def _evict(world: World, chance: random.Random) -> None:
    """Let the queue evict an attempt, or admit it, with a pause in between in which anything else may happen."""
    if world.newest.suspended:
        world.admit().settle()
    elif world.newest.queue:
        _run(world).wait(chance.choice([0, 7]))
        if world.active and not world.newest.deleting:
            if world.newest.nodes > 1 and chance.random() < 0.2:
                world.end(0, index=1)
            world.suspend_child().settle().wait(chance.choice([0, 3])).evict()


def _requeue(world: World, chance: random.Random) -> None:
    world.labels = dict(chance.choice(_QUEUES))


_PROFILES: tuple[dict[str, Any], ...] = (
    {},
    {"image": "other:1", "budget": {"trainingSeconds": 60}, "pricePerAcceleratorHour": "2.49"},
    {"budget": {"trainingSeconds": 600}, "environment": [{"name": "A", "value": "1"}]},
    {"accelerator": {"nvidia": {"count": 8}}},
    {"allowedUriSchemes": ["s3"]},
    {"limits": {"accelerators": ["quantum"]}},
)
# Those of the profile, in up to three pods.
_MOST_ACCELERATORS = 24
_Happening = Callable[[World, random.Random], object]
_TO_ALL: tuple[_Happening, ...] = (
    lambda world, chance: world.change(suspend=chance.random() < 0.5),
    lambda world, chance: world.change(hyperparameters={"seed": chance.randrange(3)}),
    lambda world, chance: world.change(nodes=chance.choice([1, 2, 3])),
    _requeue,
    lambda world, chance: world.change(resources={"cpu": str(chance.randrange(1, 3)), "memory": "1Gi"}),
    lambda world, chance: world.change(runPolicy={"backoffLimit": _LIMIT} | chance.choice(_POLICIES)),
    lambda world, chance: world.wait(chance.choice([1, 20, 400])),
    lambda world, _: world.collect(),
    _lose_some,
)
_TO_AN_ATTEMPT: tuple[_Happening, ...] = (
    lambda world, _: _run(world),
    lambda world, _: _run(world).wait(3).disrupt(),
    lambda world, _: _run(world).wait(9).save(),
    _evict,
    _exit,
    _exit,
)

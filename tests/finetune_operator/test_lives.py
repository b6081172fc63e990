"""Random lives of a FineTuneJob: whatever happens in whatever order, some things are never so."""

import random

import pytest
from finetune_api.conditions import is_true
from world import PUBLISHED, SPEC, World


@pytest.mark.parametrize("seed", range(200))
def test_random_lives_never_overlap_attempts_and_never_exceed_the_limit(seed: int) -> None:
    """Whatever happens in whatever order, at most one attempt is active and retries stay within backoffLimit."""
    chance = random.Random(seed)
    world = World(spec=SPEC | {"runPolicy": {"backoffLimit": 2}}).settle()
    for _ in range(40):
        _happen(world, chance)
        world.settle()
        assert 1 >= len(world.active)
        assert 2 >= world.status.restarts
        assert world.status.observed_generation == world.generation
        assert not (is_true(world.status.conditions, "Complete") and is_true(world.status.conditions, "Failed"))


def _happen(world: World, chance: random.Random) -> None:
    active = [child for child in world.active if not child.deleting]
    choice = chance.randrange(8)
    if choice == 0:
        world.change(suspend=chance.random() < 0.5)
    elif choice == 1:
        world.change(hyperparameters={"seed": chance.randrange(3)})
    elif choice == 2:
        world.change(resources={"cpu": str(chance.randrange(1, 3)), "memory": "1Gi"})
    elif choice == 3:
        world.wait(chance.choice([1, 20, 400]))
    elif choice == 4:
        world.collect()
    elif choice == 5 and active:
        world.run()
    elif choice == 6 and active:
        world.run().exit(chance.choice([0, 1, 65, 75, 137]), message=chance.choice([None, PUBLISHED]))
    elif choice == 7:
        for name in [name for name in world.children if chance.random() < 0.5]:
            del world.children[name]
            world.pods.pop(name, None)

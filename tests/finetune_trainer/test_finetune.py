import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_api.v1alpha1 import Hyperparameters, MethodType, Precision
from finetune_trainer.backbone import Backbone, Classifier, load_backbone
from finetune_trainer.batches import TrainingSet, augment, draw_batch, draw_numbers, order_examples
from finetune_trainer.device import Device
from finetune_trainer.errors import DivergedError
from finetune_trainer.finetune import FineTuned, Note, finetune, group_parameters, list_stages
from finetune_trainer.recipe import Recipe, choose_recipe
from torch import nn

CPU = Device("cpu", Precision.FP32)


@pytest.fixture
def backbone(tiny_model: Path, tmp_path: Path) -> Backbone:
    return load_backbone("pvc://models/tiny", folder=tiny_model, image_size=32, cache=tmp_path)


def make_recipe(**changes: Any) -> Recipe:
    hyperparameters = Hyperparameters(batch_size=8, max_steps=changes.pop("max_steps", 6))
    recipe = choose_recipe(
        num_train=48,
        has_batch_statistics=True,
        method=MethodType.AUTO,
        training_seconds=None,
        hyperparameters=hyperparameters,
        on_cpu=True,
    )
    return replace(recipe, **changes)


def make_training(count: int = 48) -> TrainingSet:
    """Return bright and dark pictures."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(count) % 2
    noise = torch.randint(0, 100, (count, 32, 32, 3), generator=generator)
    return TrainingSet((noise + 150 * y.view(-1, 1, 1, 1)).to(torch.uint8), torch.arange(count), y)


def build(backbone: Backbone) -> Classifier:
    torch.manual_seed(0)
    model = copy.deepcopy(backbone.model)
    return Classifier(model, backbone.architecture, num_features=backbone.num_features, num_classes=2)


def train(backbone: Backbone, recipe: Recipe, notes: list[Note] | None = None) -> tuple[Classifier, FineTuned]:
    model = build(backbone)
    tuned, _ = finetune(
        model,
        make_training(),
        recipe,
        preprocessing=backbone.architecture.preprocessing,
        seed=1,
        device=CPU,
        step_seconds=1.0,
        seconds_left=lambda: None,
        check=lambda: None,
        advance=(notes if notes is not None else []).append,
    )
    return model, tuned


def test_loss_falls(backbone: Backbone) -> None:
    notes: list[Note] = []

    train(backbone, make_recipe(max_steps=40), notes)

    assert notes[-1].pace.done == 40
    assert notes[-1].loss < 0.8 * notes[0].loss
    assert notes[-1].pace.progress == 1.0
    assert 0 < notes[-1].data_wait_share < 1


def test_same_seed_gives_the_same_weights(backbone: Backbone) -> None:
    one, two = (train(backbone, make_recipe())[1] for _ in range(2))

    assert all(torch.equal(one.weights[name], two.weights[name]) for name in one.weights)
    assert all(torch.equal(one.average[name], two.average[name]) for name in one.average)


def test_frozen_batch_statistics_stay(backbone: Backbone) -> None:
    before = build(backbone).state_dict()
    frozen = train(backbone, make_recipe())[1].weights
    trained = train(backbone, make_recipe(freeze_batch_statistics=False))[1].weights

    names = [name for name in before if "running_mean" in name]
    assert all(torch.equal(before[name], frozen[name]) for name in names)
    assert not any(torch.equal(before[name], trained[name]) for name in names)


def test_first_stages_stay_while_they_hold_little(backbone: Backbone) -> None:
    model = build(backbone)
    first = [name for name, _ in list_stages(model.backbone)[0]]

    group_parameters(model, make_recipe(frozen_share=0.05))

    frozen = [name for name, parameter in model.backbone.named_parameters() if not parameter.requires_grad]
    assert sorted(frozen) == sorted(first)
    group_parameters(model, make_recipe(frozen_share=0.0))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_earlier_stages_learn_slower_and_norms_do_not_decay(backbone: Backbone) -> None:
    model = build(backbone)

    groups = group_parameters(model, make_recipe(layer_decay=0.5, frozen_share=0.0))

    rate_of = {id(parameter): group["peak"] for group in groups for parameter in group["params"]}  # type: ignore[attr-defined]
    stages = [rate_of[id(stage[0][1])] for stage in list_stages(model.backbone)]
    assert stages == sorted(stages)
    assert stages[-1] == make_recipe().backbone_rate
    assert stages[0] == pytest.approx(stages[-1] * 0.5 ** (len(stages) - 1))
    assert rate_of[id(model.head.weight)] == make_recipe().head_rate
    decayed = [parameter for group in groups if group["weight_decay"] for parameter in group["params"]]  # type: ignore[attr-defined]
    assert all(parameter.ndim > 1 for parameter in decayed)
    assert len(rate_of) == len(list(model.parameters()))


def test_loss_that_is_no_number_stops_the_training(backbone: Backbone) -> None:
    with pytest.raises(DivergedError, match="learningRate"):
        train(backbone, make_recipe(head_rate=math.inf))


def test_order_is_a_function_of_seed_and_epoch() -> None:
    orders = {(seed, epoch): tuple(order_examples(50, seed=seed, epoch=epoch).tolist()) for seed in (0, 1) for epoch in (0, 1)}

    assert len(set(orders.values())) == 4
    assert all(sorted(order) == list(range(50)) for order in orders.values())


def test_augmentation_is_a_function_of_seed_epoch_and_example() -> None:
    assert (draw_numbers(50, seed=0, epoch=1) != draw_numbers(50, seed=0, epoch=2)).all()
    assert (draw_numbers(50, seed=0, epoch=1)[:20] == draw_numbers(20, seed=0, epoch=1)).all()


def test_batches_of_an_epoch_hold_every_example_once() -> None:
    training = replace(make_training(), y_N=torch.arange(48))

    seen = [
        y
        for step in range(6)
        for y in draw_batch(training, step, batch_size=8, seed=0, smallest_crop=1.0, device="cpu")[1].tolist()
    ]

    assert sorted(seen) == list(range(48))


def test_no_augmentation_leaves_the_picture() -> None:
    x = torch.rand(4, 3, 16, 16)
    draws = torch.rand(4, 4)
    draws[:, 1] = 0.5

    assert torch.allclose(augment(x, draws, smallest_crop=1.0), x, atol=1e-5)


def test_crops_stay_inside_the_picture() -> None:
    ramp = torch.linspace(0, 1, 64).expand(200, 1, 64, 64)

    cropped = augment(ramp, torch.rand(200, 4, generator=torch.Generator().manual_seed(0)), smallest_crop=0.3)

    widths = cropped.amax((1, 2, 3)) - cropped.amin((1, 2, 3))
    assert 0.4 < float(widths.min()) < 0.6
    assert float(widths.max()) > 0.9


def test_dropout_depends_on_the_step_alone(backbone: Backbone) -> None:
    dropping = replace(
        backbone, model=nn.Sequential(backbone.model, nn.Dropout(0.5)), architecture=replace(backbone.architecture, num_stages=0)
    )
    dropping = replace(dropping, num_features=backbone.model.num_features)
    torch.manual_seed(1)
    one = train(dropping, make_recipe())[1]
    torch.manual_seed(2)
    two = train(dropping, make_recipe())[1]

    assert all(torch.equal(one.weights[name], two.weights[name]) for name in one.weights)

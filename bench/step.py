"""The trainer's fine-tuning step, as a share of the rate of a hand-written loop, and the share of time it waits for data."""

import copy
import dataclasses
import tempfile
import time
from pathlib import Path

import torch
from finetune_api.v1alpha1 import Hyperparameters, MethodType
from finetune_trainer.backbone import Backbone, Classifier
from finetune_trainer.batches import TrainingSet
from finetune_trainer.device import Device
from finetune_trainer.finetune import Note, finetune, group_parameters, set_train_mode
from finetune_trainer.recipe import Recipe, choose_recipe
from torch import Tensor
from torch.nn import functional

from bench.features import make_ready
from bench.harness import (
    compare,
    describe_machine,
    ignore,
    load_model,
    make_pictures,
    parse_arguments,
    print_table,
    read_pictures,
)

NUM_CLASSES = 9


def main() -> None:
    """Measure and print the table."""
    quick = parse_arguments(__doc__).quick
    machine = describe_machine()
    num_steps, rounds = (3, 1) if quick else (12, 7)
    with tempfile.TemporaryDirectory() as scratch:
        backbone, device = load_model(Path(scratch))
        pictures = read_pictures(make_pictures("emoji"), Path(scratch))
    pixels_NHWC = torch.from_numpy(pictures.pixels_NHWC)
    recipe = choose(backbone, len(pixels_NHWC), num_steps)
    y_N = torch.arange(len(pixels_NHWC)) % NUM_CLASSES
    training = TrainingSet(pixels_NHWC, torch.arange(len(pixels_NHWC)), y_N)
    ready = make_ready(backbone, device, pixels_NHWC[: num_steps * recipe.batch_size])
    x_NCHW = torch.cat(ready)
    notes: list[Note] = []
    result = compare(
        lambda: run_trainer(backbone, device, training, recipe, notes),
        lambda: run_by_hand(backbone, device, x_NCHW, y_N, recipe),
        rounds=rounds,
    )
    num_pictures = num_steps * recipe.batch_size
    waits = sorted(note.data_wait_share for note in notes if note.steps_left == 0)
    print_table(
        f"Fine-tuning step, batch {recipe.batch_size}, {num_steps} steps, median of {rounds} pairs ({machine})",
        ["", "pictures/s", "share", "waiting for data"],
        [
            ["hand-written loop on ready tensors", f"{num_pictures / result.theirs:.1f}", "100 %", ""],
            [
                "trainer: augmentation, clipping, layer-decayed rates, moving average",
                f"{num_pictures / result.ours:.1f}",
                f"{100 * result.ratio:.0f} %",
                f"{100 * waits[len(waits) // 2]:.1f} %",
            ],
        ],
    )


def choose(backbone: Backbone, num_train: int, num_steps: int) -> Recipe:
    """Return the trainer's own recipe for these pictures, shortened."""
    recipe = choose_recipe(
        num_train=num_train,
        has_batch_statistics=backbone.has_batch_statistics,
        method=MethodType.AUTO,
        training_seconds=None,
        hyperparameters=Hyperparameters(),
        on_cpu=True,
    )
    return dataclasses.replace(recipe, planned_steps=num_steps)


def build(backbone: Backbone, device: Device) -> Classifier:
    """Return a classifier that owns its weights, so that each round starts from the same ones."""
    torch.manual_seed(0)
    classifier = Classifier(
        copy.deepcopy(backbone.model), backbone.architecture, num_features=backbone.num_features, num_classes=NUM_CLASSES
    )
    device.place(classifier)
    return classifier


def run_by_hand(backbone: Backbone, device: Device, x_NCHW: Tensor, y_N: Tensor, recipe: Recipe) -> float:
    """Return the seconds of the loop that one would write: forward, loss, backward, AdamW, and the same parts frozen."""
    model = build(backbone, device)
    set_train_mode(model, freeze_batch_statistics=recipe.freeze_batch_statistics)
    group_parameters(model, recipe)  # freezes the first stages
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-5, fused=True)
    started = time.perf_counter()
    for x_BCHW, y_B in zip(torch.split(x_NCHW, recipe.batch_size), torch.split(y_N, recipe.batch_size), strict=False):
        loss = functional.cross_entropy(model(x_BCHW), y_B)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # untyped in torch
        optimizer.step()
    return time.perf_counter() - started


def run_trainer(backbone: Backbone, device: Device, training: TrainingSet, recipe: Recipe, notes: list[Note]) -> float:
    """Return the seconds of the trainer's loop from pictures in memory, and keep what it says about itself."""
    model = build(backbone, device)
    started = time.perf_counter()
    finetune(
        model,
        training,
        recipe,
        preprocessing=backbone.architecture.preprocessing,
        seed=0,
        device=device,
        step_seconds=1.0,
        seconds_left=lambda: None,
        check=ignore,
        advance=notes.append,
    )
    return time.perf_counter() - started


if __name__ == "__main__":
    main()

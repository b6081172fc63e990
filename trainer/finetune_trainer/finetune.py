"""Fine-tune all layers from the probe's head: AdamW with layer-decayed rates that reach zero at the end of budget or plan."""

import math
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass

import timm.models
import torch
from torch import Tensor, nn
from torch.nn import functional

from finetune_trainer.backbone import Classifier, Preprocessing
from finetune_trainer.batches import TrainingSet, draw_batch, mix_seed
from finetune_trainer.device import Device
from finetune_trainer.errors import DivergedError
from finetune_trainer.recipe import Recipe
from finetune_trainer.schedule import Pace, compute_rate, count_steps_left

Weights = dict[str, Tensor]
SECONDS_BETWEEN_NOTES = 1.0


@dataclass(frozen=True)
class Note:
    """How the fine-tuning stands."""

    pace: Pace
    steps_left: int
    step_seconds: float
    loss: float
    images_per_second: float
    data_wait_share: float


@dataclass(frozen=True)
class FineTuned:
    """The weights after fine-tuning, and their moving average."""

    weights: Weights
    average: Weights


def finetune(
    model: Classifier,
    training: TrainingSet,
    recipe: Recipe,
    *,
    preprocessing: Preprocessing,
    seed: int,
    device: Device,
    step_seconds: float,
    seconds_left: Callable[[], float | None],
    check: Callable[[], None],
    advance: Callable[[Note], None],
) -> tuple[FineTuned, Note]:
    """Train `model` in place until the plan or the time is over; `step_seconds` is the first guess of a step's time."""
    optimizer = torch.optim.AdamW(group_parameters(model, recipe), fused=True)
    average = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    durations: deque[float] = deque([step_seconds], maxlen=20)
    pace, wait_seconds, num_images, losses = Pace(), 0.0, 0, deque[Tensor](maxlen=20)
    started = noted = time.perf_counter()
    set_train_mode(model, freeze_batch_statistics=recipe.freeze_batch_statistics)
    note: Note | None = None
    while pace.progress < 1.0:
        check()
        begin = time.perf_counter()
        median_seconds = statistics.median(durations)
        # A step that took longer than expected may leave no time for the last one, which brings the rate to zero.
        steps_left = max(
            1, count_steps_left(pace.done, planned=recipe.planned_steps, seconds_left=seconds_left(), step_seconds=median_seconds)
        )
        stride = pace.next_stride(steps_left)
        x_BCHW, y_B = draw_batch(
            training, pace.done, batch_size=recipe.batch_size, seed=seed, smallest_crop=recipe.smallest_crop, device=device.name
        )
        wait_seconds += time.perf_counter() - begin

        # Dropout depends on the step alone.
        torch.manual_seed(mix_seed(seed, pace.done))
        set_rate(optimizer, compute_rate(pace.progress + stride / 2, warmup_share=recipe.warmup_share))
        with device.autocast():
            loss = functional.cross_entropy(model(preprocessing.normalise(x_BCHW)), y_B)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # untyped in torch
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm, foreach=True)
        optimizer.step()
        update_average(average, model, weight=1 - math.exp(-stride / recipe.ema_horizon))

        pace = pace.step(steps_left)
        losses.append(loss.detach())
        num_images += len(y_B)
        now = time.perf_counter()
        if pace.done == 1:
            durations.clear()
        if pace.done % 10 == 0 or now - noted > SECONDS_BETWEEN_NOTES or pace.progress >= 1.0:
            device.synchronize()
            noted = now = time.perf_counter()
            elapsed = noted - started
            mean_loss = float(torch.stack(tuple(losses)).mean())
            note = Note(pace, steps_left - 1, median_seconds, mean_loss, num_images / elapsed, wait_seconds / elapsed)
            refuse_divergence(note)
            advance(note)
        durations.append(now - begin)
    assert note is not None, "the loop ends with a note"
    return FineTuned({name: tensor.detach().clone() for name, tensor in model.state_dict().items()}, average), note


def group_parameters(model: Classifier, recipe: Recipe) -> list[dict[str, object]]:
    """Return the optimizer's groups: lower rates for earlier stages, no weight decay on biases and norms.

    The first stages are frozen as long as they hold less than the recipe's share of the weights.
    """
    stages = list_stages(model.backbone)
    undecayed = set(getattr(model.backbone, "no_weight_decay", tuple)())
    total = sum(parameter.numel() for stage in stages for _, parameter in stage)
    groups: dict[tuple[float, float], list[Tensor]] = defaultdict(list)
    passed = 0
    for number, stage in enumerate(stages):
        passed += sum(parameter.numel() for _, parameter in stage)
        rate = recipe.backbone_rate * recipe.layer_decay ** (len(stages) - 1 - number)
        for name, parameter in stage:
            parameter.requires_grad = passed >= recipe.frozen_share * total
            if parameter.requires_grad:
                decay = 0.0 if parameter.ndim <= 1 or name in undecayed else recipe.weight_decay
                groups[rate, decay].append(parameter)
    groups[recipe.head_rate, recipe.weight_decay].append(model.head.weight)
    groups[recipe.head_rate, 0.0].append(model.head.bias)
    return [{"params": members, "weight_decay": decay, "peak": rate, "lr": 0.0} for (rate, decay), members in groups.items()]


def list_stages(backbone: nn.Module) -> list[list[tuple[str, nn.Parameter]]]:
    """Return the named weights of the backbone stage by stage, from the input on."""
    matcher = getattr(backbone, "group_matcher", None)
    stage_of = timm.models.group_parameters(backbone, matcher(coarse=True), reverse=True) if matcher else {}
    stages: dict[int, list[tuple[str, nn.Parameter]]] = defaultdict(list)
    for name, parameter in backbone.named_parameters():
        stages[stage_of.get(name, 0)].append((name, parameter))
    return [stages[number] for number in sorted(stages)]


def set_rate(optimizer: torch.optim.Optimizer, relative: float) -> None:
    """Set every group's learning rate to its peak times `relative`."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * relative


def set_train_mode(model: nn.Module, *, freeze_batch_statistics: bool) -> None:
    """Set train mode, in which batch normalisation keeps the statistics of the pretraining if they are frozen."""
    model.train()
    if freeze_batch_statistics:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):  # noqa: SLF001  no public base class
                module.eval()


@torch.no_grad()
def update_average(average: Weights, model: nn.Module, *, weight: float) -> None:
    """Move the average towards the weights; counters are copied."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            average[name].lerp_(tensor, weight)
        else:
            average[name].copy_(tensor)


def refuse_divergence(note: Note) -> None:
    """Raise DivergedError if the loss is no number."""
    if not math.isfinite(note.loss):
        raise DivergedError(
            "LossNotFinite",
            f"the loss was {note.loss} at step {note.pace.done}; give a smaller hyperparameters.learningRate, or precision fp32",
        )

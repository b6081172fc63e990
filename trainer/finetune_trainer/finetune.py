"""Fine-tune all layers from the probe's head: AdamW with layer-decayed rates that reach zero at the end of budget or plan."""

import logging
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import timm.models
import torch
from torch import Tensor, nn
from torch.nn import functional

from finetune_trainer.backbone import Classifier, Preprocessing
from finetune_trainer.batch_statistics import share_batch_statistics
from finetune_trainer.batches import Share, TrainingSet, draw_batch, mix_seed
from finetune_trainer.device import Device
from finetune_trainer.distributed import Group
from finetune_trainer.errors import DivergedError, PreemptedError
from finetune_trainer.guard import MAX_ROLLBACKS, RATE_FACTOR, STEPS_BETWEEN_VERDICTS, find_trouble
from finetune_trainer.learner import Learner, Snapshot, Weights, build_learner, compute_average_weight
from finetune_trainer.memory import MicroBatches
from finetune_trainer.prefetch import Prefetcher
from finetune_trainer.recipe import Recipe
from finetune_trainer.schedule import Pace, compute_rate, count_steps_left

logger = logging.getLogger(__name__)

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
    work: "Work"


@dataclass(frozen=True)
class Work:
    """What the fine-tuning has done in this process, steps that were taken back included."""

    steps: int
    images: int
    seconds: float
    wait_seconds: float


@dataclass(frozen=True)
class FineTuned:
    """The weights after fine-tuning, and their moving average."""

    weights: Weights
    average: Weights


class Keeper(Protocol):
    """Keeps snapshots outside of the process."""

    def is_due(self) -> bool:
        """Return whether it is time for a snapshot."""

    def save(self, snapshot: Snapshot) -> None:
        """Keep the snapshot."""

    def load(self) -> Snapshot | None:
        """Return the newest good snapshot."""


@dataclass(frozen=True)
class Course:
    """What the steps are computed from, and never change."""

    training: TrainingSet
    recipe: Recipe
    preprocessing: Preprocessing
    device: Device
    seed: int
    num_classes: int
    memory: MicroBatches

    @property
    def batch_size(self) -> int:
        """Return the number of examples in each step, over all processes."""
        return min(self.recipe.batch_size, len(self.training.index_N))

    def list_runs(self, parts: int) -> list[slice]:
        """Return where the examples of this process are in each batch."""
        group = self.memory.group
        return Share(group.rank, group.size).list_runs(self.batch_size, parts=parts)

    def draw(self, step: int) -> tuple[Tensor, Tensor]:
        """Return the pictures and labels of this process in a step."""
        recipe = self.recipe
        return draw_batch(
            self.training,
            step,
            batch_size=recipe.batch_size,
            seed=self.seed,
            smallest_crop=recipe.smallest_crop,
            device=self.device.name,
            runs=self.list_runs(min(self.memory.parts, self.batch_size)),
        )


@dataclass(frozen=True)
class Turn:
    """What all processes do next, as rank 0 decides by its clock."""

    stop: PreemptedError | None
    steps_left: int
    is_due: bool
    """Whether it is time for a snapshot."""


@dataclass
class Meter:
    """Measures the steps of this process, for people and for the length of the schedule under a budget."""

    durations: deque[float]
    started: float = field(default_factory=time.perf_counter)
    noted: float = field(default_factory=time.perf_counter)
    busy_seconds: float = 0.0
    wait_seconds: float = 0.0
    num_images: int = 0
    num_steps: int = 0

    @property
    def step_seconds(self) -> float:
        """Return the median time of the latest steps."""
        return statistics.median(self.durations)

    def add(self, seconds: float, *, images: int) -> None:
        """Take in a step; the first one replaces the guess."""
        self.num_steps += 1
        if self.num_steps == 1:
            self.durations.clear()
        self.durations.append(seconds)
        self.busy_seconds += seconds
        self.num_images += images

    def describe(self, learner: Learner, steps_left: int) -> Note:
        """Return how the fine-tuning stands."""
        self.noted = time.perf_counter()
        elapsed = self.noted - self.started
        loss = float(torch.stack(tuple(learner.latest)).mean())
        images_per_second, wait_share = self.num_images / elapsed, self.wait_seconds / elapsed
        work = Work(self.num_steps, self.num_images, self.busy_seconds, self.wait_seconds)
        return Note(learner.pace, steps_left, self.step_seconds, loss, images_per_second, wait_share, work)


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
    keeper: Keeper | None = None,
    memory: MicroBatches | None = None,
    num_workers: int = 0,
) -> tuple[FineTuned, Note]:
    """Train `model` in place until the plan or the time is over; `step_seconds` is the first guess of a step's time.

    With a keeper, the training goes on from the newest snapshot, and the bits of the result are those of an unbroken run.
    """
    memory = memory or MicroBatches()
    course = Course(training, recipe, preprocessing, device, seed, model.head.out_features, memory)
    start = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    sample = preprocessing.normalise(training.pixels_NHWC[:1].permute(0, 3, 1, 2).to(device.name))
    learner = build_learner(model, group_parameters(model, recipe), sample=sample, memory=memory, device=device)
    if keeper and (kept := keeper.load()):
        step_seconds = learner.restore(kept)
        memory.parts = learner.parts
        logger.info("fine-tuning goes on after step %d", learner.pace.done)
    meter = Meter(deque([step_seconds], maxlen=20))
    set_train_mode(model, freeze_batch_statistics=recipe.freeze_batch_statistics)
    saved, note = learner.pace.done, None
    with Prefetcher(course.draw, num_workers=num_workers) as batches:
        while learner.pace.progress < 1.0:
            steps_left = count_steps_left(
                learner.pace.done, planned=recipe.planned_steps, seconds_left=seconds_left(), step_seconds=meter.step_seconds
            )
            turn = _take_turn(memory.group, check, steps_left=steps_left, is_due=keeper is not None and keeper.is_due())
            if (turn.stop or turn.is_due) and learner.pace.done > saved and _save(keeper, learner, meter, course):
                saved = learner.pace.done
            if turn.stop:
                raise turn.stop
            _train_step(learner, course, meter, steps_left=turn.steps_left, batches=batches)
            done, is_last = learner.pace.done, learner.pace.progress >= 1.0
            if done % STEPS_BETWEEN_VERDICTS == 0 or is_last:
                device.synchronize()
                trouble = find_trouble(learner.take_level(), learner.levels[:-1], num_classes=course.num_classes)
                if trouble:
                    _roll_back(learner, start, trouble, keeper=keeper, report=memory.report)
                    saved = learner.pace.done
                    continue
            if done % STEPS_BETWEEN_VERDICTS == 0 or is_last or time.perf_counter() - meter.noted > SECONDS_BETWEEN_NOTES:
                device.synchronize()
                note = meter.describe(learner, turn.steps_left - 1)
                advance(note)
    assert note is not None, "the loop ends with a note"
    return FineTuned({name: tensor.detach().clone() for name, tensor in model.state_dict().items()}, learner.average), note


def _take_turn(group: Group, check: Callable[[], None], *, steps_left: int, is_due: bool) -> Turn:
    """Agree on what comes next, so that neither clocks nor signals ever lead the processes apart."""
    stop: PreemptedError | None = None
    try:
        check()
    except PreemptedError as error:
        stop = error
    # A step that took longer than expected may leave no time for the last one, which brings the rate to zero.
    steps_left = max(1, steps_left)
    if group.size > 1:
        own = (float(steps_left), float(is_due)) if group.is_main else (0.0, 0.0)
        stops, steps, due = group.agree((float(stop is not None), *own))
        steps_left, is_due = int(steps), bool(due)
        if stops and stop is None:
            stop = PreemptedError("Preempted", "another process of the job was asked to stop; what was done is saved")
    return Turn(stop, steps_left, is_due)


def _train_step(learner: Learner, course: Course, meter: Meter, *, steps_left: int, batches: Prefetcher) -> None:
    """Do one step of the optimizer."""
    begin = time.perf_counter()
    pace, recipe, memory = learner.pace, course.recipe, course.memory
    stride = pace.next_stride(steps_left)
    x_BCHW, y_B = batches.get(pace.done)
    meter.wait_seconds += time.perf_counter() - begin
    rate = compute_rate(pace.progress + stride / 2, warmup_share=recipe.warmup_share)
    set_rate(learner.optimizer, rate * learner.rate_scale)
    buffers = _copy_statistics(learner.model, recipe)

    def compute(parts: int) -> Tensor:
        for buffer, value in buffers:
            buffer.copy_(value)
        return _compute_gradients(learner, course, x_BCHW, y_B, parts=parts)

    loss = memory.group.sum(memory.run(compute, batch_size=course.batch_size))
    learner.parts = memory.parts
    nn.utils.clip_grad_norm_(learner.model.parameters(), recipe.clip_norm)
    learner.optimizer.step()
    course.device.finish_step()
    learner.update_average(compute_average_weight(stride, horizon=recipe.ema_horizon))
    learner.pace = pace.step(steps_left)
    learner.note_loss(loss)
    meter.add(time.perf_counter() - begin, images=course.batch_size)
    logger.debug("step %d done", learner.pace.done)


def _compute_gradients(learner: Learner, course: Course, x_BCHW: Tensor, y_B: Tensor, *, parts: int) -> Tensor:
    """Leave the gradients of the mean loss over the batch at the weights; parts bound the memory.

    What is returned is this process's share of that loss.
    """
    group = course.memory.group
    learner.optimizer.zero_grad()
    # Dropout depends on the step alone, and on which pictures a process has.
    seed = mix_seed(course.seed, learner.pace.done)
    torch.manual_seed(mix_seed(seed, group.rank) if group.rank else seed)
    total = torch.zeros((), device=x_BCHW.device)
    sizes = [run.stop - run.start for run in course.list_runs(parts)]
    for number, (x_bCHW, y_b) in enumerate(zip(torch.split(x_BCHW, sizes), torch.split(y_B, sizes), strict=True), start=1):
        with group.exchanging(learner.forward, is_last=number == len(sizes)), share_batch_statistics(group, course.device):
            with course.device.autocast():
                z_bK = learner.forward(course.preprocessing.normalise(x_bCHW))
                loss = functional.cross_entropy(z_bK, y_b) * (len(y_b) / course.batch_size) if len(y_b) else z_bK.sum()
            # The exchange of gradients gives their mean over the processes; here it must be their sum.
            (loss * group.size).backward()
        total += loss.detach()
    return total


def _copy_statistics(model: nn.Module, recipe: Recipe) -> list[tuple[Tensor, Tensor]]:
    """Return the statistics that a forward pass changes, with copies, so that a pass can be repeated."""
    return [] if recipe.freeze_batch_statistics else [(buffer, buffer.clone()) for buffer in model.buffers()]


def _save(keeper: Keeper | None, learner: Learner, meter: Meter, course: Course) -> bool:
    """Keep the state unless its loss has gone wrong, which the next verdict deals with."""
    if keeper is None:
        return False
    if learner.recent:
        loss = float(torch.stack(learner.recent).mean())
        if find_trouble(loss, learner.levels, num_classes=course.num_classes):
            return False
    keeper.save(learner.capture(meter.step_seconds))
    return True


def _roll_back(learner: Learner, start: Weights, trouble: str, *, keeper: Keeper | None, report: Callable[[str], None]) -> None:
    """Go back to the last good state with a smaller learning rate, or give up."""
    step, rate_scale, rollbacks = learner.pace.done, learner.rate_scale, learner.rollbacks
    if rollbacks >= MAX_ROLLBACKS:
        raise DivergedError(
            "Diverged",
            f"{trouble} at step {step}, after {rollbacks} times going back with a smaller learning rate; give a smaller "
            "hyperparameters.learningRate, or precision fp32",
        )
    kept = keeper.load() if keeper else None
    if kept:
        learner.restore(kept)
    else:
        learner.start_over(start)
    learner.rate_scale, learner.rollbacks = rate_scale * RATE_FACTOR, rollbacks + 1
    report(
        f"{trouble} at step {step}; went back to step {learner.pace.done} with {learner.rate_scale:.3g} times the learning rate"
    )


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

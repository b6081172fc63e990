"""Decide whether to fine-tune, plan the time for it, and do it."""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from finetune_api.v1alpha1 import Hyperparameters, MethodType

from finetune_trainer.batches import TrainingSet
from finetune_trainer.checkpoint import load_checkpoint, save_checkpoint
from finetune_trainer.data import Split
from finetune_trainer.finetune import FineTuned, Note, finetune
from finetune_trainer.job import Job, build_classifier
from finetune_trainer.model_v0 import ModelV0
from finetune_trainer.progress import Phase
from finetune_trainer.recipe import (
    CEILING_ACCURACY,
    MIN_EPOCHS,
    MIN_EXAMPLES_PER_CLASS,
    Recipe,
    choose_recipe,
    count_steps_per_epoch,
)
from finetune_trainer.select import BATCHES_FOR_STATISTICS, NUM_CANDIDATES

logger = logging.getLogger(__name__)

STAGE = "finetuned"
# Forward, backward and optimizer compared with the forward pass: a guess until the first steps are measured.
STEP_TO_FORWARD = 3.0
# Metrics, bootstrap and writing; and for what is computed, a little unsteadiness of the machine.
PUBLISH_SECONDS = 2.0
UNSTEADINESS = 1.25


@dataclass(frozen=True)
class Tuning:
    """What came of the fine-tuning, or why there was none."""

    recipe: Recipe
    tuned: FineTuned | None = None
    notes: tuple[str, ...] = ()
    details: dict[str, Any] | None = None


def tune(job: Job, v0: ModelV0) -> Tuning:
    """Fine-tune from the probe, unless the method, the data or the budget speak against it."""
    num_train = len(job.dataset.positions[Split.TRAIN])
    recipe = choose_recipe(
        num_train=num_train,
        has_batch_statistics=job.backbone.has_batch_statistics,
        method=job.config.method,
        training_seconds=job.config.training_seconds,
        hyperparameters=job.config.hyperparameters,
        on_cpu=job.device.name == "cpu",
    )
    if job.config.method is MethodType.PROBE:
        return Tuning(recipe)
    job.progress.begin(Phase.FINETUNE)
    kept = _load_tuning(job, recipe)
    if kept is not None:
        return kept
    step_seconds = STEP_TO_FORWARD * v0.picture_seconds * recipe.batch_size
    seconds_left = _count_seconds_left(job, v0, recipe)
    least_steps = MIN_EPOCHS * count_steps_per_epoch(num_train, recipe.batch_size)
    reason = find_reason_to_skip(
        job.config.method,
        job.config.hyperparameters,
        examples_per_class=num_train / len(job.dataset.labels),
        probe_accuracy=v0.probe.cv_accuracy,
        seconds_left=seconds_left(),
        step_seconds=step_seconds,
        least_steps=least_steps,
    )
    if reason is not None:
        logger.info("no fine-tuning: %s", reason)
        return Tuning(recipe, notes=(f"fine-tuning was skipped: {reason}",))
    return _tune(job, v0, recipe, step_seconds=step_seconds, seconds_left=seconds_left)


def find_reason_to_skip(
    method: MethodType,
    hyperparameters: Hyperparameters,
    *,
    examples_per_class: float,
    probe_accuracy: float,
    seconds_left: float | None,
    step_seconds: float,
    least_steps: int,
) -> str | None:
    """Return why fine-tuning would not pay, or None; a length that the user asks for is bounded by the budget alone."""
    if seconds_left is not None and seconds_left < step_seconds:
        return "features and probe used up the budget; give more budget.trainingSeconds"
    asked = hyperparameters.epochs is not None or hyperparameters.max_steps is not None
    if method is MethodType.FULL or asked:
        return None
    if examples_per_class < MIN_EXAMPLES_PER_CLASS:
        return f"{examples_per_class:.1f} training examples per class are fewer than {MIN_EXAMPLES_PER_CLASS}"
    if probe_accuracy >= CEILING_ACCURACY:
        return f"the probe is right on {probe_accuracy:.1%} in cross-validation, which leaves nothing to gain"
    seconds_needed = least_steps * step_seconds
    if seconds_left is not None and seconds_left < seconds_needed:
        return f"{seconds_left:.0f} s of the budget are left, and one pass over the data takes about {seconds_needed:.0f} s"
    return None


def _tune(job: Job, v0: ModelV0, recipe: Recipe, *, step_seconds: float, seconds_left: Callable[[], float | None]) -> Tuning:
    dataset, seed = job.dataset, job.config.hyperparameters.seed
    logger.info("fine-tuning with %s", recipe)
    reserve_seconds = _estimate_reserve(job, v0, recipe)

    def advance(note: Note) -> None:
        job.progress.note(
            loss=note.loss,
            train_images_per_second=note.images_per_second,
            data_wait_share=note.data_wait_share,
            current_step=note.pace.done,
            total_steps=note.pace.done + note.steps_left,
        )
        job.progress.advance(note.pace.progress, remaining_seconds=note.steps_left * note.step_seconds + reserve_seconds)

    tuned, last = finetune(
        build_classifier(job, v0.probe.head),
        TrainingSet(dataset.pixels_NHWC, dataset.positions[Split.TRAIN], dataset.targets(Split.TRAIN)),
        recipe,
        preprocessing=job.backbone.architecture.preprocessing,
        seed=seed,
        device=job.device,
        step_seconds=step_seconds,
        seconds_left=seconds_left,
        check=job.check,
        advance=advance,
    )
    details = {
        "steps": last.pace.done,
        "epochs": round(last.pace.done / count_steps_per_epoch(len(dataset.positions[Split.TRAIN]), recipe.batch_size), 2),
        "loss": last.loss,
        "imagesPerSecond": round(last.images_per_second, 2),
        "dataWaitShare": round(last.data_wait_share, 4),
        "recipe": asdict(recipe),
    }
    notes = _describe_cut(recipe, last.pace.done)
    _save_tuning(job, tuned, notes=notes, details=details)
    return Tuning(recipe, tuned, notes, details)


def _describe_cut(recipe: Recipe, done: int) -> tuple[str, ...]:
    if recipe.planned_steps is None or done >= recipe.planned_steps:
        return ()
    return (f"the budget ended fine-tuning after {done} of {recipe.planned_steps} steps; the schedule was shortened to fit",)


def _count_seconds_left(job: Job, v0: ModelV0, recipe: Recipe) -> Callable[[], float | None]:
    """Return a function that tells the time for fine-tuning: what the budget has left, less what comes afterwards."""
    reserve_seconds = _estimate_reserve(job, v0, recipe)

    def seconds_left() -> float | None:
        remaining = job.budget.remaining_seconds()
        return None if remaining is None else remaining - reserve_seconds

    return seconds_left


def _estimate_reserve(job: Job, v0: ModelV0, recipe: Recipe) -> float:
    evaluated = {split: len(index_N) for split, index_N in job.evaluated.items()}
    num_pictures = evaluated[Split.VAL] * (NUM_CANDIDATES - 1) + evaluated[Split.TRAIN] + evaluated.get(Split.TEST, 0)
    if job.backbone.has_batch_statistics and not recipe.freeze_batch_statistics:
        num_pictures += (NUM_CANDIDATES - 2) * BATCHES_FOR_STATISTICS * recipe.batch_size
    return PUBLISH_SECONDS + UNSTEADINESS * num_pictures * v0.picture_seconds


def _save_tuning(job: Job, tuned: FineTuned, *, notes: tuple[str, ...], details: dict[str, Any]) -> None:
    tensors = {f"weights/{name}": tensor for name, tensor in tuned.weights.items()}
    tensors |= {f"average/{name}": tensor for name, tensor in tuned.average.items()}
    state = {"notes": list(notes), "details": details}
    save_checkpoint(job.work, STAGE, identity=job.identity, tensors=tensors, state=state)


def _load_tuning(job: Job, recipe: Recipe) -> Tuning | None:
    kept = load_checkpoint(job.work, STAGE, identity=job.identity)
    if kept is None:
        return None
    logger.info("fine-tuning was finished before; going on from its checkpoint")
    parts = {
        part: {name.removeprefix(f"{part}/"): tensor for name, tensor in kept.tensors.items() if name.startswith(f"{part}/")}
        for part in ("weights", "average")
    }
    return Tuning(recipe, FineTuned(parts["weights"], parts["average"]), tuple(kept.state["notes"]), kept.state["details"])

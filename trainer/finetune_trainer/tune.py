"""Decide whether to fine-tune, plan the time for it, and do it."""

import logging
from dataclasses import asdict, dataclass, replace
from typing import Any

from finetune_api.v1alpha1 import Hyperparameters, MethodType

from finetune_trainer.batches import TrainingSet
from finetune_trainer.data import Split
from finetune_trainer.finetune import FineTuned, Note, finetune
from finetune_trainer.job import Job, build_classifier
from finetune_trainer.learner import Snapshot, Weights, lay_out_like
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

PLAN, STEPS, STAGE = "plan", "steps", "finetuned"
# Forward, backward and optimizer compared with the forward pass: a guess until the first steps are measured.
STEP_TO_FORWARD = 3.0
# Metrics, bootstrap and writing; and for what is computed, a little unsteadiness of the machine.
PUBLISH_SECONDS = 2.0
UNSTEADINESS = 1.25


@dataclass(frozen=True)
class Plan:
    """What was decided at the start of the fine-tuning, partly from measured times, and holds for every later attempt."""

    recipe: Recipe
    reason_to_skip: str | None
    picture_seconds: float
    step_seconds: float


@dataclass(frozen=True)
class StepKeeper:
    """Keeps the fine-tuning among the checkpoints, with its plan."""

    job: Job
    plan: Plan

    def is_due(self) -> bool:
        """Return whether the interval is over."""
        return self.job.checkpoints.is_due()

    def save(self, snapshot: Snapshot) -> None:
        """Save a checkpoint."""
        step = int(snapshot.state["pace"]["done"])
        samples = _count_samples(self.job, self.plan.recipe, step)
        state = {"learner": snapshot.state, "plan": asdict(self.plan)}
        self.job.checkpoints.save(STEPS, tensors=snapshot.tensors, state=state, step=step, samples=samples)

    def load(self) -> Snapshot | None:
        """Return the state in the newest good checkpoint."""
        kept = self.job.checkpoints.load(STEPS)
        return None if kept is None else Snapshot(kept.tensors, kept.state["learner"])


@dataclass(frozen=True)
class Tuning:
    """What came of the fine-tuning, or why there was none."""

    recipe: Recipe
    tuned: FineTuned | None = None
    notes: tuple[str, ...] = ()
    details: dict[str, Any] | None = None


def tune(job: Job, v0: ModelV0) -> Tuning:
    """Fine-tune from the probe, unless the method, the data or the budget speak against it."""
    if job.config.method is MethodType.PROBE:
        return Tuning(_choose_recipe(job))
    job.progress.begin(Phase.FINETUNE)
    kept = _load_tuning(job, like=v0.choice.weights)
    if kept is not None:
        return kept
    plan = _load_plan(job) or _make_plan(job, v0)
    if plan.reason_to_skip is not None:
        logger.info("no fine-tuning: %s", plan.reason_to_skip)
        return Tuning(plan.recipe, notes=(f"fine-tuning was skipped: {plan.reason_to_skip}",))
    return _tune(job, v0, plan)


def _choose_recipe(job: Job) -> Recipe:
    return choose_recipe(
        num_train=len(job.dataset.positions[Split.TRAIN]),
        has_batch_statistics=job.backbone.has_batch_statistics,
        method=job.config.method,
        training_seconds=job.config.training_seconds,
        hyperparameters=job.config.hyperparameters,
        on_cpu=job.device.name == "cpu",
    )


def _make_plan(job: Job, v0: ModelV0) -> Plan:
    """Decide, and keep the decision, because the times that it rests on would be others after a restart."""
    num_train, recipe = len(job.dataset.positions[Split.TRAIN]), _choose_recipe(job)
    plan = Plan(recipe, None, v0.picture_seconds, STEP_TO_FORWARD * v0.picture_seconds * recipe.batch_size)
    reason = find_reason_to_skip(
        job.config.method,
        job.config.hyperparameters,
        examples_per_class=num_train / len(job.dataset.labels),
        probe_accuracy=v0.probe.cv_accuracy,
        seconds_left=_count_seconds_left(job, plan),
        step_seconds=plan.step_seconds,
        least_steps=MIN_EPOCHS * count_steps_per_epoch(num_train, recipe.batch_size),
    )
    plan = replace(plan, reason_to_skip=reason)
    job.checkpoints.save(PLAN, tensors={}, state=asdict(plan))
    return _parse_plan(job.group.broadcast_json(asdict(plan)))


def _load_plan(job: Job) -> Plan | None:
    """Return the plan of an earlier attempt; each checkpoint of the steps holds it as well."""
    steps = job.checkpoints.load(STEPS)
    kept = steps.state["plan"] if steps else None
    if kept is None and (checkpoint := job.checkpoints.load(PLAN)):
        kept = checkpoint.state
    return None if kept is None else _parse_plan(kept)


def _parse_plan(content: dict[str, Any]) -> Plan:
    return Plan(**{**content, "recipe": Recipe(**content["recipe"])})


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


def _tune(job: Job, v0: ModelV0, plan: Plan) -> Tuning:
    dataset, recipe = job.dataset, plan.recipe
    logger.info("fine-tuning with %s", recipe)
    reserve_seconds = _estimate_reserve(job, plan)

    def advance(note: Note) -> None:
        _show(job, note)
        job.progress.note(
            loss=note.loss,
            train_images_per_second=note.images_per_second,
            data_wait_share=note.data_wait_share,
            current_step=note.pace.done,
            total_steps=note.pace.done + note.steps_left,
        )
        job.progress.advance(
            note.pace.progress, steps_seconds=note.steps_left * note.step_seconds, after_steps_seconds=reserve_seconds
        )

    tuned, last = finetune(
        build_classifier(job, v0.probe.head),
        TrainingSet(dataset.pixels_NHWC, dataset.positions[Split.TRAIN], dataset.targets(Split.TRAIN)),
        recipe,
        preprocessing=job.backbone.architecture.preprocessing,
        seed=job.config.hyperparameters.seed,
        device=job.device,
        step_seconds=plan.step_seconds,
        seconds_left=lambda: _count_seconds_left(job, plan),
        check=job.stop.check_here,
        advance=advance,
        keeper=StepKeeper(job, plan),
        memory=job.memory,
        num_workers=job.num_workers,
    )
    details = {
        "steps": last.pace.done,
        "epochs": round(last.pace.done / count_steps_per_epoch(len(dataset.positions[Split.TRAIN]), recipe.batch_size), 2),
        "loss": last.loss,
        "imagesPerSecond": round(last.images_per_second, 2),
        "dataWaitShare": round(last.data_wait_share, 4),
        "recipe": asdict(recipe),
    }
    tuning = Tuning(recipe, tuned, _describe_cut(recipe, last.pace.done), details)
    _save_tuning(job, tuning, tuned, step=last.pace.done)
    return tuning


def _show(job: Job, note: Note) -> None:
    """Let Prometheus see how the fine-tuning stands."""
    totals = job.progress.totals
    totals.steps, totals.samples = note.work.steps, note.work.images
    totals.step_seconds, totals.data_wait_seconds = note.work.seconds, note.work.wait_seconds
    totals.samples_per_second, totals.loss = note.images_per_second, note.loss
    totals.exchange_seconds = job.group.clock.seconds
    totals.device_memory_peak_bytes = job.device.read_peak_memory()


def _describe_cut(recipe: Recipe, done: int) -> tuple[str, ...]:
    if recipe.planned_steps is None or done >= recipe.planned_steps:
        return ()
    return (f"the budget ended fine-tuning after {done} of {recipe.planned_steps} steps; the schedule was shortened to fit",)


def _count_seconds_left(job: Job, plan: Plan) -> float | None:
    """Return the time for fine-tuning: what the budget has left, less what comes afterwards."""
    remaining = job.budget.remaining_seconds()
    return None if remaining is None else remaining - _estimate_reserve(job, plan)


def _estimate_reserve(job: Job, plan: Plan) -> float:
    evaluated = {split: len(index_N) for split, index_N in job.evaluated.items()}
    num_pictures = evaluated[Split.VAL] * (NUM_CANDIDATES - 1) + evaluated[Split.TRAIN] + evaluated.get(Split.TEST, 0)
    if job.backbone.has_batch_statistics and not plan.recipe.freeze_batch_statistics:
        num_pictures += (NUM_CANDIDATES - 1) * BATCHES_FOR_STATISTICS * plan.recipe.batch_size
    return PUBLISH_SECONDS + UNSTEADINESS * num_pictures * plan.picture_seconds


def _count_samples(job: Job, recipe: Recipe, step: int) -> int:
    return step * min(recipe.batch_size, len(job.dataset.positions[Split.TRAIN]))


def _save_tuning(job: Job, tuning: Tuning, tuned: FineTuned, *, step: int) -> None:
    tensors = {f"weights/{name}": tensor for name, tensor in tuned.weights.items()}
    tensors |= {f"average/{name}": tensor for name, tensor in tuned.average.items()}
    state = {"notes": list(tuning.notes), "details": tuning.details, "recipe": asdict(tuning.recipe)}
    samples = _count_samples(job, tuning.recipe, step)
    job.checkpoints.save(STAGE, tensors=tensors, state=state, step=step, samples=samples)


def _load_tuning(job: Job, *, like: Weights) -> Tuning | None:
    kept = job.checkpoints.load(STAGE)
    if kept is None:
        return None
    logger.info("fine-tuning was finished before")
    parts = {
        part: {name.removeprefix(f"{part}/"): tensor for name, tensor in kept.tensors.items() if name.startswith(f"{part}/")}
        for part in ("weights", "average")
    }
    tuned = FineTuned(lay_out_like(parts["weights"], like), lay_out_like(parts["average"], like))
    return Tuning(Recipe(**kept.state["recipe"]), tuned, tuple(kept.state["notes"]), kept.state["details"])

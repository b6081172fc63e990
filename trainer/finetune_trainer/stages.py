"""The stages of a job between reading and publishing; each can be repeated or is kept in a checkpoint."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune_api.contract import TrainerConfig
from finetune_api.v1alpha1 import Hyperparameters, MethodType
from finetune_trainer.backbone import Backbone, Classifier
from finetune_trainer.batches import Augmentation, TrainingSet, draw_batch
from finetune_trainer.budget import Budget
from finetune_trainer.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from finetune_trainer.data import Split
from finetune_trainer.dataset import Dataset
from finetune_trainer.device import Device
from finetune_trainer.evaluate import compute_logits, fit_temperature
from finetune_trainer.features import Features, compute_features
from finetune_trainer.finetune import FineTuned, Note, Weights, finetune
from finetune_trainer.probe import Head, Probe, fit_probe
from finetune_trainer.progress import Phase, Progress
from finetune_trainer.recipe import (
    CEILING_ACCURACY,
    MIN_EPOCHS,
    MIN_EXAMPLES_PER_CLASS,
    Recipe,
    choose_recipe,
    count_steps_per_epoch,
)
from finetune_trainer.select import NUM_CANDIDATES, PROBE, Score, build_candidates, choose, estimate_batch_statistics

logger = logging.getLogger(__name__)

# Accuracy on the training data is measured on this many examples, which is enough to see overfitting.
MAX_TRAIN_EVALUATED = 512
MAX_MIRROR_EVALUATED = 256
# A mirrored picture must be recognised about as often as the picture itself, or mirroring changes its meaning.
LARGEST_MIRROR_LOSS = 0.05
# Forward, backward and optimizer, compared with the forward pass; only a guess until the first steps are measured.
STEP_TO_FORWARD = 3.5
BATCHES_FOR_STATISTICS = 16
# Metrics, bootstrap, writing and a little unsteadiness.
PUBLISH_SECONDS = 2.0
RESERVE_SHARE = 1.25


@dataclass(frozen=True)
class Job:
    """What every stage works with."""

    config: TrainerConfig
    budget: Budget
    device: Device
    backbone: Backbone
    dataset: Dataset
    progress: Progress
    check: Callable[[], None]

    @property
    def work(self) -> Path:
        """Return the folder for features and checkpoints."""
        return Path(self.config.work_path)

    @property
    def identity(self) -> dict[str, str]:
        """Return what a checkpoint depends on."""
        return {"run": self.config.run, "data": self.dataset.audit.digest, "backbone": self.backbone.digest}

    @property
    def train_sample(self) -> Tensor:
        """Return the positions of the training examples that are evaluated; their order is that of hashes, so any part is random."""
        return self.dataset.positions[Split.TRAIN][:MAX_TRAIN_EVALUATED]


@dataclass(frozen=True)
class Choice:
    """A model, and what it says about each split."""

    candidate: str
    weights: Weights
    temperature: float
    logits: dict[Split, Tensor]
    scores: tuple[Score, ...]


@dataclass(frozen=True)
class ModelV0:
    """The backbone with the probe as its head."""

    probe: Probe
    choice: Choice
    picture_seconds: float
    """Time of the forward pass for one picture."""
    details: dict[str, Any]


@dataclass(frozen=True)
class Tuning:
    """What came of the fine-tuning, or why there was none."""

    tuned: FineTuned | None
    recipe: Recipe
    notes: tuple[str, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)


def fit_model_v0(job: Job) -> ModelV0:
    """Compute the features, fit the probe, and return both as the first usable model."""
    positions = torch.cat([job.dataset.positions[split] for split in Split])
    job.progress.begin(Phase.FEATURES)
    features = _compute_features(job, positions)
    job.progress.begin(Phase.PROBE)
    sizes = [len(job.dataset.positions[split]) for split in Split]
    by_split = dict(zip(Split, features.f_ND.split(sizes), strict=True))
    started = time.perf_counter()
    probe = _fit_probe(job, by_split[Split.TRAIN])
    logits = {split: probe.head.classify(f_ND) for split, f_ND in by_split.items() if len(f_ND)}
    logits[Split.TRAIN] = logits[Split.TRAIN][: len(job.train_sample)]
    temperature = fit_temperature(logits[Split.VAL], job.dataset.targets(Split.VAL))
    classifier = build_classifier(job, probe.head)
    weights = {name: tensor.detach().clone() for name, tensor in classifier.state_dict().items()}
    score = score_logits(PROBE, logits[Split.VAL], job.dataset.targets(Split.VAL))
    details = {
        "featuresComputed": features.num_computed,
        "featuresFromCache": features.num_cached,
        "featureSeconds": round(features.compute_seconds, 3),
        "probeSeconds": round(time.perf_counter() - started, 3),
        "probeStrength": probe.strength,
        "probeCvAccuracy": probe.cv_accuracy,
    }
    picture_seconds = measure_forward(job) if features.num_computed < MAX_TRAIN_EVALUATED else features.compute_seconds / features.num_computed
    return ModelV0(probe, Choice(PROBE, weights, temperature, logits, (score,)), picture_seconds, details)


def tune(job: Job, v0: ModelV0) -> Tuning:
    """Fine-tune from the probe, unless the method, the data or the budget speak against it."""
    hyperparameters = job.config.hyperparameters
    num_train = len(job.dataset.positions[Split.TRAIN])
    recipe = choose_recipe(
        num_train=num_train,
        has_batch_statistics=job.backbone.has_batch_statistics,
        training_seconds=job.config.training_seconds,
        hyperparameters=hyperparameters,
        on_cpu=job.device.name == "cpu",
    )
    if job.config.method is MethodType.PROBE:
        return Tuning(None, recipe)
    kept = load_checkpoint(job.work, "finetuned", identity=job.identity)
    if kept is not None:
        return _restore_tuning(kept, recipe)
    step_seconds = STEP_TO_FORWARD * v0.picture_seconds * recipe.batch_size
    seconds_left = _count_seconds_left(job, v0, recipe)
    reason = find_reason_to_skip(
        job.config.method,
        hyperparameters,
        examples_per_class=num_train / len(job.dataset.labels),
        probe_accuracy=v0.probe.cv_accuracy,
        seconds_left=seconds_left(),
        seconds_needed=step_seconds * _count_least_steps(recipe, num_train),
        step_seconds=step_seconds,
    )
    if reason is not None:
        logger.info("no fine-tuning: %s", reason)
        return Tuning(None, recipe, (f"fine-tuning was skipped: {reason}",))
    return _tune(job, v0, recipe, step_seconds=step_seconds, seconds_left=seconds_left)


def find_reason_to_skip(
    method: MethodType,
    hyperparameters: Hyperparameters,
    *,
    examples_per_class: float,
    probe_accuracy: float,
    seconds_left: float | None,
    seconds_needed: float,
    step_seconds: float,
) -> str | None:
    """Return why fine-tuning would not pay, or None; lengths that the user asks for are only bounded by the budget."""
    if seconds_left is not None and seconds_left < step_seconds:
        return "the budget was used up by the features and the probe; give more budget.trainingSeconds"
    asked = hyperparameters.epochs is not None or hyperparameters.max_steps is not None
    if method is MethodType.FULL or asked:
        return None
    if examples_per_class < MIN_EXAMPLES_PER_CLASS:
        return f"{examples_per_class:.1f} training examples per class are fewer than {MIN_EXAMPLES_PER_CLASS}"
    if probe_accuracy >= CEILING_ACCURACY:
        return f"the probe is right on {probe_accuracy:.1%} in cross-validation, which leaves nothing to gain"
    if seconds_left is not None and seconds_left < seconds_needed:
        return f"{seconds_left:.0f} s of the budget are left, and {MIN_EPOCHS} epochs take about {seconds_needed:.0f} s"
    return None


def select_model(job: Job, v0: ModelV0, tuning: Tuning) -> Choice:
    """Return the best model on the validation data."""
    if tuning.tuned is None:
        return v0.choice
    y_val = job.dataset.targets(Split.VAL)
    candidates = build_candidates(v0.choice.weights, tuning.tuned.weights, tuning.tuned.average)
    model = build_classifier(job, v0.probe.head)
    logits = {PROBE: v0.choice.logits[Split.VAL]}
    for number, (name, weights) in enumerate(candidates.items()):
        job.progress.advance(number / (len(candidates) + 2))
        if name != PROBE:
            model.load_state_dict(weights)
            if not tuning.recipe.freeze_batch_statistics and job.backbone.has_batch_statistics and name != "finetuned":
                _show_training_pictures(job, model, tuning.recipe)
                candidates[name] = {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}
            logits[name] = _classify(job, model, job.dataset.positions[Split.VAL])
    scores = tuple(score_logits(name, z_NK, y_val) for name, z_NK in logits.items())
    best = choose(scores, len(y_val))
    if best.name == PROBE:
        return Choice(PROBE, v0.choice.weights, v0.choice.temperature, v0.choice.logits, scores)
    model.load_state_dict(candidates[best.name])
    chosen = {Split.VAL: logits[best.name], Split.TRAIN: _classify(job, model, job.train_sample)}
    if len(job.dataset.positions[Split.TEST]):
        chosen[Split.TEST] = _classify(job, model, job.dataset.positions[Split.TEST])
    return Choice(best.name, candidates[best.name], fit_temperature(logits[best.name], y_val), chosen, scores)


def score_logits(name: str, z_NK: Tensor, y_N: Tensor) -> Score:
    """Return how logits do, each with the temperature that suits them."""
    temperature = fit_temperature(z_NK, y_N)
    nll = float(torch.nn.functional.cross_entropy(z_NK.double() / temperature, y_N))
    return Score(name, float((z_NK.argmax(1) == y_N).float().mean()), nll)


def build_classifier(job: Job, head: Head) -> Classifier:
    """Return the backbone with the head on the device."""
    classifier = Classifier(job.backbone.model, job.backbone.num_features, len(job.dataset.labels))
    with torch.no_grad():
        classifier.head.weight.copy_(head.weight_KD)
        classifier.head.bias.copy_(head.bias_K)
    job.device.place(classifier).eval()
    return classifier


def measure_forward(job: Job) -> float:
    """Return the time of the forward pass for one picture."""
    index_N = job.dataset.positions[Split.TRAIN][:64]
    _classify(job, job.backbone.model, index_N)
    started = time.perf_counter()
    _classify(job, job.backbone.model, index_N)
    return (time.perf_counter() - started) / len(index_N)


def _compute_features(job: Job, positions: Tensor, *, mirrored: bool = False) -> Features:
    digests = [job.dataset.digests[int(position)] or "" for position in positions]
    return compute_features(
        job.backbone,
        job.dataset.pixels_NHWC[positions] if mirrored else _Selection(job.dataset.pixels_NHWC, positions),
        digests,
        device=job.device,
        cache=job.work / "features",
        mirrored=mirrored,
        check=job.check,
        advance=job.progress.advance,
    )

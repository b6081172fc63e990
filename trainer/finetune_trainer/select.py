"""Choose the model to publish among probe, fine-tuned, averaged and interpolated weights, on the validation data."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from finetune_trainer.backbone import Classifier
from finetune_trainer.batch_statistics import share_batch_statistics
from finetune_trainer.batches import Share, TrainingSet, draw_batch
from finetune_trainer.data import Split
from finetune_trainer.evaluate import fit_temperature
from finetune_trainer.finetune import FineTuned
from finetune_trainer.job import Choice, Job, Score, build_classifier, classify, copy_weights
from finetune_trainer.learner import Weights
from finetune_trainer.probe import Head
from finetune_trainer.recipe import Recipe, count_steps_per_epoch

STAGE = "selection"
PROBE = "probe"
FINETUNED = "finetuned"
ALPHAS = (0.25, 0.5, 0.75)
NUM_CANDIDATES = 3 + len(ALPHAS)
BATCHES_FOR_STATISTICS = 16
# Accuracies within this share of a standard error are the same for all that the validation data can tell.
NEAR_TIE = 0.25


def select_model(job: Job, probe: Choice, head: Head, tuned: FineTuned, recipe: Recipe) -> Choice:
    """Return the best model on the validation data; it is never less accurate there than the probe."""
    y_val = job.dataset.targets(Split.VAL)
    contest = _Contest(job, build_candidates(probe.weights, tuned.weights, tuned.average), recipe, build_classifier(job, head))
    logits = {PROBE: probe.logits[Split.VAL]}
    for number, name in enumerate(contest.candidates):
        job.progress.advance(number / NUM_CANDIDATES)
        if name != PROBE:
            logits[name] = contest.classify(name, Split.VAL)
    scores = tuple(score_logits(name, logits[name], y_val) for name in contest.candidates)
    chosen_name = job.group.broadcast_json(choose(scores, len(y_val)).name)
    best = next(score for score in scores if score.name == chosen_name)
    if best.name == PROBE:
        return Choice(PROBE, probe.weights, probe.temperature, probe.logits, scores)
    chosen = {split: contest.classify(best.name, split) for split in job.evaluated}
    weights = copy_weights(contest.load(best.name))
    return Choice(best.name, weights, fit_temperature(chosen[Split.VAL], y_val), chosen, scores)


class _Contest:
    """The candidates, and the logits that were computed for them, which are kept for a restart."""

    def __init__(self, job: Job, candidates: dict[str, Weights], recipe: Recipe, model: Classifier) -> None:
        self.candidates = candidates
        self._job = job
        self._recipe = recipe
        self._model = model
        self._loaded: str | None = None
        kept = job.checkpoints.load(STAGE)
        self._logits = dict(kept.tensors) if kept else {}

    def load(self, name: str) -> Classifier:
        """Return the model with the weights of a candidate; those of the fine-tuning have statistics of their own."""
        if self._loaded != name:
            self._model.load_state_dict(self.candidates[name])
            if name != FINETUNED and self._job.backbone.has_batch_statistics and not self._recipe.freeze_batch_statistics:
                estimate_batch_statistics(self._job, self._model, self._recipe)
            self._loaded = name
        return self._model

    def classify(self, name: str, split: Split) -> Tensor:
        """Return the logits of a candidate on a split, computed once."""
        key = f"{name}/{split}"
        if key not in self._logits:
            self._logits[key] = classify(self._job, self.load(name), self._job.evaluated[split])
            self._job.checkpoints.save(STAGE, tensors=self._logits, state={})
        return self._logits[key]


def choose(scores: Sequence[Score], num_val: int) -> Score:
    """Return the score with the lowest log loss among those of near-best accuracy, none less accurate than the probe."""
    floor = next((score.accuracy for score in scores if score.name == PROBE), 0.0)
    best = max(score.accuracy for score in scores)
    margin = NEAR_TIE * math.sqrt(best * (1 - best) / num_val)
    eligible = [score for score in scores if score.accuracy >= max(floor, best - margin)]
    return min(eligible, key=lambda score: score.nll)


def score_logits(name: str, z_NK: Tensor, y_N: Tensor) -> Score:
    """Return how logits do, each with the temperature that suits them."""
    nll = float(functional.cross_entropy(z_NK.double() / fit_temperature(z_NK, y_N), y_N))
    return Score(name, float((z_NK.argmax(1) == y_N).float().mean()), nll)


def build_candidates(probe: Weights, tuned: Weights, average: Weights) -> dict[str, Weights]:
    """Return all candidates by name."""
    blends = {f"interpolated-{alpha:g}": interpolate(probe, tuned, alpha) for alpha in ALPHAS}
    return {PROBE: probe, **blends, FINETUNED: tuned, "ema": average}


def interpolate(start: Weights, end: Weights, alpha: float) -> Weights:
    """Return the weights at `alpha` of the way from start to end; counters are those of the end."""
    return {
        name: torch.lerp(start[name].to(tensor.device), tensor, alpha) if tensor.is_floating_point() else tensor
        for name, tensor in end.items()
    }


@torch.no_grad()
def estimate_batch_statistics(job: Job, model: Classifier, recipe: Recipe) -> None:
    """Measure the statistics of batch normalisation anew: those of blended weights are not the blended statistics."""
    layers = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]  # noqa: SLF001
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        # None means the mean over all batches.
        layer.momentum = None
        layer.train()
    _show_training_pictures(job, model, recipe)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
        layer.eval()


def _show_training_pictures(job: Job, model: Classifier, recipe: Recipe) -> None:
    train_N = job.dataset.positions[Split.TRAIN]
    training = TrainingSet(job.dataset.pixels_NHWC, train_N, job.dataset.targets(Split.TRAIN))
    for step in range(min(BATCHES_FOR_STATISTICS, count_steps_per_epoch(len(train_N), recipe.batch_size))):
        job.stop.check_together()
        x_BCHW, _ = draw_batch(
            training,
            step,
            batch_size=recipe.batch_size,
            seed=job.config.hyperparameters.seed,
            smallest_crop=1.0,
            device=job.device.name,
            runs=Share(job.group.rank, job.group.size).list_runs(min(recipe.batch_size, len(train_N)), parts=1),
        )
        with job.device.autocast(), share_batch_statistics(job.group, job.device):
            model(job.backbone.architecture.preprocessing.normalise(x_BCHW))

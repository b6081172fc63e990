"""Choose the model to publish among probe, fine-tuned, averaged and interpolated weights, on the validation data."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from finetune_trainer.backbone import Classifier
from finetune_trainer.batches import TrainingSet, draw_batch
from finetune_trainer.data import Split
from finetune_trainer.evaluate import fit_temperature
from finetune_trainer.finetune import FineTuned, Weights
from finetune_trainer.job import Choice, Job, Score, build_classifier, classify, copy_weights
from finetune_trainer.probe import Head
from finetune_trainer.recipe import Recipe, count_steps_per_epoch

PROBE = "probe"
FINETUNED = "finetuned"
ALPHAS = (0.25, 0.5, 0.75)
NUM_CANDIDATES = 3 + len(ALPHAS)
BATCHES_FOR_STATISTICS = 16
# Accuracies within this share of a standard error are the same for all that the validation data can tell.
NEAR_TIE = 0.25


def select_model(job: Job, probe: Choice, head: Head, tuned: FineTuned, recipe: Recipe) -> Choice:
    """Return the best model on the validation data; it is never less accurate there than the probe."""
    y_val, val_N = job.dataset.targets(Split.VAL), job.dataset.positions[Split.VAL]
    candidates = build_candidates(probe.weights, tuned.weights, tuned.average)
    model = build_classifier(job, head)
    logits = {PROBE: probe.logits[Split.VAL]}
    for number, name in enumerate(candidates.keys() - {PROBE}):
        job.progress.advance(number / NUM_CANDIDATES)
        model.load_state_dict(candidates[name])
        if name != FINETUNED and job.backbone.has_batch_statistics and not recipe.freeze_batch_statistics:
            estimate_batch_statistics(job, model, recipe)
            candidates[name] = copy_weights(model)
        logits[name] = classify(job, model, val_N)
    scores = tuple(score_logits(name, logits[name], y_val) for name in candidates)
    best = choose(scores, len(y_val))
    if best.name == PROBE:
        return Choice(PROBE, probe.weights, probe.temperature, probe.logits, scores)
    model.load_state_dict(candidates[best.name])
    chosen = {split: classify(job, model, index_N) for split, index_N in job.evaluated.items()}
    return Choice(best.name, candidates[best.name], fit_temperature(chosen[Split.VAL], y_val), chosen, scores)


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
        job.check()
        x_BCHW, _ = draw_batch(
            training,
            step,
            batch_size=recipe.batch_size,
            seed=job.config.hyperparameters.seed,
            smallest_crop=1.0,
            device=job.device.name,
        )
        with job.device.autocast():
            model(job.backbone.architecture.preprocessing.normalise(x_BCHW))

"""Choose the model to publish among probe, fine-tuned, averaged and interpolated weights, on the validation data."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finetune_trainer.finetune import Weights

PROBE = "probe"
ALPHAS = (0.25, 0.5, 0.75)
NUM_CANDIDATES = 3 + len(ALPHAS)
# Accuracies within this share of a standard error are the same for all that the validation data can tell.
NEAR_TIE = 0.25


@dataclass(frozen=True)
class Score:
    """How one candidate did on the validation data."""

    name: str
    accuracy: float
    nll: float
    """Log loss after a temperature of its own."""


def choose(scores: Sequence[Score], num_val: int) -> Score:
    """Return the score with the lowest log loss among those of near-best accuracy, none less accurate than the probe."""
    floor = next((score.accuracy for score in scores if score.name == PROBE), 0.0)
    best = max(score.accuracy for score in scores)
    margin = NEAR_TIE * math.sqrt(max(best * (1 - best), 0.0) / num_val)
    eligible = [score for score in scores if score.accuracy >= max(floor, best - margin)]
    return min(eligible, key=lambda score: score.nll)


def build_candidates(probe: Weights, tuned: Weights, average: Weights) -> dict[str, Weights]:
    """Return all candidates by name."""
    blends = {f"interpolated-{alpha:g}": interpolate(probe, tuned, alpha) for alpha in ALPHAS}
    return {PROBE: probe, **blends, "finetuned": tuned, "ema": average}


def interpolate(start: Weights, end: Weights, alpha: float) -> Weights:
    """Return the weights at `alpha` of the way from start to end; counters are those of the end."""
    return {
        name: torch.lerp(start[name], tensor, alpha) if tensor.is_floating_point() else tensor for name, tensor in end.items()
    }


@torch.no_grad()
def estimate_batch_statistics(model: nn.Module, run: Callable[[], Tensor]) -> None:
    """Replace the statistics of batch normalisation by those that `run`, a pass over training pictures, shows it.

    Statistics of interpolated weights are not the interpolated statistics.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]  # noqa: SLF001
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None
        layer.train()
    run()
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
        layer.eval()

"""Measure a classifier: logits on pictures, a temperature that calibrates them, and metrics with bootstrap intervals.

Shapes: N examples, K classes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from finetune_trainer.backbone import Preprocessing
from finetune_trainer.device import Device
from finetune_trainer.memory import MicroBatches

BATCH_SIZE = 32
NUM_BINS = 15
NUM_RESAMPLES = 1000
# Resampling more than this many examples tells nothing: the interval is then far narrower than what it is used for.
MAX_RESAMPLED = 20_000
_COLDEST, _HOTTEST = 0.05, 20.0

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Measurement:
    """One metric with its 95 % interval."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """Everything that was measured on one split."""

    measurements: tuple[Measurement, ...]
    details: dict[str, Any]
    """Per-class values, confusion matrix and calibration, as JSON data."""


@torch.no_grad()
def compute_logits(
    model: nn.Module,
    pixels_NHWC: Tensor,
    index_N: Tensor,
    *,
    preprocessing: Preprocessing,
    device: Device,
    check: Callable[[], None],
    memory: MicroBatches | None = None,
) -> Tensor:
    """Return the logits z_NK of the pictures at `index_N`."""
    model.eval()
    memory = memory or MicroBatches()

    def compute(index_b: Tensor) -> Tensor:
        pixels_bHWC = pixels_NHWC[index_b.to(pixels_NHWC.device)].to(device.name)
        with device.autocast():
            return model(preprocessing.normalise(pixels_bHWC.permute(0, 3, 1, 2))).float().cpu()  # type: ignore[no-any-return]

    logits = []
    for index_B in torch.split(index_N, BATCH_SIZE * memory.group.size):
        check()
        logits.append(memory.map(compute, index_B, share=BATCH_SIZE))
    return torch.cat(logits)


def fit_temperature(z_NK: Tensor, y_N: Tensor) -> float:
    """Return the temperature that minimises the log loss of softmax(z / temperature), by golden section search."""
    z_NK = z_NK.double()

    def nll(log_temperature: float) -> float:
        return float(nn.functional.cross_entropy(z_NK / math.exp(log_temperature), y_N))

    low, high = math.log(_COLDEST), math.log(_HOTTEST)
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(60):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if nll(left) < nll(right):
            high = right
        else:
            low = left
    return math.exp((low + high) / 2)


def evaluate(
    split: str,
    z_NK: Tensor,
    y_N: Tensor,
    *,
    temperature: float,
    labels: tuple[str, ...],
    majority: int,
    seed: int,
    check: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Return the metrics of logits on one split, named after it; `majority` is the most frequent class in training."""
    y = y_N.numpy().astype(np.int64)
    before, after = _softmax(z_NK, 1.0), _softmax(z_NK, temperature)
    predicted = after.argmax(1)
    point = _measure(y, predicted, after, num_classes=len(labels))
    intervals = _bootstrap(y, predicted, after, num_classes=len(labels), seed=seed, check=check)
    measurements = tuple(
        Measurement(f"{split}_{name}", value, *intervals.get(name, (None, None))) for name, value in point.items()
    )
    confusion = _count_confusion(y, predicted, len(labels))
    details = {
        "examples": len(y),
        "majorityBaseline": float((y == majority).mean()),
        "perClass": _describe_classes(confusion, labels),
        "confusionMatrix": {"labels": list(labels), "rowsAreTrueLabels": confusion.tolist()},
        "calibration": {
            "temperature": temperature,
            "eceBefore": compute_ece(y, before),
            "eceAfter": point["ece"],
            "nllBefore": _compute_nll(y, before),
            "nllAfter": point["nll"],
        },
    }
    return Evaluation(measurements, details)


def compute_ece(y: Integers, probability: Floats) -> float:
    """Return the expected calibration error over bins of equal width."""
    confidence = probability.max(1)
    correct = (probability.argmax(1) == y).astype(np.float64)
    bins = np.minimum((confidence * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    gap = np.bincount(bins, weights=confidence - correct, minlength=NUM_BINS)
    return float(np.abs(gap).sum() / len(y))


def compute_macro_f1(confusion: Integers) -> float:
    """Return the mean F1 over the classes that occur as label or prediction."""
    hits = np.diag(confusion).astype(np.float64)
    total = (confusion.sum(0) + confusion.sum(1)).astype(np.float64)
    present = total > 0
    return float((2 * hits[present] / total[present]).mean())


def _measure(y: Integers, predicted: Integers, probability: Floats, *, num_classes: int) -> dict[str, float]:
    return {
        "accuracy": float((y == predicted).mean()),
        "macro_f1": compute_macro_f1(_count_confusion(y, predicted, num_classes)),
        "nll": _compute_nll(y, probability),
        "ece": compute_ece(y, probability),
    }


def _bootstrap(
    y: Integers, predicted: Integers, probability: Floats, *, num_classes: int, seed: int, check: Callable[[], None]
) -> dict[str, tuple[float, float]]:
    generator = np.random.default_rng(seed)
    samples: dict[str, list[float]] = {}
    for _ in range(NUM_RESAMPLES if len(y) <= MAX_RESAMPLED else NUM_RESAMPLES // 10):
        check()
        drawn = generator.integers(len(y), size=len(y))
        for name, value in _measure(y[drawn], predicted[drawn], probability[drawn], num_classes=num_classes).items():
            samples.setdefault(name, []).append(value)
    # Resampling adds to the calibration error, so its quantiles would not even hold the value itself.
    del samples["ece"]
    return {name: (float(np.quantile(values, 0.025)), float(np.quantile(values, 0.975))) for name, values in samples.items()}


def _softmax(z_NK: Tensor, temperature: float) -> Floats:
    return torch.softmax(z_NK.double() / temperature, dim=1).numpy()


def _compute_nll(y: Integers, probability: Floats) -> float:
    return float(-np.log(np.maximum(probability[np.arange(len(y)), y], 1e-12)).mean())


def _count_confusion(y: Integers, predicted: Integers, num_classes: int) -> Integers:
    return np.bincount(y * num_classes + predicted, minlength=num_classes**2).reshape(num_classes, num_classes)


def _describe_classes(confusion: Integers, labels: tuple[str, ...]) -> list[dict[str, Any]]:
    hits, support, guesses = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    return [
        {
            "label": label,
            "precision": float(hits[k] / guesses[k]) if guesses[k] else 0.0,
            "recall": float(hits[k] / support[k]) if support[k] else 0.0,
            "f1": float(2 * hits[k] / (guesses[k] + support[k])) if guesses[k] + support[k] else 0.0,
            "support": int(support[k]),
        }
        for k, label in enumerate(labels)
    ]

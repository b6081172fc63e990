"""What the stages of a job share: the job itself, the model that a stage proposes, and how a model is put together and tried."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from finetune_api.contract import TrainerConfig
from torch import Tensor, nn

from finetune_trainer.backbone import Backbone, Classifier
from finetune_trainer.budget import Budget
from finetune_trainer.data import Split
from finetune_trainer.dataset import Dataset
from finetune_trainer.device import Device
from finetune_trainer.distributed import Group, StopNotice
from finetune_trainer.evaluate import compute_logits
from finetune_trainer.learner import Weights
from finetune_trainer.memory import MicroBatches
from finetune_trainer.probe import Head
from finetune_trainer.progress import Progress
from finetune_trainer.shared_checkpoints import SharedCheckpoints

# Accuracy on the training data is measured on this many examples, which is enough to see overfitting.
MAX_TRAIN_EVALUATED = 512


@dataclass(frozen=True)
class Job:
    """What every stage works with."""

    config: TrainerConfig
    budget: Budget
    device: Device
    backbone: Backbone
    dataset: Dataset
    progress: Progress
    stop: StopNotice
    checkpoints: SharedCheckpoints
    memory: MicroBatches
    num_workers: int = 0
    """Number of threads that draw batches ahead."""

    @property
    def group(self) -> Group:
        """Return the processes that work on the job."""
        return self.memory.group

    @property
    def check(self) -> Callable[[], None]:
        """Return what raises PreemptedError when the job is to stop, for work that each process does by itself."""
        return self.stop.check

    @property
    def work(self) -> Path:
        """Return the folder for features."""
        return Path(self.config.work_path)

    @property
    def evaluated(self) -> dict[Split, Tensor]:
        """Return the examples that are evaluated; training examples are ordered by hashes, so their first ones are random."""
        parts = {split: index_N for split, index_N in self.dataset.positions.items() if len(index_N)}
        return {**parts, Split.TRAIN: parts[Split.TRAIN][:MAX_TRAIN_EVALUATED]}


@dataclass(frozen=True)
class Score:
    """How one candidate did on the validation data."""

    name: str
    accuracy: float
    nll: float
    """Log loss after a temperature of its own."""


@dataclass(frozen=True)
class Choice:
    """A model to publish, and what it says about each split."""

    candidate: str
    weights: Weights
    temperature: float
    logits: dict[Split, Tensor]
    scores: tuple[Score, ...]


def build_classifier(job: Job, head: Head) -> Classifier:
    """Return the backbone with the head, on the device and in eval mode; the backbone is shared, not copied."""
    classifier = Classifier(
        job.backbone.model,
        job.backbone.architecture,
        num_features=job.backbone.num_features,
        num_classes=len(job.dataset.labels),
    )
    with torch.no_grad():
        classifier.head.weight.copy_(head.weight_KD)
        classifier.head.bias.copy_(head.bias_K)
    job.device.place(classifier).eval()
    return classifier


def copy_weights(model: nn.Module) -> Weights:
    """Return a copy of the weights that training does not change."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def classify(job: Job, model: nn.Module, index_N: Tensor) -> Tensor:
    """Return the logits of the pictures at `index_N`."""
    return compute_logits(
        model,
        job.dataset.pixels_NHWC,
        index_N,
        preprocessing=job.backbone.architecture.preprocessing,
        device=job.device,
        check=job.stop.check_together,
        memory=job.memory,
    )


def measure_forward(job: Job) -> float:
    """Return the seconds that the forward pass takes for one picture."""
    index_N = job.dataset.positions[Split.TRAIN][:64]
    classify(job, job.backbone.model, index_N)
    started = time.perf_counter()
    classify(job, job.backbone.model, index_N)
    return (time.perf_counter() - started) / len(index_N)

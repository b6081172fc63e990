"""The job from beginning to end: audit, features, probe, fine-tune, select, evaluate, publish."""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune_api.contract import TrainerConfig, TrainerReport
from finetune_api.v1alpha1 import MethodType
from finetune_trainer.backbone import Backbone, load_backbone
from finetune_trainer.budget import Budget
from finetune_trainer.checkpoint import remove_checkpoints
from finetune_trainer.dataset import Dataset, read_dataset
from finetune_trainer.device import Device, count_cpus, prepare_arithmetic, select_device
from finetune_trainer.errors import InvalidSpecError
from finetune_trainer.outcome import Outcome, build_artefact, measure, to_result
from finetune_trainer.progress import Phase, Progress, Sink
from finetune_trainer.publish import publish, read_published
from finetune_trainer.stages import Job, fit_model_v0, select_model, tune

logger = logging.getLogger(__name__)

MODEL_V0 = "model-v0"


def run(config: TrainerConfig, *, budget: Budget, check: Callable[[], None], sinks: Sequence[Sink]) -> TrainerReport:
    """Carry out the job and return its last report; a run that is already published is not repeated."""
    progress = Progress(budget, sinks, with_finetune=config.method is not MethodType.PROBE)
    progress.begin(Phase.READ)
    output = Path(config.output_path)
    prepare_output(output, Path(config.work_path))
    published = read_published(output, run=config.run, uri=config.output_uri)
    if published is not None:
        logger.info("this run is already published in %s", output)
        return progress.finish(published.output, published.result)

    num_threads = count_cpus()
    prepare_arithmetic(num_threads)
    device = select_device(config.hyperparameters.precision)
    backbone = load_backbone(
        config.model_uri,
        folder=Path(config.model_path) if config.model_path else None,
        image_size=config.hyperparameters.image_size,
        cache=Path(config.work_path) / "hub",
    )
    logger.info("backbone %s from %s, %s, %d threads", backbone.architecture.name, backbone.source, device.name, num_threads)
    dataset = read_dataset(
        config, image_size=backbone.architecture.preprocessing.image_size, num_threads=num_threads, check=check,
        advance=progress.advance,
    )  # fmt: skip
    device.place(backbone.model)
    job = Job(config, budget, device, backbone, dataset, progress, check)

    outcome = fit_model_v0(job)
    publish(Path(config.work_path) / MODEL_V0, build_artefact(job, outcome), uri=config.output_uri)
    progress.note(probe_val_accuracy=outcome.val_accuracy, val_accuracy=outcome.val_accuracy)
    progress.advance(1.0)
    logger.info("model v0 (probe): validation accuracy %.4f after %.1f s", outcome.val_accuracy, budget.elapsed_seconds())

    tuned = tune(job, outcome)
    progress.begin(Phase.FINISH)
    outcome = measure(job, select_model(job, outcome, tuned))
    progress.note(val_accuracy=outcome.val_accuracy)
    status = publish(output, build_artefact(job, outcome), uri=config.output_uri)
    remove_checkpoints(Path(config.work_path))
    result = to_result(job, outcome)
    logger.info("published %s after %.1f s: %s", outcome.candidate, budget.elapsed_seconds(), outcome.describe())
    return progress.finish(status, result)

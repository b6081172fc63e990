"""The job from beginning to end: audit, features, probe, fine-tune, select, evaluate, publish."""

import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path

from finetune_api.contract import TrainerConfig, TrainerReport

from finetune_trainer.backbone import load_backbone
from finetune_trainer.budget import Budget, ElapsedFile
from finetune_trainer.checkpoint import Checkpoints, Writer, read_elapsed_seconds
from finetune_trainer.dataset import read_dataset
from finetune_trainer.device import count_cpus, prepare_arithmetic, select_device
from finetune_trainer.errors import InvalidSpecError, StorageError
from finetune_trainer.fence import Fence
from finetune_trainer.identity import describe_identity
from finetune_trainer.job import Job
from finetune_trainer.memory import MicroBatches
from finetune_trainer.model_v0 import fit_model_v0
from finetune_trainer.outcome import Outcome, build_artefact, measure, to_result
from finetune_trainer.progress import Phase, Progress
from finetune_trainer.publish import publish, read_published
from finetune_trainer.select import select_model
from finetune_trainer.signals import run_interruptibly
from finetune_trainer.storage import Storage, open_storage
from finetune_trainer.tune import tune

logger = logging.getLogger(__name__)

MODEL_V0 = "model-v0"
ELAPSED_FILE = "elapsed.json"
_WORKERS_ON_GPU = 2


def run(
    config: TrainerConfig, *, budget: Budget, check: Callable[[], None], progress: Progress, num_workers: int | None = None
) -> TrainerReport:
    """Carry out the job and return its last report; a run that is already published is not repeated."""
    progress.begin(Phase.READ)
    check()
    _prepare_folders(config)
    published = read_published(Path(config.output_path), run=config.run, uri=config.output_uri)
    if published is not None:
        logger.info("this run is already published in %s", config.output_path)
        return progress.finish(published.output, published.result)

    storage = open_storage(config.checkpoint_path)
    fence = Fence(storage, run=config.run, attempt=config.attempt)
    fence.raise_up(config.checkpoint_path)
    elapsed = ElapsedFile(
        Path(config.work_path) / ELAPSED_FILE, budget, run=config.run, interval_seconds=config.checkpoint_interval_seconds
    )
    budget.used_seconds = max(elapsed.read(), read_elapsed_seconds(storage, run=config.run))

    def check_and_count() -> None:
        elapsed.beat()
        check()

    try:
        job = _prepare_job(
            config, storage, fence, budget=budget, check=check_and_count, progress=progress, num_workers=num_workers
        )
        report = _carry_out(job)
    except BaseException:
        elapsed.write()
        raise
    elapsed.remove()
    return report


def _carry_out(job: Job) -> TrainerReport:
    config, progress = job.config, job.progress
    v0 = fit_model_v0(job)
    outcome = measure(job, v0.choice, details={"modelV0": v0.details})
    job.checkpoints.confirm()
    publish(Path(config.work_path) / MODEL_V0, build_artefact(job, outcome), uri=config.output_uri)
    _announce(job, outcome, "model v0")
    progress.note(probe_val_accuracy=outcome.val_accuracy, val_accuracy=outcome.val_accuracy)

    tuning = tune(job, v0)
    progress.begin(Phase.FINISH)
    details = {"modelV0": v0.details, "finetuning": tuning.details}
    choice = v0.choice if tuning.tuned is None else select_model(job, v0.choice, v0.probe.head, tuning.tuned, tuning.recipe)
    outcome = measure(job, choice, notes=tuning.notes, details=details)
    job.check()
    job.checkpoints.confirm()
    output = publish(Path(config.output_path), build_artefact(job, outcome), uri=config.output_uri)
    if read_published(Path(config.output_path), run=config.run, uri=config.output_uri) is None:
        raise StorageError("OutputNotDurable", f"spec.output.uri: {config.output_path} does not hold what was written to it")
    job.checkpoints.clear()
    _announce(job, outcome, f"published {outcome.choice.candidate}")
    progress.note(val_accuracy=outcome.val_accuracy)
    return progress.finish(output, to_result(job, outcome))


def _prepare_folders(config: TrainerConfig) -> None:
    """Create the folders, and find out before any work whether they can be written."""
    probe_file = Path(config.output_path) / ".writable"
    try:
        Path(config.work_path).mkdir(parents=True, exist_ok=True)
        probe_file.write_bytes(b"")
        probe_file.unlink()
    except OSError as error:
        raise InvalidSpecError(
            "OutputNotWritable",
            f"spec.output.uri: {config.output_path} cannot be written by user {os.getuid()} ({error.strerror}); "
            "give a volume that is mounted read-write and whose files belong to this user or to the pod's fsGroup",
        ) from error


def _prepare_job(
    config: TrainerConfig,
    storage: Storage,
    fence: Fence,
    *,
    budget: Budget,
    check: Callable[[], None],
    progress: Progress,
    num_workers: int | None,
) -> Job:
    num_threads = count_cpus()
    prepare_arithmetic(num_threads)
    device = select_device(config.hyperparameters.precision)
    load = functools.partial(
        load_backbone,
        config.model_uri,
        folder=Path(config.model_path) if config.model_path else None,
        image_size=config.hyperparameters.image_size,
        cache=Path(config.work_path) / "hub",
    )
    # A download asks nobody whether it should stop.
    backbone = run_interruptibly(load, check)
    logger.info("%s from %s on %s, %d threads", backbone.architecture.name, backbone.source, device.name, num_threads)
    dataset = read_dataset(
        config,
        image_size=backbone.architecture.preprocessing.image_size,
        num_threads=num_threads,
        device=device,
        check=check,
        advance=progress.advance,
    )
    for finding in dataset.audit.findings:
        logger.warning("%s: %s", finding.kind, finding.to_warning())
    logger.info("%d classes, %s", len(dataset.labels), {split.value: len(index) for split, index in dataset.positions.items()})
    device.place(backbone.model)
    writer = Writer(
        config.run,
        config.attempt,
        keep=config.checkpoint_keep,
        interval_seconds=config.checkpoint_interval_seconds,
        threads=num_threads,
        elapsed_seconds=budget.elapsed_seconds,
    )
    identity = describe_identity(config, data_digest=dataset.audit.digest, backbone_digest=backbone.digest)
    checkpoints = Checkpoints(storage, fence, writer, identity=identity, progress=progress)
    if num_workers is None:
        num_workers = 0 if device.name == "cpu" else _WORKERS_ON_GPU
    memory = MicroBatches(config.micro_batch_divisor, report=checkpoints.warn)
    return Job(config, budget, device, backbone, dataset, progress, check, checkpoints, memory, num_workers)


def _announce(job: Job, outcome: Outcome, what: str) -> None:
    values = ", ".join(f"{item.name} {item.value:.4f}" for item in outcome.measurements if item.name.endswith("accuracy"))
    logger.info("%s after %.1f s: %s", what, job.budget.elapsed_seconds(), values)

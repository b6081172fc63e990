"""The job from beginning to end: audit, features, probe, fine-tune, select, evaluate, publish."""

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_api.contract import TrainerConfig, TrainerReport
from finetune_api.v1alpha1 import OutputStatus, Result

from finetune_trainer.backbone import Backbone, load_backbone
from finetune_trainer.budget import Budget, ElapsedFile
from finetune_trainer.checkpoint import Checkpoints, Writer, read_elapsed_seconds
from finetune_trainer.dataset import Dataset, read_dataset
from finetune_trainer.device import Device, count_cpus, prepare_arithmetic, select_device
from finetune_trainer.distributed import ALONE, Group, StopNotice, join
from finetune_trainer.errors import InvalidSpecError, PreemptedError, StorageError
from finetune_trainer.fence import Fence
from finetune_trainer.identity import describe_identity
from finetune_trainer.job import Job
from finetune_trainer.memory import MicroBatches
from finetune_trainer.model_v0 import fit_model_v0
from finetune_trainer.outcome import Outcome, build_artefact, measure, to_result
from finetune_trainer.progress import Phase, Progress
from finetune_trainer.publish import publish, read_published
from finetune_trainer.seat import Seat, share_cpus
from finetune_trainer.select import select_model
from finetune_trainer.shared_checkpoints import SharedCheckpoints
from finetune_trainer.signals import run_interruptibly
from finetune_trainer.storage import Storage, open_storage
from finetune_trainer.tune import tune

logger = logging.getLogger(__name__)

MODEL_V0 = "model-v0"
ELAPSED_FILE = "elapsed.json"
_WORKERS_ON_GPU = 2
_BACKBONE_IS_HERE = "backbone"


@dataclass(frozen=True)
class Setting:
    """What a process of the job knows before it has read anything."""

    config: TrainerConfig
    budget: Budget
    progress: Progress
    device: Device
    group: Group
    stop: StopNotice
    elapsed: ElapsedFile
    num_workers: int | None


def run(
    config: TrainerConfig,
    *,
    budget: Budget,
    check: Callable[[], None],
    progress: Progress,
    num_workers: int | None = None,
    seat: Seat | None = None,
) -> TrainerReport:
    """Carry out the job and return its last report; a run that is already published is not repeated.

    Each of several processes has its seat, and all of them do this.
    """
    device = select_device(config.hyperparameters.precision, config.world.device, local_rank=seat.local_rank if seat else 0)
    # The processes of other pods may take minutes, and nobody can be asked to stop while waiting.
    group = run_interruptibly(functools.partial(join, seat, config.world), check) if seat else ALONE
    path = Path(config.work_path) / ELAPSED_FILE
    elapsed = ElapsedFile(path, budget, run=config.run, interval_seconds=config.checkpoint_interval_seconds)

    def check_and_count() -> None:
        if group.is_main:
            elapsed.beat()
        check()

    stop = StopNotice(group, check_and_count)
    try:
        return _run(Setting(config, budget, progress, device, group, stop, elapsed, num_workers))
    except PreemptedError:
        stop.leave()
        raise
    except RuntimeError as error:
        meaning = stop.explain(error)
        if meaning is error:
            raise
        raise meaning from error


def _run(setting: Setting) -> TrainerReport:
    config, progress, group, elapsed = setting.config, setting.progress, setting.group, setting.elapsed
    progress.begin(Phase.READ)
    setting.stop.check()
    content = group.broadcast_json(_find_published(config) if group.is_main else None)
    if content is not None:
        logger.info("this run is already published in %s", config.output_path)
        return _finish(progress, content)
    if not group.is_main:
        setting.budget.used_seconds = group.broadcast_json(None)
        return _carry_out(_prepare_job(setting, None))

    storage = open_storage(config.checkpoint_path)
    fence = Fence(storage, run=config.run, attempt=config.attempt, uid=config.uid, generation=config.generation)
    fence.raise_up(config.checkpoint_path)
    used_seconds = max(elapsed.read(), read_elapsed_seconds(storage, run=config.run))
    setting.budget.used_seconds = group.broadcast_json(used_seconds)
    try:
        report = _carry_out(_prepare_job(setting, (storage, fence)))
    except BaseException:
        elapsed.write()
        raise
    elapsed.remove()
    return report


def _carry_out(job: Job) -> TrainerReport:
    progress = job.progress
    v0 = fit_model_v0(job)
    if job.group.is_main:
        outcome = measure(job, v0.choice, details={"modelV0": v0.details})
        job.checkpoints.confirm()
        publish(job.work / MODEL_V0, build_artefact(job, outcome), uri=job.config.output_uri)
        _announce(job, outcome, "model v0")
        progress.note(probe_val_accuracy=outcome.val_accuracy, val_accuracy=outcome.val_accuracy)

    tuning = tune(job, v0)
    progress.begin(Phase.FINISH)
    details = {"modelV0": v0.details, "finetuning": tuning.details}
    choice = v0.choice if tuning.tuned is None else select_model(job, v0.choice, v0.probe.head, tuning.tuned, tuning.recipe)
    published = None
    if job.group.is_main:
        published = _publish(job, measure(job, choice, notes=tuning.notes, details=details))
    # Nobody leaves as if all were well before the model is where it belongs.
    content = job.group.broadcast_json(published)
    job.group.barrier()
    return _finish(progress, content)


def _publish(job: Job, outcome: Outcome) -> dict[str, Any]:
    """Publish the model, and return what is reported of it as JSON data."""
    config = job.config
    job.check()
    job.checkpoints.confirm()
    output = publish(Path(config.output_path), build_artefact(job, outcome), uri=config.output_uri)
    if read_published(Path(config.output_path), run=config.run, uri=config.output_uri) is None:
        raise StorageError("OutputNotDurable", f"spec.output.uri: {config.output_path} does not hold what was written to it")
    job.checkpoints.clear()
    _announce(job, outcome, f"published {outcome.choice.candidate}")
    job.progress.note(val_accuracy=outcome.val_accuracy)
    return _to_content(output, to_result(job, outcome))


def _find_published(config: TrainerConfig) -> dict[str, Any] | None:
    _prepare_folders(config)
    found = read_published(Path(config.output_path), run=config.run, uri=config.output_uri)
    return None if found is None else _to_content(found.output, found.result)


def _to_content(output: OutputStatus, result: Result) -> dict[str, Any]:
    return {"output": output.model_dump(mode="json"), "result": result.model_dump(mode="json")}


def _finish(progress: Progress, content: dict[str, Any]) -> TrainerReport:
    return progress.finish(OutputStatus.model_validate(content["output"]), Result.model_validate(content["result"]))


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


def _prepare_job(setting: Setting, store: tuple[Storage, Fence] | None) -> Job:
    config, group, device = setting.config, setting.group, setting.device
    num_threads = share_cpus(count_cpus(), processes_per_node=config.world.processes_per_node)
    prepare_arithmetic(num_threads)
    backbone = _load_backbone(setting)
    logger.info("%s from %s on %s, %d threads", backbone.architecture.name, backbone.source, device.name, num_threads)
    # Every process reads all of the data: what it is used for follows from its contents alone, any process needs any picture in
    # some epoch, and files are read faster than pixels come from another process.
    dataset = read_dataset(
        config,
        image_size=backbone.architecture.preprocessing.image_size,
        num_threads=num_threads,
        device=device,
        check=setting.stop.check,
        advance=setting.progress.advance,
    )
    if group.is_main:
        for finding in dataset.audit.findings:
            logger.warning("%s: %s", finding.kind, finding.to_warning())
    logger.info("%d classes, %s", len(dataset.labels), {split.value: len(index) for split, index in dataset.positions.items()})
    device.place(backbone.model)
    own = _open_checkpoints(setting, store, dataset=dataset, backbone=backbone, num_threads=num_threads) if store else None
    checkpoints = SharedCheckpoints(own, group)
    num_workers = setting.num_workers
    if num_workers is None:
        num_workers = 0 if device.name == "cpu" else _WORKERS_ON_GPU
    memory = MicroBatches(config.micro_batch_divisor, report=checkpoints.warn, group=group)
    return Job(
        config, setting.budget, device, backbone, dataset, setting.progress, setting.stop, checkpoints, memory, num_workers
    )


def _load_backbone(setting: Setting) -> Backbone:
    """Return the backbone; what must be downloaded is downloaded by rank 0, and found by the others."""
    config, group, check = setting.config, setting.group, setting.stop.check
    load = functools.partial(
        load_backbone,
        config.model_uri,
        folder=Path(config.model_path) if config.model_path else None,
        image_size=config.hyperparameters.image_size,
        cache=Path(config.work_path) / "hub",
    )
    if not group.is_main:
        group.wait_for(_BACKBONE_IS_HERE, check)
    # A download asks nobody whether it should stop.
    backbone = run_interruptibly(load, check)
    if group.is_main:
        group.announce(_BACKBONE_IS_HERE)
    return backbone


def _open_checkpoints(
    setting: Setting, store: tuple[Storage, Fence], *, dataset: Dataset, backbone: Backbone, num_threads: int
) -> Checkpoints:
    config = setting.config
    writer = Writer(
        config.run,
        config.attempt,
        keep=config.checkpoint_keep,
        interval_seconds=config.checkpoint_interval_seconds,
        threads=num_threads,
        elapsed_seconds=setting.budget.elapsed_seconds,
    )
    identity = describe_identity(config, data_digest=dataset.audit.digest, backbone_digest=backbone.digest)
    return Checkpoints(*store, writer, identity=identity, progress=setting.progress)


def _announce(job: Job, outcome: Outcome, what: str) -> None:
    values = ", ".join(f"{item.name} {item.value:.4f}" for item in outcome.measurements if item.name.endswith("accuracy"))
    logger.info("%s after %.1f s: %s", what, job.budget.elapsed_seconds(), values)

"""Run a FineTuneJob from its YAML on this machine, without a cluster."""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from finetune_api import names
from finetune_api.contract import TrainerConfig, TrainerReport, build_trainer_config, claim_of
from finetune_api.v1alpha1 import FineTuneJob
from pydantic import ValidationError
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from finetune_trainer.errors import InvalidSpecError

_SHOWN_METRICS = ("loss", "val_accuracy", "train_images_per_second")


@dataclass(frozen=True)
class Paths:
    """Folders that stand in for the URIs of the job."""

    output: Path
    data: Path | None = None
    model: Path | None = None


def read_job(path: Path, paths: Paths) -> TrainerConfig:
    """Return the configuration of the FineTuneJob in the YAML file `path`; raise InvalidSpecError naming what is wrong."""
    job = _parse_job(path)
    name = str(job["metadata"]["name"])
    try:
        spec = FineTuneJob.model_validate({"spec": job.get("spec")}).spec
    except ValidationError as error:
        raise InvalidSpecError("InvalidSpec", f"{path}: {describe(error)}") from error
    for folder, uri, option in ((paths.data, spec.dataset.uri, "--data"), (paths.model, spec.model.uri, "--model")):
        if folder is None and claim_of(uri):
            raise InvalidSpecError("InvalidSpec", f"{uri} is a volume of a cluster; give {option} DIR to stand in for it")
    config = build_trainer_config(
        spec,
        namespace=str(job["metadata"].get("namespace", "default")),
        name=name,
        attempt=1,
        dataset_path=str(paths.data.absolute()) if paths.data else None,
        output_path=str(paths.output.absolute()),
    )
    if spec.checkpoint.uri is None or claim_of(spec.checkpoint.uri):
        config = config.model_copy(update={"checkpoint_path": str(PurePosixPath(config.work_path) / "checkpoints")})
    return config.model_copy(update={"model_path": str(paths.model.absolute())}) if paths.model else config


def describe(error: ValidationError) -> str:
    """Return what pydantic found, field by field."""
    problems = []
    for problem in error.errors():
        field = ".".join(str(part) for part in problem["loc"]) or "spec"
        given = f" (given: {problem['input']!r})" if isinstance(problem["input"], str | int | float) else ""
        problems.append(f"{field}: {problem['msg'].removeprefix('Value error, ')}{given}")
    return "; ".join(problems)


def _parse_job(path: Path) -> dict[str, Any]:
    try:
        documents = [document for document in yaml.safe_load_all(path.read_text(encoding="utf-8")) if document]
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidSpecError("InvalidSpec", f"{path}: {error}") from error
    jobs = [document for document in documents if isinstance(document, dict) and document.get("kind") == names.KIND]
    if len(jobs) != 1:
        raise InvalidSpecError("InvalidSpec", f"{path}: {len(jobs)} documents of kind {names.KIND}; give a file with one")
    job: dict[str, Any] = jobs[0]
    if job.get("apiVersion") != names.API_VERSION:
        raise InvalidSpecError("InvalidSpec", f"{path}: apiVersion: {job.get('apiVersion')!r} is not {names.API_VERSION}")
    metadata = job.get("metadata")
    if not isinstance(metadata, dict) or not metadata.get("name"):
        raise InvalidSpecError("InvalidSpec", f"{path}: metadata.name is missing")
    return job


class Bar:
    """A progress bar on the terminal, as a sink of reports."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<26}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TimeElapsedColumn(),
            TextColumn("{task.fields[eta]}"), TextColumn("{task.fields[metrics]}"),
        )  # fmt: skip
        self._task = self._progress.add_task("starting", total=100, eta="", metrics="")

    def __enter__(self) -> "Bar":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, report: TrainerReport, phase: str, _urgent: bool) -> None:  # noqa: FBT001  the signature of a progress sink
        """Show the report."""
        status = report.trainer_status
        shown = [f"{metric.name} {metric.value}" for metric in status.metrics if metric.name in _SHOWN_METRICS]
        eta = "" if status.estimated_remaining_seconds is None else f"{status.estimated_remaining_seconds} s left"
        self._progress.update(
            self._task, description=phase, completed=status.progress_percentage or 0, eta=eta, metrics=", ".join(shown)
        )

"""What a model is worth, in the forms that people and programs read: metrics, result, configuration, card, provenance."""

import csv
import importlib.metadata
import io
import json
from dataclasses import asdict, dataclass
from typing import Any

import torch
from finetune_api import names
from finetune_api.v1alpha1 import Result, ResultMetric

from finetune_trainer.data import Split
from finetune_trainer.evaluate import Evaluation, Measurement, evaluate
from finetune_trainer.job import Choice, Job
from finetune_trainer.publish import Artefact

MAX_WARNINGS = 16
# The split with the most telling measurements comes first, and with it the task's main metric.
_ORDER = (Split.TEST, Split.VAL, Split.TRAIN)
_PACKAGES = ("finetune-trainer", "numpy", "pillow", "safetensors", "timm", "torch")


@dataclass(frozen=True)
class Outcome:
    """A model with everything that was measured on it."""

    choice: Choice
    evaluations: dict[Split, Evaluation]
    notes: tuple[str, ...]
    details: dict[str, Any]

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        """Return all metrics, the task's main metric first."""
        return tuple(item for split in _ORDER if split in self.evaluations for item in self.evaluations[split].measurements)

    @property
    def val_accuracy(self) -> float:
        """Return the accuracy on the validation data."""
        return self.evaluations[Split.VAL].measurements[0].value


def measure(job: Job, choice: Choice, *, notes: tuple[str, ...] = (), details: dict[str, Any]) -> Outcome:
    """Evaluate the model on every split."""
    y_train = job.dataset.targets(Split.TRAIN)
    evaluations = {
        split: evaluate(
            split,
            choice.logits[split],
            job.dataset.y_N[index_N],
            temperature=choice.temperature,
            labels=job.dataset.labels,
            majority=int(torch.bincount(y_train).argmax()),
            seed=job.config.hyperparameters.seed,
            check=job.check,
        )
        for split, index_N in job.evaluated.items()
    }
    return Outcome(choice, evaluations, notes, details)


def to_result(job: Job, outcome: Outcome) -> Result:
    """Return what goes into the status of the FineTuneJob."""
    warnings = (*outcome.notes, *job.checkpoints.warnings, *(finding.to_warning() for finding in job.dataset.audit.findings))
    metrics = tuple(
        ResultMetric(name=item.name, value=f"{item.value:.4f}", low=_format(item.low), high=_format(item.high))
        for item in outcome.measurements
    )
    return Result(candidate=outcome.choice.candidate, metrics=metrics, warnings=warnings[:MAX_WARNINGS])


def _format(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"


def build_artefact(job: Job, outcome: Outcome) -> Artefact:
    """Return the model as it is published."""
    return Artefact(
        weights=outcome.choice.weights,
        config=_build_config(job, outcome),
        metrics=_build_metrics(job, outcome),
        splits=_write_splits(job),
        card=_write_card(job, outcome),
        provenance=_build_provenance(job),
    )


def _build_config(job: Job, outcome: Outcome) -> dict[str, Any]:
    return {
        "task": job.config.task.value,
        **job.backbone.architecture.describe(),
        "num_features": job.backbone.num_features,
        "num_classes": len(job.dataset.labels),
        "labels": list(job.dataset.labels),
        "temperature": outcome.choice.temperature,
        "precision": job.device.precision.value,
    }


def _build_metrics(job: Job, outcome: Outcome) -> dict[str, Any]:
    audit = job.dataset.audit
    return {
        "metrics": [asdict(item) for item in outcome.measurements],
        "splits": {split.value: evaluation.details for split, evaluation in outcome.evaluations.items()},
        "examples": {split.value: len(index_N) for split, index_N in job.dataset.positions.items()},
        "candidates": [asdict(score) for score in outcome.choice.scores],
        "audit": [
            {
                "kind": finding.kind.value,
                "message": finding.message,
                "paths": list(finding.paths[:50]),
                "count": len(finding.paths),
            }
            for finding in audit.findings
        ],
        "training": outcome.details,
        "elapsedSeconds": round(job.budget.elapsed_seconds(), 3),
        "result": to_result(job, outcome).model_dump(mode="json", by_alias=True, exclude_none=True),
    }


def _write_splits(job: Job) -> str:
    dataset = job.dataset
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(("path", "label", "split"))
    for split, index_N in dataset.positions.items():
        writer.writerows((dataset.paths[i], dataset.labels[int(dataset.y_N[i])], split.value) for i in index_N.tolist())
    return table.getvalue()


def _build_provenance(job: Job) -> dict[str, Any]:
    config = job.config
    return {
        "apiVersion": names.API_VERSION,
        "namespace": config.namespace,
        "name": config.name,
        "run": config.run,
        "seed": config.hyperparameters.seed,
        "method": config.method.value,
        "hyperparameters": config.hyperparameters.model_dump(mode="json", by_alias=True, exclude_none=True),
        "dataset": {"uri": config.dataset_uri, "sha256": job.dataset.audit.digest},
        "model": {"uri": config.model_uri, "source": job.backbone.source, "sha256": job.backbone.digest},
        "versions": {package: importlib.metadata.version(package) for package in _PACKAGES},
    }


_CARD = """# {name}

An image classifier with {num_classes} classes, fine-tuned from {model} on {dataset}.

| Metric | Value | 95 % interval |
|---|---|---|
{rows}

The published weights are the candidate `{candidate}`, chosen on the validation data. The majority class alone would reach an
accuracy of {baseline:.4f}. Probabilities are calibrated: softmax(logits / {temperature:.4f}).

Labels: {labels}.

## Use

    finetune-trainer predict FOLDER PICTURE...

The weights load without pickle. `config.json` holds all that is needed with timm alone:

    config = json.load(open("config.json"))
    weights = safetensors.torch.load_file("model.safetensors")
    backbone = timm.create_model(config["architecture"], num_classes=0, **config["model_args"]).eval()
    backbone.load_state_dict({{k.removeprefix("backbone."): v for k, v in weights.items() if k.startswith("backbone.")}})
    # Inputs: RGB pictures resized (not cropped) to preprocessing.image_size, scaled to 0..1, minus mean, over std.
{features}
    logits = torch.nn.functional.linear(features, weights["head.weight"], weights["head.bias"])

## Data

{examples}
{warnings}
"""


_FEATURES_OF_STAGES = """\
    final, stages = backbone.forward_intermediates(inputs, indices=config["num_stages"], output_fmt="NCHW")
    features = torch.cat([*(s.mean((2, 3)) for s in stages), backbone.forward_head(final, pre_logits=True)], dim=1)"""
_FEATURES_PLAIN = "    features = backbone(inputs)"


def _write_card(job: Job, outcome: Outcome) -> str:
    rows = "\n".join(
        f"| {item.name} | {item.value:.4f} | " + (f"{item.low:.4f} to {item.high:.4f} |" if item.low is not None else "|")
        for item in outcome.measurements
    )
    best = outcome.evaluations.get(Split.TEST) or outcome.evaluations[Split.VAL]
    warnings = to_result(job, outcome).warnings
    return _CARD.format(
        name=job.config.name,
        num_classes=len(job.dataset.labels),
        model=job.config.model_uri,
        dataset=job.config.dataset_uri,
        rows=rows,
        features=_FEATURES_OF_STAGES if job.backbone.architecture.num_stages else _FEATURES_PLAIN,
        candidate=outcome.choice.candidate,
        baseline=best.details["majorityBaseline"],
        temperature=outcome.choice.temperature,
        labels=", ".join(job.dataset.labels[:100]) + (" and more" if len(job.dataset.labels) > 100 else ""),
        examples=", ".join(f"{len(index_N)} {split.value}" for split, index_N in job.dataset.positions.items()) + " examples.",
        warnings="\n".join(f"- {json.dumps(warning, ensure_ascii=False)[1:-1]}" for warning in warnings),
    )

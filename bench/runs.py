"""Run `finetune-trainer run` as a user would, and read what came of it."""

import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MODEL_V0 = re.compile(r"model v0 after ([0-9.]+) s: .*?val_accuracy ([0-9.]+)")


@dataclass(frozen=True)
class Run:
    """What one run of the trainer achieved, and when."""

    metrics: dict[str, dict[str, float]]
    """Value, low and high of each metric by its name."""
    candidate: str
    probe_val_accuracy: float
    probe_seconds: float
    """When the probe was a usable model, from the start of the process."""
    total_seconds: float

    def describe(self, name: str) -> str:
        """Return a metric with its interval."""
        metric = self.metrics[name]
        return f"{metric['value']:.3f} [{metric['low']:.3f}, {metric['high']:.3f}]"


def run_trainer(data: Path, *, image_size: int, training_seconds: int, seed: int = 0) -> Run:
    """Run the trainer on a folder of pictures with a budget and no other setting."""
    with tempfile.TemporaryDirectory() as folder:
        job, output = Path(folder) / "job.yaml", Path(folder) / "output"
        job.write_text(json.dumps(describe_job(image_size=image_size, training_seconds=training_seconds, seed=seed)))
        program = Path(sys.executable).parent / "finetune-trainer"
        command: list[str | Path] = [program, "run", job, "--output", output, "--data", data]
        started = time.monotonic()
        finished = subprocess.run(command, check=False, capture_output=True, text=True)
        total_seconds = time.monotonic() - started
        if finished.returncode != 0:
            raise RuntimeError(f"finetune-trainer ended with status {finished.returncode}:\n{finished.stderr[-2000:]}")
        return read_run(finished.stdout + finished.stderr, output, total_seconds=total_seconds)


def describe_job(*, image_size: int, training_seconds: int, seed: int) -> dict[str, Any]:
    """Return a FineTuneJob; JSON is YAML as well."""
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "bench"},
        "spec": {
            "task": "image-classification",
            "model": {"uri": "timm://tf_efficientnet_lite0"},
            "dataset": {
                "uri": "pvc://datasets/bench",
                "format": "imagefolder",
                "validationFraction": 0.15,
                "testFraction": 0.15,
            },
            "hyperparameters": {"imageSize": image_size, "seed": seed},
            "budget": {"trainingSeconds": training_seconds},
            "output": {"uri": "pvc://models/bench"},
        },
    }


def read_run(log: str, output: Path, *, total_seconds: float) -> Run:
    """Return what the log and the artefact say."""
    probe = _MODEL_V0.search(log)
    assert probe is not None, f"the log does not tell of the probe:\n{log[-2000:]}"
    metrics = json.loads((output / "metrics.json").read_text())
    return Run(
        {metric["name"]: read_metric(metric) for metric in metrics["metrics"]},
        str(metrics["result"]["candidate"]),
        float(probe[2]),
        float(probe[1]),
        total_seconds,
    )


def read_metric(metric: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a metric; the API writes decimals as strings."""
    return {key: float(metric[key]) for key in ("value", "low", "high") if metric.get(key) is not None}

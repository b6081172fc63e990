"""Builders of small data sets, a tiny real backbone with random weights, and jobs over both."""

import json
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path

# Before torch loads: threads that wait actively make tests slow on a busy machine.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # noqa: TID251

import fsspec
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from finetune_api.contract import TrainerConfig, TrainerReport, build_trainer_config
from finetune_api.v1alpha1 import FineTuneJobSpec
from finetune_trainer.budget import Budget
from finetune_trainer.errors import PreemptedError
from finetune_trainer.progress import Phase, Progress
from finetune_trainer.run import run
from PIL import Image

MakePictures = Callable[..., Path]
MakeConfig = Callable[..., TrainerConfig]
RunJob = Callable[..., TrainerReport]

RunUntil = Callable[..., None]

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
COLOURS = {"amber": (200, 140, 20), "blue": (30, 60, 200), "green": (40, 160, 60), "violet": (140, 40, 170)}


@pytest.fixture(scope="session", autouse=True)
def _two_threads() -> None:
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the hub holds it: a real architecture of 0.4 million weights, initialised at random."""
    folder = tmp_path_factory.mktemp("tiny-model")
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=0)
    safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors")
    config = {"architecture": "test_resnet", "num_classes": 0, "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def draw_picture(label: str, seed: int, *, size: int = 24, noise: float = 60.0) -> Image.Image:
    """Return a noisy picture in the colour of its class, different for every seed."""
    generator = np.random.default_rng([seed, *label.encode()])
    pixels = np.asarray(COLOURS[label]) + generator.normal(0, noise, (size, size, 3)) + generator.normal(0, noise, 3)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


@pytest.fixture
def make_pictures(tmp_path: Path) -> MakePictures:
    """Write class folders of noisy pictures and return the folder."""

    def make(
        name: str = "data", *, labels: tuple[str, ...] = ("blue", "green", "violet"), count: int = 20, **kwargs: float
    ) -> Path:
        for label in labels:
            (tmp_path / name / label).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                draw_picture(label, number, **kwargs).save(tmp_path / name / label / f"{number:03d}.png")
        return tmp_path / name

    return make


@pytest.fixture
def make_config(tmp_path: Path, tiny_model: Path) -> MakeConfig:
    """Return the configuration of a job on the tiny model; `spec` replaces parts of the spec."""

    def make(data: Path, *, output: str = "output", model: Path | None = tiny_model, **spec: object) -> TrainerConfig:
        content: dict[str, object] = {
            "task": "image-classification",
            "model": {"uri": "pvc://models/tiny"},
            "dataset": {"uri": "pvc://datasets/colours"},
            "hyperparameters": {"imageSize": 32},
            "output": {"uri": "pvc://models/result"},
            **spec,
        }
        config = build_trainer_config(
            FineTuneJobSpec.model_validate(content),
            namespace="default",
            name="colours",
            attempt=1,
            dataset_path=str(data),
            output_path=str(tmp_path / output),
        )
        return config.model_copy(update={"model_path": None if model is None else str(model)})

    return make


class StoppingProgress(Progress):
    """Stops the job at a place that its own reports name: a phase, and how much of it must be done."""

    def __init__(self, phase: Phase, *, after: int = 1) -> None:
        super().__init__(Budget(None, 0.0), (), with_finetune=True)
        self._stop_phase = phase
        self._calls_left = after
        self._stopping = False

    def advance(self, fraction: float, **seconds: float | None) -> None:
        super().advance(fraction, **seconds)
        if self._phase is self._stop_phase:
            self._calls_left -= 1
            self._stopping = self._calls_left <= 0

    def check(self) -> None:
        """Raise what a SIGTERM raises, once the place is reached."""
        if self._stopping or (self._calls_left <= 0 and self._phase is self._stop_phase):
            raise PreemptedError("Preempted", "stopped")


@pytest.fixture
def run_job() -> RunJob:
    """Carry out a job in this process."""

    def carry_out(
        config: TrainerConfig,
        check: Callable[[], None] = lambda: None,
        budget: Budget | None = None,
        num_workers: int | None = None,
    ) -> TrainerReport:
        budget = budget or Budget(None, 0.0)
        progress = Progress(budget, (), with_finetune=True)
        return run(config, budget=budget, check=check, progress=progress, num_workers=num_workers)

    return carry_out


@pytest.fixture
def run_until() -> RunUntil:
    """Carry out a job until it is asked to stop at a place."""

    def carry_out(config: TrainerConfig, phase: Phase, *, after: int = 1, num_workers: int | None = None) -> None:
        progress = StoppingProgress(phase, after=after)
        budget = Budget(config.training_seconds, time.monotonic())
        with pytest.raises(PreemptedError):
            run(config, budget=budget, check=progress.check, progress=progress, num_workers=num_workers)

    return carry_out


@pytest.fixture(scope="session")
def endpoint(start_s3: Callable[[str], str]) -> str:
    """A real S3 server."""
    return start_s3("127.0.0.1")


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": endpoint}.items():
        monkeypatch.setenv(name, value)
    name = f"bucket-{secrets.token_hex(8)}"
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir(name)
    return f"s3://{name}/some/where"

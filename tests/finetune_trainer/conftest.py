"""Builders of small data sets, a tiny real backbone with random weights, and jobs over both."""

import json
import os
from collections.abc import Callable
from pathlib import Path

# Before torch loads: threads that wait actively make tests slow on a busy machine.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # noqa: TID251

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from finetune_api.contract import TrainerConfig, TrainerReport, build_trainer_config
from finetune_api.v1alpha1 import FineTuneJobSpec
from finetune_trainer.budget import Budget
from finetune_trainer.progress import Progress
from finetune_trainer.run import run
from PIL import Image

MakePictures = Callable[..., Path]
MakeConfig = Callable[..., TrainerConfig]
RunJob = Callable[..., TrainerReport]

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


@pytest.fixture
def run_job() -> RunJob:
    """Carry out a job in this process."""

    def carry_out(config: TrainerConfig, check: Callable[[], None] = lambda: None, budget: Budget | None = None) -> TrainerReport:
        budget = budget or Budget(None, 0.0)
        return run(config, budget=budget, check=check, progress=Progress(budget, (), with_finetune=True))

    return carry_out

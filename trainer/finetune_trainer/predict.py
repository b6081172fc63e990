"""Use a published model: labels with calibrated probabilities for pictures."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from finetune_api.v1alpha1 import Precision
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from finetune_trainer.backbone import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Architecture,
    Classifier,
    build_backbone,
    parse_architecture,
)
from finetune_trainer.device import Device, select_device
from finetune_trainer.errors import InvalidDataError, ModelNotFoundError
from finetune_trainer.evaluate import compute_logits
from finetune_trainer.pictures import DECODE_ERRORS, decode_picture
from finetune_trainer.publish import COMPLETE_FILE


@dataclass(frozen=True)
class PublishedModel:
    """A model that was read from its folder."""

    classifier: Classifier
    architecture: Architecture
    labels: tuple[str, ...]
    temperature: float
    device: Device


def load_model(folder: Path) -> PublishedModel:
    """Return the published model in `folder`."""
    if not (folder / COMPLETE_FILE).is_file():
        raise ModelNotFoundError("ModelNotFound", f"{folder} holds no complete model: there is no file {COMPLETE_FILE}")
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        weights = safetensors.torch.load_file(folder / WEIGHTS_FILE)
        architecture, labels = parse_architecture(config), tuple(config["labels"])
        classifier = Classifier(
            build_backbone(architecture), architecture, num_features=weights["head.weight"].shape[1], num_classes=len(labels)
        )
        classifier.load_state_dict(weights)
        temperature = float(config["temperature"])
        device = select_device(Precision(config["precision"]))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ModelNotFoundError("ModelUnreadable", f"{folder}: {error}") from error
    device.place(classifier).eval()
    return PublishedModel(classifier, architecture, labels, temperature, device)


def predict_logits(model: PublishedModel, paths: Sequence[Path]) -> Tensor:
    """Return the logits of the pictures, before the temperature."""
    size = model.architecture.preprocessing.image_size
    pixels_NHWC = torch.stack([torch.from_numpy(_read(path, size).copy()) for path in paths])
    return compute_logits(
        model.classifier,
        pixels_NHWC,
        torch.arange(len(paths)),
        preprocessing=model.architecture.preprocessing,
        device=model.device,
        check=lambda: None,
    )


def predict_probabilities(model: PublishedModel, paths: Sequence[Path]) -> Tensor:
    """Return the calibrated probabilities of the labels for each picture."""
    return torch.softmax(predict_logits(model, paths) / model.temperature, dim=1)


def _read(path: Path, size: int) -> NDArray[np.uint8]:
    try:
        return decode_picture(path.read_bytes(), image_size=size)
    except DECODE_ERRORS as error:
        raise InvalidDataError("UnreadablePicture", f"{path} cannot be read as a picture: {error}") from error

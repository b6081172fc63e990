"""Time to the accuracy of PyTorch's transfer learning tutorial, against the trainer, on the same data, backbone and cores.

The tutorial: https://docs.pytorch.org/tutorials/beginner/transfer_learning_tutorial.html, "Finetuning the ConvNet": a new head on
an unfrozen backbone, SGD at 0.001 with momentum 0.9, divided by 10 every 7 epochs, 25 epochs, batches of 4, random crops and
mirroring, the best epoch on the validation data kept. Its training loop is kept as published, without the prints.
"""

import argparse
import hashlib
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from finetune_trainer.backbone import Backbone
from finetune_trainer.pictures import convert_to_rgb
from PIL import Image
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from bench.harness import IMAGE_SIZE, describe_machine, load_model, make_pictures, print_table
from bench.runs import Run, run_trainer

NUM_EPOCHS = 25
BATCH_SIZE = 4
# The tutorial's own 4 loader processes are more than the cores, of which torch warns.
NUM_WORKERS = 2
BUDGETS = (60, 120)
GOAL = 30
Loaders = dict[str, DataLoader[tuple[torch.Tensor, torch.Tensor]]]


@dataclass(frozen=True)
class Epoch:
    """The validation accuracy of an epoch and the time of training since the start, evaluation included."""

    val_accuracy: float
    seconds: float


def main() -> None:
    """Run both and print the table."""
    arguments = parse_tutorial_arguments()
    machine = describe_machine()
    with tempfile.TemporaryDirectory() as folder:
        split = Path(folder) / "split"
        split_pictures(make_pictures("emoji"), split)
        budgets = BUDGETS[:1] if arguments.quick else BUDGETS
        ours = {seconds: run_trainer(split, image_size=IMAGE_SIZE, training_seconds=seconds) for seconds in budgets}
        epochs = run_tutorial(split, num_epochs=1 if arguments.quick else arguments.epochs_measured, scratch=Path(folder))
    print_comparison(epochs, ours, machine)


def parse_tutorial_arguments() -> argparse.Namespace:
    """Return the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one epoch of the tutorial: shows that it runs, not how well")
    parser.add_argument(
        "--epochs-measured",
        type=int,
        default=NUM_EPOCHS,
        metavar="N",
        help="run N epochs and extrapolate the time, marked as such",
    )
    return parser.parse_args()


def split_pictures(source: Path, destination: Path) -> None:
    """Copy the pictures, on white, into train, val and test folders, 70 : 15 : 15 in each class: one split for both."""
    for folder in sorted(source.iterdir()):
        pictures = sorted(folder.glob("*.png"), key=lambda path: hashlib.sha256(path.name.encode()).digest())
        test, val = round(0.15 * len(pictures)), round(0.30 * len(pictures))
        for part, members in (("test", pictures[:test]), ("val", pictures[test:val]), ("train", pictures[val:])):
            target = destination / part / folder.name
            target.mkdir(parents=True)
            for path in members:
                with Image.open(path) as picture:
                    convert_to_rgb(picture).save(target / path.name)


def run_tutorial(split: Path, *, num_epochs: int, scratch: Path) -> list[Epoch]:
    """Return how the tutorial's method does after each epoch; its learning rates are those of 25 epochs whatever the number."""
    torch.manual_seed(0)
    backbone, _ = load_model(scratch)
    loaders = build_loaders(split, backbone)
    model: nn.Module = timm.create_model(backbone.architecture.name, num_classes=len(list((split / "train").iterdir())))
    model.load_state_dict(backbone.model.state_dict(), strict=False)  # all but the head
    optimizer = SGD(model.parameters(), lr=0.001, momentum=0.9)
    scheduler = StepLR(optimizer, step_size=7, gamma=0.1)
    return train_model(model, loaders, nn.CrossEntropyLoss(), optimizer, scheduler, num_epochs=num_epochs, scratch=scratch)


def build_loaders(split: Path, backbone: Backbone) -> Loaders:
    """Return the tutorial's loaders, at the size of this benchmark instead of 224."""
    preprocessing = backbone.architecture.preprocessing
    normalise = transforms.Normalize(preprocessing.mean, preprocessing.std)
    data_transforms = {
        "train": transforms.Compose(
            [transforms.RandomResizedCrop(IMAGE_SIZE), transforms.RandomHorizontalFlip(), transforms.ToTensor(), normalise]
        ),
        "val": transforms.Compose(
            [transforms.Resize(IMAGE_SIZE * 256 // 224), transforms.CenterCrop(IMAGE_SIZE), transforms.ToTensor(), normalise]
        ),
    }
    return {
        part: DataLoader(
            datasets.ImageFolder(str(split / part), transform), batch_size=BATCH_SIZE, shuffle=True, num_workers=NUM_WORKERS
        )
        for part, transform in data_transforms.items()
    }


def train_model(
    model: nn.Module,
    loaders: Loaders,
    criterion: nn.Module,
    optimizer: SGD,
    scheduler: StepLR,
    *,
    num_epochs: int,
    scratch: Path,
) -> list[Epoch]:
    """Train as published: a training and a validation pass for each epoch, the best weights saved."""
    best_path = scratch / "best_model_params.pt"
    torch.save(model.state_dict(), best_path)
    best_accuracy = 0.0
    epochs: list[Epoch] = []
    since = time.perf_counter()
    for epoch in range(num_epochs):
        for phase in ("train", "val"):
            model.train(phase == "train")
            running_corrects = 0
            for inputs, labels in loaders[phase]:
                optimizer.zero_grad()
                with torch.set_grad_enabled(phase == "train"):
                    outputs = model(inputs)
                    _, preds = torch.max(outputs, 1)
                    loss = criterion(outputs, labels)
                    if phase == "train":
                        loss.backward()
                        optimizer.step()
                running_corrects += int(torch.sum(preds == labels.data))
            if phase == "train":
                scheduler.step()
        accuracy = running_corrects / len(loaders["val"].dataset)  # type: ignore[arg-type]  # an ImageFolder has a length
        if accuracy > best_accuracy:
            best_accuracy = accuracy
            torch.save(model.state_dict(), best_path)
        epochs.append(Epoch(accuracy, time.perf_counter() - since))
        print(f"tutorial, epoch {epoch + 1}: {accuracy:.3f} after {epochs[-1].seconds:.0f} s", file=sys.stderr, flush=True)
    return epochs


def print_comparison(epochs: Sequence[Epoch], ours: dict[int, Run], machine: str) -> None:
    """Print what each side reached and when, and the ratio of the times to the tutorial's accuracy."""
    tutorial_seconds = epochs[-1].seconds * NUM_EPOCHS / len(epochs)
    points = list_points(ours)
    rows: list[list[object]] = [["tutorial", describe_accuracy(epochs), describe_time(epochs, tutorial_seconds), "1"]]
    rows += [[name, f"{value:.3f}", f"{seconds:.0f} s", f"{tutorial_seconds / seconds:.1f}"] for name, value, seconds in points]
    columns = ["method", "validation accuracy", "time", "times faster"]
    print_table(f"Transfer learning tutorial, {NUM_EPOCHS} epochs, batches of {BATCH_SIZE} ({machine})", columns, rows)
    if len(epochs) == NUM_EPOCHS:
        final = epochs[-1].val_accuracy
        reaching = [seconds for _, value, seconds in points if value >= final]
        verdict = f"{tutorial_seconds / min(reaching):.1f} times less" if reaching else "not reached"
        print(f"Time to the tutorial's final validation accuracy of {final:.3f}: {verdict} (aim: {GOAL}).")


def list_points(ours: dict[int, Run]) -> list[tuple[str, float, float]]:
    """Return the validation accuracies that the trainer reached, with the seconds since the start of its process."""
    fastest = ours[min(ours)]
    probe = ("trainer, probe", fastest.probe_val_accuracy, fastest.probe_seconds)
    return [
        probe,
        *(
            (f"trainer, budget {budget} s", run.metrics["val_accuracy"]["value"], run.total_seconds)
            for budget, run in ours.items()
        ),
    ]


def describe_accuracy(epochs: Sequence[Epoch]) -> str:
    """Return the tutorial's accuracy, which only the whole schedule gives."""
    if len(epochs) < NUM_EPOCHS:
        return f"not known after {len(epochs)} epochs"
    return f"{epochs[-1].val_accuracy:.3f} (best epoch {max(epoch.val_accuracy for epoch in epochs):.3f})"


def describe_time(epochs: Sequence[Epoch], seconds: float) -> str:
    """Return the tutorial's time and whether all of it was measured."""
    return f"{seconds:.0f} s" + ("" if len(epochs) == NUM_EPOCHS else f" (extrapolated from {len(epochs)} epochs)")


if __name__ == "__main__":
    main()

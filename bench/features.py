"""The trainer's feature pass, as a share of the rate of the bare model on ready tensors."""

import tempfile
from pathlib import Path

import torch
from finetune_trainer.backbone import Backbone
from finetune_trainer.device import Device
from finetune_trainer.features import BATCH_SIZE, compute_features
from torch import Tensor

from bench.harness import (
    compare,
    describe_machine,
    ignore,
    ignore_progress,
    load_model,
    make_pictures,
    measure,
    parse_arguments,
    print_table,
    read_pictures,
)


def main() -> None:
    """Measure and print the table."""
    quick = parse_arguments(__doc__).quick
    machine = describe_machine()
    num_pictures, rounds = (128, 3) if quick else (512, 9)
    with tempfile.TemporaryDirectory() as scratch:
        backbone, device = load_model(Path(scratch))
        pictures = read_pictures(make_pictures("emoji"), Path(scratch))
        pixels_NHWC = torch.from_numpy(pictures.pixels_NHWC[:num_pictures])
        digests = [digest or "" for digest in pictures.digests[:num_pictures]]
        ready = make_ready(backbone, device, pixels_NHWC)
        result = compare(
            lambda: run_trainer(backbone, device, pixels_NHWC, digests),
            lambda: measure(lambda: run_bare(backbone, ready)),
            rounds=rounds,
        )
    print_table(
        f"Feature pass, {num_pictures} pictures, median of {rounds} pairs ({machine})",
        ["", "pictures/s", "share"],
        [
            ["bare model on ready tensors", f"{num_pictures / result.theirs:.1f}", "100 %"],
            ["trainer, cache written", f"{num_pictures / result.ours:.1f}", f"{result.ratio:.0%}".replace("%", " %")],
        ],
    )


def make_ready(backbone: Backbone, device: Device, pixels_NHWC: Tensor) -> list[Tensor]:
    """Return the pictures as the model takes them, in batches."""
    preprocessing = backbone.architecture.preprocessing
    return [
        preprocessing.normalise(part.permute(0, 3, 1, 2)).to(device.name, memory_format=torch.channels_last)
        for part in torch.split(pixels_NHWC, BATCH_SIZE)
    ]


def run_bare(backbone: Backbone, ready: list[Tensor]) -> None:
    """Run the model and nothing else."""
    with torch.inference_mode():
        for x_BCHW in ready:
            backbone.model(x_BCHW)


def run_trainer(backbone: Backbone, device: Device, pixels_NHWC: Tensor, digests: list[str]) -> float:
    """Return the seconds of the trainer's pass with an empty cache."""
    with tempfile.TemporaryDirectory() as cache:
        return measure(
            lambda: compute_features(
                backbone,
                pixels_NHWC,
                torch.arange(len(digests)),
                digests,
                device=device,
                cache=Path(cache),
                check=ignore,
                advance=ignore_progress,
            )
        )


if __name__ == "__main__":
    main()

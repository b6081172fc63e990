"""The data of a job, audited, split and in memory, in an order that depends on contents alone."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from finetune_api.contract import TrainerConfig
from torch import Tensor

from finetune_trainer.audit import Audit, audit
from finetune_trainer.data import Split, list_examples
from finetune_trainer.device import Device
from finetune_trainer.pictures import load_pictures


@dataclass(frozen=True)
class Dataset:
    """Pictures and labels; the splits hold positions in them."""

    audit: Audit
    paths: tuple[str, ...]
    """Paths below the folder of the data set, by position."""
    pixels_NHWC: Tensor
    y_N: Tensor
    """Classes by position; -1 for pictures that are left out."""
    digests: tuple[str | None, ...]
    positions: dict[Split, Tensor]

    @property
    def labels(self) -> tuple[str, ...]:
        """Return the names of the classes."""
        return self.audit.labels

    def targets(self, split: Split) -> Tensor:
        """Return the classes of the examples of a split."""
        return self.y_N[self.positions[split]]


def read_dataset(
    config: TrainerConfig,
    *,
    image_size: int,
    num_threads: int,
    device: Device,
    check: Callable[[], None],
    advance: Callable[[float], None],
) -> Dataset:
    """Read and audit the data; raise InvalidDataError if it cannot be learnt from."""
    listing = list_examples(Path(config.dataset_path), config.dataset_format)
    pictures = load_pictures(
        listing, image_size=image_size, num_threads=num_threads, scratch=Path(config.work_path), check=check, advance=advance
    )
    audited = audit(
        listing,
        pictures,
        validation_fraction=config.validation_fraction,
        test_fraction=config.test_fraction,
        seed=config.hyperparameters.seed,
    )
    classes = {label: number for number, label in enumerate(audited.labels)}
    return Dataset(
        audited,
        tuple(example.path for example in listing.examples),
        device.keep(torch.from_numpy(pictures.pixels_NHWC)),
        torch.tensor([classes.get(example.label, -1) for example in listing.examples]),
        pictures.digests,
        {
            Split.TRAIN: torch.tensor(audited.train, dtype=torch.long),
            Split.VAL: torch.tensor(audited.val, dtype=torch.long),
            Split.TEST: torch.tensor(audited.test, dtype=torch.long),
        },
    )

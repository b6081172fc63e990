"""Batches as a function: the order of (seed, epoch), the augmentation of (seed, epoch, example), the batch of the step.

Nothing is remembered between steps, so training can go on from any step and sees what it would have seen.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from finetune_trainer.recipe import count_steps_per_epoch

_LARGEST_RATIO = 4 / 3
_DRAWS_PER_EXAMPLE = 4


@dataclass(frozen=True)
class TrainingSet:
    """The training examples, in the order of their contents."""

    pixels_NHWC: Tensor
    """All pictures of the data set."""
    index_N: Tensor
    """Positions of the training examples in the pictures."""
    y_N: Tensor


@dataclass(frozen=True)
class Share:
    """What one process computes of each batch: a run of consecutive examples of each of the parts into which it is split.

    The parts are those of the whole batch, so that what a layer sees of a part together does not depend on the processes.
    """

    rank: int = 0
    size: int = 1

    def list_runs(self, num_examples: int, *, parts: int) -> list[slice]:
        """Return where the process's examples are in a batch, part by part; a run may be empty."""
        bounds = [0, *(int(part[-1]) for part in torch.arange(1, num_examples + 1).chunk(parts))]
        return [
            slice(begin + (end - begin) * self.rank // self.size, begin + (end - begin) * (self.rank + 1) // self.size)
            for begin, end in itertools.pairwise(bounds)
        ]


def draw_batch(
    training: TrainingSet,
    step: int,
    *,
    batch_size: int,
    seed: int,
    smallest_crop: float,
    device: str,
    runs: Sequence[slice] = (slice(None),),
) -> tuple[Tensor, Tensor]:
    """Return the augmented pictures x_BCHW, with values from 0 to 255, and the labels y_B of one step, or of `runs` of it."""
    epoch, position = divmod(step, count_steps_per_epoch(len(training.index_N), batch_size))
    batch = order_examples(len(training.index_N), seed=seed, epoch=epoch)[position * batch_size :][:batch_size]
    chosen_B = torch.cat([batch[run] for run in runs])
    draws_B4 = torch.from_numpy(draw_numbers(len(training.index_N), seed=seed, epoch=epoch)[chosen_B.numpy()])
    pixels_BHWC = training.pixels_NHWC[training.index_N[chosen_B].to(training.pixels_NHWC.device)].to(device)
    x_BCHW = augment(pixels_BHWC.permute(0, 3, 1, 2).float(), draws_B4.to(device), smallest_crop=smallest_crop)
    return x_BCHW, training.y_N[chosen_B].to(device)


@lru_cache(maxsize=2)
def order_examples(num_examples: int, *, seed: int, epoch: int) -> Tensor:
    """Return the order of the examples in an epoch."""
    return torch.randperm(num_examples, generator=torch.Generator().manual_seed(mix_seed(seed, epoch)))


@lru_cache(maxsize=2)
def draw_numbers(num_examples: int, *, seed: int, epoch: int) -> "np.ndarray[tuple[int, int], np.dtype[np.float32]]":
    """Return the random numbers from 0 to 1 that decide on the augmentation of each example in an epoch."""
    generator = np.random.Generator(np.random.Philox(key=mix_seed(seed, epoch)))
    return generator.random((num_examples, _DRAWS_PER_EXAMPLE), dtype=np.float32)


def augment(x_BCHW: Tensor, draws_B4: Tensor, *, smallest_crop: float) -> Tensor:
    """Return a random crop of each picture, resized to the whole square.

    Pictures are not mirrored: that changes the meaning of digits, letters and x-rays, and the features of backbones that were
    themselves trained on mirrored pictures cannot tell for which data it does.
    """
    if not len(x_BCHW):
        return x_BCHW
    area, ratio, left, top = draws_B4.unbind(1)
    scale = (smallest_crop + (1 - smallest_crop) * area).sqrt()
    stretch = ((2 * ratio - 1) * (math.log(_LARGEST_RATIO) / 2)).exp()
    width, height = (scale * stretch).clamp(max=1.0), (scale / stretch).clamp(max=1.0)
    zero = torch.zeros_like(area)
    theta_B23 = torch.stack(
        [
            torch.stack([width, zero, (1 - width) * (2 * left - 1)], 1),
            torch.stack([zero, height, (1 - height) * (2 * top - 1)], 1),
        ],
        1,
    )
    grid = functional.affine_grid(theta_B23, list(x_BCHW.shape), align_corners=False)
    return functional.grid_sample(x_BCHW, grid, mode="bilinear", padding_mode="border", align_corners=False)


def mix_seed(seed: int, number: int) -> int:
    """Return a seed for every (seed, number), of 32 bits, because generators on the CPU ignore all further ones."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])

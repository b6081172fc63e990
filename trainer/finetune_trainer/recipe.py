"""The training settings: every constant of the recipe, chosen from the data, the backbone, the budget and the device (pure)."""

from dataclasses import dataclass

from finetune_api.v1alpha1 import Hyperparameters, MethodType

# Below this many examples a class has too little to fine-tune on, and the probe is the better model.
MIN_EXAMPLES_PER_CLASS = 10
# Less than one pass over the data is not worth the time; a short fine-tuning costs nothing but budget, as the best candidate on
# the validation data is published.
MIN_EPOCHS = 1
# Fewer examples than this do not support new statistics of batch normalisation, nor new filters in the first stages.
SMALL_DATA = 10_000
# A probe that is right this often leaves less to gain than the noise of the validation data.
CEILING_ACCURACY = 0.995


@dataclass(frozen=True)
class Recipe:
    """Settings of the fine-tuning."""

    batch_size: int
    head_rate: float
    """Peak learning rate of the head."""
    backbone_rate: float
    """Peak learning rate of the last layer of the backbone."""
    layer_decay: float
    """Factor on the learning rate from each stage of the backbone to the one before."""
    frozen_share: float
    """The first stages are kept as they are while they hold less than this share of the weights: they cost most of the time
    and learn little."""
    weight_decay: float
    warmup_share: float
    ema_horizon: float
    """Share of the schedule that the moving average of the weights looks back on."""
    clip_norm: float
    freeze_batch_statistics: bool
    smallest_crop: float
    """Smallest share of a picture's area that a random crop keeps."""
    planned_steps: int | None
    """Number of steps; None when the budget alone decides."""


def choose_recipe(
    *,
    num_train: int,
    has_batch_statistics: bool,
    method: MethodType,
    training_seconds: int | None,
    hyperparameters: Hyperparameters,
    on_cpu: bool,
) -> Recipe:
    """Return the settings for this much data, with the user's hyperparameters in place of the defaults."""
    batch_size = hyperparameters.batch_size or _choose_batch_size(num_train, on_cpu=on_cpu)
    default_head, default_backbone = (1e-3, 1e-3) if has_batch_statistics else (5e-4, 1e-4)
    head_rate = hyperparameters.learning_rate or default_head
    return Recipe(
        batch_size=batch_size,
        head_rate=head_rate,
        backbone_rate=head_rate * default_backbone / default_head,
        layer_decay=0.7 if has_batch_statistics else 0.75,
        frozen_share=0.01 if method is MethodType.AUTO and num_train < SMALL_DATA else 0.0,
        weight_decay=0.02,
        warmup_share=0.1,
        ema_horizon=0.1,
        clip_norm=1.0,
        # Statistics of few examples or small batches are worse than those of the pretraining.
        freeze_batch_statistics=has_batch_statistics and (batch_size < 16 or num_train < SMALL_DATA),
        smallest_crop=0.6,
        planned_steps=_plan_steps(num_train, batch_size, training_seconds=training_seconds, hyperparameters=hyperparameters),
    )


def _choose_batch_size(num_train: int, *, on_cpu: bool) -> int:
    largest = 32 if on_cpu else 128
    # At least ten steps an epoch, so that a small set is not one step.
    fitting = max(8, num_train // 10)
    return min(largest, 1 << (fitting.bit_length() - 1))


def _plan_steps(num_train: int, batch_size: int, *, training_seconds: int | None, hyperparameters: Hyperparameters) -> int | None:
    steps_per_epoch = count_steps_per_epoch(num_train, batch_size)
    if hyperparameters.max_steps is not None:
        return hyperparameters.max_steps
    if hyperparameters.epochs is not None:
        return hyperparameters.epochs * steps_per_epoch
    if training_seconds is not None:
        return None
    return min(max(20 * steps_per_epoch, 200), max(1000, 3 * steps_per_epoch))


def count_steps_per_epoch(num_train: int, batch_size: int) -> int:
    """Return the number of full batches in one pass over the data; what is left over comes in another epoch's order."""
    return max(1, num_train // batch_size)

"""What the fine-tuning does about trouble: a loss gone wrong, too little memory, a stop in the middle."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_api.v1alpha1 import Hyperparameters, MethodType, Precision
from finetune_trainer.backbone import Backbone, Classifier, load_backbone
from finetune_trainer.batches import TrainingSet
from finetune_trainer.device import Device
from finetune_trainer.errors import DivergedError, OutOfMemoryError, PreemptedError
from finetune_trainer.evaluate import compute_logits
from finetune_trainer.features import compute_features
from finetune_trainer.finetune import FineTuned, Note, finetune
from finetune_trainer.guard import find_trouble
from finetune_trainer.learner import Snapshot
from finetune_trainer.memory import MicroBatches
from finetune_trainer.prefetch import Prefetcher
from finetune_trainer.recipe import Recipe, choose_recipe


@dataclass
class MemoryKeeper:
    """Keeps snapshots in this process, as bits of their own, and after every step if `always`."""

    always: bool = False
    kept: list[Snapshot] = field(default_factory=list)

    def is_due(self) -> bool:
        return self.always

    def save(self, snapshot: Snapshot) -> None:
        # A contiguous copy, as files hold it: the layout in memory must come from the model.
        tensors = {name: tensor.detach().clone().contiguous() for name, tensor in snapshot.tensors.items()}
        self.kept.append(Snapshot(tensors, copy.deepcopy(snapshot.state)))

    def load(self) -> Snapshot | None:
        return self.kept[-1] if self.kept else None


@pytest.fixture
def backbone(tiny_model: Path, tmp_path: Path) -> Backbone:
    return load_backbone("pvc://models/tiny", folder=tiny_model, image_size=32, cache=tmp_path)


def make_recipe(max_steps: int = 12, **changes: Any) -> Recipe:
    recipe = choose_recipe(
        num_train=48,
        has_batch_statistics=True,
        method=MethodType.FULL,
        training_seconds=None,
        hyperparameters=Hyperparameters(batch_size=8, max_steps=max_steps),
        on_cpu=True,
    )
    return replace(recipe, **changes)


def build(backbone: Backbone) -> Classifier:
    """Return a model in the memory layout of real runs, with dropout, so that its random numbers count."""
    torch.manual_seed(0)
    model = Classifier(copy.deepcopy(backbone.model), backbone.architecture, num_features=backbone.num_features, num_classes=2)
    model.head = torch.nn.Sequential(torch.nn.Dropout(0.2), model.head)  # type: ignore[assignment]
    model.head.out_features, model.head.weight, model.head.bias = 2, model.head[1].weight, model.head[1].bias  # type: ignore[index]
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def train(backbone: Backbone, recipe: Recipe, **options: Any) -> FineTuned:
    return train_and_note(backbone, recipe, **options)[0]


def train_and_note(
    backbone: Backbone,
    recipe: Recipe,
    *,
    keeper: MemoryKeeper | None = None,
    memory: MicroBatches | None = None,
    check: Callable[[], None] = lambda: None,
    num_workers: int = 0,
    spoil: Callable[[Classifier], None] = lambda _model: None,
) -> tuple[FineTuned, Note]:
    model = build(backbone)
    spoil(model)
    y = torch.arange(48) % 2
    noise = torch.randint(0, 100, (48, 32, 32, 3), generator=torch.Generator().manual_seed(0))
    pixels = (noise + 150 * y.view(-1, 1, 1, 1)).to(torch.uint8)
    return finetune(
        model,
        TrainingSet(pixels, torch.arange(48), y),
        recipe,
        preprocessing=backbone.architecture.preprocessing,
        seed=1,
        device=Device("cpu", Precision.FP32),
        step_seconds=1.0,
        seconds_left=lambda: None,
        check=check,
        advance=lambda _note: None,
        keeper=keeper,
        memory=memory,
        num_workers=num_workers,
    )


def have_equal_bits(one: FineTuned, two: FineTuned) -> bool:
    pairs = ((one.weights, two.weights), (one.average, two.average))
    return all(torch.equal(left[name], right[name]) for left, right in pairs for name in left)


def stop_after(calls: int) -> Callable[[], None]:
    left = iter(range(calls))

    def check() -> None:
        if next(left, None) is None:
            raise PreemptedError("Preempted", "stopped")

    return check


@pytest.mark.parametrize("statistics", ["kept", "learnt"])
@pytest.mark.parametrize("steps", [1, 7, 11])
def test_stop_at_any_step_gives_the_bits_of_an_unbroken_run(backbone: Backbone, statistics: str, steps: int) -> None:
    recipe = make_recipe(freeze_batch_statistics=statistics == "kept")
    keeper = MemoryKeeper()
    unbroken = train(backbone, recipe)

    with pytest.raises(PreemptedError):
        train(backbone, recipe, keeper=keeper, check=stop_after(steps))
    torch.manual_seed(steps)
    resumed = train(backbone, recipe, keeper=keeper)

    assert [snapshot.state["pace"]["done"] for snapshot in keeper.kept] == [steps]
    assert have_equal_bits(resumed, unbroken)


@pytest.mark.parametrize("steps", [1, 13, 27])
def test_loss_that_is_told_at_the_end_is_that_of_an_unbroken_run(backbone: Backbone, steps: int) -> None:
    recipe, keeper = make_recipe(max_steps=30), MemoryKeeper()
    _, unbroken = train_and_note(backbone, recipe)

    with pytest.raises(PreemptedError):
        train(backbone, recipe, keeper=keeper, check=stop_after(steps))
    _, resumed = train_and_note(backbone, recipe, keeper=keeper)

    assert unbroken.loss == resumed.loss


def test_saving_and_drawing_ahead_change_nothing(backbone: Backbone) -> None:
    plain = train(backbone, make_recipe())

    saving = train(backbone, make_recipe(), keeper=MemoryKeeper(always=True), num_workers=2)

    assert have_equal_bits(saving, plain)


def test_prefetcher_gives_the_batch_of_the_step_wherever_training_goes_on() -> None:
    def draw(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor([step]), torch.tensor([-step])

    for num_workers in (0, 1, 3):
        with Prefetcher(draw, num_workers=num_workers) as batches:
            assert [int(batches.get(step)[0]) for step in (0, 1, 2, 9, 10, 1, 2)] == [0, 1, 2, 9, 10, 1, 2]


@pytest.mark.parametrize(
    ("loss", "levels", "expected"),
    [
        pytest.param(0.7, [0.6, 0.7], None, id="steady"),
        pytest.param(math.nan, [], "nan", id="not a number"),
        pytest.param(math.inf, [0.1], "inf", id="infinite"),
        pytest.param(50.0, [], None, id="high from the start"),
        pytest.param(0.02, [0.001], None, id="twenty times, and still small"),
        pytest.param(3.0, [0.5], None, id="confidently wrong, not ten times"),
        pytest.param(30.0, [0.5, 0.4, 20.0], "rose from 0.5 to 30", id="exploding, one outlier before"),
    ],
)
def test_trouble_is_told_from_unsteadiness(loss: float, levels: list[float], expected: str | None) -> None:
    trouble = find_trouble(loss, levels, num_classes=2)

    assert (trouble is None) if expected is None else (trouble is not None and expected in trouble)


def spoil_once(model: Classifier, *, times: int) -> None:
    """Make the model give no numbers in some forward passes, as an overflow does."""
    left = iter(range(100))

    def hook(_module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        number = next(left)
        return output * math.nan if 12 <= number < 12 + times else output

    model.register_forward_hook(hook)


def test_bad_loss_goes_back_with_a_smaller_rate(backbone: Backbone) -> None:
    reports: list[str] = []
    keeper = MemoryKeeper(always=True)

    tuned = train(
        backbone,
        make_recipe(max_steps=40),
        keeper=keeper,
        memory=MicroBatches(report=reports.append),
        spoil=lambda model: spoil_once(model, times=1),
    )

    assert reports == ["the loss was nan at step 20; went back to step 12 with 0.3 times the learning rate"]
    assert all(bool(tensor.isfinite().all()) for tensor in (*tuned.weights.values(), *tuned.average.values()))
    assert all(bool(tensor.isfinite().all()) for snapshot in keeper.kept for tensor in snapshot.tensors.values())


def test_bad_loss_without_a_checkpoint_goes_back_to_the_start(backbone: Backbone) -> None:
    reports: list[str] = []

    train(
        backbone,
        make_recipe(max_steps=20),
        memory=MicroBatches(report=reports.append),
        spoil=lambda model: spoil_once(model, times=1),
    )

    assert ["back to step 0" in text for text in reports] == [True]


def test_training_gives_up_after_three_times(backbone: Backbone) -> None:
    reports: list[str] = []

    with pytest.raises(DivergedError, match="learningRate") as caught:
        train(backbone, make_recipe(head_rate=math.inf), memory=MicroBatches(report=reports.append))

    assert len(reports) == 3
    assert int(caught.value.exit_code) == 70


def limit_memory(model: torch.nn.Module, *, largest: int) -> None:
    """Fail as the allocator does for batches beyond a size, after the forward pass has changed the statistics."""

    def hook(_module: torch.nn.Module, inputs: tuple[torch.Tensor], _output: torch.Tensor) -> None:
        if len(inputs[0]) > largest:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory")

    model.register_forward_hook(hook)


def test_too_little_memory_splits_the_batch(backbone: Backbone) -> None:
    reports: list[str] = []
    memory = MicroBatches(report=reports.append)
    recipe = make_recipe()

    split = train(backbone, recipe, memory=memory, spoil=lambda model: limit_memory(model, largest=3))

    assert (memory.parts, len(reports)) == (4, 2)
    # The batch is the same, so what is learnt is that of whole batches but for rounding and dropout's draws.
    assert have_equal_bits(split, train(backbone, recipe, memory=MicroBatches(4)))


def test_parts_give_the_gradient_of_the_whole_batch(backbone: Backbone) -> None:
    recipe = make_recipe(max_steps=3)

    def without_dropout(model: Classifier) -> None:
        model.head[0].p = 0.0  # type: ignore[index,union-attr]

    whole, split = (train(backbone, recipe, memory=MicroBatches(parts), spoil=without_dropout) for parts in (1, 3))

    # AdamW's first steps depend on the signs of gradients, so rounding can show in weights whose gradient is all but zero.
    close = [torch.isclose(whole.weights[name], split.weights[name], atol=1e-4).float().mean() for name in whole.weights]
    assert min(close) > 0.95


def test_parts_stay_as_they_were_after_a_resume(backbone: Backbone) -> None:
    keeper, memory = MemoryKeeper(), MicroBatches(4)
    with pytest.raises(PreemptedError):
        train(backbone, make_recipe(), keeper=keeper, memory=memory, check=stop_after(5))

    resumed = MicroBatches()
    tuned = train(backbone, make_recipe(), keeper=keeper, memory=resumed)

    assert resumed.parts == 4
    assert have_equal_bits(tuned, train(backbone, make_recipe(), memory=MicroBatches(4)))


def test_one_picture_that_does_not_fit_ends_the_job_with_advice(backbone: Backbone) -> None:
    with pytest.raises(OutOfMemoryError, match=r"resources\.memory"):
        train(backbone, make_recipe(), spoil=lambda model: limit_memory(model, largest=0))


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    def fail(_parts: int) -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        MicroBatches().run(fail, batch_size=8)


def test_evaluation_and_features_get_by_with_little_memory(backbone: Backbone, tmp_path: Path) -> None:
    pixels = torch.randint(0, 255, (40, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    device, memory = Device("cpu", Precision.FP32), MicroBatches()
    limit_memory(next(backbone.model.children()), largest=8)
    model = build(backbone)

    logits = compute_logits(
        model,
        pixels,
        torch.arange(40),
        preprocessing=backbone.architecture.preprocessing,
        device=device,
        check=lambda: None,
        memory=memory,
    )
    features = compute_features(
        backbone,
        pixels,
        torch.arange(40),
        [f"{number:064x}" for number in range(40)],
        device=device,
        cache=tmp_path / "features",
        check=lambda: None,
        advance=lambda _fraction: None,
        memory=memory,
    )

    assert (len(logits), len(features.f_ND), memory.parts) == (40, 40, 4)

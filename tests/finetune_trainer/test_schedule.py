import pytest
from finetune_api.v1alpha1 import Hyperparameters, MethodType
from finetune_trainer.recipe import Recipe, choose_recipe
from finetune_trainer.schedule import Pace, compute_rate, count_steps_left


@pytest.mark.parametrize(
    ("progress", "expected"),
    [
        pytest.param(0.0, 0.0, id="start"),
        pytest.param(0.05, 0.5, id="half of the warmup"),
        pytest.param(0.1, 1.0, id="peak"),
        pytest.param(0.55, 0.5, id="middle of the cosine"),
        pytest.param(1.0, 0.0, id="end"),
        pytest.param(1.1, 0.0, id="past the end"),
    ],
)
def test_rate_rises_and_falls_to_zero(progress: float, expected: float) -> None:
    assert compute_rate(progress, warmup_share=0.1) == pytest.approx(expected)


@pytest.mark.parametrize("planned", [1, 2, 7, 1000])
def test_planned_steps_end_exactly_at_zero(planned: int) -> None:
    pace = Pace()
    while pace.progress < 1:
        pace = pace.step(count_steps_left(pace.done, planned=planned, seconds_left=None, step_seconds=1))

    assert pace == Pace(planned, 1.0)
    assert compute_rate(pace.progress, warmup_share=0.1) == 0.0


@pytest.mark.parametrize("durations", [(1.0,), (0.5, 1.5), (1.0, 1.0, 1.0, 4.0)])
def test_time_ends_exactly_at_zero_whatever_the_steps_take(durations: tuple[float, ...]) -> None:
    pace, clock, rates = Pace(), 0.0, []
    while pace.progress < 1:
        left = max(1, count_steps_left(pace.done, planned=None, seconds_left=60 - clock, step_seconds=1.0))
        rates.append(compute_rate(pace.progress + pace.next_stride(left) / 2, warmup_share=0.1))
        pace = pace.step(left)
        clock += durations[pace.done % len(durations)]

    assert pace.progress == 1.0
    assert 56 <= clock <= 64
    assert rates[-1] < 0.06


def test_the_shorter_of_plan_and_budget_counts() -> None:
    assert count_steps_left(10, planned=50, seconds_left=20.0, step_seconds=1.0) == 20
    assert count_steps_left(10, planned=15, seconds_left=20.0, step_seconds=1.0) == 5


def recipe_of(num_train: int = 1000, training_seconds: int | None = None, **changes: int) -> Recipe:
    return choose_recipe(
        num_train=num_train,
        has_batch_statistics=True,
        method=MethodType.AUTO,
        training_seconds=training_seconds,
        hyperparameters=Hyperparameters.model_validate(changes),
        on_cpu=True,
    )


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        pytest.param(recipe_of(max_steps=7), 7, id="steps"),
        pytest.param(recipe_of(epochs=2, batch_size=10), 200, id="epochs"),
        pytest.param(recipe_of(epochs=2, training_seconds=60, batch_size=10), 200, id="epochs within a budget"),
        pytest.param(recipe_of(training_seconds=60), None, id="budget alone"),
        pytest.param(recipe_of(num_train=64), 200, id="at least 200 steps"),
        pytest.param(recipe_of(num_train=5000), 1000, id="at most 1000 steps"),
        pytest.param(recipe_of(num_train=320_000), 30_000, id="at least three epochs"),
    ],
)
def test_number_of_steps(recipe: Recipe, expected: int | None) -> None:
    assert recipe.planned_steps == expected


@pytest.mark.parametrize(("num_train", "frozen"), [(500, True), (9_999, True), (10_000, False)])
def test_batch_statistics_of_little_data_are_not_used(num_train: int, frozen: bool) -> None:  # noqa: FBT001
    assert recipe_of(num_train).freeze_batch_statistics is frozen


def test_learning_rate_scales_the_backbone_too() -> None:
    usual, larger = recipe_of(), recipe_of(learning_rate=1)

    assert larger.backbone_rate / larger.head_rate == pytest.approx(usual.backbone_rate / usual.head_rate)

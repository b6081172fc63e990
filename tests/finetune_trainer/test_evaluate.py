import numpy as np
import pytest
import torch
from finetune_trainer.evaluate import compute_ece, evaluate, fit_temperature
from finetune_trainer.job import Score
from finetune_trainer.select import choose, interpolate
from sklearn.metrics import confusion_matrix, f1_score, log_loss, precision_recall_fscore_support
from torch import Tensor

LABELS = ("a", "b", "c", "d")


def make_logits(count: int = 400, *, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return calibrated logits, multiplied by `scale`, and labels drawn from them."""
    generator = torch.Generator().manual_seed(0)
    z = 1.5 * torch.randn(count, 4, generator=generator)
    y = torch.multinomial(torch.softmax(z, 1), 1, generator=generator).flatten()
    return scale * z, y


def test_metrics_agree_with_scikit_learn() -> None:
    z, y = make_logits()
    y[y == 3] = 0  # a class that is predicted and never right

    evaluation = evaluate("test", z, y, temperature=1.3, labels=LABELS, majority=0, seed=0)

    values = {item.name: item.value for item in evaluation.measurements}
    predicted, probability = z.argmax(1).numpy(), torch.softmax(z.double() / 1.3, 1).numpy()
    assert list(values) == ["test_accuracy", "test_macro_f1", "test_nll", "test_ece"]
    assert values["test_accuracy"] == pytest.approx((predicted == y.numpy()).mean())
    assert values["test_macro_f1"] == pytest.approx(f1_score(y, predicted, average="macro", zero_division=0))
    assert values["test_nll"] == pytest.approx(log_loss(y, probability, labels=range(4)))
    assert evaluation.details["confusionMatrix"]["rowsAreTrueLabels"] == confusion_matrix(y, predicted, labels=range(4)).tolist()
    precision, recall, f1, support = precision_recall_fscore_support(y, predicted, labels=range(4), zero_division=0)
    for k, row in enumerate(evaluation.details["perClass"]):
        assert (row["precision"], row["recall"], row["f1"], row["support"]) == pytest.approx(
            (precision[k], recall[k], f1[k], support[k])
        )
    assert evaluation.details["majorityBaseline"] == pytest.approx(float((y == 0).float().mean()))


def test_intervals_hold_the_value_and_shrink_with_data() -> None:
    widths = []
    for count in (100, 1600):
        accuracy = evaluate("val", *make_logits(count), temperature=1.0, labels=LABELS, majority=0, seed=0).measurements[0]
        assert accuracy.low is not None
        assert accuracy.high is not None
        assert accuracy.low < accuracy.value < accuracy.high
        widths.append(accuracy.high - accuracy.low)

    assert widths[0] / widths[1] == pytest.approx(4, rel=0.25)
    assert widths[0] == pytest.approx(2 * 1.96 * np.sqrt(0.6 * 0.4 / 100), rel=0.25)


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_temperature_undoes_wrong_confidence(scale: float) -> None:
    z, y = make_logits(4000, scale=scale)

    temperature = fit_temperature(z, y)

    assert temperature == pytest.approx(scale, rel=0.1)
    details = evaluate("val", z, y, temperature=temperature, labels=LABELS, majority=0, seed=0).details["calibration"]
    assert details["nllAfter"] <= details["nllBefore"] + 1e-9
    assert details["eceAfter"] <= details["eceBefore"] + 0.01


def test_temperature_stays_in_bounds_when_all_is_right() -> None:
    assert 0.04 < fit_temperature(5 * torch.eye(4), torch.arange(4)) < 1


def test_calibration_error_of_a_known_case() -> None:
    probability = np.array([[0.9, 0.1]] * 10)

    assert compute_ece(np.array([0] * 6 + [1] * 4), probability) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        pytest.param([("probe", 0.80, 0.9), ("finetuned", 0.79, 0.2)], "probe", id="never less accurate than the probe"),
        pytest.param([("probe", 0.80, 0.9), ("finetuned", 0.90, 0.5)], "finetuned", id="clearly better"),
        pytest.param([("probe", 0.80, 0.6), ("ema", 0.900, 0.5), ("finetuned", 0.901, 0.9)], "ema", id="near tie: lower loss"),
        pytest.param([("probe", 0.80, 0.4), ("finetuned", 0.80, 0.6)], "probe", id="tie with the probe"),
        pytest.param([("probe", 1.0, 0.4), ("finetuned", 1.0, 0.1)], "finetuned", id="all right"),
    ],
)
def test_choice_on_validation(scores: list[tuple[str, float, float]], expected: str) -> None:
    assert choose([Score(*score) for score in scores], 300).name == expected


def test_interpolation_of_frozen_parts_changes_nothing() -> None:
    start = {"w": torch.zeros(2), "frozen": torch.ones(2), "count": torch.tensor(1)}
    end = {"w": torch.ones(2), "frozen": torch.ones(2), "count": torch.tensor(5)}

    blend = interpolate(start, end, 0.25)

    assert torch.equal(blend["w"], torch.full((2,), 0.25))
    assert torch.equal(blend["frozen"], torch.ones(2))
    assert blend["count"] == 5

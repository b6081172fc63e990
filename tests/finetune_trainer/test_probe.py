import numpy as np
import pytest
import torch
from finetune_trainer.errors import PreemptedError
from finetune_trainer.probe import STRENGTHS, fit_head, fit_probe
from sklearn.linear_model import LogisticRegression
from torch import Tensor


def make_features(count: int = 300, *, noise: float = 2.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 4
    centres = torch.randn(4, 20, generator=generator)
    return centres[y] + noise * torch.randn(count, 20, generator=generator), y


@pytest.mark.parametrize("strength", [0.001, 0.03, 1.0])
def test_head_agrees_with_scikit_learn(strength: float) -> None:
    f, y = make_features()

    head = fit_head(f.double(), y, 4, strength=strength, check=lambda: None)

    reference = LogisticRegression(C=1 / (strength * len(f)), tol=1e-8, max_iter=2000).fit(f.double().numpy(), y.numpy())
    expected = reference.predict_proba(f.double().numpy())
    assert np.abs(torch.softmax(head.classify(f.double()), 1).numpy() - expected).max() < 1e-4


def test_head_works_on_raw_features() -> None:
    f, y = make_features(noise=0.3)

    probe = fit_probe(100 * f + 7, y, 4, seed=0, check=lambda: None)

    assert (probe.head.classify(100 * f + 7).argmax(1) == y).float().mean() > 0.98
    assert probe.cv_accuracy > 0.95


def test_noisier_data_gets_stronger_regularisation() -> None:
    clean, noisy = (fit_probe(*make_features(noise=noise), 4, seed=0, check=lambda: None).strength for noise in (0.5, 6.0))

    assert noisy > clean
    assert {clean, noisy} <= set(STRENGTHS)


def test_cross_validated_accuracy_is_honest() -> None:
    generator = torch.Generator().manual_seed(0)
    f, y = torch.randn(200, 400, generator=generator), torch.arange(200) % 2

    probe = fit_probe(f, y, 2, seed=0, check=lambda: None)

    assert 0.3 < probe.cv_accuracy < 0.7


def test_same_data_gives_the_same_head() -> None:
    f, y = make_features()

    one, two = (fit_probe(f, y, 4, seed=0, check=lambda: None) for _ in range(2))

    assert torch.equal(one.head.weight_KD, two.head.weight_KD)


def test_class_of_one_example_does_no_harm() -> None:
    f, y = make_features(40)
    y[0] = 4

    assert fit_probe(f, y, 5, seed=0, check=lambda: None).head.weight_KD.isfinite().all()


def test_fit_stops_when_asked_to() -> None:
    def stop() -> None:
        raise PreemptedError("Preempted", "stopped")

    with pytest.raises(PreemptedError):
        fit_probe(*make_features(), 4, seed=0, check=stop)

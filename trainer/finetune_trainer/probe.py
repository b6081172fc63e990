"""The probe: multinomial logistic regression on standardised features, its L2 strength chosen by cross-validation.

Shapes: N examples, D features, K classes, F folds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from finetune_trainer.errors import PreemptedError

NUM_FOLDS = 5
# Half-decades, from strong to weak: each fit starts from the one before.
STRENGTHS = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
# Cross-validation on more examples than this would cost more than it tells.
MAX_FOLD_EXAMPLES = 4000
# The weaker strengths are skipped after this many in a row that were worse than the best.
PATIENCE = 2


@dataclass(frozen=True)
class Head:
    """A linear classifier on raw features: logits = f_ND @ weight_KD.T + bias_K."""

    weight_KD: Tensor
    bias_K: Tensor

    def classify(self, f_ND: Tensor) -> Tensor:
        """Return the logits z_NK."""
        return f_ND @ self.weight_KD.T + self.bias_K


@dataclass(frozen=True)
class Probe:
    """A fitted head, and how it did in cross-validation."""

    head: Head
    strength: float
    cv_accuracy: float
    cv_nll: float


@dataclass(frozen=True)
class Trials:
    """The strengths that were tried, and the weights of all folds after the last one, from which the next one starts."""

    results: list[tuple[float, float, float]] = field(default_factory=list)
    """Log loss, strength and accuracy of each."""
    weight_DFK: Tensor | None = None
    bias_FK: Tensor | None = None

    def is_enough(self) -> bool:
        """Return whether weaker strengths have become worse and worse, or none is left."""
        best = min(range(len(self.results)), key=lambda i: self.results[i][0], default=0)
        return len(self.results) == len(STRENGTHS) or len(self.results) - 1 - best >= PATIENCE


KeepTrials = Callable[[Trials, bool], None]
"""Receives the trials after each strength, and whether they must be kept at once because the process is leaving."""


def fit_probe(
    f_ND: Tensor,
    y_N: Tensor,
    num_classes: int,
    *,
    seed: int,
    check: Callable[[], None],
    trials: Trials | None = None,
    keep: KeepTrials = lambda _trials, _leaving: None,
) -> Probe:
    """Return the head with the strength that has the lowest cross-validated log loss; go on from `trials`, if there are any."""
    mean_D, std_D = f_ND.mean(0), f_ND.std(0, unbiased=False).clamp_min(1e-6)
    z_ND = (f_ND - mean_D) / std_D
    nll, strength, accuracy = _choose_strength(
        z_ND, y_N, num_classes, seed=seed, check=check, trials=trials or Trials(), keep=keep
    )
    return Probe(
        _unscale(fit_head(z_ND.double(), y_N, num_classes, strength=strength, check=check), mean_D, std_D),
        strength,
        accuracy,
        nll,
    )


def fit_head(
    z_ND: Tensor, y_N: Tensor, num_classes: int, *, strength: float, check: Callable[[], None], max_iterations: int = 200
) -> Head:
    """Return the head that minimises mean log loss + strength / 2 * the squared norm of the weights."""
    weight_DK = torch.zeros(z_ND.shape[1], num_classes, dtype=z_ND.dtype)
    bias_K = torch.zeros(num_classes, dtype=z_ND.dtype)

    def loss() -> Tensor:
        return functional.cross_entropy(z_ND @ weight_DK + bias_K, y_N) + strength / 2 * weight_DK.square().sum()

    _minimise(loss, (weight_DK, bias_K), max_iterations=max_iterations, check=check)
    return Head(weight_DK.T.contiguous(), bias_K)


def _unscale(head: Head, mean_D: Tensor, std_D: Tensor) -> Head:
    weight_KD = head.weight_KD / std_D
    return Head(weight_KD.float(), (head.bias_K - weight_KD @ mean_D.to(weight_KD)).float())


def _choose_strength(
    z_ND: Tensor, y_N: Tensor, num_classes: int, *, seed: int, check: Callable[[], None], trials: Trials, keep: KeepTrials
) -> tuple[float, float, float]:
    """Return the cross-validated log loss of the best strength, the strength, and its accuracy.

    All folds are fitted as one problem whose terms share no weights: one pass over the features serves all of them.
    """
    fold_N = _assign_folds(y_N, seed=seed)
    kept = torch.nonzero(fold_N >= 0).flatten()
    z_ND, y_N, fold_N = z_ND[kept], y_N[kept], fold_N[kept]
    weight_DFK = torch.zeros(z_ND.shape[1], NUM_FOLDS * num_classes) if trials.weight_DFK is None else trials.weight_DFK.clone()
    bias_FK = torch.zeros(NUM_FOLDS * num_classes) if trials.bias_FK is None else trials.bias_FK.clone()
    trains_NF = (fold_N[:, None] != torch.arange(NUM_FOLDS)).float()
    share_NF = trains_NF / trains_NF.sum(0).clamp_min(1)
    target_NF = y_N[:, None].expand(-1, NUM_FOLDS)

    def losses() -> Tensor:
        z_NFK = (z_ND @ weight_DFK + bias_FK).view(-1, NUM_FOLDS, num_classes)
        return functional.cross_entropy(z_NFK.transpose(1, 2), target_NF, reduction="none")

    while not trials.is_enough():
        strength = STRENGTHS[len(trials.results)]

        def loss(strength: float = strength) -> Tensor:
            return (losses() * share_NF).sum() + strength / 2 * weight_DFK.square().sum()

        try:
            _minimise(loss, (weight_DFK, bias_FK), max_iterations=30, check=check)
        except PreemptedError:
            keep(trials, True)  # noqa: FBT003  the one argument of its kind
            raise
        with torch.no_grad():
            nll = float((losses() * (1 - trains_NF)).sum() / len(y_N))
            z_NFK = (z_ND @ weight_DFK + bias_FK).view(-1, NUM_FOLDS, num_classes)
            held_NK = z_NFK[torch.arange(len(y_N)), fold_N]
        result = (nll, strength, float((held_NK.argmax(1) == y_N).float().mean()))
        trials = Trials([*trials.results, result], weight_DFK.detach().clone(), bias_FK.detach().clone())
        keep(trials, False)  # noqa: FBT003  as above
    return min(trials.results)


def _assign_folds(y_N: Tensor, *, seed: int) -> Tensor:
    """Return the fold of each example, -1 for those beyond the limit; every fold has the same share of each class."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(y_N), generator=generator)
    by_class = shuffled[torch.argsort(y_N[shuffled], stable=True)]
    keep = max(1, -(-len(y_N) // MAX_FOLD_EXAMPLES))
    fold_N = torch.full((len(y_N),), -1)
    chosen = by_class[::keep]
    fold_N[chosen] = torch.arange(len(chosen)) % NUM_FOLDS
    return fold_N


def _minimise(
    loss: Callable[[], Tensor], parameters: Sequence[Tensor], *, max_iterations: int, check: Callable[[], None]
) -> None:
    for parameter in parameters:
        parameter.requires_grad_()
    precise = parameters[0].dtype is torch.float64
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=max_iterations,
        history_size=10,
        tolerance_grad=1e-7 if precise else 1e-4,
        tolerance_change=1e-10 if precise else 1e-6,
        line_search_fn="strong_wolfe",
    )

    def evaluate() -> float:
        check()
        optimizer.zero_grad()
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]  # untyped in torch
        return float(value.detach())

    optimizer.step(evaluate)  # type: ignore[no-untyped-call]  # untyped in torch
    for parameter in parameters:
        parameter.requires_grad = False

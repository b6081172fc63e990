"""Model v0: the frozen backbone with the probe as its head, usable long before any fine-tuning."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finetune_trainer.data import Split
from finetune_trainer.evaluate import fit_temperature
from finetune_trainer.features import Features, compute_features
from finetune_trainer.job import Choice, Job, build_classifier, copy_weights, measure_forward
from finetune_trainer.probe import Head, Probe, Trials, fit_probe
from finetune_trainer.progress import Phase
from finetune_trainer.select import PROBE, score_logits

TRIALS = "trials"
# A rate of fewer pictures is mostly the first batch, which is slow.
LEAST_TIMED = 256


@dataclass(frozen=True)
class ModelV0:
    """The probe as a model, and what the later stages want to know of how it came about."""

    probe: Probe
    choice: Choice
    picture_seconds: float
    """Time of the forward pass for one picture."""
    details: dict[str, Any]


def fit_model_v0(job: Job) -> ModelV0:
    """Compute the features, fit the probe, and return both as a model."""
    positions = job.dataset.positions
    job.progress.begin(Phase.FEATURES)
    features = _compute_features(job, torch.cat([positions[split] for split in Split]))
    job.progress.begin(Phase.PROBE)
    started = time.perf_counter()
    by_split = dict(zip(Split, torch.split(features.f_ND, [len(positions[split]) for split in Split]), strict=True))
    probe = _fit_probe(job, by_split[Split.TRAIN])
    logits = {split: probe.head.classify(by_split[split][: len(index_N)]) for split, index_N in job.evaluated.items()}
    y_val = job.dataset.targets(Split.VAL)
    choice = Choice(
        PROBE,
        copy_weights(build_classifier(job, probe.head)),
        fit_temperature(logits[Split.VAL], y_val),
        logits,
        (score_logits(PROBE, logits[Split.VAL], y_val),),
    )
    details = {
        "featuresComputed": features.num_computed,
        "featuresFromCache": features.num_cached,
        "featureSeconds": round(features.compute_seconds, 3),
        "probeSeconds": round(time.perf_counter() - started, 3),
        "probeStrength": probe.strength,
        "probeCvAccuracy": probe.cv_accuracy,
    }
    timed = features.num_computed >= LEAST_TIMED
    picture_seconds = features.compute_seconds / features.num_computed if timed else measure_forward(job)
    return ModelV0(probe, choice, picture_seconds, details)


def _compute_features(job: Job, index_N: Tensor) -> Features:
    return compute_features(
        job.backbone,
        job.dataset.pixels_NHWC,
        index_N,
        [job.dataset.digests[int(index)] or "" for index in index_N],
        device=job.device,
        cache=job.work / "features",
        check=job.stop.check_together,
        advance=job.progress.advance,
        interval_seconds=job.config.checkpoint_interval_seconds,
        memory=job.memory,
        kept=job.checkpoints.note_progress,
    )


def _fit_probe(job: Job, f_ND: Tensor) -> Probe:
    """Return the probe that rank 0 fits: the others fit it as well, from the same features, but rounding differs by processor."""
    kept = job.checkpoints.load(PROBE)
    if kept is not None:
        return Probe(Head(kept.tensors["weight"], kept.tensors["bias"]), **kept.state)
    probe = fit_probe(
        f_ND,
        job.dataset.targets(Split.TRAIN),
        len(job.dataset.labels),
        seed=job.config.hyperparameters.seed,
        check=job.check,
        trials=_load_trials(job),
        keep=lambda trials, leaving: _keep_trials(job, trials, leaving=leaving),
    )
    tensors = {"weight": probe.head.weight_KD, "bias": probe.head.bias_K}
    state = {"strength": probe.strength, "cv_accuracy": probe.cv_accuracy, "cv_nll": probe.cv_nll}
    job.checkpoints.save(PROBE, tensors=tensors, state=state)
    tensors = job.group.broadcast_tensors(tensors)
    return Probe(Head(tensors["weight"], tensors["bias"]), **job.group.broadcast_json(state))


def _load_trials(job: Job) -> Trials | None:
    kept = job.checkpoints.load(TRIALS)
    if kept is None:
        return None
    results = [(nll, strength, accuracy) for nll, strength, accuracy in kept.state["results"]]
    return Trials(results, kept.tensors["weight"], kept.tensors["bias"])


def _keep_trials(job: Job, trials: Trials, *, leaving: bool) -> None:
    if trials.weight_DFK is not None and trials.bias_FK is not None and (leaving or job.checkpoints.is_due()):
        tensors = {"weight": trials.weight_DFK, "bias": trials.bias_FK}
        job.checkpoints.save(TRIALS, tensors=tensors, state={"results": trials.results})

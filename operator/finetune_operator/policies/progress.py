"""Which report is shown, and when progress alone is worth a write (pure)."""

import math
from datetime import datetime

from finetune_api.contract import TrainerReport
from finetune_api.v1alpha1 import CheckpointStatus, FineTuneJobStatus, Metric, ResultMetric, TrainerStatus
from pydantic import ValidationError

from finetune_operator.observed import ChildView, Observed, PodView, ReceivedReport
from finetune_operator.policies.pace import estimate_seconds_left, follow

# The task's main metric while it trains, best first.
_MAIN_METRICS = ("val_accuracy", "probe_val_accuracy", "loss")
# What comes by this share of the interval before its end is not made to wait for another one.
_EARLY = 0.1
# A write that had to wait by more than this share makes the next one later, so that the turns of all catch up.
_LATE = 0.25
# So many intervals after the shown one, an earlier report is written, as no other comes.
_PATIENCE = 1.5


def parse_termination_message(message: str | None) -> TrainerReport | None:
    """Return the report that a trainer left, or None when the message is something else, such as the end of a log."""
    if not message:
        return None
    try:
        return TrainerReport.model_validate_json(message)
    except ValidationError:
        return None


def find_last_word(pod: PodView | None) -> TrainerReport | None:
    """Return the report that the trainer of a pod left when it ended, or None."""
    return parse_termination_message(pod.termination_message) if pod else None


def find_report(observed: Observed, child: ChildView, *, pod: PodView | None) -> TrainerReport | None:
    """Return the last word of an attempt: its termination message, else the last report that was received from it."""
    if final := find_last_word(pod):
        return final
    received = observed.report
    if received and (received.run, received.attempt) == (child.run, child.attempt):
        return received.report
    return None


def receive(
    previous: ReceivedReport | None, report: TrainerReport, *, child: ChildView, received_at: datetime, monotonic: float
) -> ReceivedReport:
    """Return a report of an attempt as it is kept, with the remaining time that follows from it and those before it."""
    is_same = previous is not None and (previous.run, previous.attempt) == (child.run, child.attempt)
    pace = follow(previous.pace if previous and is_same else None, report, at=monotonic)
    return ReceivedReport(
        run=child.run,
        attempt=child.attempt,
        received_at=received_at,
        report=report,
        pace=pace,
        seconds_left=estimate_seconds_left(pace, report, at=monotonic),
    )


def find_newest_checkpoint(known: CheckpointStatus | None, observed: Observed, *, run: str) -> CheckpointStatus | None:
    """Return the newest checkpoint that a trainer of this run has told of, in a report or as its last word."""
    pods = (pod for pod in (*observed.pods, *observed.former_pods) if pod.run == run)
    reports = [parse_termination_message(pod.termination_message) for pod in pods]
    if observed.report and observed.report.run == run:
        reports.append(observed.report.report)
    found = [report.checkpoint for report in reports if report and report.checkpoint]
    return max((*found, *((known,) if known else ())), key=lambda each: each.time, default=None)


def merge_trainer_status(previous: TrainerStatus | None, observed: Observed, *, child: ChildView) -> TrainerStatus | None:
    """Return the progress to show: a newer report of this attempt with the time of its receipt, else what was shown."""
    received = observed.report
    if received is None or (received.run, received.attempt) != (child.run, child.attempt):
        return previous
    if previous and previous.last_updated_time and previous.last_updated_time >= received.received_at:
        return previous
    seconds_left = None if received.seconds_left is None else round(received.seconds_left)
    update = {"last_updated_time": received.received_at, "estimated_remaining_seconds": seconds_left}
    return received.report.trainer_status.model_copy(update=update)


def describe_metric(metrics: tuple[Metric, ...] | tuple[ResultMetric, ...]) -> str | None:
    """Return the main metric as `name=value`: the first of a result, the most telling one of a progress report."""
    by_name: dict[str, Metric | ResultMetric] = {metric.name: metric for metric in metrics}
    if metrics and isinstance(metrics[0], ResultMetric):
        chosen: Metric | ResultMetric | None = metrics[0]
    else:
        chosen = next((by_name[name] for name in _MAIN_METRICS if name in by_name), None)
    return f"{chosen.name}={chosen.value}"[:64] if chosen else None


def compute_progress_delay(old: FineTuneJobStatus, new: FineTuneJobStatus, *, now: datetime, interval_seconds: float) -> float:
    """Return for how many seconds a status write can wait: 0 unless only progress changed since a recent write."""
    if not is_only_progress(old, new):
        return 0
    shown_at, received_at = _find_time(old.trainer_status), _find_time(new.trainer_status)
    if shown_at is None or received_at is None:
        return 0
    return compute_report_delay(
        (received_at - shown_at).total_seconds(),
        age_seconds=(now - received_at).total_seconds(),
        interval_seconds=interval_seconds,
    )


def compute_report_delay(
    seconds_later: float, *, age_seconds: float = 0, seconds_since_write: float = math.inf, interval_seconds: float
) -> float:
    """Return for how many seconds the write of a report can wait that came so much later than the shown one.

    The first one that comes about an interval after the shown one is written as it comes: a trainer that reports every few
    seconds has each status written while its report is new. An earlier one is written when no other comes.
    """
    is_late = seconds_since_write < interval_seconds * (1 - _LATE)
    if seconds_later >= interval_seconds * (1 - _EARLY) and not is_late:
        return 0
    return max(0.0, interval_seconds * _PATIENCE - min(seconds_later + age_seconds, seconds_since_write))


def _find_time(status: TrainerStatus | None) -> datetime | None:
    return status.last_updated_time if status else None


def is_only_progress(old: FineTuneJobStatus, new: FineTuneJobStatus) -> bool:
    """Return whether two statuses are the same but for progress."""
    without = {"trainer_status": None, "metric": None, "checkpoint": None}
    return old.model_copy(update=without) == new.model_copy(update=without)

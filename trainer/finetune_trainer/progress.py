"""Progress of the whole job: a share for each phase, the time that is probably left, and the latest metrics."""

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from enum import StrEnum

from finetune_api.contract import FailureReport, TimeLeft, TrainerReport
from finetune_api.v1alpha1 import CheckpointStatus, Metric, OutputStatus, Result, TrainerStatus

from finetune_trainer.budget import Budget
from finetune_trainer.metrics import Totals
from finetune_trainer.redact import Redact, redact_report

# Less than this is done too early to say how long the rest takes.
LEAST_SHARE_FOR_ESTIMATE = 0.05

Sink = Callable[[TrainerReport, str, bool], None]
"""Receives a report, the name of the phase, and whether it is urgent."""


class Phase(StrEnum):
    """A stage of the job, in order."""

    READ = "reading the data"
    FEATURES = "computing features"
    PROBE = "fitting the probe"
    FINETUNE = "fine-tuning"
    FINISH = "selecting and publishing"


_SHARES_WITH_FINETUNE = {Phase.READ: 0.03, Phase.FEATURES: 0.12, Phase.PROBE: 0.05, Phase.FINETUNE: 0.7, Phase.FINISH: 0.1}
_SHARES_OF_PROBE = {Phase.READ: 0.15, Phase.FEATURES: 0.6, Phase.PROBE: 0.15, Phase.FINETUNE: 0.0, Phase.FINISH: 0.1}


class Progress:
    """Collects what the stages say and hands reports to the sinks."""

    def __init__(
        self,
        budget: Budget,
        sinks: Sequence[Sink],
        *,
        with_finetune: bool,
        redact: Redact = str,
        totals: Totals | None = None,
    ) -> None:
        self.totals = totals or Totals()
        """What is shown to Prometheus."""
        self._budget = budget
        self.redact = redact
        self._sinks = tuple(sinks)
        self._shares = _SHARES_WITH_FINETUNE if with_finetune else _SHARES_OF_PROBE
        self._with_finetune = with_finetune
        self._phase = Phase.READ
        self._fraction = 0.0
        self._highest = 0
        self._remaining_seconds: float | None = None
        self._after_steps_seconds: float | None = None
        self._metrics: dict[str, str] = {}
        self._delivered = 0.0
        self._checkpoint: CheckpointStatus | None = None

    def begin(self, phase: Phase) -> None:
        """Enter a phase, and report at once."""
        self._phase, self._fraction, self._remaining_seconds = phase, 0.0, None
        self.totals.phase = phase.value
        self._deliver(self.report(), urgent=True)

    def advance(self, fraction: float, *, steps_seconds: float | None = None, after_steps_seconds: float | None = None) -> None:
        """Say how much of the phase is done and, if known, how long the steps that are left take, and what follows them."""
        self._fraction = min(1.0, fraction)
        self._remaining_seconds = None
        if steps_seconds is not None and after_steps_seconds is not None:
            self._remaining_seconds, self._after_steps_seconds = steps_seconds + after_steps_seconds, after_steps_seconds
        now = time.monotonic()
        if now - self._delivered > 0.5:
            self._delivered = now
            self._deliver(self.report(), urgent=False)

    def note(self, **metrics: float) -> None:
        """Replace the latest values of metrics."""
        self._metrics |= {name: f"{value:.6g}" for name, value in metrics.items()}

    def keep(self, checkpoint: CheckpointStatus) -> None:
        """Say what is saved; it goes with the next report."""
        self._checkpoint = checkpoint

    def finish(self, output: OutputStatus, result: Result) -> TrainerReport:
        """Report the result, which ends the job."""
        self._highest, self._remaining_seconds = 100, 0.0
        return self._deliver(self.report().model_copy(update={"output": output, "result": result}), urgent=True)

    def fail(self, failure: FailureReport, *, log_tail: str | None = None) -> TrainerReport:
        """Report the failure, which ends the job."""
        return self._deliver(self.report().model_copy(update={"failure": failure, "log_tail": log_tail}), urgent=True)

    def report(self) -> TrainerReport:
        """Return the state as a report."""
        phases = list(Phase)
        before = sum(self._shares[phase] for phase in phases[: phases.index(self._phase)])
        share = before + self._shares[self._phase] * self._fraction
        self._highest = max(self._highest, min(99, int(share * 100)))
        self.totals.progress_ratio = self._highest / 100
        remaining = self._estimate_remaining(share)
        status = TrainerStatus(
            progress_percentage=self._highest,
            estimated_remaining_seconds=None if remaining is None else max(0, round(remaining)),
            metrics=tuple(Metric(name=name, value=value) for name, value in self._metrics.items()),
            last_updated_time=datetime.now(UTC),
        )
        return TrainerReport(trainer_status=status, time_left=self._build_time_left(), checkpoint=self._checkpoint)

    def _build_time_left(self) -> TimeLeft | None:
        """Return what the operator cannot tell from our steps; without fine-tuning the percentage is all there is."""
        if not self._with_finetune:
            return None
        budget, after_steps = self._budget.remaining_seconds(), self._after_steps_seconds
        if after_steps is not None and self._phase is Phase.FINISH:
            after_steps *= 1 - self._fraction
        return TimeLeft(
            after_steps_seconds=None if after_steps is None else round(max(0.0, after_steps), 1),
            budget_seconds=None if budget is None else round(max(0.0, budget), 1),
        )

    def _estimate_remaining(self, share: float) -> float | None:
        if self._highest == 100 or self._remaining_seconds is not None:
            return self._remaining_seconds
        budgeted = self._budget.remaining_seconds()
        if budgeted is not None and self._with_finetune:
            return budgeted
        if self._with_finetune or share < LEAST_SHARE_FOR_ESTIMATE:
            return None
        return self._budget.elapsed_seconds() * (1 - share) / share

    def _deliver(self, report: TrainerReport, *, urgent: bool) -> TrainerReport:
        report = redact_report(report, self.redact)
        for sink in self._sinks:
            sink(report, self._phase.value, urgent)
        return report

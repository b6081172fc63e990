"""What a decision is made from and what it finds: a context in, a step out (pure)."""

from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Self

from finetune_api.conditions import find_condition, is_true
from finetune_api.contract import compute_run
from finetune_api.v1alpha1 import FineTuneJobSpec, FineTuneJobStatus

from finetune_operator.observed import ChildView, JobView, Observed, PodView
from finetune_operator.outcome import EventNote
from finetune_operator.policies.gang import Gang, build_gang
from finetune_operator.policies.progress import find_newest_checkpoint
from finetune_operator.settings import TrainerSettings
from finetune_operator.state import Phase, State


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one branch of the decision found: the state, the status without its conditions, and the effects."""

    state: State
    status: FineTuneJobStatus
    confirm: ChildView | None = None
    delete: tuple[ChildView, ...] = ()
    absent: tuple[str, ...] = ()
    apply: tuple[dict[str, Any], ...] = ()
    events: tuple[EventNote, ...] = ()
    inspect: ChildView | None = None
    requeue_after: float | None = None

    def wake(self, *seconds: float | None) -> "Step":
        """Return the step with an earlier time to look again, if one of these is."""
        times = [each for each in (self.requeue_after, *seconds) if each is not None]
        return replace(self, requeue_after=min(times) if times else None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """The inputs of a decision, named once."""

    job: JobView
    spec: FineTuneJobSpec
    run: str
    observed: Observed
    status: FineTuneJobStatus
    """The status as far as it belongs to this run."""
    now: datetime
    settings: TrainerSettings
    attempts: tuple[ChildView, ...] = ()
    """The children of this run, oldest first."""

    @property
    def current(self) -> ChildView | None:
        """Return the newest attempt of this run that still exists."""
        return self.attempts[-1] if self.attempts else None

    @property
    def busy_pods(self) -> tuple[PodView, ...]:
        """Return the pods of any run whose trainer may still write."""
        return tuple(pod for pod in self.observed.pods if not pod.is_ended)

    def update(self, **fields: object) -> Self:
        """Return the context with fields of its status changed."""
        return replace(self, status=self.status.model_copy(update=fields))

    def find_gang(self, attempt: int) -> Gang:
        """Return the pods of an attempt of this run."""
        return build_gang(self.observed, run=self.run, attempt=attempt)

    def has_ended(self, phase: Phase) -> bool:
        """Return whether this run has ended in this way."""
        return self.job.status.run == self.run and is_true(self.status.conditions, phase.value)

    def is_shown_as(self, reason: str) -> bool:
        """Return whether this is the STATE that was written for this very spec."""
        ready = find_condition(self.status.conditions, "Ready")
        is_current = self.job.status.run == self.run and self.job.status.observed_generation == self.job.generation
        return is_current and ready is not None and ready.reason == reason


def build_context(
    job: JobView, spec: FineTuneJobSpec, observed: Observed, *, now: datetime, settings: TrainerSettings
) -> Context:
    """Return the context of a decision, with the newest checkpoint that was seen in its status."""
    run = compute_run(spec)
    status = job.status if job.status.run == run else _begin_run(job.status, run=run)
    checkpoint = find_newest_checkpoint(status.checkpoint, observed, run=run)
    return Context(
        job=job,
        spec=spec,
        run=run,
        observed=_forget_namesakes(observed),
        status=status if checkpoint == status.checkpoint else status.model_copy(update={"checkpoint": checkpoint}),
        now=now,
        settings=settings,
        attempts=tuple(sorted((each for each in observed.children if each.run == run), key=lambda child: child.attempt)),
    )


def without_estimate(status: FineTuneJobStatus) -> FineTuneJobStatus:
    """Return the status without a remaining time, which means nothing while no trainer runs."""
    if status.trainer_status is None:
        return status
    trainer_status = status.trainer_status.model_copy(update={"estimated_remaining_seconds": None})
    return status.model_copy(update={"trainer_status": trainer_status})


def _forget_namesakes(observed: Observed) -> Observed:
    """Return what was observed without that of earlier Jobs of the same names, which a run that returns has once more."""
    uids = {child.name: child.uid for child in observed.children}
    created_at = {(child.run, child.attempt): child.created_at for child in observed.children}
    report = observed.report
    is_earlier = report is not None and report.received_at < created_at.get((report.run, report.attempt), report.received_at)
    return replace(
        observed,
        former_pods=tuple(pod for pod in observed.former_pods if pod.child_uid in ("", uids.get(pod.child, pod.child_uid))),
        report=None if is_earlier else report,
    )


def _begin_run(status: FineTuneJobStatus, *, run: str) -> FineTuneJobStatus:
    """Return the status for a new run. The earlier model stays in it until it is replaced, as it does in its volume."""
    return FineTuneJobStatus(run=run, conditions=status.conditions, output=status.output, result=status.result)

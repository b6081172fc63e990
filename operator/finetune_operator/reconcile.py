"""The one decision of the operator: what to do about a FineTuneJob, given all that was observed (pure).

Level-triggered: it looks at the state and never at the event that woke it, so a lost or repeated event changes nothing.
Every step that must not be forgotten (an attempt, a retry) is in a child's name or in the status before the next one builds
on it.
"""

from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from finetune_api import names
from finetune_api.conditions import find_condition, is_true
from finetune_api.contract import TrainerReport, compute_pod_shape, compute_run
from finetune_api.v1alpha1 import Condition, Failure, FineTuneJobSpec, FineTuneJobStatus, TrainerStatus

from finetune_operator.manifests.job import build_job
from finetune_operator.observed import ChildState, ChildView, JobView, Observed, PodView
from finetune_operator.outcome import Deletion, EventNote, EventType, Outcome
from finetune_operator.policies.failure import Verdict, classify_failure
from finetune_operator.policies.pending import explain_pending
from finetune_operator.policies.progress import (
    compute_progress_delay,
    describe_metric,
    find_report,
    merge_trainer_status,
)
from finetune_operator.policies.retry import compute_retry_time
from finetune_operator.settings import TrainerSettings
from finetune_operator.state import Phase, State, build_conditions


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one branch of the decision found: the state, the status without its conditions, and the effects."""

    state: State
    status: FineTuneJobStatus
    delete: tuple[ChildView, ...] = ()
    absent: tuple[str, ...] = ()
    apply: tuple[dict[str, Any], ...] = ()
    events: tuple[EventNote, ...] = ()
    requeue_after: float | None = None


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
    attempts: tuple[ChildView, ...] = field(default=())
    """The children of this run, oldest first."""

    @property
    def current(self) -> ChildView | None:
        """Return the newest attempt of this run that still exists."""
        return self.attempts[-1] if self.attempts else None


def reconcile(job: JobView, observed: Observed, *, now: datetime, settings: TrainerSettings) -> Outcome:
    """Return everything that is to be done about one FineTuneJob."""
    if job.deleting:
        return Outcome()
    if job.spec is None:
        state = State(phase=Phase.INVALID, problem="InvalidSpec", message=job.spec_error or "the spec cannot be read")
        return _conclude(job, Step(state=state, status=job.status), now=now, settings=settings)
    run = compute_run(job.spec)
    status = job.status if job.status.run == run else _begin_run(job.status, run=run)
    attempts = tuple(sorted((child for child in observed.children if child.run == run), key=lambda child: child.attempt))
    context = Context(
        job=job, spec=job.spec, run=run, observed=observed, status=status, now=now, settings=settings, attempts=attempts
    )
    return _conclude(job, _decide(context), now=now, settings=settings)


def build_refused_status(job: JobView, observed: Observed, *, reason: str, message: str, now: datetime) -> FineTuneJobStatus:
    """Return the status of a job whose child the API server refuses to create, for example because of a quota."""
    run = compute_run(job.spec) if job.spec else job.status.run
    status = job.status if job.status.run == run else _begin_run(job.status, run=run or "")
    scheduled = bool(observed.pods)
    return _finish_status(job, State(phase=Phase.PENDING, problem=reason, message=message, scheduled=scheduled), status, now=now)


def _begin_run(status: FineTuneJobStatus, *, run: str) -> FineTuneJobStatus:
    """Return the status for a new run. The earlier model stays in it until it is replaced, as it does in its volume."""
    return FineTuneJobStatus(run=run, conditions=status.conditions, output=status.output, result=status.result)


def _decide(context: Context) -> Step:
    strangers = tuple(child for child in context.observed.children if child.run != context.run)
    if strangers:
        return _wait_for_removal(context, strangers, message="the pods of the previous run are being stopped")
    if is_true(context.status.conditions, "Complete") and context.job.status.run == context.run:
        return _stay(context, Phase.COMPLETE)
    if is_true(context.status.conditions, "Failed") and context.job.status.run == context.run:
        return _revive(context) if _has_new_shape(context) else _stay(context, Phase.FAILED)
    current = context.current
    if current is None or current.attempt < context.status.attempt:
        return _suspended(context) if context.spec.suspend else _start_attempt(context)
    context = replace(context, status=context.status.model_copy(update={"attempt": current.attempt}))
    if current.deleting:
        return _wait_for_removal(context, (current,), message="the pods of the previous attempt are being stopped")
    if current.state is ChildState.ACTIVE:
        return _watch(context, current)
    return _settle(context, current)


def _watch(context: Context, current: ChildView) -> Step:
    """Decide on an attempt that is under way."""
    if context.spec.suspend:
        return _wait_for_removal(context, (current,), message="the pods are being stopped")
    if current.pod_shape != compute_pod_shape(context.spec.resources):
        return _wait_for_removal(context, (current,), message="the pods are being replaced, as spec.resources changed")
    pod = _find_pod(context, current)
    if pod is None or pod.phase == "Pending" or pod.started_at is None:
        return Step(state=explain_pending(pod), status=_without_estimate(context.status))
    trainer_status = merge_trainer_status(context.status.trainer_status, context.observed, child=current)
    update = {
        "trainer_status": trainer_status,
        "metric": (describe_metric(trainer_status.metrics) if trainer_status else None) or context.status.metric,
        "start_time": context.status.start_time or pod.started_at,
    }
    state = State(phase=Phase.RUNNING, message=f"attempt {current.attempt} runs in pod {pod.name} on node {pod.node}")
    return Step(state=state, status=context.status.model_copy(update=update))


def _settle(context: Context, current: ChildView) -> Step:
    """Decide on an attempt that has ended, once its pod shows how."""
    failure = context.status.failure
    if failure and failure.attempt == current.attempt:
        return _retry(context, current, failure=failure)
    pod = _find_pod(context, current)
    report = find_report(context.observed, current, pod=pod)
    if current.state is ChildState.COMPLETE and report and report.output:
        return _complete(context, current, pod=pod, report=report)
    if (waiting := _evidence_delay(context, current, pod=pod)) > 0:
        return Step(state=_keep_state(context, current), status=context.status, requeue_after=waiting)
    return _fail(context, current, verdict=classify_failure(current, pod, report=report), pod=pod)


def _keep_state(context: Context, current: ChildView) -> State:
    """Return Running if that is what is shown: a moment of waiting for evidence is no transition."""
    ready = find_condition(context.status.conditions, "Ready")
    if ready is not None and ready.reason == Phase.RUNNING.value:
        return State(phase=Phase.RUNNING, message=ready.message)
    message = f"attempt {current.attempt} has ended; waiting for its pod to show how"
    return State(phase=Phase.PENDING, message=message, scheduled=True)


def _complete(context: Context, current: ChildView, *, pod: PodView | None, report: TrainerReport) -> Step:
    finished_at = (pod.finished_at if pod else None) or current.finished_at or context.now
    metrics = report.result.metrics if report.result else ()
    update = {
        "trainer_status": TrainerStatus(
            progress_percentage=100,
            estimated_remaining_seconds=0,
            metrics=report.trainer_status.metrics,
            last_updated_time=finished_at,
        ),
        "metric": describe_metric(metrics) or context.status.metric,
        "output": report.output,
        "result": report.result,
        "failure": None,
        "start_time": context.status.start_time or (pod.started_at if pod else None),
        "completion_time": finished_at,
    }
    assert report.output is not None
    state = State(phase=Phase.COMPLETE, message=f"the model is in {report.output.uri}")
    return Step(state=state, status=context.status.model_copy(update=update))


def _fail(context: Context, current: ChildView, *, verdict: Verdict, pod: PodView | None) -> Step:
    failure = verdict.failure
    limit = context.spec.run_policy.backoff_limit
    start_time = context.status.start_time or (pod.started_at if pod else None)
    status = _without_estimate(context.status).model_copy(update={"failure": failure, "start_time": start_time})
    if verdict.is_retryable and status.restarts < limit:
        status = status.model_copy(update={"restarts": status.restarts + 1})
        step = _retry(replace(context, status=status), current, failure=failure, is_recorded=False)
        return replace(step, events=(*step.events, _note_failed_attempt(failure)))
    end = "a retry cannot mend this" if not verdict.is_retryable else f"backoffLimit {limit} is reached"
    state = State(phase=Phase.FAILED, problem=failure.reason, message=f"{failure.message} ({end})")
    finished_at = (pod.finished_at if pod else None) or current.finished_at or context.now
    return Step(state=state, status=status.model_copy(update={"completion_time": finished_at}))


def _retry(context: Context, current: ChildView, *, failure: Failure, is_recorded: bool = True) -> Step:
    """Start the next attempt when its time has come; the failure must be in the status first, or it would count twice."""
    if context.spec.suspend:
        return _suspended(context)
    due = compute_retry_time(
        current.finished_at or context.now,
        restarts=context.status.restarts,
        base_seconds=context.settings.retry_base_seconds,
        limit_seconds=context.settings.retry_limit_seconds,
    )
    seconds = max(0.0, (due - context.now).total_seconds())
    if is_recorded and seconds == 0:
        return _start_attempt(context)
    message = f"attempt {failure.attempt} failed, restart {context.status.restarts} follows: {failure.message}"
    state = State(phase=Phase.RETRYING, problem=failure.reason, message=message)
    return Step(state=state, status=context.status, requeue_after=seconds)


def _start_attempt(context: Context) -> Step:
    attempt = context.status.attempt + 1
    previous = names.child_name(context.job.name, context.run, context.status.attempt)
    kept = {child.name for child in context.attempts}
    return Step(
        state=explain_pending(None),
        status=_without_estimate(context.status).model_copy(update={"attempt": attempt}),
        absent=(previous,) if context.status.attempt and previous not in kept else (),
        apply=(build_job(context.job, context.spec, attempt=attempt, settings=context.settings),),
    )


def _revive(context: Context) -> Step:
    """Start a failed run again, with all its retries, after the user gave it other resources."""
    attempt = max(context.status.attempt, context.attempts[-1].attempt)
    update = {"attempt": attempt, "restarts": 0, "completion_time": None}
    return _start_attempt(replace(context, status=context.status.model_copy(update=update)))


def _has_new_shape(context: Context) -> bool:
    return context.current is not None and context.current.pod_shape != compute_pod_shape(context.spec.resources)


def _stay(context: Context, phase: Phase) -> Step:
    """Keep a finished run as it is, with only observedGeneration moving on."""
    ended: Condition = next(each for each in context.status.conditions if each.type == phase.value)
    problem = ended.reason if phase is Phase.FAILED else None
    return Step(state=State(phase=phase, problem=problem, message=ended.message), status=context.status)


def _suspended(context: Context) -> Step:
    state = State(phase=Phase.SUSPENDED, message="spec.suspend is true; set it to false to go on")
    return Step(state=state, status=_without_estimate(context.status))


def _wait_for_removal(context: Context, children: tuple[ChildView, ...], *, message: str) -> Step:
    phase = Phase.SUSPENDING if context.spec.suspend else Phase.PENDING
    return Step(
        state=State(phase=phase, message=message, scheduled=False),
        status=_without_estimate(context.status),
        delete=tuple(child for child in children if not child.deleting),
    )


def _find_pod(context: Context, child: ChildView) -> PodView | None:
    """Return the pod that speaks for an attempt: the one that ended, else the newest."""
    pods = sorted(context.observed.pods_of(child), key=lambda pod: (pod.exit_code is not None, not pod.deleting, pod.name))
    return pods[-1] if pods else None


def _evidence_delay(context: Context, child: ChildView, *, pod: PodView | None) -> float:
    """Return for how long the pod's last status may still be on its way."""
    if pod is not None and (pod.exit_code is not None or pod.phase == "Failed"):
        return 0
    elapsed = (context.now - (child.finished_at or context.now)).total_seconds()
    return max(0.0, context.settings.evidence_seconds - elapsed)


def _without_estimate(status: FineTuneJobStatus) -> FineTuneJobStatus:
    """Return the status without a remaining time, which means nothing while no trainer runs."""
    if status.trainer_status is None:
        return status
    trainer_status = status.trainer_status.model_copy(update={"estimated_remaining_seconds": None})
    return status.model_copy(update={"trainer_status": trainer_status})


def _conclude(job: JobView, step: Step, *, now: datetime, settings: TrainerSettings) -> Outcome:
    """Turn a step into effects: the whole status if it changed, its events, and when to look again."""
    status = _finish_status(job, step.state, step.status, now=now)
    delay = compute_progress_delay(job.status, status, now=now, interval_seconds=settings.progress_seconds)
    is_changed = status != job.status
    waits = [each for each in (step.requeue_after, delay if is_changed and delay else None) if each is not None]
    return Outcome(
        delete=tuple(Deletion(name=each.name, uid=each.uid, resource_version=each.resource_version) for each in step.delete),
        absent=step.absent,
        apply=step.apply,
        status=status if is_changed and not delay else None,
        events=(*step.events, *_note_transition(job.status, step.state)),
        requeue_after=min(waits) if waits else None,
    )


def _finish_status(job: JobView, state: State, status: FineTuneJobStatus, *, now: datetime) -> FineTuneJobStatus:
    conditions = build_conditions(status.conditions, state, generation=job.generation, now=now)
    return status.model_copy(update={"observed_generation": job.generation, "conditions": conditions})


def _note_transition(old: FineTuneJobStatus, state: State) -> tuple[EventNote, ...]:
    """Return an event when the STATE changes; a problem or a failure is a warning."""
    ready = find_condition(old.conditions, "Ready")
    if ready is not None and ready.reason == state.reason:
        return ()
    is_bad = state.phase in (Phase.FAILED, Phase.INVALID) or (state.phase is Phase.PENDING and state.problem is not None)
    kind = EventType.WARNING if is_bad else EventType.NORMAL
    return (EventNote(type=kind, reason=state.reason, action="Reconcile", message=state.message),)


def _note_failed_attempt(failure: Failure) -> EventNote:
    message = f"attempt {failure.attempt}: {failure.reason}: {failure.message}"
    return EventNote(type=EventType.WARNING, reason="AttemptFailed", action="Retry", message=message)

"""How attempts and runs end: complete, failed with a retry, failed for good (pure)."""

from datetime import datetime

from finetune_api.conditions import truncate
from finetune_api.contract import TrainerReport
from finetune_api.v1alpha1 import Failure, FailureAction, FineTuneJobStatus, TrainerStatus

from finetune_operator.observed import ChildView, PodView
from finetune_operator.outcome import EventNote, EventType
from finetune_operator.policies.failure import Verdict
from finetune_operator.policies.gang import Gang, find_hindrance
from finetune_operator.policies.progress import describe_metric, parse_termination_message
from finetune_operator.policies.retry import record_restart
from finetune_operator.policies.usage import end_running
from finetune_operator.state import Phase, State
from finetune_operator.steps import Context, Step, without_estimate

BACKOFF_LIMIT = "BackoffLimitExceeded"

_MAX_MESSAGE = 1024


def find_published(pod: PodView | None) -> TrainerReport | None:
    """Return the report of a pod that published its model, or None."""
    report = parse_termination_message(pod.termination_message) if pod and pod.exit_code == 0 else None
    return report if report and report.output else None


def complete(context: Context, *, gang: Gang, report: TrainerReport, ended_at: datetime | None) -> Step:
    """End a run whose model is published."""
    assert report.output is not None
    finished_at = gang.finished_at or ended_at or context.now
    status, _ = end_running(context.status, gang, now=finished_at, is_complete=True)
    metrics = report.result.metrics if report.result else ()
    trainer_status = TrainerStatus(
        progress_percentage=100,
        estimated_remaining_seconds=0,
        metrics=report.trainer_status.metrics,
        last_updated_time=finished_at,
    )
    update = {
        "trainer_status": trainer_status,
        "metric": describe_metric(metrics) or status.metric,
        "output": report.output,
        "result": report.result,
        "failure": None,
        "completion_time": finished_at,
    }
    state = State(phase=Phase.COMPLETE, message=f"the model is in {report.output.uri}")
    return Step(state=state, status=status.model_copy(update=update))


def fail(context: Context, current: ChildView, *, verdict: Verdict, gang: Gang) -> Step:
    """End an attempt: with a retry, which is only recorded here, or with the run."""
    failure = verdict.failure
    finished_at = gang.finished_at or current.finished_at or context.now
    status, lost_seconds = end_running(context.status, gang, now=finished_at)
    status = without_estimate(status).model_copy(update={"failure": failure})
    is_counted = verdict.action is FailureAction.RETRY
    limit = context.spec.run_policy.backoff_limit
    if verdict.action is FailureAction.FAIL:
        return _end_run(status, failure, reason=failure.reason, why="a retry cannot mend this", at=finished_at)
    if is_counted and status.restarts_counted_towards_limit >= limit:
        return _end_run(status, failure, reason=BACKOFF_LIMIT, why=f"backoffLimit {limit} is reached", at=finished_at)
    status = record_restart(
        status,
        attempt=failure.attempt,
        reason=failure.reason,
        is_counted=is_counted,
        ended_at=finished_at,
        lost_seconds=lost_seconds,
    )
    return Step(state=explain_retry(status, failure), status=status, events=(_note(failure, action="Retry"),), requeue_after=0)


def explain_retry(status: FineTuneJobStatus, failure: Failure) -> State:
    """Return the state of a run whose next attempt follows."""
    message = f"attempt {failure.attempt} failed, restart {status.restarts} follows: {failure.reason}: {failure.message}"
    return State(phase=Phase.RETRYING, problem=failure.reason, message=message)


def fail_active_deadline(context: Context, *, reason: str) -> Step:
    """End a run whose trainers have used their time."""
    limit = context.spec.run_policy.active_deadline_seconds or 0
    saved = context.status.checkpoint
    state_of = f"the state of step {saved.step} is saved" if saved else "no state was saved"
    message = (
        f"the trainers of {context.status.attempt} attempts ran for {limit} s, which is all that activeDeadlineSeconds allows; "
        f"{state_of}, and a higher value goes on from there"
    )
    failure = Failure(reason=reason, message=message, attempt=context.status.attempt)
    # The clocks of nodes differ from ours: a run that ended by its deadline has used all of it.
    update = {
        "failure": failure,
        "active_seconds": max(context.status.active_seconds, limit),
        "running_since": None,
        "completion_time": context.now,
    }
    state = State(phase=Phase.FAILED, problem=reason, message=message)
    return Step(
        state=state, status=without_estimate(context.status.model_copy(update=update)), events=(_note(failure, action="Stop"),)
    )


def fail_start_deadline(context: Context, step: Step, *, reason: str) -> Step:
    """End a run whose attempt did not start in time. Its children are deleted when this is written."""
    attempt = max(context.status.attempt, context.current.attempt if context.current else 0)
    gang = context.find_gang(attempt)
    status = without_estimate(end_running(context.status, gang, now=context.now)[0])
    seconds = context.spec.run_policy.start_deadline_seconds
    cause = step.state.problem or "TrainerNotStarted"
    pod = find_hindrance(gang)
    message = f"{cause}: {step.state.message}"
    suffix = f" (startDeadlineSeconds {seconds} is over)"
    failure = Failure(
        reason=cause,
        message=truncate(message, _MAX_MESSAGE - len(suffix)) + suffix,
        attempt=attempt,
        pod=pod.name if pod else None,
        node=pod.node if pod else None,
    )
    update = {"attempt": attempt, "pod_shape": step.status.pod_shape, "failure": failure, "completion_time": context.now}
    state = State(phase=Phase.FAILED, problem=reason, message=failure.message)
    return Step(state=state, status=status.model_copy(update=update), events=(_note(failure, action="Stop"),), requeue_after=0)


def _end_run(status: FineTuneJobStatus, failure: Failure, *, reason: str, why: str, at: datetime) -> Step:
    suffix = f" ({why})"
    message = truncate(f"{failure.reason}: {failure.message}", _MAX_MESSAGE - len(suffix)) + suffix
    return Step(
        state=State(phase=Phase.FAILED, problem=reason, message=message),
        status=status.model_copy(update={"completion_time": at}),
        events=(_note(failure, action="Fail"),),
    )


def _note(failure: Failure, *, action: str) -> EventNote:
    """Return the event of a failure, whose reason is the cause."""
    message = f"attempt {failure.attempt}: {failure.message}"
    return EventNote(type=EventType.WARNING, reason=failure.reason, action=action, message=message)

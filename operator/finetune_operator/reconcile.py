"""The one decision of the operator: what to do about a FineTuneJob, given all that was observed (pure).

Level-triggered: it looks at the state and never at the event that woke it, so a lost or repeated event changes nothing.
Every step that must not be forgotten (an attempt, a retry, an end) is in a child's name or in the status before the next one
builds on it.
"""

from dataclasses import replace
from datetime import datetime

from finetune_api.conditions import find_condition
from finetune_api.contract import compute_pod_shape
from finetune_api.v1alpha1 import Condition, Failure

from finetune_operator.admission import account_for_eviction, wait_for_admission
from finetune_operator.beginning import start_attempt
from finetune_operator.conclude import conclude
from finetune_operator.endings import complete, explain_retry, fail, fail_active_deadline, fail_start_deadline, find_published
from finetune_operator.observed import ChildState, ChildView, JobView, Observed
from finetune_operator.outcome import Outcome
from finetune_operator.policies.deadline import (
    DEADLINE,
    START_DEADLINE,
    compute_active_seconds_left,
    compute_start_seconds,
    compute_ttl_seconds,
    has_later_deadline,
)
from finetune_operator.policies.failure import classify_failure
from finetune_operator.policies.gang import Gang, find_root
from finetune_operator.policies.progress import describe_metric, find_last_word, find_report, merge_trainer_status
from finetune_operator.policies.refusal import explain_refusal
from finetune_operator.policies.retry import compute_retry_time
from finetune_operator.policies.usage import begin_attempt, begin_running, end_running
from finetune_operator.settings import TrainerSettings
from finetune_operator.state import Phase, State
from finetune_operator.steps import Context, Step, build_context, without_estimate
from finetune_operator.waiting import (
    compute_evidence_delay,
    explain_overdue,
    find_overdue,
    keep_state,
    shows_end,
    wait_for_end,
    wait_for_pods,
    wait_for_removal,
    wait_for_start,
)


def reconcile(job: JobView, observed: Observed, *, now: datetime, settings: TrainerSettings) -> Outcome:
    """Return everything that is to be done about one FineTuneJob."""
    if job.deleting:
        return Outcome()
    if job.spec is None:
        state = State(phase=Phase.INVALID, problem="InvalidSpec", message=job.spec_error or "the spec cannot be read")
        return conclude(job, Step(state=state, status=job.status), now=now, settings=settings)
    context = build_context(job, job.spec, observed, now=now, settings=settings)
    outcome = conclude(job, _limit_start(context, _decide(context)), now=now, settings=settings)
    return replace(outcome, adopt=tuple(child for child in observed.children if not child.is_owned and not child.deleting))


def refuse(job: JobView, observed: Observed, *, subject: str, message: str, now: datetime, settings: TrainerSettings) -> Outcome:
    """Return what is to be done about a job whose child the API server refuses to create, for example because of a quota."""
    assert job.spec is not None, "an unreadable spec has no child"
    context = build_context(job, job.spec, observed, now=now, settings=settings)
    problem, text = explain_refusal(message, subject=subject)
    state = State(phase=Phase.PENDING, problem=problem, message=text, scheduled=False)
    return conclude(job, _limit_start(context, Step(state=state, status=context.status)), now=now, settings=settings)


def _decide(context: Context) -> Step:
    strangers = tuple(child for child in context.observed.children if child.run != context.run)
    if strangers:
        return wait_for_removal(context, strangers, message="the pods of the previous run are being stopped")
    if context.has_ended(Phase.COMPLETE):
        return _stay(context, Phase.COMPLETE)
    if context.has_ended(Phase.FAILED):
        return _stay_failed(context)
    return _attend(context)


def _attend(context: Context) -> Step:
    """Decide on the newest attempt of a run that has not ended."""
    current = context.current
    if current is None or current.attempt < context.status.attempt:
        return _go_on(context)
    if current.attempt > context.status.attempt and context.status.running_since is not None:
        # The operator was killed before it wrote that the attempt before this one is over.
        gang = context.find_gang(context.status.attempt)
        context = replace(context, status=end_running(context.status, gang, now=current.created_at)[0])
    status = begin_attempt(context.status, attempt=current.attempt, pod_shape=current.pod_shape, snapshot=current.snapshot)
    context = replace(context, status=status)
    if current.deleting:
        return _wait_for_deletion(context, current)
    if current.state is ChildState.ACTIVE:
        return _watch(context, current)
    return _settle(context, current)


def _watch(context: Context, current: ChildView) -> Step:
    """Decide on an attempt that is under way, or that its queue holds."""
    if current.suspended:
        gang = context.find_gang(current.attempt)
        if report := find_published(gang.leader):
            return complete(context, gang=gang, report=report, ended_at=None)
    context, events = account_for_eviction(context, current)
    step = _hold(context, current) if current.suspended else _follow(context, current)
    return replace(step, events=(*events, *step.events))


def _hold(context: Context, current: ChildView) -> Step:
    """Decide on an attempt that its queue has not admitted, or has evicted."""
    if stopping := _stop(context, current):
        return stopping
    if any(pod.exit_code == 0 for pod in context.find_gang(current.attempt).pods) and not context.busy_pods:
        # The Job controller would run the others without it, and they need all.
        return wait_for_removal(context, (current,), message="the Job is being replaced, as a part of its pods has completed")
    if context.job.queue_request != current.queue_request and not context.busy_pods:
        return wait_for_removal(context, (current,), message="the Job is being replaced, as the queue or the priority changed")
    overdue, seconds = find_overdue(context)
    if overdue is not None:
        return Step(state=explain_overdue(overdue), status=without_estimate(context.status))
    return wait_for_admission(context, current).wake(seconds)


def _stop(context: Context, current: ChildView) -> Step | None:
    """Have an attempt stopped, if the user or a deadline wants that."""
    if _is_active_deadline_over(context):
        return _stop_at_deadline(context, current)
    if context.spec.suspend:
        return wait_for_removal(context, (current,), message="the pods are being stopped")
    if current.pod_shape != compute_pod_shape(context.spec):
        return wait_for_removal(
            context,
            (current,),
            message="the pods are being replaced, as spec.resources, accelerator, nodes or profileRef changed",
        )
    if current.is_resized:
        message = f"the pods are being replaced, as somebody changed the number of pods of Job {current.name}"
        return wait_for_removal(context, (current,), message=message)
    return None


def _follow(context: Context, current: ChildView) -> Step:
    """Decide on an attempt that may have its pods."""
    gang = context.find_gang(current.attempt)
    if gang.has_ended(current.nodes):
        return wait_for_end(context, current)
    context = replace(context, status=begin_running(context.status, gang))
    if stopping := _stop(context, current):
        return stopping
    overdue, seconds = find_overdue(context)
    if overdue is not None:
        return Step(state=explain_overdue(overdue), status=without_estimate(context.status))
    if not gang.is_complete(current.nodes):
        return wait_for_start(context, current, gang=gang).wake(seconds)
    return _run(context, current, gang=gang).wake(seconds)


def _run(context: Context, current: ChildView, *, gang: Gang) -> Step:
    """Show the progress of running trainers."""
    context = _show_progress(context, current)
    pod = gang.running[0]
    where = f"pod {pod.name} on node {pod.node}"
    pods = where if current.nodes == 1 else f"{current.nodes} pods, the first of them is {where}"
    state = State(phase=Phase.RUNNING, message=f"attempt {current.attempt} runs in {pods}")
    step = Step(state=state, status=context.status)
    return step.wake(compute_active_seconds_left(context.spec.run_policy, context.status, now=context.now))


def _show_progress(context: Context, current: ChildView) -> Context:
    """Return the status with the latest report of an attempt."""
    trainer_status = merge_trainer_status(context.status.trainer_status, context.observed, child=current)
    metric = (describe_metric(trainer_status.metrics) if trainer_status else None) or context.status.metric
    return context.update(trainer_status=trainer_status, metric=metric)


def _settle(context: Context, current: ChildView) -> Step:
    """Decide on an attempt that has ended, once its pod shows how."""
    failure = context.status.failure
    if failure and failure.attempt == current.attempt:
        return _go_on(context)
    gang = context.find_gang(current.attempt)
    report = find_report(context.observed, current, pod=gang.leader)
    is_published = current.state is ChildState.COMPLETE or find_published(gang.leader) is not None
    if is_published and report and report.output:
        return complete(context, gang=gang, report=report, ended_at=current.finished_at)
    if (waiting := compute_evidence_delay(context, current, gang=gang)) > 0:
        return Step(state=keep_state(context, current), status=context.status, requeue_after=waiting)
    root = find_root(gang)
    words = report if root is gang.leader else find_last_word(root)
    # What was reported since the last write: how far the attempt came.
    context = _show_progress(context, current)
    step = fail(context, current, verdict=classify_failure(current, root, report=words, spec=context.spec), gang=gang)
    # A watch that is deaf must not make a failure one that counts for nothing.
    return step if shows_end(current, gang=gang) else replace(step, confirm=current)


def _go_on(context: Context) -> Step:
    """Decide on the next attempt, when none is under way: all that must be true before it begins."""
    if context.status.running_since is not None:
        # The attempt left no failure: it was stopped, or somebody deleted its Job.
        gang = context.find_gang(context.status.attempt)
        if report := find_published(gang.leader):
            return complete(context, gang=gang, report=report, ended_at=None)
        if context.busy_pods:
            return wait_for_pods(context)
        context = replace(context, status=end_running(context.status, gang, now=context.now)[0])
    if _is_active_deadline_over(context):
        return fail_active_deadline(context, reason=DEADLINE)
    if context.busy_pods:
        return wait_for_pods(context)
    if context.spec.suspend:
        return _suspended(context)
    failure = context.status.failure
    if failure and failure.attempt == context.status.attempt:
        return _retry(context, failure)
    return start_attempt(context)


def _retry(context: Context, failure: Failure) -> Step:
    """Start the next attempt when its time has come; the failure is in the status already, or it would count twice."""
    settings = context.settings
    due = compute_retry_time(
        context.status,
        uid=context.job.uid,
        base_seconds=settings.retry_base_seconds,
        limit_seconds=settings.retry_limit_seconds,
    )
    seconds = (due - context.now).total_seconds() if due else 0.0
    if seconds <= 0:
        return start_attempt(context)
    return Step(state=explain_retry(context.status, failure), status=context.status, requeue_after=seconds)


def _stay_failed(context: Context) -> Step:
    """Keep a failed run as it is, unless the user gave it other resources, or more time when that was the cause."""
    ended = find_condition(context.status.conditions, Phase.FAILED.value)
    shape = context.status.pod_shape or (context.current.pod_shape if context.current else None)
    has_new_shape = shape is not None and shape != compute_pod_shape(context.spec)
    has_time = compute_active_seconds_left(context.spec.run_policy, context.status, now=context.now) != 0
    if context.spec.suspend or not has_time:
        return _stay(context, Phase.FAILED)
    if has_new_shape:
        return _revive(context.update(micro_batch_divisor=1))
    has_more_time = ended is not None and has_later_deadline(ended.reason, context.spec.run_policy, context.status)
    return _revive(context) if has_more_time else _stay(context, Phase.FAILED)


def _revive(context: Context) -> Step:
    """Start a failed run again, with all its retries, as soon as nothing is left of its last attempt that could still write."""
    revived = context.update(restarts=0, restarts_counted_towards_limit=0, failure=None, completion_time=None, pending_since=None)
    current = context.current
    if current is not None and current.attempt > context.status.attempt:
        # It was started already, by an operator that was killed before it wrote that.
        return _attend(revived)
    if context.busy_pods or any(child.state is ChildState.ACTIVE for child in context.attempts):
        return _stay(context, Phase.FAILED)
    step = start_attempt(revived)
    # Without an attempt of its own, the revived run must not take the last one for one that has just failed.
    return step if step.apply else replace(step, status=step.status.model_copy(update={"failure": context.status.failure}))


def _stay(context: Context, phase: Phase) -> Step:
    """Keep a finished run as it is, with only observedGeneration moving on, and its children until their time is over."""
    ended: Condition = next(each for each in context.status.conditions if each.type == phase.value)
    problem = ended.reason if phase is Phase.FAILED else None
    left = compute_ttl_seconds(context.spec.run_policy, context.status, now=context.now)
    step = Step(state=State(phase=phase, problem=problem, message=ended.message), status=context.status)
    # What did not start in time holds quota and accelerators for as long as it exists, and a queue may admit what it holds.
    removed = tuple(
        each
        for each in context.attempts
        if left == 0 or (each.state is ChildState.ACTIVE and (each.suspended or problem == START_DEADLINE))
    )
    step = replace(step, delete=tuple(child for child in removed if not child.deleting))
    return step.wake(left if left and context.attempts else None)


def _suspended(context: Context) -> Step:
    state = State(phase=Phase.SUSPENDED, message="spec.suspend is true; set it to false to go on")
    return Step(state=state, status=without_estimate(context.status))


def _stop_at_deadline(context: Context, current: ChildView) -> Step:
    seconds = context.spec.run_policy.active_deadline_seconds
    message = f"activeDeadlineSeconds {seconds} is reached; the trainer saves its state and is stopped"
    return wait_for_removal(context, (current,), message=message, problem=DEADLINE)


def _wait_for_deletion(context: Context, current: ChildView) -> Step:
    """Wait for the pods of an attempt that is being deleted; a model that it still publishes counts."""
    gang = context.find_gang(current.attempt)
    if report := find_published(gang.leader):
        return complete(context, gang=gang, report=report, ended_at=current.finished_at)
    context = replace(context, status=begin_running(context.status, gang))
    if _is_active_deadline_over(context):
        return _stop_at_deadline(context, current)
    return wait_for_removal(context, (current,), message="the pods of the previous attempt are being stopped")


def _is_active_deadline_over(context: Context) -> bool:
    """Return whether the trainers have used their time, or are being stopped for that."""
    left = compute_active_seconds_left(context.spec.run_policy, context.status, now=context.now)
    return left is not None and (left == 0 or context.is_shown_as(DEADLINE))


def _limit_start(context: Context, step: Step) -> Step:
    """Give up an attempt that has waited for too long, or look again when it has."""
    if step.state.phase is not Phase.PENDING or not step.state.is_start:
        return step
    left = compute_start_seconds(context.spec.run_policy, step.status, now=context.now)
    if left == 0:
        return fail_start_deadline(context, _recall_refusal(context, step), reason=START_DEADLINE)
    return step.wake(left)


def _recall_refusal(context: Context, step: Step) -> Step:
    """Return a step that would create a Job with the state that the last try of it has led to, as that has the cause."""
    ready = find_condition(context.status.conditions, "Ready")
    if not step.apply or ready is None or ready.reason in set(Phase):
        return step
    return replace(step, state=State(phase=Phase.PENDING, problem=ready.reason, message=ready.message, scheduled=False))

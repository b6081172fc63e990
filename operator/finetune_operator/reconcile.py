"""The one decision of the operator: what to do about a FineTuneJob, given all that was observed (pure).

Level-triggered: it looks at the state and never at the event that woke it, so a lost or repeated event changes nothing.
Every step that must not be forgotten (an attempt, a retry, an end) is in a child's name or in the status before the next one
builds on it.
"""

from dataclasses import replace
from datetime import datetime, timedelta

from finetune_api import names
from finetune_api.conditions import find_condition
from finetune_api.contract import compute_pod_shape
from finetune_api.v1alpha1 import Condition, Failure

from finetune_operator.conclude import conclude
from finetune_operator.endings import complete, explain_retry, fail, fail_active_deadline, fail_start_deadline, find_published
from finetune_operator.manifests.job import build_job
from finetune_operator.observed import ChildState, ChildView, JobView, Observed, PodView
from finetune_operator.outcome import Outcome
from finetune_operator.policies.deadline import compute_active_seconds_left, compute_start_seconds, compute_ttl_seconds
from finetune_operator.policies.failure import NODE_LOST, classify_failure
from finetune_operator.policies.pending import explain_pending
from finetune_operator.policies.progress import describe_metric, find_report, merge_trainer_status
from finetune_operator.policies.refusal import explain_refusal
from finetune_operator.policies.retry import compute_retry_time
from finetune_operator.policies.usage import begin_running, end_running
from finetune_operator.settings import TrainerSettings
from finetune_operator.state import Phase, State
from finetune_operator.steps import Context, Step, build_context, without_estimate

DEADLINE = "DeadlineExceeded"
START_DEADLINE = "StartDeadlineExceeded"

# The kubelet reports a stopped pod within a moment; after this it does not answer.
_OVERDUE_SECONDS = 5
# The Job controller creates a pod within a second, or an event that tells why it cannot.
_INSPECT_SECONDS = 2
_INSPECT_LIMIT_SECONDS = 60


def reconcile(job: JobView, observed: Observed, *, now: datetime, settings: TrainerSettings) -> Outcome:
    """Return everything that is to be done about one FineTuneJob."""
    if job.deleting:
        return Outcome()
    if job.spec is None:
        state = State(phase=Phase.INVALID, problem="InvalidSpec", message=job.spec_error or "the spec cannot be read")
        return conclude(job, Step(state=state, status=job.status), now=now, settings=settings)
    context = build_context(job, job.spec, observed, now=now, settings=settings)
    return conclude(job, _limit_start(context, _decide(context)), now=now, settings=settings)


def refuse(job: JobView, observed: Observed, *, child: str, message: str, now: datetime, settings: TrainerSettings) -> Outcome:
    """Return what is to be done about a job whose child the API server refuses to create, for example because of a quota."""
    assert job.spec is not None, "an unreadable spec has no child"
    context = build_context(job, job.spec, observed, now=now, settings=settings)
    problem, text = explain_refusal(message, subject=f"Job {child}")
    state = State(phase=Phase.PENDING, problem=problem, message=text, scheduled=False)
    return conclude(job, _limit_start(context, Step(state=state, status=context.status)), now=now, settings=settings)


def _decide(context: Context) -> Step:
    strangers = tuple(child for child in context.observed.children if child.run != context.run)
    if strangers:
        return _wait_for_removal(context, strangers, message="the pods of the previous run are being stopped")
    if context.has_ended(Phase.COMPLETE):
        return _stay(context, Phase.COMPLETE)
    if context.has_ended(Phase.FAILED):
        return _stay_failed(context)
    current = context.current
    if current is None or current.attempt < context.status.attempt:
        return _go_on(context)
    context = context.update(attempt=current.attempt, pod_shape=current.pod_shape)
    if current.deleting:
        return _wait_for_deletion(context, current)
    if current.state is ChildState.ACTIVE:
        return _watch(context, current)
    return _settle(context, current)


def _watch(context: Context, current: ChildView) -> Step:
    """Decide on an attempt that is under way."""
    pod = context.find_pod(current.attempt)
    if pod is not None and pod.is_ended:
        return Step(state=_keep_state(context, current), status=context.status)
    if pod is not None:
        context = replace(context, status=begin_running(context.status, pod))
    if _is_active_deadline_over(context):
        return _stop_at_deadline(context, current)
    if context.spec.suspend:
        return _wait_for_removal(context, (current,), message="the pods are being stopped")
    if current.pod_shape != compute_pod_shape(context.spec.resources):
        return _wait_for_removal(context, (current,), message="the pods are being replaced, as spec.resources changed")
    if pod is None or pod.phase == "Pending" or pod.started_at is None:
        return _wait_for_start(context, current, pod=pod)
    return _run(context, current, pod=pod)


def _run(context: Context, current: ChildView, *, pod: PodView) -> Step:
    """Show the progress of a running trainer."""
    overdue, seconds = _find_overdue(context)
    if overdue is not None:
        return Step(state=_explain_overdue(overdue), status=without_estimate(context.status))
    trainer_status = merge_trainer_status(context.status.trainer_status, context.observed, child=current)
    metric = (describe_metric(trainer_status.metrics) if trainer_status else None) or context.status.metric
    state = State(phase=Phase.RUNNING, message=f"attempt {current.attempt} runs in pod {pod.name} on node {pod.node}")
    step = Step(state=state, status=context.update(trainer_status=trainer_status, metric=metric).status)
    return step.wake(seconds, compute_active_seconds_left(context.spec.run_policy, context.status, now=context.now))


def _wait_for_start(context: Context, current: ChildView, *, pod: PodView | None) -> Step:
    """Tell what an attempt waits for; without a pod, the events of its Job may know."""
    found = context.observed.refusal
    refusal = found if found and found.child_uid == current.uid and pod is None else None
    state = explain_pending(pod, spec=context.spec, refusal=refusal.message if refusal else None, child=current.name)
    step = Step(state=state, status=without_estimate(context.status))
    if pod is not None:
        return step
    # At 2, 4, 8, 16 ... seconds: the cause may change while a quota or a policy is being mended.
    checked_at = refusal.checked_at if refusal else current.created_at
    age = (checked_at - current.created_at).total_seconds()
    due = checked_at + timedelta(seconds=min(max(_INSPECT_SECONDS, age), _INSPECT_LIMIT_SECONDS))
    seconds = (due - context.now).total_seconds()
    return step.wake(seconds) if seconds > 0 else replace(step, inspect=current)


def _settle(context: Context, current: ChildView) -> Step:
    """Decide on an attempt that has ended, once its pod shows how."""
    failure = context.status.failure
    if failure and failure.attempt == current.attempt:
        return _go_on(context)
    pod = context.find_pod(current.attempt)
    report = find_report(context.observed, current, pod=pod)
    if current.state is ChildState.COMPLETE and report and report.output:
        return complete(context, pod=pod, report=report, ended_at=current.finished_at)
    if (waiting := _evidence_delay(context, current, pod=pod)) > 0:
        return Step(state=_keep_state(context, current), status=context.status, requeue_after=waiting)
    return fail(context, current, verdict=classify_failure(current, pod, report=report, spec=context.spec), pod=pod)


def _go_on(context: Context) -> Step:
    """Decide on the next attempt, when none is under way: all that must be true before it begins."""
    if context.status.running_since is not None:
        # The attempt left no failure: it was stopped, or somebody deleted its Job.
        pod = context.find_pod(context.status.attempt)
        if report := find_published(pod):
            return complete(context, pod=pod, report=report, ended_at=None)
        if context.busy_pods:
            return _wait_for_pods(context)
        context = replace(context, status=end_running(context.status, pod, now=context.now)[0])
    if _is_active_deadline_over(context):
        return fail_active_deadline(context, reason=DEADLINE)
    if context.busy_pods:
        return _wait_for_pods(context)
    if context.spec.suspend:
        return _suspended(context)
    failure = context.status.failure
    if failure and failure.attempt == context.status.attempt:
        return _retry(context, failure)
    return _start_attempt(context)


def _retry(context: Context, failure: Failure) -> Step:
    """Start the next attempt when its time has come; the failure is in the status already, or it would count twice."""
    settings = context.settings
    due = compute_retry_time(context.status, base_seconds=settings.retry_base_seconds, limit_seconds=settings.retry_limit_seconds)
    seconds = (due - context.now).total_seconds() if due else 0.0
    if seconds <= 0:
        return _start_attempt(context)
    return Step(state=explain_retry(context.status, failure), status=context.status, requeue_after=seconds)


def _start_attempt(context: Context) -> Step:
    attempt = context.status.attempt + 1
    previous = names.child_name(context.job.name, context.run, context.status.attempt)
    kept = {child.name for child in context.attempts}
    manifest = build_job(
        context.job,
        context.spec,
        attempt=attempt,
        micro_batch_divisor=context.status.micro_batch_divisor,
        settings=context.settings,
    )
    shape = compute_pod_shape(context.spec.resources)
    return Step(
        state=explain_pending(None, spec=context.spec),
        status=without_estimate(context.update(attempt=attempt, pod_shape=shape).status),
        absent=(previous,) if context.status.attempt and previous not in kept else (),
        apply=(manifest,),
    )


def _stay_failed(context: Context) -> Step:
    """Keep a failed run as it is, unless the user gave it other resources or more time."""
    shape, policy = context.status.pod_shape, context.spec.run_policy
    shape = context.current.pod_shape if shape is None and context.current else shape
    ended = find_condition(context.status.conditions, Phase.FAILED.value)
    if context.spec.suspend:
        return _stay(context, Phase.FAILED)
    if shape is not None and shape != compute_pod_shape(context.spec.resources):
        return _revive(context.update(active_seconds=0, micro_batch_divisor=1))
    if ended and ended.reason == DEADLINE and compute_active_seconds_left(policy, context.status, now=context.now) != 0:
        return _revive(context)
    return _stay(context, Phase.FAILED)


def _revive(context: Context) -> Step:
    """Start a failed run again, with all its retries, as soon as nothing is left of its last attempt that could still write."""
    if context.busy_pods or any(child.state is ChildState.ACTIVE for child in context.attempts):
        return _stay(context, Phase.FAILED)
    attempt = max(context.status.attempt, context.current.attempt if context.current else 0)
    context = context.update(attempt=attempt, restarts=0, restarts_counted_towards_limit=0, failure=None, completion_time=None)
    return _start_attempt(context)


def _stay(context: Context, phase: Phase) -> Step:
    """Keep a finished run as it is, with only observedGeneration moving on, and its children until their time is over."""
    ended: Condition = next(each for each in context.status.conditions if each.type == phase.value)
    problem = ended.reason if phase is Phase.FAILED else None
    left = compute_ttl_seconds(context.spec.run_policy, context.status, now=context.now)
    step = Step(state=State(phase=phase, problem=problem, message=ended.message), status=context.status)
    # What did not start in time holds quota and accelerators for as long as it exists.
    removed = context.attempts if left == 0 else tuple(each for each in context.attempts if each.state is ChildState.ACTIVE)
    if left == 0 or problem == START_DEADLINE:
        return replace(step, delete=tuple(child for child in removed if not child.deleting))
    return step.wake(left if context.attempts else None)


def _suspended(context: Context) -> Step:
    state = State(phase=Phase.SUSPENDED, message="spec.suspend is true; set it to false to go on")
    return Step(state=state, status=without_estimate(context.status))


def _stop_at_deadline(context: Context, current: ChildView) -> Step:
    seconds = context.spec.run_policy.active_deadline_seconds
    message = f"activeDeadlineSeconds {seconds} is reached; the trainer saves its state and is stopped"
    return _wait_for_removal(context, (current,), message=message, problem=DEADLINE)


def _wait_for_deletion(context: Context, current: ChildView) -> Step:
    """Wait for the pods of an attempt that is being deleted; a model that it still publishes counts."""
    pod = context.find_pod(current.attempt)
    if report := find_published(pod):
        return complete(context, pod=pod, report=report, ended_at=current.finished_at)
    if pod is not None:
        context = replace(context, status=begin_running(context.status, pod))
    if _is_active_deadline_over(context):
        return _stop_at_deadline(context, current)
    return _wait_for_removal(context, (current,), message="the pods of the previous attempt are being stopped")


def _wait_for_removal(context: Context, children: tuple[ChildView, ...], *, message: str, problem: str | None = None) -> Step:
    """Have children deleted, which ends their pods by SIGTERM first, and wait until they are gone."""
    phase = Phase.SUSPENDING if context.spec.suspend and problem is None else Phase.PENDING
    state = State(phase=phase, problem=problem, message=message, scheduled=False, is_start=False)
    overdue, seconds = _find_overdue(context)
    return Step(
        state=state if overdue is None else replace(_explain_overdue(overdue), phase=phase, problem=problem or NODE_LOST),
        status=without_estimate(context.status),
        delete=tuple(child for child in children if not child.deleting),
        requeue_after=seconds,
    )


def _wait_for_pods(context: Context) -> Step:
    """Wait for pods whose Job is gone or has ended, as two trainers must never write to one folder."""
    pods = ", ".join(pod.name for pod in context.busy_pods)
    return _wait_for_removal(context, (), message=f"the next attempt waits until pod {pods} has stopped")


def _find_overdue(context: Context) -> tuple[PodView | None, float | None]:
    """Return a pod that should have stopped by now, or in how many seconds one could become such."""
    dues = sorted(
        ((pod.deletion_due + timedelta(seconds=_OVERDUE_SECONDS), pod) for pod in context.busy_pods if pod.deletion_due),
        key=lambda pair: pair[0],
    )
    if not dues:
        return None, None
    due, pod = dues[0]
    seconds = (due - context.now).total_seconds()
    return (pod, None) if seconds <= 0 else (None, seconds)


def _explain_overdue(pod: PodView) -> State:
    message = (
        f"node {pod.node} does not confirm that pod {pod.name} has stopped, and the next attempt must not write beside it: bring "
        "the node back, or delete its Node object if the machine is gone"
    )
    return State(phase=Phase.PENDING, problem=NODE_LOST, message=message, scheduled=True, is_start=False)


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
        return fail_start_deadline(context, step, reason=START_DEADLINE)
    return step.wake(left)


def _keep_state(context: Context, current: ChildView) -> State:
    """Return Running if that is what is shown: a moment of waiting for evidence is no transition."""
    ready = find_condition(context.status.conditions, "Ready")
    if ready is not None and ready.reason == Phase.RUNNING.value:
        return State(phase=Phase.RUNNING, message=ready.message)
    message = f"attempt {current.attempt} has ended; waiting for its pod to show how"
    return State(phase=Phase.PENDING, message=message, scheduled=True, is_start=False)


def _evidence_delay(context: Context, child: ChildView, *, pod: PodView | None) -> float:
    """Return for how long the pod's last status may still be on its way."""
    if pod is not None and pod.is_ended:
        return 0
    elapsed = (context.now - (child.finished_at or context.now)).total_seconds()
    return max(0.0, context.settings.evidence_seconds - elapsed)

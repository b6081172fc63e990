"""Turn a step into effects: the whole status if it changed, its events, and when to look again (pure)."""

from datetime import datetime

from finetune_api.conditions import find_condition
from finetune_api.v1alpha1 import FineTuneJobStatus

from finetune_operator.observed import JobView
from finetune_operator.outcome import Deletion, EventNote, EventType, Outcome
from finetune_operator.policies.deadline import START_DEADLINE
from finetune_operator.policies.progress import compute_progress_delay, is_only_progress
from finetune_operator.settings import TrainerSettings
from finetune_operator.state import Phase, State, build_conditions
from finetune_operator.steps import Step


def conclude(job: JobView, step: Step, *, now: datetime, settings: TrainerSettings) -> Outcome:
    """Return the effects of a step."""
    status = _finish_status(job, step, now=now)
    delay = compute_progress_delay(job.status, status, now=now, interval_seconds=settings.progress_seconds)
    is_changed = status != job.status
    is_written = is_changed and not delay
    events = (*step.events, *_note_transition(job.status, step.state))
    return Outcome(
        confirm=step.confirm,
        delete=tuple(Deletion(name=each.name, uid=each.uid, resource_version=each.resource_version) for each in step.delete),
        absent=step.absent,
        apply=step.apply,
        status=status if is_written else None,
        is_only_progress=is_written and not events and is_only_progress(job.status, status),
        events=events,
        inspect=step.inspect,
        requeue_after=step.wake(delay if is_changed and delay else None).requeue_after,
    )


def _finish_status(job: JobView, step: Step, *, now: datetime) -> FineTuneJobStatus:
    """Return the status with its conditions, and with the time since when the attempt waits, for as long as it does.

    A run that ended by that keeps the time: it tells whether a later deadline gives more of it.
    """
    is_waiting = step.state.phase is Phase.PENDING and step.state.is_start
    has_waited = step.state.phase is Phase.FAILED and step.state.problem == START_DEADLINE
    update = {
        "observed_generation": job.generation,
        "conditions": build_conditions(step.status.conditions, step.state, generation=job.generation, now=now),
        "pending_since": (step.status.pending_since or now) if is_waiting else step.status.pending_since if has_waited else None,
    }
    return step.status.model_copy(update=update)


def _note_transition(old: FineTuneJobStatus, state: State) -> tuple[EventNote, ...]:
    """Return an event when the STATE changes; a problem or a failure is a warning."""
    ready = find_condition(old.conditions, "Ready")
    if ready is not None and ready.reason == state.reason:
        return ()
    is_bad = state.phase in (Phase.FAILED, Phase.INVALID) or (state.phase is Phase.PENDING and state.problem is not None)
    kind = EventType.WARNING if is_bad else EventType.NORMAL
    return (EventNote(type=kind, reason=state.reason, action="Reconcile", message=state.message),)

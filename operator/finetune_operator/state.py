"""The state of a FineTuneJob, and the conditions that tell it (pure).

Ready, Stalled and observedGeneration follow kstatus, so that `kubectl wait`, Flux and Argo CD read the state right:
https://github.com/kubernetes-sigs/cli-utils/blob/master/pkg/kstatus/README.md
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from finetune_api.conditions import set_condition
from finetune_api.v1alpha1 import Condition


class Phase(StrEnum):
    """What a FineTuneJob is doing, for our own decisions; users see conditions."""

    QUEUED = "Queued"
    PENDING = "Pending"
    RETRYING = "Retrying"
    RUNNING = "Running"
    SUSPENDING = "Suspending"
    SUSPENDED = "Suspended"
    COMPLETE = "Complete"
    FAILED = "Failed"
    INVALID = "InvalidSpec"


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """A phase with its cause: what the STATE column and the messages say."""

    phase: Phase
    message: str
    problem: str | None = None
    """One CamelCase word for what is wrong, such as Unschedulable, ImagePullBackOff or OOMKilled."""
    scheduled: bool | None = None
    """Whether the pod has a node; None when there is no pod."""
    is_start: bool = True
    """Whether a pending state is a part of the attempt's start, for which startDeadlineSeconds is the limit."""

    @property
    def reason(self) -> str:
        """Return the reason of Ready: the STATE column. A pending job shows its problem, as `kubectl get pods` does."""
        return self.problem if self.phase in (Phase.PENDING, Phase.INVALID) and self.problem else self.phase.value


def build_conditions(previous: Sequence[Condition], state: State, *, generation: int, now: datetime) -> tuple[Condition, ...]:
    """Return all conditions for a state. Every type is there from the first write on."""
    cause = state.problem or state.phase.value
    values: tuple[tuple[str, bool | None, str], ...] = (
        ("Ready", state.phase is Phase.COMPLETE, state.reason),
        ("Stalled", state.phase in (Phase.FAILED, Phase.INVALID), cause),
        ("Suspended", state.phase is Phase.SUSPENDED, state.phase.value),
        ("Scheduled", _is_scheduled(state), cause if state.phase is Phase.PENDING else state.phase.value),
        ("Running", state.phase is Phase.RUNNING, cause),
        ("Complete", state.phase is Phase.COMPLETE, cause),
        ("Failed", state.phase is Phase.FAILED, cause),
    )
    conditions = tuple(previous)
    for kind, status, reason in values:
        conditions = set_condition(
            conditions, kind, status=status, reason=reason, message=state.message, generation=generation, now=now
        )
    return conditions


def _is_scheduled(state: State) -> bool | None:
    return True if state.phase is Phase.RUNNING else state.scheduled if state.phase is Phase.PENDING else False

"""Semantics of metav1.Condition (pure)."""

from collections.abc import Sequence
from datetime import datetime

from finetune_api.v1alpha1 import Condition, ConditionStatus

MAX_MESSAGE_LENGTH = 1024


def set_condition(
    conditions: Sequence[Condition], type: str, *, status: bool | None, reason: str, message: str, generation: int, now: datetime
) -> tuple[Condition, ...]:
    """Return the conditions with one replaced or added; None as status means Unknown.

    lastTransitionTime changes only when status does. Source:
    https://github.com/kubernetes/community/blob/master/contributors/devel/sig-architecture/api-conventions.md#typical-status-properties
    """
    value = {True: ConditionStatus.TRUE, False: ConditionStatus.FALSE, None: ConditionStatus.UNKNOWN}[status]
    previous = find_condition(conditions, type)
    changed = previous is None or previous.status is not value
    condition = Condition(
        type=type,
        status=value,
        reason=reason,
        message=truncate(message, MAX_MESSAGE_LENGTH),
        last_transition_time=now if changed or previous is None else previous.last_transition_time,
        observed_generation=generation,
    )
    if previous is None:
        return (*conditions, condition)
    return tuple(condition if each.type == type else each for each in conditions)


def find_condition(conditions: Sequence[Condition], type: str) -> Condition | None:
    """Return the condition of this type, or None."""
    return next((condition for condition in conditions if condition.type == type), None)


def is_true(conditions: Sequence[Condition], type: str) -> bool:
    """Return whether the condition of this type is present and True."""
    condition = find_condition(conditions, type)
    return condition is not None and condition.status is ConditionStatus.TRUE


def truncate(text: str, length: int) -> str:
    """Return the text, cut to a length with an ellipsis at its end."""
    return text if len(text) <= length else text[: length - 3] + "..."

"""Conditions as metav1.Condition means them."""

from datetime import UTC, datetime, timedelta

import pytest
from finetune_api.conditions import MAX_MESSAGE_LENGTH, find_condition, is_true, set_condition, truncate
from finetune_api.v1alpha1 import Condition, ConditionStatus

_THEN = datetime(2026, 1, 1, tzinfo=UTC)
_NOW = _THEN + timedelta(minutes=5)


def _set(
    conditions: tuple[Condition, ...] = (),
    type: str = "Ready",
    *,
    status: bool | None = False,
    reason: str = "Pending",
    message: str = "waiting",
    generation: int = 1,
    now: datetime = _THEN,
) -> tuple[Condition, ...]:
    return set_condition(conditions, type, status=status, reason=reason, message=message, generation=generation, now=now)


@pytest.mark.parametrize(("status", "expected"), [(True, "True"), (False, "False"), (None, "Unknown")])
def test_status_is_one_of_three_words(*, status: bool | None, expected: str) -> None:
    (condition,) = _set(status=status)

    assert ConditionStatus(expected) is condition.status


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        pytest.param(True, _NOW, id="changed status"),
        pytest.param(None, _NOW, id="unknown is a change too"),
        pytest.param(False, _THEN, id="same status, other reason and message"),
    ],
)
def test_transition_time_moves_only_with_the_status(*, status: bool | None, expected: datetime) -> None:
    (condition,) = _set(_set(), status=status, reason="Other", message="other", generation=2, now=_NOW)

    assert expected == condition.last_transition_time
    assert ("Other", "other", 2) == (condition.reason, condition.message, condition.observed_generation)


def test_other_conditions_stay_in_their_order() -> None:
    before = _set(_set(_set(type="A"), type="B"), type="C")
    after = _set(before, "B", status=True)

    assert ["A", "B", "C"] == [each.type for each in after]
    assert (before[0], before[2]) == (after[0], after[2])


def test_inputs_are_not_changed() -> None:
    before = _set()
    _set(before, status=True)

    assert before == _set()


def test_the_same_again_changes_nothing() -> None:
    assert _set() == _set(_set(), now=_NOW)


def test_long_messages_are_cut() -> None:
    (condition,) = _set(message="x" * 5000)

    assert MAX_MESSAGE_LENGTH == len(condition.message)
    assert condition.message.endswith("...")


@pytest.mark.parametrize(
    ("text", "length", "expected"),
    [("", 5, ""), ("12345", 5, "12345"), ("123456", 5, "12..."), ("abc", 3, "abc")],
)
def test_truncate(text: str, length: int, expected: str) -> None:
    assert expected == truncate(text, length)


def test_find_and_is_true() -> None:
    conditions = _set(_set(type="Complete", status=True), type="Running", status=None)

    assert "Complete" == getattr(find_condition(conditions, "Complete"), "type", None)
    assert find_condition(conditions, "Failed") is None
    assert [True, False, False] == [is_true(conditions, name) for name in ("Complete", "Running", "Failed")]

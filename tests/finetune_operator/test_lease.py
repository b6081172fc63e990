"""Who leads, by what is seen of the Lease."""

from dataclasses import replace
from typing import Any

import pytest
from finetune_operator.lease import (
    Action,
    Claim,
    Sight,
    Timing,
    build_claim,
    build_lease,
    decide,
    observe,
    read_claim,
    release,
)

_TIMING = Timing(lease_seconds=15, renew_seconds=10, retry_seconds=2)
_MINE = Claim(holder="a", acquired_at="t1", renewed_at="t1", lease_seconds=15, transitions=3, report_url="https://10.0.0.1:10443")
_THEIRS = replace(_MINE, holder="b", acquired_at="t2")
_RELEASED = release(_THEIRS, time="t3")


@pytest.mark.parametrize(
    ("claim", "now", "action"),
    [
        pytest.param(_THEIRS, 114.9, Action.WAIT, id="held by another"),
        pytest.param(_THEIRS, 115.0, Action.TAKE, id="not renewed for the whole time"),
        pytest.param(_RELEASED, 100.0, Action.TAKE, id="released by its holder"),
        pytest.param(None, 114.9, Action.WAIT, id="missing: its holder may still write"),
        pytest.param(None, 115.0, Action.TAKE, id="missing for the whole time"),
        pytest.param(replace(_THEIRS, holder=""), 114.9, Action.WAIT, id="cleared by somebody else"),
        pytest.param(replace(_THEIRS, holder=""), 115.0, Action.TAKE, id="cleared for the whole time"),
        pytest.param(replace(_THEIRS, holder="a"), 114.9, Action.WAIT, id="given to us by somebody else"),
        pytest.param(replace(_THEIRS, lease_seconds=40), 139.9, Action.WAIT, id="another's longer time counts"),
        pytest.param(replace(_THEIRS, lease_seconds=40), 140.0, Action.TAKE, id="another's longer time is over"),
        pytest.param(replace(_THEIRS, lease_seconds=1), 114.9, Action.WAIT, id="another's shorter time does not count"),
        pytest.param(replace(_THEIRS, lease_seconds=10**9), 700.0, Action.TAKE, id="nobody waits for ever"),
    ],
)
def test_candidate_takes_what_is_free(claim: Claim | None, now: float, action: Action) -> None:
    sight = Sight(claim=claim, since=100.0)

    assert action is decide(sight, hold=None, valid_until=None, now=now, timing=_TIMING, may_take=True)
    assert Action.WAIT is decide(sight, hold=None, valid_until=None, now=now, timing=_TIMING, may_take=False)


@pytest.mark.parametrize(
    ("claim", "now", "action"),
    [
        pytest.param(_MINE, 109.0, Action.RENEW, id="ours"),
        pytest.param(_MINE, 110.0, Action.LOST, id="not renewed in time"),
        pytest.param(replace(_MINE, renewed_at="x", transitions=9, lease_seconds=99), 109.0, Action.RENEW, id="edited, but ours"),
        pytest.param(None, 109.0, Action.RENEW, id="deleted: others wait, so it is made again"),
        pytest.param(_THEIRS, 109.0, Action.LOST, id="another's"),
        pytest.param(replace(_MINE, holder=""), 109.0, Action.LOST, id="cleared"),
        pytest.param(replace(_MINE, acquired_at="t9"), 109.0, Action.LOST, id="our name, not our mark"),
    ],
)
def test_leader_stays_while_the_lease_is_its_own(claim: Claim | None, now: float, action: Action) -> None:
    sight = Sight(claim=claim, since=100.0)

    assert action is decide(sight, hold=_MINE, valid_until=110.0, now=now, timing=_TIMING, may_take=True)


def test_claim_whose_answer_was_lost_is_confirmed_by_another_write() -> None:
    sight = Sight(claim=_MINE, since=100.0)

    assert Action.RENEW is decide(sight, hold=_MINE, valid_until=None, now=101.0, timing=_TIMING, may_take=True)
    assert Action.WAIT is decide(
        sight, hold=replace(_MINE, acquired_at="t0"), valid_until=None, now=101.0, timing=_TIMING, may_take=True
    )


def _raw(claim: Claim, version: str = "7") -> dict[str, Any]:
    return build_lease(
        claim,
        namespace="finetune",
        name="op",
        base={"metadata": {"name": "op", "resourceVersion": version, "labels": {"a": "b"}}},
    )


def test_time_runs_from_the_last_change_of_the_content() -> None:
    first = observe(None, _raw(_THEIRS), now=100.0)
    annotated = observe(first, _raw(_THEIRS, version="8"), now=105.0)
    renewed = observe(annotated, _raw(replace(_THEIRS, renewed_at="t4")), now=106.0)
    gone = observe(renewed, None, now=107.0)

    assert [100.0, 100.0, 106.0, 107.0] == [each.since for each in (first, annotated, renewed, gone)]
    assert annotated.raw is not None
    assert "8" == annotated.raw["metadata"]["resourceVersion"]


@pytest.mark.parametrize("claim", [_MINE, _RELEASED])
def test_lease_carries_the_claim_and_keeps_what_others_wrote(claim: Claim) -> None:
    lease = _raw(claim)

    assert claim == read_claim(lease)
    assert ("7", {"a": "b"}) == (lease["metadata"]["resourceVersion"], lease["metadata"]["labels"])


def test_empty_lease_is_nobodys() -> None:
    assert "" == read_claim({"metadata": {}}).holder
    assert not read_claim({"metadata": {}}).is_released


def test_every_new_holder_is_counted() -> None:
    sight = Sight(claim=_RELEASED, since=0.0)
    claim = build_claim(sight, identity="a", report_url="https://a", time="t5", timing=_TIMING)

    assert (4, "a", "https://a") == (claim.transitions, claim.holder, claim.report_url)

"""Faults of watches and of what lags behind, at the real API server: nothing is missed for good, and nothing done twice."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from fault_life import await_state, run_attempt
from fault_proxy import Expire, Fault, FaultProxy, Match, Swallow
from fault_trials import Act, Stage, Trials
from harness import Team, wait_until

pytestmark = pytest.mark.apiserver

_KINDS = ("finetunejobs", "jobs", "pods")
_TYPES = ("ADDED", "MODIFIED", "DELETED")
_STEPS = ("running", "retried", "suspended", "resumed", "complete")
# An audit every second or so, which gives a change four seconds to arrive.
_AUDITED = {"audit_seconds": "1", "deaf_seconds": "4"}
# A watch that misses a change ends the operator, which is started again.
_DEAF = 1


@contextmanager
def _cutting(proxy: FaultProxy, seconds: float) -> Iterator[list[int]]:
    """Cut all watches at intervals for as long as the block runs."""
    is_over = threading.Event()
    cut: list[int] = []

    def work() -> None:
        while not is_over.wait(seconds):
            cut.append(proxy.cut_watches())

    thread = threading.Thread(target=work, name="cutter", daemon=True)
    thread.start()
    try:
        yield cut
    finally:
        is_over.set()
        thread.join(60)


def _cut_every_second(stage: Stage) -> int:
    with _cutting(stage.proxy, 1) as cut:
        stage.live()
    assert sum(cut) > 4
    return sum(cut)


def _expire(stage: Stage) -> int:
    """What is deleted before the list is in none of its events."""
    expired = Fault(match=Match(verb="watch"), action=Expire(), every=2, times=None)
    stage.proxy.plan(expired)
    stage.restart_on(_DEAF)
    with _cutting(stage.proxy, 2):
        stage.live()
    assert expired.struck > 4
    return expired.struck


def _swallow(**which: Any) -> Act:
    """Return an act in which events of watches do not arrive; an audit finds it, or ends the operator, which begins anew."""

    def act(stage: Stage) -> int:
        swallow = Swallow(**which)
        stage.proxy.swallow(swallow)
        stage.restart_on(_DEAF)
        stage.live()
        return len(swallow.swallowed)

    return act


def _fall_silent(resource: str) -> Act:
    """Return an act in which a watch stays open and says nothing more, until the operator has given it up."""

    def act(stage: Stage) -> int:
        stage.restart_on(_DEAF, heal=True)
        stage.live(after_step=lambda step: stage.proxy.freeze_watches(resource) if step == "running" else None)
        return 1

    return act


def _lag(step: str, *, back: int) -> Act:
    """Return an act in which the operator starts with lists that are some steps old; after a while the server catches up."""

    def act(stage: Stage) -> int:
        team, keeper, proxy = stage.team, stage.keeper, stage.proxy
        versions = [_read_version(team)]

        def fall_behind(now: str) -> None:
            versions.append(_read_version(team))
            if now != step:
                return
            proxy.pin(versions[max(0, len(versions) - 1 - back)])
            num_exits = len(keeper.exits)
            keeper.kill()
            wait_until(lambda: len(keeper.exits) > num_exits, what="it is dead")
            stage.operator.wait_until_ready()
            # Time to do something wrong in; a slow machine only makes the test weaker.
            threading.Event().wait(5)
            proxy.heal()

        stage.restart_on(-9)
        stage.live(after_step=fall_behind)
        return 1

    return act


def _meet_a_successor(stage: Stage) -> int:
    """Lists and watches show a FineTuneJob that was deleted and created again since, with the attempts of the first."""
    team, operator, proxy = stage.team, stage.operator, stage.proxy
    operator.start()
    team.apply()
    run_attempt(team, 1)
    version = _read_version(team)
    team.api.delete(team.path("finetunejobs", "emoji"))
    wait_until(lambda: not team.children(), what="the first one's Job is gone")
    team.apply()
    pod = run_attempt(team, 1)
    team.end_pod(pod, 1)
    run_attempt(team, 2)
    before = _read(team)
    operator.stop()
    proxy.pin(version)
    operator.start()
    wait_until(lambda: proxy.count_watches("finetunejobs") == 1, what="the stale operator watches")
    num_requests = len(proxy.requests)
    operator.stop()
    stale = [each for each in proxy.requests[num_requests:] if each.is_write]
    assert before == _read(team)
    operator.start()
    proxy.heal()
    team.apply(suspend=True)
    await_state(team, "Suspended")

    assert before["run"] == team.status()["run"]
    assert 2 == team.status()["attempt"]
    assert not [each for each in stale if each.verb == "delete"]
    return 1


def test_watches_that_are_cut_expire_lose_events_or_fall_silent_miss_nothing(trials: Trials) -> None:
    trials.run(
        {
            "all watches cut every second": [_cut_every_second],
            "all watches cut every two seconds, and every other one expired": [_expire],
            "no DELETED event arrives": [_swallow(type="DELETED", times=None)],
            "an event does not arrive": [_swallow(resource="jobs", type="ADDED"), _swallow(resource="pods", type="MODIFIED")],
            "a watch stays open and falls silent": [_fall_silent("pods")],
        },
        **_AUDITED,
    )


def test_operators_that_start_with_a_stale_view_repeat_nothing_and_leave_a_successor_alone(trials: Trials) -> None:
    trials.run({
        "a start onto lists from before a deletion and a creation": [_meet_a_successor],
        "SIGKILL, and a start onto lists that are steps old, for 5 s": [_lag("retried", back=2), _lag("resumed", back=1)],
    })  # fmt: skip


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_restart_onto_a_server_that_lags_repeats_nothing(trials: Trials) -> None:
    trials.run({
        f"SIGKILL, and a start onto lists that are {back} steps old, for 5 s, at each step": [
            _lag(step, back=back) for step in _STEPS
        ]
        for back in (1, 2, 3)
    })  # fmt: skip


@pytest.mark.faults
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("resource", _KINDS)
def test_each_single_event_that_is_swallowed_is_made_up_for(trials: Trials, resource: str) -> None:
    counts = dict.fromkeys(_TYPES, 0)

    def count(stage: Stage) -> int:
        seen = [Swallow(resource=resource, type=each, nth=10_000) for each in _TYPES]
        stage.proxy.swallow(*seen)
        stage.live()
        counts.update({str(each.type): each.seen for each in seen})
        return 0

    trials.run({"none": [count]}, **_AUDITED)
    print(f"events of {resource}:", counts)
    trials.run(
        {
            f"the nth {each} of the {resource} does not arrive, for each n": [
                _swallow(resource=resource, type=each, nth=nth) for nth in range(1, counts[each] + 1)
            ]
            for each in _TYPES
        },
        **_AUDITED,
    )


@pytest.mark.faults
def test_half_open_watches_are_noticed(trials: Trials) -> None:
    trials.run({"a watch stays open and falls silent": [_fall_silent(each) for each in _KINDS]}, **_AUDITED)


def _read_version(team: Team) -> int:
    return int(team.api.get(team.path("jobs"))["metadata"]["resourceVersion"])


def _read(team: Team) -> dict[str, Any]:
    """Return what the operator has decided about a job, with the uid that it is about."""
    status = team.status()
    children = sorted((each["metadata"]["uid"], each["metadata"].get("deletionTimestamp")) for each in team.children())
    return {"uid": team.job()["metadata"]["uid"], "run": status["run"], "attempt": status["attempt"], "children": children}

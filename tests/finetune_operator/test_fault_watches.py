"""Faults of watches and of what lags behind, at the real API server: nothing is missed for good, and nothing done twice."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fault_life import LIFE, Keeper, await_state, live, run_attempt
from fault_proxy import Expire, Fault, FaultProxy, Match, Swallow
from harness import Operator

pytestmark = [pytest.mark.apiserver, pytest.mark.faults]

_KINDS = ("finetunejobs", "jobs", "pods")


@pytest.fixture
def audited(team: Any, operator: Operator, tls: tuple[Path, Path], tmp_path: Path) -> Operator:
    """The team's operator, with an audit every second or so."""
    operator._environment["FINETUNE_AUDIT_SECONDS"] = "1"
    return operator


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


def test_watches_that_are_cut_every_second_miss_nothing(team: Any, operator: Any, proxy: FaultProxy, created: Any) -> None:
    with Keeper(operator) as keeper, _cutting(proxy, 1) as cut:
        assert LIFE == live(team)

    assert sum(cut) > 4
    assert [] == keeper.exits
    assert 3 == len(created(team))
    print(f"cut {sum(cut)} watches")


def test_deletions_that_no_watch_tells_are_found_by_the_audit(
    team: Any, audited: Operator, proxy: FaultProxy, created: Any
) -> None:
    swallow = Swallow(type="DELETED", times=None)
    proxy.swallow(swallow)
    with Keeper(audited) as keeper:
        assert LIFE == live(team)

    assert len(swallow.swallowed) >= 2
    assert [] == keeper.exits
    assert 3 == len(created(team))


def test_watch_whose_start_is_too_old_lists_anew(team: Any, audited: Operator, proxy: FaultProxy, created: Any) -> None:
    """What is deleted before the list is in none of its events."""
    expired = Fault(match=Match(verb="watch"), action=Expire(), every=2, times=None)
    proxy.plan(expired)
    with Keeper(audited) as keeper, _cutting(proxy, 2):
        assert LIFE == live(team)

    assert expired.struck > 4
    assert [] == keeper.exits
    assert 3 == len(created(team))
    print(f"expired {expired.struck} watches")


def test_operator_that_starts_with_a_stale_view_leaves_the_successor_alone(
    team: Any, operator: Operator, proxy: FaultProxy, created: Any, until: Any
) -> None:
    """Lists and watches show a FineTuneJob that was deleted and created again since, with the attempts of the first."""
    operator.start()
    team.apply()
    run_attempt(team, 1)
    version = int(team.api.get(team.path("jobs"))["metadata"]["resourceVersion"])
    team.api.delete(team.path("finetunejobs", "emoji"))
    until(lambda: not team.children(), what="the first one's Job is gone")
    team.apply()
    pod = run_attempt(team, 1)
    team.end_pod(pod, 1)
    run_attempt(team, 2)
    before = _read(team)
    operator.stop()
    proxy.pin(version)
    operator.start()
    until(lambda: proxy.count_watches("finetunejobs") == 1, what="the stale operator watches")
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
    assert 3 == len(created(team))
    assert not [each for each in stale if each.verb == "delete"]


_STEPS = ("running", "retried", "suspended", "resumed", "complete")


@pytest.mark.faults
@pytest.mark.parametrize("back", [1, 2, 3])
@pytest.mark.parametrize("step", _STEPS)
def test_restart_onto_a_server_that_lags_repeats_nothing(
    team: Any, operator: Operator, proxy: FaultProxy, created: Any, until: Any, step: str, back: int
) -> None:
    """The lists that it starts with are some steps old; after a while the server catches up."""
    keeper = Keeper(operator)
    versions = [int(team.api.get(team.path("jobs"))["metadata"]["resourceVersion"])]

    def lag(now: str) -> None:
        versions.append(int(team.api.get(team.path("jobs"))["metadata"]["resourceVersion"]))
        if now != step:
            return
        proxy.pin(versions[max(0, len(versions) - 1 - back)])
        num_exits, num_requests = len(keeper.exits), len(proxy.requests)
        keeper.kill()
        until(lambda: len(keeper.exits) > num_exits, what="it is dead")
        until(operator._is_ready, what="it is ready", seconds=240)
        # Time to do something wrong in; a slow machine only makes the test weaker.
        threading.Event().wait(5)
        print(f"{step}, {back} back: {[(each.verb, each.resource) for each in proxy.requests[num_requests:] if each.is_write]}")
        proxy.heal()

    with keeper:
        assert LIFE == live(team, after_step=lag)

    assert 3 == len(created(team))


@pytest.mark.faults
@pytest.mark.parametrize("nth", [1, 2, 3])
@pytest.mark.parametrize("type", ["ADDED", "MODIFIED", "DELETED"])
@pytest.mark.parametrize("resource", _KINDS)
def test_single_event_that_is_swallowed_is_made_up_for(
    team: Any, audited: Operator, proxy: FaultProxy, created: Any, resource: str, type: str, nth: int
) -> None:
    """Within an audit, or by a new start a minute after it."""
    swallow = Swallow(resource=resource, type=type, nth=nth)
    proxy.swallow(swallow)
    with Keeper(audited) as keeper:
        assert LIFE == live(team)

    assert len(keeper.exits) <= 1
    assert 3 == len(created(team))
    print(f"swallowed {swallow.swallowed or 'nothing'}, new starts {len(keeper.exits)}")


@pytest.mark.faults
@pytest.mark.parametrize("resource", _KINDS)
def test_half_open_watch_is_noticed(team: Any, audited: Operator, proxy: FaultProxy, created: Any, resource: str) -> None:
    """The link stays open and says nothing more, until the operator has given it up."""
    with Keeper(audited, on_exit=proxy.heal) as keeper:
        assert LIFE == live(team, after_step=lambda step: proxy.freeze_watches(resource) if step == "running" else None)

    assert len(keeper.exits) <= 1
    assert 3 == len(created(team))
    print(f"{resource} frozen, new starts {keeper.exits}")


def _read(team: Any) -> dict[str, Any]:
    """Return what the operator has decided about a job, with the uid that it is about."""
    status = team.status()
    children = sorted((each["metadata"]["uid"], each["metadata"].get("deletionTimestamp")) for each in team.children())
    return {"uid": team.job()["metadata"]["uid"], "run": status["run"], "attempt": status["attempt"], "children": children}

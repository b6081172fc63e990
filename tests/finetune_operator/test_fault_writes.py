"""Faults of requests at the real API server: a FineTuneJob's life comes to the same end as one without them."""

import time
from typing import Any

import pytest
from fault_life import LIFE, Keeper, live
from fault_proxy import WRITES, Action, Answer, Drop, Fault, FaultProxy, Kill, Match
from harness import write_kubeconfig

pytestmark = [pytest.mark.apiserver, pytest.mark.faults]

_WRITES = Match(verb=WRITES)
_ANY = Match()
_LOST, _UNSENT = Drop(), Drop(is_forwarded=False)
_CONFLICT = Answer(409, reason="Conflict")
_BUSY = Answer(429, reason="TooManyRequests", retry_after=1)
_ERRORS = tuple(Answer(status) for status in (500, 502, 503, 504))


def _spread(*actions: Action, stride: int) -> list[Fault]:
    """Return faults that strike one write in `stride`, with one action after the other."""
    every = stride * len(actions)
    return [
        Fault(match=_WRITES, action=action, nth=2 + stride * number, every=every, times=None)
        for number, action in enumerate(actions)
    ]


def test_life_without_faults(team: Any, operator: Any, proxy: FaultProxy, created: Any) -> None:
    with Keeper(operator) as keeper:
        assert LIFE == live(team)

    assert [] == keeper.exits
    assert 3 == len(created(team))


def test_operator_that_is_killed_around_its_writes_comes_to_the_same_end(
    team: Any, operator: Any, proxy: FaultProxy, created: Any
) -> None:
    keeper = Keeper(operator)
    faults = _spread(Kill(keeper.kill), Kill(keeper.kill, is_after=True), stride=4)
    proxy.plan(*faults)
    with keeper:
        assert LIFE == live(team, after_step=lambda step: proxy.heal() if step == "complete" else None)

    assert len(keeper.exits) == sum(fault.struck for fault in faults) > 3
    assert {-9} == set(keeper.exits)
    assert 3 == len(created(team))


def test_answers_that_are_errors_or_do_not_come_change_nothing(team: Any, operator: Any, proxy: FaultProxy, created: Any) -> None:
    faults = _spread(_LOST, _CONFLICT, *_ERRORS, _UNSENT, stride=2)
    proxy.plan(*faults)
    with Keeper(operator) as keeper:
        assert LIFE == live(team)

    assert sum(fault.struck for fault in faults) > 7
    assert [] == keeper.exits
    assert 3 == len(created(team))


def _plan_point(keeper: Keeper, point: int) -> Fault:
    return Fault(match=_WRITES, action=Kill(keeper.kill, is_after=bool(point % 2)), nth=1 + point // 2)


# A life has about thirty writes; the test of the last points finds that nothing is left to strike.
@pytest.mark.faults
@pytest.mark.parametrize("point", range(72))
def test_kill_at_one_write(team: Any, operator: Any, proxy: FaultProxy, created: Any, point: int) -> None:
    keeper = Keeper(operator)
    fault = _plan_point(keeper, point)
    proxy.plan(fault)
    with keeper:
        assert LIFE == live(team)

    assert [-9] * fault.struck == keeper.exits
    assert 3 == len(created(team))
    print(f"kill {'after' if point % 2 else 'before'} write {fault.nth}: struck {fault.struck}")


@pytest.mark.faults
@pytest.mark.parametrize("offset", [1, 2])
@pytest.mark.parametrize(
    "action",
    [
        pytest.param(_LOST, id="answer lost"),
        pytest.param(_UNSENT, id="request lost"),
        pytest.param(_CONFLICT, id="409"),
        pytest.param(_BUSY, id="429"),
        *(pytest.param(each, id=str(each.status)) for each in _ERRORS),
    ],
)
def test_every_other_write_is_struck(
    team: Any, operator: Any, proxy: FaultProxy, created: Any, action: Action, offset: int
) -> None:
    fault = Fault(match=_WRITES, action=action, nth=offset, every=2, times=None)
    proxy.plan(fault)
    with Keeper(operator) as keeper:
        assert LIFE == live(team)

    assert [] == keeper.exits
    assert 3 == len(created(team))
    print(f"{action}: struck {fault.struck}")


@pytest.mark.faults
@pytest.mark.parametrize("status", [403, 422])
def test_refused_job_is_created_when_it_is_no_longer_refused(
    team: Any, operator: Any, proxy: FaultProxy, created: Any, status: int
) -> None:
    """The user is told meanwhile, and the training does not fail."""
    fault = Fault(match=Match(verb="patch", resource="jobs"), action=Answer(status, reason="Forbidden"), every=2, times=None)
    proxy.plan(fault)
    with Keeper(operator) as keeper:
        assert LIFE == live(team)

    assert [] == keeper.exits
    assert 3 == fault.struck
    assert 3 == len(created(team))


@pytest.mark.faults
@pytest.mark.parametrize(
    ("answer", "seconds"),
    [
        pytest.param(_BUSY, 60, id="429"),
        pytest.param(Answer(503), 10, id="503 for 10 s"),
        pytest.param(Answer(500), 60, id="500 for 60 s"),
        pytest.param(Answer(403, reason="Forbidden"), 90, id="403 for 90 s"),
    ],
)
def test_outage_of_everything_ends_no_process_and_is_caught_up(
    team: Any, operator: Any, proxy: FaultProxy, created: Any, until: Any, answer: Answer, seconds: float
) -> None:
    """All requests are answered so, those of watches included, while things go on."""
    took: list[float] = []

    def fail(step: str) -> None:
        if step != "running":
            return
        proxy.plan(Fault(match=_ANY, action=answer, times=None))
        proxy.cut_watches()
        before = len(proxy.requests)
        team.api.patch(team.path("finetunejobs", "emoji"), {"metadata": {"annotations": {"x": "y"}}})
        time.sleep(seconds)
        rate = (len(proxy.requests) - before) / seconds
        proxy.heal()
        since = time.monotonic()
        version = int(team.job()["metadata"]["resourceVersion"])
        until(lambda: proxy.count_watches() == 4, what="all watches are back", seconds=120)
        took.append(time.monotonic() - since)
        print(f"{answer.status}: {rate:.1f} requests/s for {seconds} s, watches back after {took[0]:.1f} s at {version}")

    with Keeper(operator) as keeper:
        assert LIFE == live(team, after_step=fail)

    assert [] == keeper.exits
    assert 3 == len(created(team))


@pytest.mark.faults
def test_tokens_that_are_replaced_in_flight_are_taken_up(
    team: Any, operator: Any, proxy: FaultProxy, created: Any, tmp_path: Any
) -> None:
    def replace(step: str) -> None:
        team.api.delete(team.path("serviceaccounts", "operator"))
        write_kubeconfig(team, tmp_path / "kubeconfig")
        proxy.route(tmp_path / "kubeconfig")
        proxy.cut_watches()

    with Keeper(operator) as keeper:
        assert LIFE == live(team, after_step=replace)

    assert [] == keeper.exits
    assert 3 == len(created(team))

"""Faults of requests at the real API server: a FineTuneJob's life comes to the same end as one without them."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fault_proxy import WRITES, Action, Answer, Drop, Fault, Kill, Match
from fault_trials import Act, Stage, Trials
from harness import wait_until, write_kubeconfig

pytestmark = pytest.mark.apiserver

_WRITES = Match(verb=WRITES)
_ANY = Match()
_LOST, _UNSENT = Drop(), Drop(is_forwarded=False)
_CONFLICT = Answer(409, reason="Conflict")
_FORBIDDEN, _INVALID = Answer(403, reason="Forbidden"), Answer(422, reason="Invalid")
_BUSY = Answer(429, reason="TooManyRequests", retry_after=1)
_ERRORS = tuple(Answer(status) for status in (500, 502, 503, 504))
_ANSWERS = {
    "answer lost": _LOST,
    "request lost": _UNSENT,
    "409": _CONFLICT,
    "429": _BUSY,
    **{str(each.status): each for each in _ERRORS},
}


def _answer(action: Action, *, nth: int, every: int = 1, times: int | None = 1, match: Match = _WRITES) -> Act:
    """Return an act in which requests are answered so."""

    def act(stage: Stage) -> int:
        fault = Fault(match=match, action=action, nth=nth, every=every, times=times)
        stage.proxy.plan(fault)
        stage.live()
        return fault.struck

    return act


def _kill(*, nth: int, is_after: bool) -> Act:
    """Return an act in which the operator is killed once."""

    def act(stage: Stage) -> int:
        fault = Fault(match=_WRITES, action=Kill(stage.keeper.kill, is_after=is_after), nth=nth)
        stage.proxy.plan(fault)
        stage.restart_on(-9)
        stage.live()
        assert [-9] * fault.struck == stage.keeper.exits
        return fault.struck

    return act


def _spread(choose: Callable[[Stage], tuple[Action, ...]], *, stride: int, least: int) -> Act:
    """Return an act that strikes one write in `stride`, with one action after the other."""

    def act(stage: Stage) -> int:
        actions = choose(stage)
        every = stride * len(actions)
        faults = [
            Fault(match=_WRITES, action=action, nth=2 + stride * number, every=every, times=None)
            for number, action in enumerate(actions)
        ]
        stage.proxy.plan(*faults)
        stage.restart_on(-9)
        stage.live(after_step=lambda step: stage.proxy.heal() if step == "complete" else None)
        struck = sum(fault.struck for fault in faults)
        assert struck >= least
        return struck

    return act


def _kill_by_turns(stage: Stage) -> tuple[Action, ...]:
    return Kill(stage.keeper.kill), Kill(stage.keeper.kill, is_after=True)


def _fail_by_turns(_stage: Stage) -> tuple[Action, ...]:
    return _LOST, _CONFLICT, *_ERRORS, _UNSENT


def test_kills_errors_and_lost_answers_by_turns_change_nothing(trials: Trials) -> None:
    trials.run({
        "none": [_answer(_LOST, nth=10_000)],
        "SIGKILL before and after every fourth write by turns": [_spread(_kill_by_turns, stride=4, least=3)],
        "every other write lost, 409, 500, 502, 503, 504 and unsent by turns": [_spread(_fail_by_turns, stride=2, least=7)],
    })  # fmt: skip


_COUNTED: list[int] = []
"""How many writes lives had that nothing disturbed; they differ by some, as changes of status may coincide."""


def _live_and_count(stage: Stage) -> int:
    stage.live()
    _COUNTED.append(len(stage.proxy.writes))
    return 0


def _list_points(trials: Trials) -> range:
    """Return the numbers of the writes of a life."""
    if not _COUNTED:
        trials.run({"none": [_live_and_count] * 3})
        print("writes of a life:", _COUNTED)
    return range(1, max(_COUNTED) + 1)


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_kill_before_and_after_each_write_changes_nothing(trials: Trials) -> None:
    points = _list_points(trials)

    trials.run({
        "SIGKILL before the nth write, for each n": [_kill(nth=nth, is_after=False) for nth in points],
        "SIGKILL after the nth write took effect, for each n": [_kill(nth=nth, is_after=True) for nth in points],
    })  # fmt: skip


@pytest.mark.faults
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["answer lost", "request lost", "409"])
def test_fault_of_each_single_write_changes_nothing(trials: Trials, name: str) -> None:
    points = _list_points(trials)

    trials.run({f"{name} at the nth write, for each n": [_answer(_ANSWERS[name], nth=nth) for nth in points]})


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_faults_of_every_other_write_change_nothing(trials: Trials) -> None:
    trials.run({
        f"{name} at every other write": [_answer(action, nth=offset, every=2, times=None) for offset in (1, 2)]
        for name, action in _ANSWERS.items()
    })  # fmt: skip


def _refuse(answer: Answer) -> Act:
    """Return an act in which each Job is refused once; the user is told meanwhile, and the training does not fail."""

    def act(stage: Stage) -> int:
        fault = Fault(match=Match(verb="patch", resource="jobs"), action=answer, every=2, times=None)
        stage.proxy.plan(fault)
        stage.live()
        assert 3 == fault.struck
        return fault.struck

    return act


@pytest.mark.faults
def test_refused_job_is_created_when_it_is_no_longer_refused(trials: Trials) -> None:
    trials.run({f"each Job refused once with {each.status}": [_refuse(each)] for each in (_FORBIDDEN, _INVALID)})


def _go_away(answer: Answer, *, seconds: float) -> Act:
    """Return an act in which all requests are answered so for a while, those of watches included, as things go on."""

    def act(stage: Stage) -> int:
        fault = Fault(match=_ANY, action=answer, times=None)

        def fail(step: str) -> None:
            if step != "running":
                return
            stage.proxy.plan(fault)
            stage.proxy.cut_watches()
            stage.team.api.patch(stage.team.path("finetunejobs", "emoji"), {"metadata": {"annotations": {"x": "y"}}})
            time.sleep(seconds)
            stage.proxy.heal()
            since = time.monotonic()
            wait_until(lambda: stage.proxy.count_watches() == 4, what="all watches are back", seconds=120)
            rate, took = fault.struck / seconds, time.monotonic() - since
            print(f"{answer.status}: {rate:.1f} requests/s for {seconds} s, watches back after {took:.1f} s")

        stage.live(after_step=fail)
        return fault.struck

    return act


@pytest.mark.faults
def test_outage_of_everything_ends_no_process_and_is_caught_up(trials: Trials) -> None:
    trials.run({
        "429 to everything for 60 s": [_go_away(_BUSY, seconds=60)],
        "503 to everything for 10 s": [_go_away(Answer(503), seconds=10)],
        "500 to everything for 60 s": [_go_away(Answer(500), seconds=60)],
        "403 to everything for 90 s": [_go_away(_FORBIDDEN, seconds=90)],
    })  # fmt: skip


def _replace_tokens(stage: Stage) -> int:
    kubeconfig = Path(stage.operator._environment["KUBECONFIG"])
    steps: list[str] = []

    def replace(step: str) -> None:
        steps.append(step)
        stage.team.api.delete(stage.team.path("serviceaccounts", "operator"))
        write_kubeconfig(stage.team, kubeconfig)
        stage.proxy.route(kubeconfig)
        stage.proxy.cut_watches()

    stage.live(after_step=replace)
    return len(steps)


@pytest.mark.faults
def test_tokens_that_are_replaced_in_flight_are_taken_up(trials: Trials) -> None:
    trials.run({"token void and replaced after each step": [_replace_tokens]})

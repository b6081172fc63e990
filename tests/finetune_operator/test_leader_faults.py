"""A hundred faults of the leader, one after the other while jobs are applied: never do two operators write."""

import random
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import Team, grant_rights, wait_until, write_kubeconfig
from replicas import LEASE, Replicas, count_writers, find_intruders, read_lease

pytestmark = [pytest.mark.apiserver, pytest.mark.faults]

_SHORT = ("5", "3.5", "0.5")
_DEFAULT = ("15", "10", "2")
_FAULTS = 100


@pytest.fixture
def start(team: Any, tls: tuple[Path, Path], tmp_path: Path) -> Iterator[Callable[..., Replicas]]:
    grant_rights(team)
    write_kubeconfig(team, tmp_path / "kubeconfig")
    begun: list[Replicas] = []

    def begin(*, lease: tuple[str, str, str]) -> Replicas:
        begun.append(Replicas(team, tls=tls, folder=tmp_path, lease=lease, number=3))
        return begun[0].start()

    yield begin
    for replicas in begun:
        replicas.stop()


class Load(threading.Thread):
    """Applies jobs, suspends and resumes them, so that there is always something to write."""

    def __init__(self, team: Team) -> None:
        super().__init__(daemon=True)
        self._team = team
        self._ended = threading.Event()
        self.problem: BaseException | None = None

    def run(self) -> None:
        step = 0
        try:
            while not self._ended.wait(0.2):
                self._team.apply(f"job-{step % 10}", suspend=bool(step // 10 % 2))
                step += 1
        except BaseException as error:  # noqa: BLE001  the test raises it
            self.problem = error

    def end(self) -> None:
        self._ended.set()
        self.join(60)
        if self.problem is not None:
            raise self.problem


@pytest.mark.timeout(3600)
def test_no_two_operators_write_whatever_becomes_of_leaders(team: Any, start: Any, requests: Any) -> None:
    chance = random.Random(6)
    replicas = start(lease=_SHORT)
    load = Load(team)
    load.start()
    for _ in range(_FAULTS):
        _FAULT[chance.choice(list(_FAULT))](team, replicas)
        for operator in replicas.operators:
            if not operator.is_running:
                operator.launch()
    load.end()
    for index in range(10):
        team.apply(f"job-{index}", suspend=True)
    for index in range(10):
        team.wait("Suspended", f"job-{index}")

    assert find_intruders(requests(), team, lease_seconds=float(_SHORT[0])) == []
    assert count_writers(requests(), team) > 10
    assert not any("Traceback" in operator.log for operator in replicas.operators)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP])
def test_failover_with_the_default_durations(team: Any, start: Any, requests: Any, number: signal.Signals) -> None:
    replicas = start(lease=_DEFAULT)
    leader = replicas.find_leader()
    team.apply("before")
    team.wait("Unschedulable", "before")
    leader.send(number)
    replicas.find_leader(other_than=leader)
    team.apply("after")
    team.wait("Unschedulable", "after")
    if number is signal.SIGSTOP:
        leader.send(signal.SIGCONT)
        assert leader.wait() == 1
    else:
        leader.wait()

    assert find_intruders(requests(), team, lease_seconds=float(_DEFAULT[0])) == []


def _kill(_team: Team, replicas: Replicas) -> None:
    leader = replicas.find_leader()
    leader.stop(signal.SIGKILL)
    replicas.find_leader(other_than=leader)


def _end(_team: Team, replicas: Replicas) -> None:
    leader = replicas.find_leader()
    leader.send(signal.SIGTERM)
    replicas.find_leader(other_than=leader)
    assert leader.wait() in (0, 1)  # 1: it lost the Lease while it finished


def _stop(_team: Team, replicas: Replicas) -> None:
    leader = replicas.find_leader()
    leader.send(signal.SIGSTOP)
    replicas.find_leader(other_than=leader)
    leader.send(signal.SIGCONT)
    assert leader.wait() == 1


def _pause(_team: Team, replicas: Replicas) -> None:
    """Stop the leader for a moment only: it may go on as such, or find that it no longer may."""
    leader = replicas.find_leader()
    leader.send(signal.SIGSTOP)
    threading.Event().wait(3.7)
    leader.send(signal.SIGCONT)


def _delete(team: Team, replicas: Replicas) -> None:
    replicas.find_leader()
    team.api.delete(team.path("leases", LEASE))
    wait_until(lambda: read_lease(team)["spec"]["holderIdentity"], what="the Lease is there again")


def _rename(team: Team, replicas: Replicas) -> None:
    leader = replicas.find_leader()
    team.api.patch(team.path("leases", LEASE), {"spec": {"holderIdentity": "somebody"}})
    replicas.find_leader(other_than=leader)


def _clear(team: Team, replicas: Replicas) -> None:
    leader = replicas.find_leader()
    team.api.patch(team.path("leases", LEASE), {"spec": {"holderIdentity": ""}})
    replicas.find_leader(other_than=leader)


_FAULT: dict[str, Callable[[Team, Replicas], None]] = {
    "kill": _kill,
    "end": _end,
    "stop": _stop,
    "pause": _pause,
    "delete": _delete,
    "rename": _rename,
    "clear": _clear,
}

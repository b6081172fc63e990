"""A hundred faults of leaders, while jobs are applied: never do two operators write, and soon another one leads."""

import contextlib
import random
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fault_trials import FAILOVERS
from harness import Operator, Process, Team, grant_rights, wait_until, write_kubeconfig
from nursery import Nursery
from replicas import LEASE, Replicas, count_writers, find_intruders, read_lease

pytestmark = [pytest.mark.apiserver, pytest.mark.faults]

_SHORT = ("5", "3.5", "0.5")
_DEFAULT = ("15", "10", "2")
# Side by side, as most of a failover is waiting.
_TEAMS = 5
_FAULTS_OF_TEAM = 20
_SOMEBODY = "somebody"


@dataclass(frozen=True, kw_only=True)
class Group:
    """Three operators of a team, one of which leads."""

    team: Team
    operators: tuple[Operator, ...]
    durations: str

    def find_leader(self, *, other_than: str = "") -> tuple[str, Process]:
        """Wait for a leader, by the Lease and by its own word, and return its name and its process."""

        def find() -> tuple[str, Process] | None:
            lease = read_lease(self.team)
            name, url = lease["spec"]["holderIdentity"], lease["metadata"].get("annotations", {}).get("finetune.dev/report-url")
            operator = next((each for each in self.operators if url and url.endswith(f":{each.report_port}")), None)
            if operator is None or not name or name in (other_than, _SOMEBODY):
                return None
            process = operator.process
            return (name, process) if "finetune_leader 1.0" in operator.scrape() else None

        found: tuple[str, Process] = wait_until(find, what="there is a leader", seconds=240)
        return found

    def fail_over(self, fault: str, strike: Callable[[Process], object]) -> Process:
        """Do something to the leader and return it when another process leads."""
        name, leader = self.find_leader()
        started_at = time.monotonic()
        strike(leader)
        self.find_leader(other_than=name)
        FAILOVERS[f"{fault}, {self.durations}"].append(time.monotonic() - started_at)
        return leader

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Start what has ended again, as a Deployment does, for as long as the block runs."""
        is_over = threading.Event()

        def keep() -> None:
            while not is_over.wait(0.1):
                for operator in self.operators:
                    if not operator.is_running:
                        operator.launch()

        thread = threading.Thread(target=keep, name="keeper", daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join(60)


Start = Callable[..., contextlib.AbstractContextManager[Group]]


@pytest.fixture
def start(api: Any, tls: tuple[Path, Path], tmp_path: Path, nursery: Nursery) -> Start:
    """Start three operators in a namespace of their own."""

    @contextlib.contextmanager
    def begin(lease: tuple[str, str, str]) -> Iterator[Group]:
        with api.keep_open() as own:
            team = Team(own, f"team-{secrets.token_hex(4)}")
            folder = tmp_path / team.namespace
            folder.mkdir()
            grant_rights(team)
            write_kubeconfig(team, folder / "kubeconfig")
            replicas = Replicas(team, tls=tls, folder=folder, lease=lease, number=3, spawn=nursery.spawn)
            try:
                replicas.start()
                group = Group(team=team, operators=tuple(replicas.operators), durations=f"Lease {lease[0]} s")
                with group.kept():
                    yield group
            finally:
                replicas.stop()
            for operator in replicas.operators:
                # Where a process ends in the middle of an event, kopf may fail to close its generator.
                assert "/finetune_operator/" not in operator.log, operator.log
            team.remove()

    return begin


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
            with self._team.api.keep_open() as api:
                team = self._team.seen_by(api)
                while not self._ended.wait(0.2):
                    team.apply(f"job-{step % 10}", suspend=bool(step // 10 % 2))
                    step += 1
        except BaseException as error:  # noqa: BLE001  the test raises it
            self.problem = error

    def end(self) -> None:
        self._ended.set()
        self.join(60)
        if self.problem is not None:
            raise self.problem


@pytest.mark.timeout(1800)
def test_no_two_operators_write_whatever_becomes_of_leaders(start: Start, requests: Any) -> None:
    def work(seed: int) -> Team:
        with start(_SHORT) as group:
            _torment(group, random.Random(seed))
        return group.team

    with ThreadPoolExecutor(_TEAMS) as pool:
        teams = list(pool.map(work, range(_TEAMS)))
    entries = requests()

    assert [find_intruders(entries, team, lease_seconds=float(_SHORT[0])) for team in teams] == [[]] * _TEAMS
    assert all(count_writers(entries, team) > 3 for team in teams)


def _torment(group: Group, chance: random.Random) -> None:
    """Have faults befall leaders one after the other, and see that all is caught up with at the end."""
    load = Load(group.team)
    load.start()
    for _ in range(_FAULTS_OF_TEAM):
        fault = chance.choice(list(_FAULT))
        _FAULT[fault](group)
    load.end()
    for index in range(10):
        group.team.apply(f"job-{index}", suspend=True)
    for index in range(10):
        group.team.wait("Suspended", f"job-{index}")


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP])
def test_failover_with_the_default_durations(start: Start, requests: Any, number: signal.Signals) -> None:
    def work(_: int) -> Team:
        with start(_DEFAULT) as group:
            group.team.apply("before")
            group.team.wait("Unschedulable", "before")
            leader = group.fail_over(number.name, lambda leader: leader.send_signal(number))
            group.team.apply("after")
            group.team.wait("Unschedulable", "after")
            if number is signal.SIGSTOP:
                leader.send_signal(signal.SIGCONT)
            assert leader.wait(60) == {signal.SIGTERM: 0, signal.SIGKILL: -9, signal.SIGSTOP: 1}[number]
        return group.team

    with ThreadPoolExecutor(_TEAMS) as pool:
        teams = list(pool.map(work, range(_TEAMS)))
    entries = requests()

    assert [find_intruders(entries, team, lease_seconds=float(_DEFAULT[0])) for team in teams] == [[]] * _TEAMS


def _kill(group: Group) -> None:
    group.fail_over("SIGKILL", lambda leader: leader.send_signal(signal.SIGKILL))


def _end(group: Group) -> None:
    leader = group.fail_over("SIGTERM", lambda leader: leader.send_signal(signal.SIGTERM))
    assert leader.wait(60) in (0, 1)  # 1: it lost the Lease while it finished


def _stop(group: Group) -> None:
    leader = group.fail_over("SIGSTOP", lambda leader: leader.send_signal(signal.SIGSTOP))
    leader.send_signal(signal.SIGCONT)
    assert leader.wait(60) == 1


def _pause(group: Group) -> None:
    """Stop the leader for a moment only: it may go on as such, or find that it no longer may."""
    _, leader = group.find_leader()
    leader.send_signal(signal.SIGSTOP)
    threading.Event().wait(3.7)
    leader.send_signal(signal.SIGCONT)
    started_at = time.monotonic()
    group.find_leader()
    FAILOVERS[f"SIGSTOP for 3.7 s, from its end, {group.durations}"].append(time.monotonic() - started_at)


def _delete(group: Group) -> None:
    team = group.team
    group.find_leader()
    team.api.delete(team.path("leases", LEASE))
    started_at = time.monotonic()
    wait_until(lambda: read_lease(team)["spec"]["holderIdentity"], what="the Lease is there again")
    FAILOVERS[f"Lease deleted, {group.durations}"].append(time.monotonic() - started_at)


def _edit(group: Group, fault: str, *, holder: str) -> None:
    path = group.team.path("leases", LEASE)
    group.fail_over(fault, lambda _leader: group.team.api.patch(path, {"spec": {"holderIdentity": holder}}))


_FAULT: dict[str, Callable[[Group], None]] = {
    "kill": _kill,
    "end": _end,
    "stop": _stop,
    "pause": _pause,
    "delete": _delete,
    "rename": lambda group: _edit(group, "Lease in another's name", holder=_SOMEBODY),
    "clear": lambda group: _edit(group, "Lease in nobody's name", holder=""),
}

"""Trials of faults side by side, each in a namespace with an operator and a proxy of its own, and the table of their ends.

    trials.run({"SIGKILL before a write": [act, act, ...]})

An act gets a Stage, plans its faults, has a FineTuneJob live, and returns how many faults struck.
"""

import contextlib
import os
import secrets
import signal
import statistics
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fault_life import LIFE, End, Keeper, live
from fault_proxy import FaultProxy
from harness import Operator, Team, build_operator, grant_rights, write_kubeconfig
from nursery import Nursery

# Most of a life is waiting, for the Job controller above all.
_SIDE_BY_SIDE = 3 * (os.cpu_count() or 2)
_CREATED = 3


@dataclass(kw_only=True)
class Stage:
    """Where one life takes place."""

    team: Team
    operator: Operator
    proxy: FaultProxy
    keeper: Keeper
    end: End | None = None
    exits: tuple[int, ...] = ()
    """With what the operator's processes may have ended; each of another kind is a fault of its own."""

    def live(self, after_step: Callable[[str], object] = str) -> None:
        """Lead a FineTuneJob through its whole life."""
        with self.keeper:
            # What comes before it watches is in none of the events.
            self.operator.wait_until_ready()
            self.end = live(self.team, after_step=after_step)

    def restart_on(self, *exits: int, heal: bool = False) -> None:
        """Let the operator end so and be started again, which ends the faults if that is wanted."""
        self.exits = exits
        if heal:
            self.keeper.on_exit = self.proxy.heal


Act = Callable[[Stage], int]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of one trial."""

    namespace: str
    struck: int
    seconds: float
    exits: tuple[int, ...]
    end: End | None
    problem: str


@dataclass(frozen=True, kw_only=True)
class Row:
    """What became of all trials of a fault."""

    fault: str
    trials: int
    struck: int
    healed: int
    lost: int
    duplicated: int

    def __add__(self, other: "Row") -> "Row":
        return Row(
            fault=self.fault,
            trials=self.trials + other.trials,
            struck=self.struck + other.struck,
            healed=self.healed + other.healed,
            lost=self.lost + other.lost,
            duplicated=self.duplicated + other.duplicated,
        )

    def __str__(self) -> str:
        return f"| {self.fault} | {self.trials} | {self.struck} | {self.healed} | {self.lost} | {self.duplicated} |"


@dataclass
class Table:
    """The rows of a test run."""

    rows: dict[str, Row] = field(default_factory=dict)

    def add(self, row: Row) -> None:
        known = self.rows.get(row.fault)
        self.rows[row.fault] = row if known is None else known + row

    def __str__(self) -> str:
        head = ("| fault | lives | faults | same end | lost | duplicated |", "| --- | ---: | ---: | ---: | ---: | ---: |")
        return "\n".join((*head, *map(str, self.rows.values())))


TABLE = Table()
FAILOVERS: defaultdict[str, list[float]] = defaultdict(list)
"""Seconds until another operator led, by what befell the leader."""


def format_failovers() -> str:
    """Return them as a table."""
    head = ("| what befalls the leader | times | median | longest |", "| --- | ---: | ---: | ---: |")
    rows = (
        f"| {fault} | {len(took)} | {statistics.median(took):.1f} s | {max(took):.1f} s |"
        for fault, took in sorted(FAILOVERS.items())
    )
    return "\n".join((*head, *rows))


class Trials:
    """Runs acts."""

    def __init__(
        self,
        api: Any,
        *,
        tls: tuple[Path, Path],
        folder: Path,
        nursery: Nursery,
        read_requests: Callable[[], Iterable[dict[str, Any]]],
    ) -> None:
        self._api = api
        self._tls = tls
        self._folder = folder
        self._nursery = nursery
        self._read_requests = read_requests

    def run(self, acts: Mapping[str, Sequence[Act]], **settings: str) -> None:
        """Run all acts with settings of the operator, show a row for each fault, and fail unless all lives are whole."""
        flat = [(fault, act) for fault, acts_of in acts.items() for act in acts_of]
        with ThreadPoolExecutor(_SIDE_BY_SIDE, thread_name_prefix="trial") as pool:
            verdicts = list(pool.map(lambda each: self._try(each[1], settings), flat))
        created = count_created(self._read_requests())
        problems: list[str] = []
        for fault in acts:
            mine = [verdict for (each, _), verdict in zip(flat, verdicts, strict=True) if each == fault]
            judged = [(each, *_judge(each, created=created[each.namespace])) for each in mine]
            problems += [
                f"{fault}, number {number}, {each.namespace}: {lost or duplicated}"
                for number, (each, lost, duplicated) in enumerate(judged)
                if lost or duplicated
            ]
            row = _sum_up(fault, judged)
            TABLE.add(row)
            print(row, "seconds:", *(f"{each.seconds:.1f}" for each in mine), "exits:", [each.exits for each in mine])

        assert not problems, "\n".join(problems)

    def _try(self, act: Act, settings: Mapping[str, str]) -> Verdict:
        started_at, struck, problem = time.monotonic(), 0, ""
        stage: Stage | None = None
        try:
            with self._set(settings) as stage:
                struck = act(stage)
                unexpected = set(stage.keeper.exits) - set(stage.exits)
                assert not unexpected, f"the operator ended with {unexpected}: {stage.operator.log}"
        except Exception:  # noqa: BLE001  one trial that fails ends no other
            problem = traceback.format_exc()
        return Verdict(
            namespace=stage.team.namespace if stage else "",
            struck=struck,
            seconds=time.monotonic() - started_at,
            exits=tuple(stage.keeper.exits) if stage else (),
            end=stage.end if stage else None,
            problem=problem,
        )

    @contextlib.contextmanager
    def _set(self, settings: Mapping[str, str]) -> Iterator[Stage]:
        with self._api.keep_open() as api:
            team = Team(api, f"team-{secrets.token_hex(4)}")
            folder = self._folder / team.namespace
            folder.mkdir()
            grant_rights(team)
            write_kubeconfig(team, folder / "kubeconfig")
            operator = build_operator(team, tls=self._tls, folder=folder, spawn=self._nursery.spawn, **settings)
            with FaultProxy(api, folder=folder) as proxy:
                proxy.route(folder / "kubeconfig")
                try:
                    yield Stage(team=team, operator=operator, proxy=proxy, keeper=Keeper(operator))
                finally:
                    # It ends before the proxy does, or its log would tell of an API server that is gone.
                    operator.stop(signal.SIGKILL)
            team.remove()
            assert "Traceback" not in operator.log, operator.log


def count_created(requests: Iterable[dict[str, Any]]) -> Counter[str]:
    """Return how many Jobs were created in each namespace by its operator, by the audit log."""
    return Counter(
        each["objectRef"]["namespace"]
        for each in requests
        if each["responseStatus"].get("code") == 201
        and each["objectRef"].get("resource") == "jobs"
        and each["user"]["username"] == f"system:serviceaccount:{each['objectRef']['namespace']}:operator"
    )


def _judge(verdict: Verdict, *, created: int) -> tuple[str, str]:
    """Return what was lost and what was done twice.

    The audit log may know fewer creations than there were: when the client of one has died, it has another code than 201. What
    has come into being is in the end; for an act that leads no whole life, and so has none, the log decides.
    """
    added = dict(verdict.end.added) if verdict.end else {}
    if created > _CREATED or any(number > 1 for number in added.values()):
        return "", f"{created} Jobs were created: {verdict.end} {verdict.problem}"
    if verdict.problem or (verdict.end is None and created < _CREATED):
        return f"{created} Jobs were created: {verdict.problem}", ""
    if verdict.end not in (None, LIFE):
        return f"another end: {verdict.end}", ""
    return "", ""


def _sum_up(fault: str, judged: Sequence[tuple[Verdict, str, str]]) -> Row:
    lost = sum(bool(each) for _, each, _ in judged)
    duplicated = sum(bool(each) for _, _, each in judged)
    struck = sum(verdict.struck for verdict, _, _ in judged)
    healed = len(judged) - lost - duplicated
    return Row(fault=fault, trials=len(judged), struck=struck, healed=healed, lost=lost, duplicated=duplicated)

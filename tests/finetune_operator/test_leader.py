"""The election against a Lease in memory: what happens in which order, with a clock that the test turns."""

import asyncio
from copy import deepcopy
from typing import Any

import pytest
from finetune_operator.election import ElectionThread
from finetune_operator.errors import ApiError, ConflictError, LeadershipLostError, NotFoundError, NotLeaderError
from finetune_operator.gate import WriteGate
from finetune_operator.leader import Elector
from finetune_operator.lease import Timing

_KEY = ("finetune", "finetune-operator")


class MemoryLeases:
    """One Lease with the API server's rules, and the faults that a request can have."""

    def __init__(self) -> None:
        self.lease: dict[str, Any] | None = None
        self.version = 0
        self.is_silent = False
        self.loses_answers = False
        self.hangs = False
        self.is_closed = False

    async def get_lease(self, key: tuple[str, str]) -> dict[str, Any]:
        assert key == _KEY
        await self._answer()
        if self.lease is None:
            raise NotFoundError("", status=404, reason="NotFound")
        return deepcopy(self.lease)

    async def create_lease(self, lease: Any) -> dict[str, Any]:
        await self._answer()
        if self.lease is not None:
            raise ConflictError("", status=409, reason="AlreadyExists")
        return self._store(lease)

    async def replace_lease(self, lease: Any) -> dict[str, Any]:
        await self._answer()
        if self.lease is None:
            raise NotFoundError("", status=404, reason="NotFound")
        if lease["metadata"]["resourceVersion"] != self.lease["metadata"]["resourceVersion"]:
            raise ConflictError("", status=409, reason="Conflict")
        return self._store(lease)

    async def close(self) -> None:
        self.is_closed = True

    def edit(self, **spec: Any) -> None:
        """Change the Lease as somebody else would."""
        assert self.lease is not None
        self._store(self.lease | {"spec": self.lease["spec"] | spec})

    async def _answer(self) -> None:
        if self.hangs:
            await asyncio.Event().wait()
        if self.is_silent:
            raise ApiError("no answer", status=0, reason="NoAnswer")

    def _store(self, lease: Any) -> dict[str, Any]:
        self.version += 1
        self.lease = deepcopy(dict(lease))
        self.lease["metadata"] = dict(self.lease["metadata"]) | {"resourceVersion": str(self.version)}
        if self.loses_answers:
            raise ApiError("reset", status=0, reason="NoAnswer")
        return deepcopy(self.lease)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """Candidates for one Lease."""

    def __init__(self, *, renew_seconds: float = 10) -> None:
        self.clock = Clock()
        self.leases = MemoryLeases()
        self._timing = Timing(lease_seconds=15, renew_seconds=renew_seconds, retry_seconds=2)
        self.gates: dict[str, WriteGate] = {}

    def candidate(self, name: str) -> Elector:
        self.gates[name] = WriteGate(clock=self.clock)
        elector = Elector(
            key=_KEY,
            identity=name,
            report_url=f"https://{name}:1",
            timing=self._timing,
            gate=self.gates[name],
            clock=self.clock,
        )
        elector.may_lead = True
        return elector

    async def lead(self, name: str) -> Elector:
        """Return a candidate that leads."""
        elector = self.candidate(name)
        await elector.step(self.leases)
        self.clock.now += 15
        await elector.step(self.leases)
        assert self.gates[name].is_open
        return elector

    @property
    def holder(self) -> str:
        assert self.leases.lease is not None
        return str(self.leases.lease["spec"]["holderIdentity"])


@pytest.fixture
def bench() -> Bench:
    return Bench()


async def test_one_of_two_leads_and_the_other_knows_it(bench: Bench) -> None:
    first, second = await bench.lead("a"), bench.candidate("b")
    await second.step(bench.leases)

    assert ("a", True, False) == (bench.holder, bench.gates["a"].is_open, bench.gates["b"].is_open)
    assert (None, "https://a:1") == (first.leader_url, second.leader_url)


async def test_leader_renews_and_the_other_waits(bench: Bench) -> None:
    first, second = await bench.lead("a"), bench.candidate("b")
    for _ in range(20):
        bench.clock.now += 2
        await first.step(bench.leases)
        await second.step(bench.leases)

    assert ("a", True, 0) == (bench.holder, bench.gates["a"].is_open, first.transitions)


async def test_leader_that_is_stopped_may_not_write_when_another_may(bench: Bench) -> None:
    first, second = await bench.lead("a"), bench.candidate("b")
    await second.step(bench.leases)
    gates = []
    for _ in range(8):
        bench.clock.now += 2
        await second.step(bench.leases)
        gates.append((bench.gates["a"].is_open, bench.gates["b"].is_open))
    with pytest.raises(LeadershipLostError, match="was not renewed for 10 s"):
        await first.step(bench.leases)

    assert [(True, False)] * 4 + [(False, False)] * 3 + [(False, True)] == gates
    assert ("b", 1) == (bench.holder, second.transitions)


async def test_release_lets_another_lead_at_once(bench: Bench) -> None:
    first, second = await bench.lead("a"), bench.candidate("b")
    await second.step(bench.leases)
    await first.release(bench.leases)
    assert ("", False) == (bench.holder, bench.gates["a"].is_open)
    await second.step(bench.leases)

    assert ("b", True) == (bench.holder, bench.gates["b"].is_open)
    await first.release(bench.leases)
    assert "b" == bench.holder


async def test_standby_that_is_not_ready_does_not_take_a_free_lease(bench: Bench) -> None:
    first, second = await bench.lead("a"), bench.candidate("b")
    second.may_lead = False
    await first.release(bench.leases)
    await second.step(bench.leases)
    assert "" == bench.holder
    second.may_lead = True
    await second.step(bench.leases)

    assert "b" == bench.holder


async def test_deleted_lease_changes_no_leader(bench: Bench) -> None:
    first, second = await bench.lead("a"), bench.candidate("b")
    await second.step(bench.leases)
    bench.leases.lease = None
    fresh = bench.candidate("c")
    for each in (second, fresh, first):
        await each.step(bench.leases)

    assert ("a", [True, False, False]) == (bench.holder, [gate.is_open for gate in bench.gates.values()])


@pytest.mark.parametrize("holder", ["", "b", "stranger"])
async def test_leader_ends_when_somebody_gives_its_lease_away(bench: Bench, holder: str) -> None:
    first, second = await bench.lead("a"), bench.candidate("b")
    await second.step(bench.leases)
    bench.leases.edit(holderIdentity=holder)
    await second.step(bench.leases)
    assert not bench.gates["b"].is_open
    with pytest.raises(LeadershipLostError, match="is no longer ours"):
        await first.step(bench.leases)
    assert not bench.gates["a"].is_open
    bench.clock.now += 15
    await second.step(bench.leases)

    assert ("b", True) == (bench.holder, bench.gates["b"].is_open)


async def test_edit_that_leaves_the_holder_is_written_over(bench: Bench) -> None:
    first = await bench.lead("a")
    bench.leases.edit(leaseDurationSeconds=3600)
    await first.step(bench.leases)

    assert bench.leases.lease is not None
    assert ("a", 15) == (bench.holder, bench.leases.lease["spec"]["leaseDurationSeconds"])


async def test_silent_api_server_ends_the_right_to_write_in_time(bench: Bench) -> None:
    first = await bench.lead("a")
    bench.leases.is_silent = True
    for _ in range(4):
        bench.clock.now += 2
        await first.step(bench.leases)
    assert bench.gates["a"].is_open
    bench.clock.now += 2
    with pytest.raises(NotLeaderError):
        bench.gates["a"].check()
    with pytest.raises(LeadershipLostError):
        await first.step(bench.leases)


async def test_answer_that_is_lost_leads_to_no_wait(bench: Bench) -> None:
    first = bench.candidate("a")
    await first.step(bench.leases)
    bench.clock.now += 15
    bench.leases.loses_answers = True
    await first.step(bench.leases)
    assert ("a", False) == (bench.holder, bench.gates["a"].is_open)
    bench.leases.loses_answers = False
    await first.step(bench.leases)

    assert bench.gates["a"].is_open


async def test_request_that_hangs_is_given_up() -> None:
    bench = Bench(renew_seconds=0.2)
    first = bench.candidate("a")
    bench.leases.hangs = True
    await asyncio.wait_for(first.step(bench.leases), 30)

    assert not bench.gates["a"].is_open


async def test_candidate_looks_again_when_the_lease_becomes_free(bench: Bench) -> None:
    first, second = await bench.lead("a"), bench.candidate("b")
    await second.step(bench.leases)
    assert 1.5 <= second.find_wait() <= 2
    bench.clock.now += 14.5

    assert pytest.approx(0.5) == second.find_wait()
    assert 2 == first.find_wait()


async def test_thread_leads_when_it_may_and_releases_at_its_end() -> None:
    leases, gate, begun = MemoryLeases(), WriteGate(), asyncio.Event()
    timing = Timing(lease_seconds=2, renew_seconds=1.5, retry_seconds=0.05)
    on_lead = begun.set
    loop = asyncio.get_running_loop()
    elector = Elector(
        key=_KEY,
        identity="a",
        report_url="",
        timing=timing,
        gate=gate,
        on_lead=lambda: loop.call_soon_threadsafe(on_lead),
    )

    async def connect() -> MemoryLeases:
        return leases

    thread = ElectionThread(elector, connect=connect)
    thread.start()
    thread.let_lead()
    await asyncio.wait_for(begun.wait(), 60)
    assert leases.lease is not None
    await asyncio.to_thread(thread.stop, 60)

    assert thread.ended.done()
    assert (None, True, False) == (thread.ended.exception(), leases.is_closed, gate.is_open)
    assert "" == leases.lease["spec"]["holderIdentity"]

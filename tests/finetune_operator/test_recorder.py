"""Events for users: what repeats becomes a series, and no job may tell too much."""

import asyncio
import contextlib
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from finetune_operator.errors import NotFoundError
from finetune_operator.metrics import Metrics
from finetune_operator.observed import JobView
from finetune_operator.outcome import EventNote, EventType
from finetune_operator.recorder import Recorder
from finetune_operator.views import RawObject, build_job_view, project_job
from prometheus_client import generate_latest


@dataclass
class FakeWriter:
    """Keeps events as the API server would."""

    events: dict[str, dict[str, Any]] = field(default_factory=dict)

    async def create_event(self, namespace: str, event: RawObject) -> None:
        assert namespace == "team"
        self.events[event["metadata"]["name"]] = dict(event)

    async def patch_event(self, namespace: str, name: str, patch: RawObject) -> None:
        if namespace != "team" or name not in self.events:
            raise NotFoundError("no such event", status=404, reason="NotFound")
        self.events[name] |= patch


@dataclass
class Bench:
    """A recorder with its clock."""

    job: JobView
    writer: FakeWriter = field(default_factory=FakeWriter)
    now: datetime = datetime(2026, 1, 1, tzinfo=UTC)

    def __post_init__(self) -> None:
        self.metrics = Metrics()
        self.recorder = self.build()

    def build(self, **limits: Any) -> Recorder:
        return Recorder(self.writer, instance="pod-1", clock=lambda: self.now, metrics=self.metrics, **limits)

    def record(self, *reasons: str, job: JobView | None = None) -> None:
        for number, reason in enumerate(reasons):
            note = EventNote(type=EventType.NORMAL, reason=reason, action="Reconcile", message=f"{reason} {number}")
            self.recorder.record(job or self.job, note)

    async def run(self) -> None:
        """Let the recorder write what its limits allow at this time."""
        task = asyncio.create_task(self.recorder.run())
        for _ in range(1000):
            await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    def count(self, result: str) -> float:
        lines = generate_latest(self.metrics.registry).decode().splitlines()
        return sum(float(each.split()[1]) for each in lines if each.startswith(f'finetune_events_total{{result="{result}"}}'))

    async def write(self, reason: str = "AttemptFailed", message: str = "m", *, after: float = 1) -> None:
        self.now += timedelta(seconds=after)
        note = EventNote(type=EventType.WARNING, reason=reason, action="Retry", message=message)
        await self.recorder.write(self.job, note)

    @property
    def counts(self) -> list[int]:
        return [event.get("series", {}).get("count", 1) for event in self.writer.events.values()]


@pytest.fixture
def bench(objects: Any) -> Bench:
    return Bench(build_job_view(project_job(objects.job(version=7))))


async def test_event_tells_of_the_job(bench: Bench) -> None:
    await bench.write(message="x" * 2000)

    (event,) = bench.writer.events.values()
    assert (event["type"], event["reason"], event["action"]) == ("Warning", "AttemptFailed", "Retry")
    assert event["regarding"]["uid"] == "uid-team-emoji"
    assert event["eventTime"] == "2026-01-01T00:00:01.000000Z"
    assert len(event["note"]) == 1024


async def test_equal_events_are_one_series(bench: Bench) -> None:
    for _ in range(3):
        await bench.write()

    assert bench.counts == [3]


async def test_other_reason_or_message_is_another_event(bench: Bench) -> None:
    await bench.write()
    await bench.write(message="another")
    await bench.write(reason="Another")

    assert bench.counts == [1, 1, 1]


async def test_series_ends_after_silence(bench: Bench) -> None:
    await bench.write()
    await bench.write(after=400)

    assert bench.counts == [1, 1]


async def test_event_that_the_api_server_forgot_is_created_again(bench: Bench) -> None:
    await bench.write()
    bench.writer.events.clear()
    await bench.write()

    assert bench.counts == [1]


async def test_memory_of_series_is_bounded(bench: Bench) -> None:
    for number in range(5000):
        await bench.write(message=str(number), after=0)
    await bench.write(message="0", after=0)

    assert bench.counts[-1] == 1


async def test_slow_event_delays_no_other_job_and_keeps_the_order_of_its_own(objects: Any) -> None:
    is_half_done, may_go_on = asyncio.Event(), asyncio.Event()
    written: list[tuple[str, str]] = []

    class SlowWriter(FakeWriter):
        async def create_event(self, namespace: str, event: RawObject) -> None:
            if (name := event["regarding"]["name"]) == "slow":
                await may_go_on.wait()
            await super().create_event(namespace, event)
            written.append((name, event["reason"]))
            if len(written) == len(others) // 2:
                is_half_done.set()

    recorder = Recorder(SlowWriter(), instance="pod-1", clock=lambda: datetime(2026, 1, 1, tzinfo=UTC), metrics=Metrics())
    task = asyncio.create_task(recorder.run())
    others = [f"job-{number}" for number in range(64)]
    for name, reason in (("slow", "First"), ("slow", "Second"), *((other, "Only") for other in others)):
        job = build_job_view(project_job(objects.job(name)))
        recorder.record(job, EventNote(type=EventType.NORMAL, reason=reason, action="Reconcile", message="m"))
    async with asyncio.timeout(60):
        # Those of its own lane wait with it: about one in eight.
        await is_half_done.wait()
        before = list(written)
        may_go_on.set()
        await recorder.flush()
    task.cancel()

    assert all(name != "slow" for name, _ in before)
    assert len(others) + 2 == len(written)
    assert ["First", "Second"] == [reason for name, reason in written if name == "slow"]


async def test_event_that_would_wait_too_long_is_dropped_and_counted(objects: Any) -> None:
    metrics = Metrics()
    recorder = Recorder(FakeWriter(), instance="pod-1", clock=lambda: datetime(2026, 1, 1, tzinfo=UTC), metrics=metrics)
    job = build_job_view(project_job(objects.job()))
    for number in range(5003):
        note = EventNote(type=EventType.NORMAL, reason="Running", action="Reconcile", message="m")
        recorder.record(replace(job, uid=str(number)), note)

    assert 3 == metrics.registry.get_sample_value("finetune_events_total", {"result": "dropped"})


async def test_a_job_that_tells_too_much_is_limited_and_others_are_not(bench: Bench) -> None:
    bench.record(*["Running", "Retrying"] * 50)
    bench.record("Running", job=replace(bench.job, uid="other", name="other"))
    await bench.run()

    assert sorted(each["regarding"]["name"] for each in bench.writer.events.values()) == ["emoji"] * 25 + ["other"]
    assert bench.count("limited") == 75


async def test_the_end_of_a_run_is_told_whatever_came_before(bench: Bench) -> None:
    bench.record(*["Running"] * 50, "Complete", "Failed")
    await bench.run()

    assert [each["reason"] for each in bench.writer.events.values()][25:] == ["Complete", "Failed"]


async def test_a_job_may_tell_more_after_a_while(bench: Bench) -> None:
    bench.record(*["Running"] * 30)
    bench.now += timedelta(seconds=600)
    bench.record(*["Retrying"] * 5)
    await bench.run()

    assert [each["reason"] for each in bench.writer.events.values()] == ["Running"] * 25 + ["Retrying"] * 2


async def test_all_jobs_together_are_limited_and_nothing_is_lost_by_that(bench: Bench) -> None:
    bench.recorder = bench.build(rate=0.001, burst=3)
    for number in range(5):
        bench.record("Running", job=replace(bench.job, uid=str(number)))
    await bench.run()

    assert len(bench.writer.events) == 3
    assert bench.count("dropped") == bench.count("limited") == 0

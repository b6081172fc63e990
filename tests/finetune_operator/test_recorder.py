"""Events for users: what repeats becomes a series."""

import asyncio
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from finetune_operator.errors import NotFoundError
from finetune_operator.metrics import Metrics
from finetune_operator.observed import JobView
from finetune_operator.outcome import EventNote, EventType
from finetune_operator.recorder import Recorder
from finetune_operator.views import RawObject, build_job_view, project_job


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
        self.recorder = Recorder(self.writer, instance="pod-1", clock=lambda: self.now, metrics=Metrics())

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
    for number in range(1003):
        recorder.record(job, EventNote(type=EventType.NORMAL, reason=f"R{number}", action="Reconcile", message="m"))

    assert 3 == metrics.registry.get_sample_value("finetune_events_total", {"result": "dropped"})

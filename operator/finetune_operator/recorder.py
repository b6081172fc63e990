"""Events for users (events.k8s.io/v1): one object for what repeats, counted as a series, and a limit for each job and for all."""

import asyncio
import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

from finetune_api import names
from finetune_api.conditions import truncate

from finetune_operator.errors import ApiError, NotFoundError
from finetune_operator.metrics import EVENTS_RECORDED, Metrics
from finetune_operator.observed import JobView
from finetune_operator.outcome import EventNote
from finetune_operator.state import Phase
from finetune_operator.throttle import TokenBucket
from finetune_operator.views import RawObject

logger = logging.getLogger(__name__)

# Bounds of the API: https://kubernetes.io/docs/reference/kubernetes-api/cluster-resources/event-v1/
_MAX_NOTE = 1024
_MAX_SERIES = 4096
# As client-go does: after six minutes of silence a repetition begins a new event, as the API server forgets them after an hour.
_SERIES_SECONDS = 360
_MAX_PENDING = 5000
# Events in flight. One at a time falls behind as soon as many jobs begin at once, and most of their events would be dropped.
_NUM_LANES = 8
# As client-go's: a job may tell this much at once, and then one thing every five minutes.
_BURST_OF_A_JOB = 25
_RATE_OF_A_JOB = 1 / 300
_MAX_JOBS = 4096
# Those that end a run: they come after whatever used up the limit, and a run ends once.
_UNLIMITED = frozenset({Phase.COMPLETE.value, Phase.FAILED.value})
# A fifth of what all requests of the operator may be by default.
_RATE = 100.0
_BURST = 500

Identity = tuple[str, str, str]
Lane = asyncio.Queue[tuple[JobView, EventNote]]


class EventWriter(Protocol):
    """Where events are written to."""

    async def create_event(self, namespace: str, event: RawObject) -> None:
        """Create an event."""

    async def patch_event(self, namespace: str, name: str, patch: RawObject) -> None:
        """Change an event."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """An event that was written, and how often it happened."""

    name: str
    count: int
    seen_at: datetime


class Recorder:
    """Writes events in the background, so that a reconcile never waits for them or fails by them."""

    def __init__(
        self,
        writer: EventWriter,
        *,
        instance: str,
        clock: Callable[[], datetime],
        metrics: Metrics,
        rate: float = _RATE,
        burst: int = _BURST,
    ) -> None:
        self._writer = writer
        self._instance = truncate(instance, 128)
        self._clock = clock
        self._metrics = metrics
        self._series: OrderedDict[Identity, Series] = OrderedDict()
        self._jobs: OrderedDict[str, TokenBucket] = OrderedDict()
        self._all = TokenBucket(rate=rate, burst=burst, clock=self._tell_seconds)
        # The events of a job stay in one lane, so that they are written in order and a repetition finds its series.
        self._lanes: tuple[Lane, ...] = tuple(asyncio.Queue() for _ in range(_NUM_LANES))

    def record(self, job: JobView, note: EventNote) -> None:
        """Have an event written. When the job has told too much, or too many events wait, it is dropped and counted."""
        if not self._is_within_limit(job.uid) and note.reason not in _UNLIMITED:
            self._metrics.count(EVENTS_RECORDED, result="limited")
            return
        if sum(lane.qsize() for lane in self._lanes) >= _MAX_PENDING:
            self._metrics.count(EVENTS_RECORDED, result="dropped")
            return
        self._lanes[hash(job.uid) % _NUM_LANES].put_nowait((job, note))

    async def run(self) -> None:
        """Write events until cancelled."""
        async with asyncio.TaskGroup() as group:
            for lane in self._lanes:
                group.create_task(self._drain(lane))

    async def flush(self) -> None:
        """Wait until all events are written."""
        for lane in self._lanes:
            await lane.join()

    async def _drain(self, lane: Lane) -> None:
        """Write the events of a lane, one after the other, until cancelled."""
        while True:
            job, note = await lane.get()
            try:
                await self._all.wait()
                await self.write(job, note)
            except ApiError as error:
                self._metrics.count(EVENTS_RECORDED, result="error")
                logger.warning("cannot record event %s for %s/%s: %s", note.reason, job.namespace, job.name, error)
            finally:
                lane.task_done()

    async def write(self, job: JobView, note: EventNote) -> None:
        """Write one event: a new one, or one more in the series of an equal one."""
        now = self._clock()
        identity = (job.uid, note.reason, note.message)
        series = self._series.get(identity)
        if series is not None and (now - series.seen_at).total_seconds() < _SERIES_SECONDS:
            series = Series(name=series.name, count=series.count + 1, seen_at=now)
            patch = {"series": {"count": series.count, "lastObservedTime": _format_micro_time(now)}}
            try:
                await self._writer.patch_event(job.namespace, series.name, patch)
            except NotFoundError:
                self._series.pop(identity, None)
            else:
                self._keep(identity, series)
                self._metrics.count(EVENTS_RECORDED, result="repeated")
                return
        event = _build_event(job, note, now=now, instance=self._instance)
        await self._writer.create_event(job.namespace, event)
        self._keep(identity, Series(name=event["metadata"]["name"], count=1, seen_at=now))
        self._metrics.count(EVENTS_RECORDED, result="created")

    def _is_within_limit(self, uid: str) -> bool:
        bucket = self._jobs.get(uid)
        if bucket is None:
            bucket = TokenBucket(rate=_RATE_OF_A_JOB, burst=_BURST_OF_A_JOB, clock=self._tell_seconds)
        self._jobs[uid] = bucket
        self._jobs.move_to_end(uid)
        while len(self._jobs) > _MAX_JOBS:
            self._jobs.popitem(last=False)
        return bucket.take()

    def _tell_seconds(self) -> float:
        return self._clock().timestamp()

    def _keep(self, identity: Identity, series: Series) -> None:
        self._series[identity] = series
        self._series.move_to_end(identity)
        while len(self._series) > _MAX_SERIES:
            self._series.popitem(last=False)


def _build_event(job: JobView, note: EventNote, *, now: datetime, instance: str) -> RawObject:
    time = _format_micro_time(now)
    suffix = hashlib.sha256(f"{job.uid}/{note.reason}/{note.message}/{time}/{instance}".encode()).hexdigest()[:16]
    return {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"name": f"{job.name}.{suffix}", "namespace": job.namespace},
        "eventTime": time,
        "type": note.type.value,
        "reason": note.reason,
        "action": note.action,
        "note": truncate(note.message, _MAX_NOTE),
        "reportingController": f"{names.GROUP}/operator",
        "reportingInstance": instance,
        "regarding": {
            "apiVersion": names.API_VERSION,
            "kind": names.KIND,
            "namespace": job.namespace,
            "name": job.name,
            "uid": job.uid,
            "resourceVersion": job.resource_version,
        },
    }


def _format_micro_time(time: datetime) -> str:
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")

"""`python -m finetune_operator`: put the parts together and run them until a signal."""

import asyncio
import logging
import math
import signal
import socket
import sys
import time
from collections.abc import Coroutine
from datetime import UTC, datetime

from prometheus_client import disable_created_metrics, start_http_server
from pydantic import ValidationError

from finetune_operator import handlers
from finetune_operator.audit import Auditor
from finetune_operator.cluster import Cluster
from finetune_operator.controller import Controller
from finetune_operator.errors import DeafWatchError, LeadershipLostError, OperatorError, RewoundError, StartError
from finetune_operator.forward import Forwarder
from finetune_operator.health import Health, HealthServer
from finetune_operator.leadership import Leadership
from finetune_operator.logs import configure_logging
from finetune_operator.metrics import (
    AUDIT_AGE_SECONDS,
    AUDIT_INTERVAL_SECONDS,
    LEADER,
    LEADER_TRANSITIONS,
    LOOP_LAG_SECONDS,
    QUEUE_WAIT_SECONDS,
    SYNCED,
    WATCH_EVENTS,
    Metrics,
)
from finetune_operator.policies.progress import compute_report_delay
from finetune_operator.queue import WorkQueue
from finetune_operator.recorder import Recorder
from finetune_operator.report_server import ReportServer
from finetune_operator.reports import ReportReceiver
from finetune_operator.settings import Settings, load_settings, load_trainer_settings
from finetune_operator.store import Store
from finetune_operator.throttle import Turns
from finetune_operator.transport import ClientSettings, Transport
from finetune_operator.views import Key, Kind, RawObject, is_unanswered

logger = logging.getLogger("finetune_operator")

_FINISH_SECONDS = 10.0


class Operator:
    """All parts of one operator process."""

    def __init__(self, settings: Settings, transport: Transport, *, metrics: Metrics, leadership: Leadership) -> None:
        self._settings = settings
        self._transport = transport
        cluster = Cluster(transport)
        self._metrics = metrics
        self._leadership = leadership
        self._store = Store()
        self._queue: WorkQueue[Key] = WorkQueue(
            clock=time.monotonic,
            find_flow=lambda key: key[0],  # by namespace, as teams must not wait for each other
            observe_wait=lambda seconds: metrics.observe(QUEUE_WAIT_SECONDS, seconds),
        )
        self._recorder = Recorder(cluster, instance=socket.gethostname(), clock=_now, metrics=metrics)
        self._auditor = Auditor(
            cluster,
            store=self._store,
            enqueue=self._enqueue,
            namespaces=settings.namespaces,
            interval_seconds=settings.audit_seconds,
            deaf_seconds=settings.deaf_seconds,
            metrics=metrics,
        )
        self._health = Health(
            watchers=handlers.name_watchers(settings.namespaces),
            max_audit_age_seconds=3 * settings.audit_seconds + settings.deaf_seconds + 60,
            read_audit_age=lambda: self._auditor.age_seconds,
            observe_lag=lambda seconds: metrics.observe(LOOP_LAG_SECONDS, seconds),
        )
        metrics.watch(SYNCED, lambda: float(self._health.is_synced))
        metrics.watch(AUDIT_AGE_SECONDS, lambda: self._auditor.age_seconds)
        metrics.watch(AUDIT_INTERVAL_SECONDS, lambda: settings.audit_seconds)
        self._forwarder = Forwarder(
            find_leader=leadership.find_leader,
            report_url=settings.report_url,
            ca_file=settings.report_ca_file,
            identity=leadership.identity,
        )
        receiver = ReportReceiver(
            store=self._store,
            reviewer=cluster,
            enqueue=self._enqueue_report,
            metrics=metrics,
            clock=_now,
            is_leading=lambda: leadership.is_leading,
            forwarder=self._forwarder,
        )
        self._report_server = ReportServer(
            receiver.build_app(),
            address=settings.bind_address,
            port=settings.report_port,
            certificate=settings.tls_certificate_file,
            key=settings.tls_key_file,
        )
        self._progress_turns: Turns[Key] = Turns(rate=settings.progress_writes_per_second, clock=time.monotonic)
        self._controller = Controller(
            store=self._store,
            queue=self._queue,
            cluster=cluster,
            recorder=self._recorder,
            metrics=metrics,
            settings=load_trainer_settings(settings),
            progress_turns=self._progress_turns,
            clock=_now,
        )
        self._stop = asyncio.Event()
        self._failure: BaseException | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def run(self) -> None:
        """Run until a signal, or until a part fails; then stop the others and raise its error."""
        # kopf sets its own handlers when it starts; a signal before that must not be lost, as process 1 ignores it by default.
        self._catch_signals()
        # Each replica sees all jobs; a sum over the replicas must count each once.
        self._metrics.watch_states(lambda: self._store.count_states() if self._leadership.is_leading else {})
        self._metrics.watch(LEADER, lambda: int(self._leadership.is_leading))
        self._metrics.watch(LEADER_TRANSITIONS, self._leadership.count_transitions)
        self._metrics.watch_queue(self._queue.__len__)
        health_server = HealthServer(self._health, address=self._settings.bind_address, port=self._settings.health_port)
        metrics_server, metrics_thread = start_http_server(
            self._settings.metrics_port, addr=self._settings.bind_address, registry=self._metrics.registry
        )
        health_server.start()
        await self._report_server.start()
        # kopf cancels every task that is younger than its own, so ours come first.
        self._start(self._health.beat(), name="health beat")
        self._start(self._recorder.run(), name="event recorder")
        self._start(self._audit(), name="auditor")
        self._start(self._leadership.run(), name="leadership")
        self._start(self._work(), name="workers")
        # And so do the tasks that they start at once: at the end kopf waits 5 s for younger ones.
        await asyncio.sleep(0)
        try:
            await handlers.watch(
                self._transport,
                namespaces=self._settings.namespaces,
                receive=self._receive,
                stop=self._stop,
                clean_up=self._finish,
            )
        finally:
            await self._finish()
            await _cancel(self._tasks)
            await asyncio.gather(asyncio.to_thread(health_server.stop), asyncio.to_thread(metrics_server.shutdown))
            metrics_server.server_close()
            metrics_thread.join()
        if self._failure is not None:
            raise self._failure

    def _receive(self, kind: Kind, raw: RawObject, is_deleted: bool) -> None:  # noqa: FBT001  the shape that kopf's events have
        self._metrics.count(WATCH_EVENTS, resource=kind.value)
        for key in self._store.observe(kind, raw, is_deleted=is_deleted):
            self._enqueue(key, is_urgent=kind is Kind.FINETUNEJOB and is_unanswered(raw))

    def _enqueue(self, key: Key, *, is_urgent: bool = False) -> None:
        """Have a key reconciled; a standby need not remember what it would, as a leader begins with all keys."""
        if self._leadership.begun.is_set():
            self._queue.add(key, is_urgent=is_urgent)

    def _enqueue_report(self, key: Key) -> None:
        """Have a key reconciled when its progress may be written next; the reports until then need no look of their own."""
        record = self._store.jobs.find(key)
        shown_at = record.content.progress_at if record else None
        delay = compute_report_delay(
            (_now() - shown_at).total_seconds() if shown_at else math.inf,
            seconds_since_write=self._progress_turns.seconds_since(key),
            interval_seconds=self._settings.progress_seconds,
        )
        self._queue.add_after(key, delay)

    async def _audit(self) -> None:
        await self._auditor.wait_until_synced()
        self._health.is_synced = True
        self._leadership.let_lead()
        logger.info("synced: %d FineTuneJobs", len(self._store.jobs))
        await self._auditor.run()

    async def _work(self) -> None:
        """Start the workers once this process leads, which it may when it has seen all."""
        await self._leadership.begun.wait()
        for key in self._store.list_keys():
            self._queue.add(key)
        try:
            async with asyncio.TaskGroup() as group:
                for number in range(self._settings.workers):
                    group.create_task(self._controller.run_worker(), name=f"worker {number}")
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _finish(self) -> None:
        """End the work in flight and close the connections; what is left undone is found again at the next start."""
        # kopf's own handlers fail at a second signal, and its waiter for the flag would be waited for in vain.
        self._catch_signals()
        self._stop.set()
        self._queue.close()
        workers = [task for task in self._tasks if task.get_name() == "workers"]
        if self._leadership.begun.is_set() and workers:
            _, late = await asyncio.wait(workers, timeout=_FINISH_SECONDS)
            for task in late:
                task.cancel()
            try:
                await asyncio.wait_for(self._recorder.flush(), timeout=2)
            except TimeoutError:
                logger.warning("some events could not be recorded")
        await self._leadership.stop()
        await self._report_server.stop()
        await self._forwarder.close()

    def _catch_signals(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._stop.set)

    def _start(self, work: Coroutine[None, None, None], *, name: str) -> None:
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(self._note_end)
        self._tasks.append(task)

    def _note_end(self, task: asyncio.Task[None]) -> None:
        """Stop the operator when one of its parts fails: half of it would look alive and do nothing."""
        if not task.cancelled() and task.exception() is not None:
            self._failure = self._failure or task.exception()
            self._stop.set()


async def run(settings: Settings) -> None:
    """Connect to the API server and run the operator."""
    metrics = Metrics()

    async def connect_election(identity: str) -> Cluster:
        client = ClientSettings(requests_per_second=20, burst=20, connections=2, identity=identity)
        return Cluster(await Transport.connect(client, metrics=metrics))

    leadership = Leadership(settings, connect=connect_election)
    client = ClientSettings(
        requests_per_second=settings.api_requests_per_second,
        burst=settings.api_burst,
        connections=settings.api_connections,
        identity=leadership.identity,
    )
    transport = await Transport.connect(client, metrics=metrics, gate=leadership.gate)
    try:
        await Cluster(transport).check_custom_resources(namespaces=settings.namespaces)
        await Operator(settings, transport, metrics=metrics, leadership=leadership).run()
    finally:
        await transport.close()


def main() -> int:
    """Run the operator and return the exit status."""
    try:
        settings = load_settings()
    except ValidationError as error:
        for each in error.errors(include_url=False):
            print(f"FINETUNE_{'_'.join(map(str, each['loc'])).upper()}: {each['msg']}", file=sys.stderr)  # noqa: T201
        return 1
    configure_logging(level=settings.log_level, format=settings.log_format)
    disable_created_metrics()
    try:
        asyncio.run(run(settings))
    except (OperatorError, OSError) as error:
        is_expected = isinstance(error, StartError | DeafWatchError | RewoundError | LeadershipLostError)
        logger.error("%s", error, exc_info=not is_expected)  # noqa: TRY400
        return 1
    logger.info("stopped")
    return 0


async def _cancel(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _now() -> datetime:
    return datetime.now(UTC)


if __name__ == "__main__":
    sys.exit(main())

"""From a key to its effects: read the store, decide (pure), carry out the decision in order."""

import asyncio
import logging
import time
from collections.abc import Callable
from datetime import datetime
from typing import Protocol

from finetune_api.v1alpha1 import FineTuneJobStatus

from finetune_operator.errors import ApiError, ConflictError, NotFoundError, RefusedError, RewoundError
from finetune_operator.measures import measure
from finetune_operator.metrics import RECONCILE_SECONDS, RECONCILES, Metrics
from finetune_operator.observed import ChildView, JobView, Observed, PodRefusal
from finetune_operator.outcome import Deletion, EventNote, Outcome
from finetune_operator.queue import QueueClosedError, WorkQueue
from finetune_operator.reconcile import reconcile, refuse
from finetune_operator.settings import TrainerSettings
from finetune_operator.store import Store
from finetune_operator.throttle import Turns
from finetune_operator.views import Key, Kind, RawObject, is_passing

logger = logging.getLogger(__name__)

_JOB = "Job"
# How the API server tells that a namespace is being deleted, and all in it soon:
# https://github.com/kubernetes/apiserver/blob/master/pkg/admission/plugin/namespace/lifecycle/admission.go
_TERMINATING = "because it is being terminated"
_TERMINATING_SECONDS = 30.0
_NAME_TAKEN = "a Job of this name exists, and it is not this FineTuneJob's"


class ClusterWriter(Protocol):
    """The requests that carry out a decision."""

    async def apply_child(self, manifest: RawObject) -> RawObject:
        """Create a child, and return it, or raise ConflictError when another manager has changed it."""

    async def apply_status(self, job: JobView, status: FineTuneJobStatus) -> RawObject:
        """Make this the whole status of a FineTuneJob, and return the object."""

    async def adopt_child(self, job: JobView, child: ChildView) -> RawObject:
        """Give a child Job the reference to its owner once more, and return it."""

    async def delete_child(self, namespace: str, deletion: Deletion) -> RawObject:
        """Delete a child Job if it is still what was seen."""

    async def get(self, kind: Kind, key: Key) -> RawObject:
        """Return an object as the API server has it at this time."""

    async def list_pods(self, namespace: str, child: str) -> tuple[RawObject, ...]:
        """Return the pods of a Job as the API server has them at this time."""

    async def list_refusals(self, namespace: str, uid: str) -> tuple[str, ...]:
        """Return why no pods could be created for a Job, the latest last."""


class EventRecorder(Protocol):
    """Where events for users go."""

    def record(self, job: JobView, note: EventNote) -> None:
        """Have an event written."""


class Controller:
    """Reconciles the keys of a queue."""

    def __init__(
        self,
        *,
        store: Store,
        queue: WorkQueue[Key],
        cluster: ClusterWriter,
        recorder: EventRecorder,
        metrics: Metrics,
        settings: TrainerSettings,
        progress_turns: Turns[Key],
        clock: Callable[[], datetime],
    ) -> None:
        self._store = store
        self._queue = queue
        self._cluster = cluster
        self._recorder = recorder
        self._metrics = metrics
        self._settings = settings
        self._progress_turns = progress_turns
        self._clock = clock

    async def run_worker(self) -> None:
        """Reconcile keys until the queue is closed."""
        while True:
            try:
                key = await self._queue.get()
            except QueueClosedError:
                return
            try:
                await self.process(key)
            finally:
                self._queue.done(key)

    async def process(self, key: Key) -> None:
        """Reconcile one key. Whatever goes wrong is counted, logged and tried again later; it never fails a job.

        Raises RewoundError alone: what was seen has become wrong, and each try would end as this one.
        """
        started_at = time.monotonic()
        try:
            result = await self._reconcile(key)
        except (asyncio.CancelledError, RewoundError):
            raise
        except ApiError as error:
            result = "error"
            logger.warning("cannot reconcile %s/%s, next try in %.1f s: %s", *key, self._queue.retry(key), error)
        except Exception:
            result = "error"
            logger.exception("cannot reconcile %s/%s, next try in %.1f s", *key, self._queue.retry(key))
        self._metrics.count(RECONCILES, result=result)
        self._metrics.observe(RECONCILE_SECONDS, time.monotonic() - started_at)

    async def _reconcile(self, key: Key) -> str:
        """Reconcile one key and return how it ended."""
        seen = self._store.read(key)
        if seen is None:
            self._queue.forget(key)
            self._progress_turns.forget(key)
            return "success"
        job, observed = seen
        return await self._carry_out(job, observed, reconcile(job, observed, now=self._clock(), settings=self._settings))

    async def _carry_out(self, job: JobView, observed: Observed, outcome: Outcome) -> str:
        """Carry out what was decided, in its order, and return how that ended."""
        if outcome.confirm is not None and not await self._is_confirmed(job, observed, outcome.confirm):
            self._queue.add(job.key)
            return "requeue"
        for deletion in outcome.delete:
            await self._delete(job, deletion)
        for child in outcome.adopt:
            await self._adopt(job, child)
        if (taken := await self._find_taken(job, outcome)) is not None:
            return await self._wait_for_name(job, observed, taken)
        if outcome.absent and not await self._is_current(job):
            self._queue.add(job.key)
            return "requeue"
        for manifest in outcome.apply:
            if (refusal := await self._apply(job, observed, manifest)) is not None:
                return refusal
        if outcome.apply and self._queue.has_urgent:
            # Others still wait for their first child. What this one leads to is in the next look, with all that has come by then.
            self._queue.add(job.key)
            return "deferred"
        await self._conclude(job, outcome)
        self._queue.forget(job.key)
        if outcome.inspect is not None:
            await self._inspect(job, outcome.inspect)
        return "success"

    async def _is_confirmed(self, job: JobView, observed: Observed, child: ChildView) -> bool:
        """Return whether the pods of a child are as they were seen, and bring the store up to date."""
        for raw in await self._cluster.list_pods(job.namespace, child.name):
            self._store.observe(Kind.POD, raw)
        seen = self._store.read(job.key)
        if seen is not None and seen[1].pods == observed.pods:
            return True
        logger.warning("the watch of pods lags behind what Job %s/%s has", job.namespace, child.name)
        return False

    async def _delete(self, job: JobView, deletion: Deletion) -> None:
        """Delete a child. One that is gone or has changed is looked at anew."""
        key = (job.namespace, deletion.name)
        try:
            answer = await self._cluster.delete_child(job.namespace, deletion)
        except (NotFoundError, ConflictError):
            await self._look_up(key)
            self._queue.add(job.key)
            return
        logger.info("deleted Job %s/%s", *key)
        # With nothing to wait for, the answer is a Status, and the watch tells of the end.
        if answer.get("kind") == "Job":
            self._store.observe(Kind.JOB, answer)

    async def _adopt(self, job: JobView, child: ChildView) -> None:
        """Give a child its owner back, unless the FineTuneJob is being deleted and lets go of its children."""
        await self._refresh(job)
        record = self._store.jobs.find(job.key)
        if record is None or record.uid != job.uid or record.content.deleting:
            return
        try:
            self._store.observe(Kind.JOB, await self._cluster.adopt_child(job, child))
        except (NotFoundError, ConflictError):
            await self._look_up((job.namespace, child.name))
            self._queue.add(job.key)
        except RefusedError as error:
            logger.warning("Job %s/%s will not go with its FineTuneJob: %s", job.namespace, child.name, error)
        else:
            logger.info("gave Job %s/%s its owner back", job.namespace, child.name)

    async def _is_current(self, job: JobView) -> bool:
        """Return whether the API server has the FineTuneJob as it was seen: a Job for one that is gone would be a second one."""
        await self._refresh(job)
        record = self._store.jobs.find(job.key)
        return record is not None and (record.uid, str(record.version)) == (job.uid, job.resource_version)

    async def _find_taken(self, job: JobView, outcome: Outcome) -> RawObject | None:
        """Return a Job that has a name which must not exist, or which is to be applied and is another's."""
        for name in outcome.absent:
            if (found := await self._look_up((job.namespace, name))) is not None:
                return found
        for manifest in _list_jobs(outcome):
            known = self._store.children.find((job.namespace, manifest["metadata"]["name"]))
            if known is not None and known.owner_uid != job.uid and (found := await self._look_up(known.key)) is not None:
                return found
        return None

    async def _wait_for_name(self, job: JobView, observed: Observed, taken: RawObject) -> str:
        """Wait for a Job that is about to go, or that was not seen yet; tell the user of one that stays in the way."""
        name = taken["metadata"]["name"]
        if is_passing(taken, job_uid=job.uid):
            logger.info("waiting for Job %s/%s to be gone", job.namespace, name)
            self._queue.retry(job.key)
            return "requeue"
        await self._report_refusal(job, observed, subject=f"Job {name}", message=_NAME_TAKEN)
        return "refused"

    async def _look_up(self, key: Key) -> RawObject | None:
        """Ask the API server for a child Job, and bring the store up to date with the answer."""
        try:
            return await self._look(Kind.JOB, key)
        except NotFoundError:
            known = self._store.children.find(key)
            self._store.purge(Kind.JOB, () if known is None else (known.uid,))
            return None

    async def _apply(self, job: JobView, observed: Observed, manifest: RawObject) -> str | None:
        """Create a child, or return how the reconcile ends without it."""
        try:
            answer = await self._cluster.apply_child(manifest)
        except RefusedError as error:
            await self._report_refusal(job, observed, subject=_name(manifest), message=error.message)
            return "refused"
        except ConflictError as error:
            return await self._settle_conflict(job, observed, manifest, error=error)
        if manifest["kind"] == _JOB:
            self._store.observe(Kind.JOB, answer)
        logger.info("applied %s %s/%s", manifest["kind"], job.namespace, manifest["metadata"]["name"])
        return None

    async def _settle_conflict(self, job: JobView, observed: Observed, manifest: RawObject, *, error: ConflictError) -> str:
        """Look at the job anew when its child is there already, as another manager has changed; else tell the user."""
        if manifest["kind"] != _JOB:
            await self._report_refusal(job, observed, subject=_name(manifest), message=error.message)
            return "refused"
        found = await self._look_up((job.namespace, manifest["metadata"]["name"]))
        if found is not None:
            return await self._wait_for_name(job, observed, found)
        self._queue.retry(job.key)
        return "requeue"

    async def _conclude(self, job: JobView, outcome: Outcome) -> None:
        """Write the status if it changed, then record the events: they tell of what is written."""
        if outcome.is_only_progress and (seconds := self._progress_turns.take(job.key)) > 0:
            # By then there may be a newer report; only that one is written.
            self._queue.add_after(job.key, seconds)
        elif outcome.status is not None:
            if not await self._write_status(job, outcome.status):
                return
            record = self._store.jobs.find(job.key)
            measure(self._metrics, job, outcome.status, created_at=record.content.created_at if record else None)
        for note in outcome.events:
            self._recorder.record(job, note)
        if outcome.requeue_after is not None:
            self._queue.add_after(job.key, outcome.requeue_after)

    async def _write_status(self, job: JobView, status: FineTuneJobStatus) -> bool:
        """Write the status and return True, or look at the job anew when it is not what the status was derived from."""
        try:
            self._store.observe(Kind.FINETUNEJOB, await self._cluster.apply_status(job, status))
        except (NotFoundError, ConflictError):
            await self._refresh(job)
            self._queue.add(job.key)
            return False
        return True

    async def _refresh(self, job: JobView) -> None:
        try:
            await self._look(Kind.FINETUNEJOB, job.key)
        except NotFoundError:
            self._store.purge(Kind.FINETUNEJOB, (job.uid,))

    async def _look(self, kind: Kind, key: Key) -> RawObject:
        """Return an object and take it in. The API server never has less than was seen before it is asked."""
        seen = self._store.find(kind, key)
        raw = await self._cluster.get(kind, key)
        metadata = raw["metadata"]
        if seen is not None and seen.uid == metadata["uid"] and int(metadata["resourceVersion"]) < seen.version:
            raise RewoundError(f"{kind.value} {'/'.join(key)}")
        self._store.observe(kind, raw)
        return raw

    async def _report_refusal(self, job: JobView, observed: Observed, *, subject: str, message: str) -> None:
        """Tell the user why no child can be created. The next try comes with backoff, as the cause is not ours."""
        logger.warning("%s of FineTuneJob %s/%s is refused: %s", subject, *job.key, message)
        refused = refuse(job, observed, subject=subject, message=message, now=self._clock(), settings=self._settings)
        await self._conclude(job, refused)
        if _TERMINATING in message:
            self._queue.add_after(job.key, _TERMINATING_SECONDS)
        else:
            self._queue.retry(job.key)

    async def _inspect(self, job: JobView, child: ChildView) -> None:
        """Look why a Job has no pod; what is found is evidence for the next decision."""
        try:
            found = await self._cluster.list_refusals(job.namespace, child.uid)
        except ApiError as error:
            logger.warning("cannot read the events of Job %s/%s: %s", job.namespace, child.name, error)
            found = ()
        message = found[-1] if found else None
        self._store.put_refusal(job.key, PodRefusal(child_uid=child.uid, checked_at=self._clock(), message=message))
        self._queue.add(job.key)


def _name(manifest: RawObject) -> str:
    return f"{manifest['kind']} {manifest['metadata']['name']}"


def _list_jobs(outcome: Outcome) -> list[RawObject]:
    return [manifest for manifest in outcome.apply if manifest["kind"] == _JOB]

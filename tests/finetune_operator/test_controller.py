"""Carrying out decisions: order, refusals, conflicts, stale views and mistakes of our own."""

import itertools
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pytest
from finetune_api import names
from finetune_api.contract import compute_run
from finetune_api.v1alpha1 import FineTuneJobSpec, FineTuneJobStatus
from finetune_operator.controller import Controller
from finetune_operator.errors import ApiError, ConflictError, NotFoundError, RefusedError, RewoundError, build_api_error
from finetune_operator.manifests.owner import build_owner
from finetune_operator.metrics import Metrics
from finetune_operator.observed import ChildView, JobView
from finetune_operator.outcome import Deletion, EventNote
from finetune_operator.queue import WorkQueue
from finetune_operator.settings import TrainerSettings
from finetune_operator.store import Store
from finetune_operator.throttle import Turns
from finetune_operator.views import Key, Kind, RawObject
from prometheus_client import generate_latest

_KEY = ("team", "emoji")
_SETTINGS = TrainerSettings(image="trainer:1", report_url="https://operator:10443", report_ca="ca")


@dataclass
class FakeCluster:
    """An API server of dictionaries with real resourceVersions, preconditions and, on demand, errors."""

    objects: dict[tuple[Kind, Key], dict[str, Any]] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)
    refusals: dict[Key, list[str]] = field(default_factory=dict)
    failures: dict[str, list[ApiError]] = field(default_factory=dict)
    versions: "itertools.count[int]" = field(default_factory=lambda: itertools.count(100))

    def put(self, kind: Kind, raw: dict[str, Any]) -> dict[str, Any]:
        raw = raw | {"metadata": raw["metadata"] | {"resourceVersion": str(next(self.versions))}}
        self.objects[kind, (raw["metadata"]["namespace"], raw["metadata"]["name"])] = raw
        return raw

    async def apply_child(self, manifest: RawObject) -> RawObject:
        self._note(f"apply {manifest['metadata']['name']}")
        created = {"uid": f"uid-{manifest['metadata']['name']}", "creationTimestamp": "1970-01-01T00:16:40Z"}
        raw = dict(manifest) | {"metadata": manifest["metadata"] | created}
        return self.put(Kind.JOB, raw) if manifest["kind"] == "Job" else raw

    async def apply_status(self, job: JobView, status: FineTuneJobStatus) -> RawObject:
        self._note("status")
        current = await self._find(Kind.FINETUNEJOB, job.key)
        if current["metadata"]["resourceVersion"] != job.resource_version:
            raise ConflictError("the object has been modified", status=409, reason="Conflict")
        return self.put(Kind.FINETUNEJOB, current | {"status": status.model_dump(mode="json", by_alias=True, exclude_none=True)})

    async def adopt_child(self, job: JobView, child: ChildView) -> RawObject:
        self._note(f"adopt {child.name}")
        current = await self._find(Kind.JOB, (job.namespace, child.name))
        return self.put(Kind.JOB, current | {"metadata": current["metadata"] | {"ownerReferences": [build_owner(job)]}})

    async def delete_child(self, namespace: str, deletion: Deletion) -> RawObject:
        self._note(f"delete {deletion.name}")
        current = await self._find(Kind.JOB, (namespace, deletion.name))
        seen = (current["metadata"]["uid"], current["metadata"]["resourceVersion"])
        if seen != (deletion.uid, deletion.resource_version):
            raise ConflictError("precondition failed", status=409, reason="Conflict")
        return self.put(Kind.JOB, current | {"metadata": current["metadata"] | {"deletionTimestamp": "2026-01-01T00:00:00Z"}})

    async def get(self, kind: Kind, key: Key) -> RawObject:
        self._note(f"get {key[1]}")
        return await self._find(kind, key)

    async def list_pods(self, namespace: str, child: str) -> tuple[RawObject, ...]:
        self._note(f"pods {child}")
        pods = (raw for (kind, key), raw in self.objects.items() if kind is Kind.POD and key[0] == namespace)
        return tuple(raw for raw in pods if raw["metadata"]["ownerReferences"][0]["name"] == child)

    async def list_refusals(self, namespace: str, uid: str) -> tuple[str, ...]:
        self._note(f"refusals {uid}")
        return tuple(self.refusals.get((namespace, uid), ()))

    async def _find(self, kind: Kind, key: Key) -> dict[str, Any]:
        if (kind, key) not in self.objects:
            raise NotFoundError(f"{key[1]} not found", status=404, reason="NotFound")
        return self.objects[kind, key]

    def _note(self, request: str) -> None:
        self.done.append(request)
        if pending := self.failures.get(request.split(maxsplit=1)[0]):
            raise pending.pop(0)


@dataclass
class Bench:
    """A controller on a fake API server, with its clock."""

    objects: Any
    cluster: FakeCluster = field(default_factory=FakeCluster)
    store: Store = field(default_factory=Store)
    now: float = 1000.0
    events: list[str] = field(default_factory=list)
    metrics: Metrics = field(default_factory=Metrics)

    def __post_init__(self) -> None:
        self.queue: WorkQueue[Key] = WorkQueue(clock=lambda: self.now, find_flow=lambda key: key[0], jitter=lambda: 1.0)
        self.controller = Controller(
            store=self.store,
            queue=self.queue,
            cluster=self.cluster,
            recorder=self,
            metrics=self.metrics,
            settings=_SETTINGS,
            progress_turns=Turns(rate=100, clock=lambda: self.now),
            clock=lambda: datetime.fromtimestamp(self.now, tz=UTC),
        )

    def record(self, job: JobView, note: EventNote) -> None:
        self.events.append(f"{job.name} {note.reason}")

    def show(self, raw: dict[str, Any], kind: Kind = Kind.FINETUNEJOB) -> dict[str, Any]:
        """Change an object in the cluster and let the watch show it."""
        raw = self.cluster.put(kind, raw)
        self.store.observe(kind, raw)
        return raw

    async def work(self) -> list[str]:
        """Process what is due, and return the requests that were made."""
        before = len(self.cluster.done)
        while (key := self.queue.take()) is not None:
            await self.controller.process(key)
            self.queue.done(key)
        return self.cluster.done[before:]

    async def wake(self) -> list[str]:
        self.queue.add(_KEY)
        return await self.work()

    @property
    def state(self) -> str:
        seen = self.store.read(_KEY)
        assert seen is not None
        return next((each.reason for each in seen[0].status.conditions if each.type == "Ready"), "")

    def results(self) -> dict[str, float]:
        lines = [line for line in generate_latest(self.metrics.registry).decode().splitlines() if "reconciles_total{" in line]
        numbers = {line.split('"')[1]: float(line.split()[1]) for line in lines}
        return {result: number for result, number in numbers.items() if number}


@pytest.fixture
def bench(objects: Any) -> Bench:
    return Bench(objects)


def _refused(message: str, *, status: int = 403) -> RefusedError:
    return RefusedError(message, status=status, reason="Forbidden")


async def test_fresh_job_gets_its_child_then_its_status(bench: Bench) -> None:
    bench.show(bench.objects.job())
    requests = await bench.wake()

    assert [each.split()[0] for each in requests] == ["apply", "status"]
    assert bench.events == ["emoji Pending"]


async def test_children_of_many_fresh_jobs_come_before_their_statuses(bench: Bench) -> None:
    names = ("cats", "dogs", "emoji")
    for name in names:
        bench.show(bench.objects.job(name=name))
        bench.queue.add(("team", name), is_urgent=True)
    requests = await bench.work()

    assert [each.split()[0] for each in requests] == ["apply"] * 3 + ["status"] * 3
    assert {f"{name} Pending" for name in names} == set(bench.events)
    assert bench.results() == {"deferred": 2, "success": 3}


async def test_many_fresh_jobs_do_not_hold_up_the_status_of_another_namespace(bench: Bench) -> None:
    for name in ("cats", "dogs", "emoji"):
        bench.show(bench.objects.job(name=name))
        bench.queue.add(("team", name), is_urgent=True)
    bench.show(bench.objects.job(name="lone", namespace="other"))
    bench.queue.add(("other", "lone"), is_urgent=True)
    await bench.work()

    assert bench.events[0] == "lone Pending"


async def test_own_writes_are_seen_without_a_watch(bench: Bench) -> None:
    bench.show(bench.objects.job())
    await bench.wake()

    assert await bench.wake() == []


async def test_key_of_a_deleted_job_needs_nothing(bench: Bench) -> None:
    assert await bench.wake() == []
    assert bench.results() == {"success": 1}


@pytest.mark.parametrize(
    ("error", "state"),
    [
        pytest.param(_refused('jobs.batch "x" is forbidden: exceeded quota: q'), "QuotaExceeded", id="quota"),
        pytest.param(
            _refused("jobs.batch \"x\" is forbidden: ValidatingAdmissionPolicy 'p' denied"), "AdmissionDenied", id="policy"
        ),
        pytest.param(_refused('jobs.batch "x" is forbidden: no'), "Forbidden", id="forbidden"),
        pytest.param(
            build_api_error(500, reason="InternalError", message='Internal error occurred: failed calling webhook "w": timeout'),
            "WebhookFailed",
            id="webhook that does not answer",
        ),
        pytest.param(_refused("spec.template: Invalid value", status=422), "InvalidJob", id="invalid"),
    ],
)
async def test_refused_child_is_shown_and_tried_again_later(bench: Bench, error: ApiError, state: str) -> None:
    bench.show(bench.objects.job())
    bench.cluster.failures["apply"] = [error, error]
    await bench.wake()
    assert (bench.state, bench.events) == (state, [f"emoji {state}"])
    assert await bench.work() == []  # not before the backoff is over
    bench.now += 1
    requests = await bench.work()
    assert [each.split()[0] for each in requests] == ["apply"]  # an unchanged status is not written again
    bench.now += 2
    await bench.work()

    assert (bench.state, len(bench.store.children)) == ("Pending", 1)


def _conflict(field: str) -> ConflictError:
    message = f'Apply failed with 1 conflict: conflict with "other" using v1: {field}'
    return ConflictError(message, status=409, reason="Conflict")


async def test_service_of_many_pods_comes_first_and_is_no_child(bench: Bench) -> None:
    bench.show(bench.objects.job(spec=bench.objects.job()["spec"] | {"nodes": 2}))
    requests = await bench.wake()

    assert ["apply emoji-uid-team", "apply", "status"] == [requests[0], *(each.split()[0] for each in requests[1:])]
    assert [2] == [child.content.nodes for child in bench.store.children]


async def test_child_that_another_manager_has_changed_is_looked_at_anew(bench: Bench) -> None:
    bench.show(bench.objects.job())
    await bench.wake()
    child = next(iter(bench.store.children))
    bench.store.children.pop(child.key)  # lost from the view
    bench.store.observe(Kind.FINETUNEJOB, bench.show(bench.objects.job()))
    bench.cluster.failures["apply"] = [_conflict(".spec.suspend")]
    requests = await bench.wake()
    assert [f"apply {child.name}", f"get {child.name}"] == requests
    assert [child.key] == [each.key for each in bench.store.children]
    bench.now += 1
    requests = await bench.work()

    assert [] == [each for each in requests if each.startswith("apply")]


async def test_service_that_another_manager_has_changed_is_shown(bench: Bench) -> None:
    bench.show(bench.objects.job(spec=bench.objects.job()["spec"] | {"nodes": 2}))
    bench.cluster.failures["apply"] = [_conflict(".spec.selector")]
    requests = await bench.wake()

    assert ["apply", "status"] == [each.split()[0] for each in requests]
    assert "FieldConflict" == bench.state


@pytest.mark.parametrize("request_", ["apply", "status"])
async def test_error_of_the_api_server_is_tried_again_with_backoff(bench: Bench, request_: str) -> None:
    bench.show(bench.objects.job())
    bench.cluster.failures[request_] = [ApiError("boom", status=500, reason="InternalError") for _ in range(3)]
    await bench.wake()
    for _ in range(4):
        assert await bench.work() == []
        bench.now += 1
        await bench.work()

    assert bench.state == "Pending"
    assert bench.results()["error"] == 3


async def test_object_that_is_older_than_what_was_seen_ends_the_process(bench: Bench) -> None:
    """After a restore each write conflicts, and what is read then is outdated: it would be tried at once and for ever."""
    before = bench.show(bench.objects.job())
    bench.show(bench.objects.job(generation=2))
    bench.cluster.objects[Kind.FINETUNEJOB, _KEY] = before

    with pytest.raises(RewoundError, match="finetunejobs team/emoji"):
        await bench.wake()


async def test_mistake_of_our_own_fails_no_job_and_stops_no_other(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.show(bench.objects.job("poison"))
    bench.show(bench.objects.job())
    bench.cluster.failures["apply"] = [ZeroDivisionError("ours")]  # type: ignore[list-item]
    bench.queue.add(("team", "poison"))
    await bench.wake()

    assert bench.state == "Pending"
    assert bench.results() == {"error": 1, "success": 1}
    assert "team/poison" in caplog.text


async def test_status_is_not_written_over_what_was_not_seen(bench: Bench) -> None:
    bench.show(bench.objects.job())
    await bench.wake()
    hidden = bench.cluster.objects[Kind.FINETUNEJOB, _KEY]
    changed = hidden | {"spec": hidden["spec"] | {"suspend": True}, "metadata": hidden["metadata"] | {"generation": 2}}
    bench.cluster.put(Kind.FINETUNEJOB, changed)  # the watch has not shown it yet
    bench.show(bench.objects.pod(child=next(iter(bench.store.children)).name, status={"phase": "Pending", "conditions": [
        {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "no"}]}), Kind.POD)  # fmt: skip
    requests = await bench.wake()

    assert [each.split()[0] for each in requests] == ["status", "get", "delete", "status"]
    assert bench.state == "Suspended" or "Suspending" in bench.state


async def test_child_that_changed_since_is_looked_at_again_before_its_deletion(bench: Bench) -> None:
    job = bench.show(bench.objects.job())
    await bench.wake()
    child = next(iter(bench.store.children))
    hidden = bench.cluster.objects[Kind.JOB, child.key]
    bench.cluster.put(Kind.JOB, hidden)
    current = bench.cluster.objects[Kind.FINETUNEJOB, _KEY]
    bench.show(current | {"spec": job["spec"] | {"suspend": True}})
    requests = await bench.wake()

    assert [each.split()[0] for each in requests if not each.startswith("status")] == ["delete", "get", "delete"]
    assert "deletionTimestamp" in bench.cluster.objects[Kind.JOB, child.key]["metadata"]


async def test_name_of_a_predecessors_child_is_waited_for(bench: Bench) -> None:
    bench.show(bench.objects.job())
    await bench.wake()
    child = next(iter(bench.store.children))
    left = bench.cluster.objects[Kind.JOB, child.key]
    labels = left["metadata"]["labels"] | {"finetune.dev/job-uid": "predecessor"}
    left = bench.show(left | {"metadata": left["metadata"] | {"labels": labels}}, Kind.JOB)
    bench.show(bench.objects.job(uid="successor"))
    requests = await bench.wake()
    assert not any(each.startswith("apply") for each in requests)
    del bench.cluster.objects[Kind.JOB, child.key]
    bench.store.observe(Kind.JOB, left, is_deleted=True)
    bench.now += 1
    requests = await bench.wake()

    assert any(each.startswith("apply") for each in requests)


async def test_name_that_another_job_has_is_shown_until_it_is_free(bench: Bench) -> None:
    bench.show(bench.objects.job())
    await bench.wake()
    child = next(iter(bench.store.children))
    bench.store.purge(Kind.JOB, [child.uid])
    metadata = bench.cluster.objects[Kind.JOB, child.key]["metadata"]
    bench.cluster.put(Kind.JOB, {"metadata": metadata | {"labels": {}}})
    requests = await bench.wake()
    assert ["get", "status"] == [each.split()[0] for each in requests]
    assert "NameTaken" == bench.state
    del bench.cluster.objects[Kind.JOB, child.key]
    bench.now += 1
    await bench.work()

    assert "Pending" == bench.state
    assert [2] == [each.content.attempt for each in bench.store.children]


async def test_first_name_that_another_job_has_is_shown(bench: Bench) -> None:
    job = bench.show(bench.objects.job())
    name = names.child_name("emoji", compute_run(FineTuneJobSpec.model_validate(job["spec"])), 1)
    bench.cluster.put(Kind.JOB, {"metadata": {"name": name, "namespace": "team", "uid": "foreign"}})
    bench.cluster.failures["apply"] = [_conflict(".spec.backoffLimit")]
    requests = await bench.wake()

    assert ["apply", "get", "status"] == [each.split()[0] for each in requests]
    assert "NameTaken" == bench.state


@pytest.mark.parametrize(("deletion", "num_adoptions"), [({}, 1), ({"deletionTimestamp": "2026-01-01T00:00:00Z"}, 0)])
async def test_child_without_its_owner_gets_it_back_unless_its_job_lets_it_go(
    bench: Bench, deletion: dict[str, str], num_adoptions: int
) -> None:
    bench.show(bench.objects.job())
    await bench.wake()
    child = next(iter(bench.store.children))
    raw = bench.cluster.objects[Kind.JOB, child.key]
    hidden = bench.cluster.objects[Kind.FINETUNEJOB, _KEY]
    bench.cluster.put(Kind.FINETUNEJOB, hidden | {"metadata": hidden["metadata"] | deletion})  # the watch has not shown it yet
    bench.show(raw | {"metadata": raw["metadata"] | {"ownerReferences": []}}, Kind.JOB)
    requests = await bench.wake()

    assert num_adoptions == requests.count(f"adopt {child.name}")
    assert [] == await bench.wake()


async def test_attempt_whose_deletion_was_only_seen_is_checked_before_the_next(bench: Bench) -> None:
    bench.show(bench.objects.job())
    await bench.wake()
    child = next(iter(bench.store.children))
    bench.store.purge(Kind.JOB, [child.uid])  # lost from the view, though the API server still has it
    requests = await bench.wake()

    assert [each.split()[0] for each in requests] == ["get"]
    assert bench.results()["requeue"] == 1


@pytest.mark.parametrize("is_gone", [True, False])
async def test_next_attempt_is_not_created_for_a_job_that_is_gone_or_suspended_unseen(bench: Bench, *, is_gone: bool) -> None:
    bench.show(bench.objects.job())
    await bench.wake()
    child = next(iter(bench.store.children))
    bench.store.observe(Kind.JOB, bench.cluster.objects.pop((Kind.JOB, child.key)), is_deleted=True)
    hidden = bench.cluster.objects.pop((Kind.FINETUNEJOB, _KEY))
    if not is_gone:
        bench.cluster.put(Kind.FINETUNEJOB, hidden | {"spec": hidden["spec"] | {"suspend": True}})
    requests = await bench.wake()

    assert not any(each.startswith("apply") for each in requests), requests
    assert (0 if is_gone else 1) == len(bench.store.jobs)


@pytest.mark.parametrize(
    ("message", "is_tried"),
    [
        pytest.param("over quota", True, id="for another reason"),
        pytest.param("unable to create new content in namespace team because it is being terminated", False, id="as it goes"),
    ],
)
async def test_refusal_of_a_namespace_that_goes_is_not_tried_again_soon(bench: Bench, message: str, *, is_tried: bool) -> None:
    bench.cluster.failures["apply"] = [RefusedError(message, status=403, reason="Forbidden")]
    bench.show(bench.objects.job())
    await bench.wake()
    bench.now += 5
    requests = await bench.work()

    assert is_tried == any(each.startswith("apply") for each in requests)
    bench.now += 30
    await bench.work()
    assert "Pending" == bench.state


async def test_pause_that_the_decision_asks_for_is_kept(bench: Bench) -> None:
    bench.show(bench.objects.job())
    await bench.wake()
    child = next(iter(bench.store.children))
    failed = {"conditions": [{"type": "Failed", "status": "True", "lastTransitionTime": _format(bench.now)}]}
    bench.show(bench.cluster.objects[Kind.JOB, child.key] | {"status": failed}, Kind.JOB)
    await bench.wake()
    bench.now += _SETTINGS.evidence_seconds - 0.1
    assert await bench.work() == []
    bench.now += 0.2
    requests = await bench.work()

    assert requests[:2] == [f"pods {child.name}", "status"]
    assert "emoji PodLost" in bench.events


def _format(now: float) -> str:
    return datetime.fromtimestamp(now, tz=UTC).isoformat()


async def test_failure_that_no_pod_explains_counts_only_when_the_api_server_shows_the_same(bench: Bench) -> None:
    """The watch of pods is deaf: it shows one that runs, and not how it ended."""
    bench.show(bench.objects.job())
    await bench.wake()
    child = next(iter(bench.store.children))
    pod = bench.objects.pod(child=child.name, status={"phase": "Running"})
    bench.show(pod, Kind.POD)
    failed = {"conditions": [{"type": "Failed", "status": "True", "lastTransitionTime": _format(bench.now)}]}
    bench.show(bench.cluster.objects[Kind.JOB, child.key] | {"status": failed}, Kind.JOB)
    terminated = {"exitCode": 1, "reason": "Error", "startedAt": _format(bench.now), "finishedAt": _format(bench.now)}
    ended = {"phase": "Failed", "containerStatuses": [{"name": "trainer", "state": {"terminated": terminated}}]}
    bench.cluster.put(Kind.POD, pod | {"status": ended})
    bench.now += 11

    requests = await bench.wake()

    assert requests[:2] == [f"pods {child.name}", "status"]
    assert "emoji TrainerError" in bench.events
    assert "emoji PodLost" not in bench.events


async def test_events_of_a_job_without_a_pod_are_read_and_told(bench: Bench) -> None:
    bench.show(bench.objects.job())
    await bench.wake()
    await bench.wake()  # as the watch shows the child
    child = next(iter(bench.store.children))
    bench.cluster.refusals["team", child.uid] = ["exceeded quota: old", 'violates PodSecurity "restricted"']
    bench.now += 2
    requests = await bench.work()

    assert ["refusals", "status"] == [each.split()[0] for each in requests]
    assert "PodSecurityViolation" == bench.state


@pytest.mark.parametrize("error", [_refused("events is forbidden"), ApiError("boom", status=500, reason="InternalError")])
async def test_events_that_cannot_be_read_cost_the_cause_and_nothing_else(bench: Bench, error: ApiError) -> None:
    bench.show(bench.objects.job())
    await bench.wake()
    await bench.wake()  # as the watch shows the child
    bench.cluster.failures["refusals"] = [error]
    bench.now += 2
    requests = await bench.work()

    assert ["refusals"] == [each.split()[0] for each in requests]
    assert {"success"} == set(bench.results())
    assert await bench.work() == []  # not again before its time


async def test_refused_child_is_given_up_at_its_deadline(bench: Bench) -> None:
    spec = bench.objects.job()["spec"] | {"runPolicy": {"startDeadlineSeconds": 30}}
    bench.show(bench.objects.job(spec=spec))
    bench.cluster.failures["apply"] = [_refused('jobs.batch "x" is forbidden: exceeded quota: q') for _ in range(100)]
    await bench.wake()
    begin, requests = bench.now, []
    while bench.state != "Failed" and bench.now < begin + 60:
        bench.now += 0.5
        requests += await bench.work()

    assert begin + 30 == bench.now
    assert 15 > len(requests), "the API server is asked ever more rarely"
    assert "emoji Failed" in bench.events
    bench.now += 1000
    assert not any(each.startswith("apply") for each in await bench.work())


async def test_lost_time_and_retries_are_counted_by_cause(bench: Bench) -> None:
    bench.show(bench.objects.job())
    await bench.wake()
    child = next(iter(bench.store.children))
    ended = {"terminated": {"exitCode": 137, "startedAt": _format(bench.now), "finishedAt": _format(bench.now + 7)}}
    status = {
        "phase": "Failed",
        "containerStatuses": [{"name": "trainer", "state": ended}],
        "conditions": [{"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}],
    }
    bench.show(bench.objects.pod(child=child.name, status=status), Kind.POD)
    failed = {"conditions": [{"type": "Failed", "status": "True", "lastTransitionTime": _format(bench.now + 7)}]}
    bench.show(bench.cluster.objects[Kind.JOB, child.key] | {"status": failed}, Kind.JOB)
    bench.now += 7
    requests = await bench.wake()
    page = generate_latest(bench.metrics.registry).decode()

    assert ["status", "apply", "status"] == [each.split()[0] for each in requests]
    assert 'finetune_lost_seconds_total{cause="disruption"} 7.0' in page
    assert 'finetune_job_retries_total{cause="disruption"} 1.0' in page

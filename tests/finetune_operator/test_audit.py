"""The audit: what the watches lost is found, and a deaf watch ends the process."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from finetune_operator.audit import Auditor
from finetune_operator.errors import ApiError, DeafWatchError, RewoundError
from finetune_operator.metrics import Metrics
from finetune_operator.store import Store
from finetune_operator.views import Key, Kind, Listing
from prometheus_client import generate_latest


@dataclass
class Bench:
    """An auditor whose clock moves only while it sleeps; `later` happens then."""

    truth: dict[Kind, list[dict[str, Any]]] = field(default_factory=lambda: {kind: [] for kind in Kind})
    version: int = 100
    store: Store = field(default_factory=Store)
    enqueued: list[Key] = field(default_factory=list)
    metrics: Metrics = field(default_factory=Metrics)
    failures: list[ApiError] = field(default_factory=list)
    now: float = 0.0
    later: list[tuple[float, Callable[[], object]]] = field(default_factory=list)
    namespaces: tuple[str, ...] = ()
    meanwhile: dict[Kind, list[Callable[[], object]]] = field(default_factory=dict)
    """Happens while a kind is listed."""
    listed: list[tuple[Kind, str | None]] = field(default_factory=list)
    num_sleeps: int = 0

    def __post_init__(self) -> None:
        self.auditor = Auditor(
            self,
            store=self.store,
            enqueue=self.enqueued.append,
            namespaces=self.namespaces,
            interval_seconds=300,
            deaf_seconds=60,
            metrics=self.metrics,
            clock=lambda: self.now,
            sleep=self.sleep,
        )

    async def list_versions(self, kind: Kind, *, namespace: str | None) -> Listing:
        assert namespace in kind.list_scopes(self.namespaces)
        self.listed.append((kind, namespace))
        for happen in self.meanwhile.pop(kind, ()):
            happen()
        if self.failures:
            raise self.failures.pop()
        metadata = [raw["metadata"] for raw in self.truth[kind]]
        objects = {each["uid"]: ((each.get("namespace", ""), each["name"]), int(each["resourceVersion"])) for each in metadata}
        return Listing(version=self.version, objects=objects)

    async def sleep(self, seconds: float) -> None:
        self.num_sleeps += 1
        self.now += seconds
        while self.later and self.later[0][0] <= self.now:
            self.later.pop(0)[1]()

    def has(self, raw: dict[str, Any], *, kind: Kind = Kind.FINETUNEJOB, is_seen: bool = True) -> dict[str, Any]:
        self.truth[kind].append(raw)
        if is_seen:
            self.store.observe(kind, raw)
        return raw

    def lagging(self, resource: str) -> float | None:
        return self.metrics.registry.get_sample_value("finetune_audit_lagging_objects", {"resource": resource})

    def audits(self) -> list[str]:
        lines = generate_latest(self.metrics.registry).decode().splitlines()
        counted = (line for line in lines if line.startswith("finetune_audits_total{") and not line.endswith(" 0.0"))
        return [line.split('"')[1] for line in counted]


@pytest.fixture
def bench() -> Bench:
    return Bench()


async def test_audit_has_every_job_reconciled(bench: Bench, objects: Any) -> None:
    bench.has(objects.job("a"))
    bench.has(objects.job("b"))
    await bench.auditor.audit()

    assert (bench.enqueued, bench.audits()) == ([("team", "a"), ("team", "b")], ["clean"])


async def test_missed_deletion_is_made_up_for(bench: Bench, objects: Any) -> None:
    bench.has(objects.job())
    bench.store.observe(Kind.JOB, objects.child(version=50))
    await bench.auditor.audit()

    assert len(bench.store.children) == 0
    assert bench.enqueued[0] == ("team", "emoji")
    assert bench.audits() == ["repaired"]


async def test_object_that_is_newer_than_the_list_stays(bench: Bench, objects: Any) -> None:
    bench.meanwhile[Kind.JOB] = [lambda: bench.store.observe(Kind.JOB, objects.child(version=101))]
    await bench.auditor.audit()

    assert len(bench.store.children) == 1


def _change(bench: Bench, objects: Any) -> None:
    """See an object change, and then go back."""
    bench.has(objects.job(version=90))
    bench.store.observe(Kind.FINETUNEJOB, objects.job(version=95))


def _delete(bench: Bench, objects: Any) -> None:
    """See an object go, and then come back."""
    raw = bench.has(objects.job(version=90))
    bench.store.observe(Kind.FINETUNEJOB, raw | objects.job(version=95), is_deleted=True)


def _create(bench: Bench, objects: Any) -> None:
    """See an object come, and then vanish."""
    bench.store.observe(Kind.FINETUNEJOB, objects.job(version=101))


@pytest.mark.parametrize(
    ("undone", "message"),
    [
        pytest.param(_change, "1 of the finetunejobs", id="change"),
        pytest.param(_delete, "1 of the finetunejobs", id="deletion"),
        pytest.param(_create, "the finetunejobs", id="creation"),
    ],
)
async def test_history_that_went_back_ends_the_process(
    bench: Bench, objects: Any, undone: Callable[[Bench, Any], None], message: str
) -> None:
    """The store would take what is older than it knows for outdated, for ever."""
    undone(bench, objects)

    with pytest.raises(RewoundError, match=f"shows {message} as of before"):
        await bench.auditor.audit()
    assert bench.audits() == ["rewound"]
    assert bench.enqueued == []


async def test_change_that_arrives_while_it_is_listed_undoes_nothing(bench: Bench, objects: Any) -> None:
    bench.has(objects.job("changes", version=90))
    bench.has(objects.job("goes", version=90))
    bench.meanwhile[Kind.FINETUNEJOB] = [
        lambda: bench.store.observe(Kind.FINETUNEJOB, objects.job("changes", version=95)),
        lambda: bench.store.observe(Kind.FINETUNEJOB, objects.job("goes", version=96), is_deleted=True),
    ]
    await bench.auditor.audit()

    assert bench.audits() == ["clean"]


@pytest.mark.parametrize("seen", [pytest.param(4, id="older version"), pytest.param(None, id="never seen")])
async def test_change_that_does_not_arrive_ends_the_process(bench: Bench, objects: Any, seen: int | None) -> None:
    if seen:
        bench.store.observe(Kind.POD, objects.pod(version=seen))
    bench.has(objects.pod(version=5), kind=Kind.POD, is_seen=False)

    with pytest.raises(DeafWatchError, match="1 changes of pods"):
        await bench.auditor.audit()
    assert bench.audits() == ["deaf"]
    assert 60 <= bench.now < 61


async def test_change_that_is_waited_for_is_shown(bench: Bench, objects: Any) -> None:
    raw = bench.has(objects.pod(version=5), kind=Kind.POD, is_seen=False)
    shown: list[float | None] = []
    bench.later.append((20, lambda: shown.append(bench.lagging("pods"))))
    bench.later.append((30, lambda: bench.store.observe(Kind.POD, raw)))
    await bench.auditor.audit()

    assert [*shown, bench.lagging("pods")] == [1, 0]


async def test_change_that_arrives_late_is_no_alarm(bench: Bench, objects: Any) -> None:
    raw = bench.has(objects.pod(version=5), kind=Kind.POD, is_seen=False)
    bench.later.append((30, lambda: bench.store.observe(Kind.POD, raw)))
    await bench.auditor.audit()

    assert bench.audits() == ["clean"]


async def test_object_deleted_since_the_list_is_no_alarm(bench: Bench, objects: Any) -> None:
    raw = bench.has(objects.pod(version=5), kind=Kind.POD, is_seen=False)
    bench.later.append((1, lambda: bench.store.observe(Kind.POD, raw | {}, is_deleted=True)))
    await bench.auditor.audit()

    assert bench.audits() == ["clean"]


async def test_object_that_is_deleted_while_its_watch_is_away_is_purged_and_no_alarm(bench: Bench, objects: Any) -> None:
    """It was listed as it changed, and neither that nor its deletion arrives."""
    bench.has(objects.job())
    bench.store.observe(Kind.JOB, objects.child(version=50))
    bench.has(objects.child(version=60), kind=Kind.JOB, is_seen=False)
    bench.later = [(3, bench.truth[Kind.JOB].clear)]
    await bench.auditor.audit()

    assert (len(bench.store.children), bench.audits()) == (0, ["repaired"])
    assert bench.now < 15


async def test_object_that_came_and_went_while_its_watch_was_away_is_no_alarm(bench: Bench, objects: Any) -> None:
    bench.has(objects.child(version=60), kind=Kind.JOB, is_seen=False)
    bench.later = [(3, bench.truth[Kind.JOB].clear)]
    await bench.auditor.audit()

    assert bench.audits() == ["clean"]


async def test_workers_wait_until_all_kinds_are_seen(bench: Bench, objects: Any) -> None:
    bench.has(objects.job())
    raw = bench.has(objects.child(), kind=Kind.JOB, is_seen=False)
    bench.later.append((7, lambda: bench.store.observe(Kind.JOB, raw)))
    await bench.auditor.wait_until_synced()

    assert bench.now >= 7


async def test_nothing_is_listed_again_while_objects_keep_coming(bench: Bench, objects: Any) -> None:
    for number in (1, 2, 3):
        raw = bench.has(objects.job(f"job-{number}", uid=f"uid-{number}"), is_seen=False)
        bench.later.append((9 * number, functools.partial(bench.store.observe, Kind.FINETUNEJOB, raw)))
    await bench.auditor.wait_until_synced()

    assert bench.now >= 27
    assert len(bench.listed) == len(Kind)


async def test_looking_for_many_objects_leaves_the_loop_to_others(bench: Bench, objects: Any) -> None:
    many = [bench.has(objects.job(f"job-{number}", uid=f"uid-{number}"), is_seen=False) for number in range(2000)]

    def come() -> None:
        for raw in many:
            bench.store.observe(Kind.FINETUNEJOB, raw)

    bench.later.append((9, come))
    await bench.auditor.wait_until_synced()

    assert bench.num_sleeps <= 60 + 1


async def test_object_that_is_deleted_meanwhile_does_not_block_the_start(bench: Bench, objects: Any) -> None:
    bench.has(objects.job(), is_seen=False)
    bench.later.append((5, bench.truth[Kind.FINETUNEJOB].clear))
    await bench.auditor.wait_until_synced()

    assert 5 <= bench.now < 15


async def test_start_survives_an_api_server_that_is_away(bench: Bench) -> None:
    bench.failures = [ApiError("away", status=0, reason="NoAnswer")]
    await bench.auditor.wait_until_synced()

    assert bench.now >= 10


async def test_age_counts_from_the_last_audit(bench: Bench) -> None:
    bench.now = 500
    assert bench.auditor.age_seconds == 500
    await bench.auditor.audit()

    assert bench.auditor.age_seconds == 0


async def test_missed_deletion_of_a_profile_reaches_its_users(bench: Bench, objects: Any) -> None:
    bench.has(objects.job("user", spec={"profileRef": {"name": "team"}}))
    bench.has(objects.job("other"))
    bench.store.observe(Kind.FINETUNEPROFILE, objects.profile(version=50))
    await bench.auditor.audit()

    assert len(bench.store.profiles) == 0
    assert bench.enqueued[0] == ("team", "user")
    assert bench.audits() == ["repaired"]
    page = generate_latest(bench.metrics.registry).decode()
    assert 'finetune_audit_purges_total{resource="finetuneprofiles"} 1.0' in page


async def test_profiles_are_listed_once_for_all_namespaces(objects: Any) -> None:
    bench = Bench(namespaces=("a", "b"))
    bench.has(objects.profile(), kind=Kind.FINETUNEPROFILE)
    await bench.auditor.audit()

    assert [each for each in bench.listed if each[0] is Kind.FINETUNEPROFILE] == [(Kind.FINETUNEPROFILE, None)]
    assert [each for each in bench.listed if each[0] is Kind.FINETUNEJOB] == [(Kind.FINETUNEJOB, "a"), (Kind.FINETUNEJOB, "b")]

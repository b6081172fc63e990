"""What the probes are told."""

import asyncio
import urllib.error
import urllib.request
from dataclasses import dataclass, field

import pytest
from finetune_operator.handlers import name_watchers
from finetune_operator.health import Health, HealthServer

_WATCHERS = frozenset({"watcher for jobs.v1.batch@None"})


@dataclass
class Bench:
    """Health with its clock."""

    now: float = 1000.0
    audit_age: float = 0.0
    health: Health = field(init=False)

    def __post_init__(self) -> None:
        self.health = Health(
            watchers=_WATCHERS, max_audit_age_seconds=900, read_audit_age=lambda: self.audit_age, clock=lambda: self.now
        )
        self.health.is_synced = True
        self.health.take_pulse(_WATCHERS)


def test_operator_is_healthy_while_all_goes_on() -> None:
    assert Bench().health.find_problem() is None


def test_event_loop_that_hangs_is_noticed() -> None:
    bench = Bench()
    bench.now += 6

    assert "event loop" in str(bench.health.find_problem())


def test_dead_watcher_is_noticed() -> None:
    bench = Bench()
    bench.now += 60
    bench.health.take_pulse(frozenset())

    assert bench.health.find_problem() == "not running: watcher for jobs.v1.batch@None"


def test_watchers_have_a_moment_to_start() -> None:
    bench = Bench()
    bench.health.take_pulse(frozenset())

    assert bench.health.find_problem() is None


def test_missing_audit_is_noticed() -> None:
    bench = Bench(audit_age=901)

    assert "audit" in str(bench.health.find_problem())


@pytest.mark.parametrize(
    ("path", "is_synced", "expected"),
    [("/healthz", False, 200), ("/readyz", False, 503), ("/readyz", True, 200), ("/", True, 404)],
)
def test_probes_are_answered(path: str, *, is_synced: bool, expected: int) -> None:
    health = Health(watchers=frozenset(), max_audit_age_seconds=900, read_audit_age=lambda: 0)
    health.is_synced = is_synced
    server = HealthServer(health, address="127.0.0.1", port=0)
    server.start()
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}{path}", timeout=5) as answer:
            status = answer.status
    except urllib.error.HTTPError as error:
        status = error.code
        error.close()
    finally:
        server.stop()

    assert status == expected


async def test_pulse_sees_tasks_by_name() -> None:
    bench = Bench()
    name = next(iter(_WATCHERS))
    task = asyncio.create_task(asyncio.Event().wait(), name=name)
    beat = asyncio.create_task(bench.health.beat())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    seen = bench.health.missing
    for each in (task, beat):
        each.cancel()
    await asyncio.gather(task, beat, return_exceptions=True)

    assert seen == frozenset()


def test_watchers_are_named_per_namespace() -> None:
    assert "watcher for finetunejobs.v1alpha1.finetune.dev@None" in name_watchers(())
    assert name_watchers(("a", "b")) >= {"watcher for pods.v1@a", "watcher for pods.v1@b"}

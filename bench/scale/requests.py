"""What single requests cost the control plane: the floor under all that an operator does by them."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from bench.scale.burst import measure_burst
from bench.scale.client import do_all
from bench.scale.cluster import World
from bench.scale.figures import Figure
from bench.scale.load import API, apply_finetunejob, copy_as_plain_job, create_plain_job, finetunejobs, jobs, number
from bench.scale.operators import RunningOperator
from bench.scale.processes import CpuMeter, read_pids

NAMESPACE = "requests"
_EVENTS = f"/apis/events.k8s.io/v1/namespaces/{NAMESPACE}/events"
_SAMPLES = 3


def take_samples(world: World, operator: RunningOperator) -> tuple[Any, Any]:
    """Let the operator lead a few jobs to their end; return the Job that it made for one and the status that it wrote."""
    measure_burst(world, operator, count=_SAMPLES)
    child = world.client.get_first(jobs("burst"))
    return copy_as_plain_job(child), world.client.get_first(finetunejobs("burst"))["status"]


def measure_requests(world: World, *, count: int, job: Any, status: Any) -> list[Figure]:
    """Make as many requests of each kind, with no operator running and nothing that starts; return the CPU time of each."""
    world.create_namespace(NAMESPACE)
    client, held = world.client, {**job, "spec": {**job["spec"], "suspend": True}}
    names = number("held-", count)

    def write_status(name: str) -> None:
        body = {"apiVersion": API.removeprefix("/apis/"), "kind": "FineTuneJob", "metadata": {"name": name}, "status": status}
        client.apply(f"{finetunejobs(NAMESPACE)}/{name}/status", body)

    return [
        _measure("apply", "apply a FineTuneJob", world, lambda name: apply_finetunejob(client, NAMESPACE, name), names),
        _measure("read", "read it", world, lambda name: client.get(f"{finetunejobs(NAMESPACE)}/{name}"), names),
        _measure("status", "apply its status", world, write_status, names),
        _measure("job", "create a Job", world, lambda name: create_plain_job(client, NAMESPACE, name, job=held), names),
        _measure("event", "create an event", world, lambda name: client.create(_EVENTS, _build_event(name)), names),
    ]


def _measure(name: str, what: str, world: World, act: Callable[[str], object], names: Sequence[str]) -> Figure:
    time.sleep(2)  # what controllers make of the requests before
    meter, started_at = CpuMeter(read_pids(world.cluster_folder)), time.monotonic()
    do_all(act, names)
    rate = len(names) / (time.monotonic() - started_at)
    value = 1000 * sum(meter.read().values()) / len(names)
    return Figure(name=name, text=f"{what} ({rate:.0f} a second)", value=value, unit="ms", digits=1, is_gated=False)


def _build_event(name: str) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "namespace": NAMESPACE},
        "eventTime": "2026-01-01T00:00:00.000000Z",
        "type": "Normal",
        "reason": "Running",
        "action": "Reconcile",
        "note": "attempt 1 runs in pod held-0 on node kwok-0",
        "reportingController": "bench",
        "reportingInstance": "bench",
        "regarding": {"apiVersion": "batch/v1", "kind": "Job", "namespace": NAMESPACE, "name": name},
    }

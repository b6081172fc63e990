"""All FineTuneJobs at once: how fast their child Jobs are made, what that costs, and the same load without the operator."""

import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

from bench.scale.audit import OPERATOR, Write, count_writes, find_latencies, read_writes
from bench.scale.client import do_all, do_at_rate, wait_until
from bench.scale.cluster import World
from bench.scale.figures import Figure, find_quantile
from bench.scale.load import (
    apply_finetunejob,
    copy_as_plain_job,
    count_unfinished_jobs,
    create_plain_job,
    jobs,
    list_states,
    number,
)
from bench.scale.operators import RunningOperator
from bench.scale.processes import CpuMeter, PeakCores, read_peak_memory

NAMESPACE, PLAIN, ASIDE = "burst", "plain", "aside"
# A job every two seconds of another team, which did not cause the burst.
_ASIDE_SHARE, _ASIDE_PER_SECOND = 0.01, 0.5
_MAX_WRITES = 11
_KINDS = {"jobs": "Jobs", "finetunejobs/status": "status", "events": "events"}


def measure_burst(world: World, operator: RunningOperator, *, count: int) -> list[Figure]:
    """Apply FineTuneJobs as fast as they are accepted, wait until all are Complete, and return what that took."""
    for namespace in (NAMESPACE, ASIDE):
        world.create_namespace(namespace)
    names, aside = number("done-", count), number("done-", math.ceil(_ASIDE_SHARE * count))
    meter = CpuMeter(world.read_pids() | {OPERATOR: operator.pid})
    with PeakCores(operator.pid) as peak, ThreadPoolExecutor(1) as beside:
        others = beside.submit(
            do_at_rate, lambda name: apply_finetunejob(world.client, ASIDE, name), aside, per_second=_ASIDE_PER_SECOND
        )
        do_all(lambda name: apply_finetunejob(world.client, NAMESPACE, name), names)
        others.result()
        wait_until(
            lambda: operator.count_states().get("Complete", 0) >= count + len(aside),
            what=f"{count} FineTuneJobs are Complete",
            seconds=300 + count,
            poll_seconds=2,
        )
        operator.wait_until_quiet()
    cpu = meter.read()
    states = Counter(list_states(world.client, NAMESPACE))
    if states != {"Complete": count}:
        raise RuntimeError(f"not all of {count} FineTuneJobs are Complete: {dict(states)}")
    writes = read_writes(world.cluster_folder, namespace=NAMESPACE)
    return [
        *_describe_speed(writes, count=count),
        *_describe_aside(read_writes(world.cluster_folder, namespace=ASIDE)),
        *_describe_writes(writes, count=count),
        Figure(name="operator-cpu", text="operator CPU for each job", value=1000 * cpu[OPERATOR] / count, unit="ms", digits=1),
        Figure(
            name="reconciles",
            text="reconciles for each job",
            value=operator.count_reconciles() / count,
            digits=1,
            is_gated=False,
        ),
        Figure(name="cores", text="operator cores, most within 5 s", value=peak.cores, goal=1.0),
        Figure(name="memory", text="operator memory, peak", value=read_peak_memory(operator.pid), unit="MiB", digits=0, goal=400),
        Figure(name="dropped", text="events not recorded", value=operator.count_dropped_events(), digits=0, is_gated=False),
        *_describe_programs(cpu, count=count),
    ]


def measure_plain(world: World, *, count: int) -> list[Figure]:
    """Create as many plain Jobs with the same pods, with no operator running, and return what that took."""
    world.create_namespace(PLAIN)
    child = world.client.get_first(jobs(NAMESPACE))
    job = copy_as_plain_job(child)
    meter = CpuMeter(world.read_pids())
    do_all(lambda name: create_plain_job(world.client, PLAIN, name, job=job), number("done-", count))
    wait_until(
        lambda: not count_unfinished_jobs(world.client, PLAIN),
        what=f"{count} plain Jobs have completed",
        seconds=300 + count,
        poll_seconds=2,
    )
    cpu = meter.read()
    writes = read_writes(world.cluster_folder, namespace=PLAIN)
    created = [each.at for each in writes if each.agent == "bench"]
    ended = [each.at for each in writes if each.resource == "jobs/status"]
    total = (max(ended) - min(created)).total_seconds()
    return [
        Figure(name="created", text="first to last Job created", value=_span(created), unit="s", digits=1, is_gated=False),
        Figure(name="completed", text="first Job created to last completed", value=total, unit="s", digits=1, is_gated=False),
        Figure(name="writes", text="writes for each Job, all programs", value=len(writes) / count, is_gated=False),
        *_describe_programs(cpu, count=count),
    ]


def _describe_speed(writes: list[Write], *, count: int) -> list[Figure]:
    latencies = list(find_latencies(writes).values())
    applied = [each.at for each in writes if each.agent == "bench" and each.resource == "finetunejobs"]
    children = [each.at for each in writes if each.agent == OPERATOR and each.resource == "jobs"]
    statuses = [each.at for each in writes if each.agent == OPERATOR and each.resource == "finetunejobs/status"]
    admitted = _span([min(applied), *children])
    completed = _span([min(applied), *statuses])
    rate = f"creation of the first FineTuneJob to the last child Job ({count / admitted:.0f} jobs/s)"
    is_burst = count <= 1000
    limits = {
        "admitted": count / 100 if is_burst else 300,
        "completed": None if is_burst else 300,
        "p99": 1.0 if is_burst else None,
    }
    return [
        Figure(
            name="applied", text="first to last FineTuneJob created", value=_span(applied), unit="s", digits=1, is_gated=False
        ),
        Figure(name="admitted", text=rate, value=admitted, unit="s", digits=1, goal=limits["admitted"]),
        Figure(name="p50", text="creation to child Job, p50", value=find_quantile(latencies, 0.5), unit="s"),
        Figure(name="p99", text="creation to child Job, p99", value=find_quantile(latencies, 0.99), unit="s", goal=limits["p99"]),
        Figure(
            name="completed",
            text="creation of the first to the last Complete",
            value=completed,
            unit="s",
            digits=1,
            goal=limits["completed"],
        ),
    ]


def _describe_aside(writes: list[Write]) -> list[Figure]:
    answers = {"child": ("child Job", "jobs"), "status": ("first status", "finetunejobs/status")}
    return [
        Figure(
            name=f"aside-{name}",
            text=f"another namespace's jobs meanwhile: creation to {what}, longest",
            value=max(find_latencies(writes, until=until).values()),
            unit="s",
        )
        for name, (what, until) in answers.items()
    ]


def _describe_writes(writes: list[Write], *, count: int) -> list[Figure]:
    counts = count_writes(writes)
    figures = [Figure(name="writes", text="operator's writes for each job", value=counts.total() / count, goal=_MAX_WRITES)]
    for resource, total in sorted(counts.items()):
        text = f"of these: {_KINDS.get(resource, resource)}"
        figures.append(Figure(name=f"writes-{resource}", text=text, value=total / count, is_gated=False))
    text = "writes for each job, all programs"
    return [*figures, Figure(name="all-writes", text=text, value=len(writes) / count, is_gated=False)]


def _describe_programs(cpu: dict[str, float], *, count: int) -> list[Figure]:
    return [
        Figure(
            name=f"cpu-{name}", text=f"CPU for each job: {name}", value=1000 * used / count, unit="ms", digits=1, is_gated=False
        )
        for name, used in sorted(cpu.items(), key=lambda pair: -pair[1])
        if name != OPERATOR
    ]


def _span(times: list[datetime]) -> float:
    return (max(times) - min(times)).total_seconds()

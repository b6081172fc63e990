"""Many FineTuneJobs at rest: neither time nor a restart of the operator may write anything."""

import time
from datetime import UTC, datetime
from typing import Any

from bench.scale.audit import count_writes, read_writes
from bench.scale.cluster import World
from bench.scale.figures import Figure
from bench.scale.operators import RunningOperator, run_operator
from bench.scale.processes import CpuMeter, read_peak_memory


def measure_rest(world: World, operator: RunningOperator, *, seconds: float) -> list[Figure]:
    """Do nothing for a while, and return what the operator wrote and used meanwhile."""
    operator.wait_until_quiet()
    since, meter, reconciles = datetime.now(UTC), CpuMeter({"operator": operator.pid}), operator.count_reconciles()
    time.sleep(seconds)
    cores = meter.read()["operator"] / meter.seconds
    return [
        _writes("writes", f"writes within {seconds:.0f} s", world, since=since),
        Figure(name="cores", text="operator cores", value=cores, digits=3),
        Figure(
            name="reconciles",
            text="reconciles (an audit looks at every job)",
            value=operator.count_reconciles() - reconciles,
            digits=0,
            is_gated=False,
        ),
    ]


def measure_restart(world: World, *, count: int, **options: Any) -> list[Figure]:
    """Start an operator where everything is done already, and return how long that took and what it wrote."""
    since = datetime.now(UTC)
    with run_operator(world.kubeconfig, world.folder, **options) as operator:
        operator.wait_until_quiet()
        seen = sum(operator.count_states().values())
        if seen < count:
            raise RuntimeError(f"the restarted operator knows {seen} of {count} FineTuneJobs")
        return [
            Figure(name="ready", text="start to ready", value=operator.start_seconds, unit="s", digits=1, goal=60),
            _writes("writes", "writes after the start", world, since=since),
            Figure(
                name="memory", text="operator memory, peak", value=read_peak_memory(operator.pid), unit="MiB", digits=0, goal=400
            ),
        ]


def _writes(name: str, text: str, world: World, *, since: datetime) -> Figure:
    counts = count_writes(read_writes(world.cluster_folder), since=since)
    detail = f" ({', '.join(f'{resource}: {total}' for resource, total in counts.items())})" if counts else ""
    return Figure(name=name, text=text + detail, value=counts.total(), digits=0, goal=0)

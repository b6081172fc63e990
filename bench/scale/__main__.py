"""How far the operator goes: real control plane, kwok as all kubelets. See docs/benchmarks.md, Scale."""

import argparse
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from bench.operator import ROOT
from bench.scale.burst import measure_burst, measure_plain
from bench.scale.cluster import run_world
from bench.scale.copies import run_copies
from bench.scale.failures import measure_failures
from bench.scale.figures import Figure, Runs, find_exceeded, format_table, record
from bench.scale.operators import run_operator
from bench.scale.requests import measure_requests, take_samples
from bench.scale.rest import measure_rest, measure_restart
from bench.scale.upgrade import measure_upgrade

RANGE = ROOT / "bench" / "scale-range.yaml"
PARTS = ("burst", "rest", "restart", "failures", "upgrade", "requests")
_QUICK = {"burst": 50, "rest": 50, "restart": 50, "failures": 20, "upgrade": 20, "requests": 20}
_FULL = {"burst": 1000, "rest": 10_000, "restart": 10_000, "failures": 1000, "upgrade": 200, "requests": 300}
_HEADER = "# Measured values of earlier runs; a gate is their mean times 1.2. Written by `python -m bench.scale --record`.\n"

Part = tuple[str, list[Figure]]


def main() -> int:
    """Run the parts, print their tables, and return 1 when a gate is exceeded."""
    arguments = _parse_arguments()
    # As Ctrl-C: all that was started is stopped on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    recorded, exceeded = read_range(RANGE), []
    for part in arguments.part or PARTS:
        count = arguments.jobs or (_QUICK if arguments.quick else _FULL)[part]
        for name, figures in run_part(part, count=count, arguments=arguments):
            print(format_table(name, figures, recorded=recorded) + "\n", flush=True)
            exceeded += find_exceeded(name, figures, recorded=recorded)
            if arguments.record:
                write_range(RANGE, record(name, figures, recorded=read_range(RANGE)))
    print("\n".join(exceeded), file=sys.stderr)
    return 1 if exceeded and not arguments.record else 0


def run_part(part: str, *, count: int, arguments: argparse.Namespace) -> Iterator[Part]:
    """Run a part on a cluster of its own, and give its figures as they come."""
    with run_world(run_seconds=arguments.run_seconds, with_crds=part != "upgrade") as world:
        if part == "upgrade":
            yield f"upgrade with {count} running jobs", measure_upgrade(world, running=count, start=arguments.start)
            return
        if part == "restart":
            with run_copies(world, count=count):
                yield f"restart with {count} copies of a job", measure_restart(world, count=count)
            return
        if part == "requests":
            with run_operator(world.kubeconfig, world.folder) as operator:
                job, status = take_samples(world, operator)
            figures = measure_requests(world, count=count, job=job, status=status)
            yield f"CPU of the control plane for each of {count} requests", figures
            return
        with run_operator(world.kubeconfig, world.folder) as operator:
            if part == "failures":
                rate, healthy = arguments.rate, min(arguments.healthy, count) if arguments.quick else arguments.healthy
                yield (
                    f"{count} failing jobs beside {healthy} healthy ones at {rate:g} a second",
                    measure_failures(world, operator, failing=count, healthy=healthy, per_second=rate),
                )
                return
            yield f"burst of {count} FineTuneJobs", measure_burst(world, operator, count=count)
            if part == "rest":
                seconds = min(arguments.rest_seconds, 20) if arguments.quick else arguments.rest_seconds
                yield f"{count} jobs at rest", measure_rest(world, operator, seconds=seconds)
        if part == "rest":
            yield f"restart with {count} jobs", measure_restart(world, count=count)
        else:
            yield f"the same {count} pods as plain Jobs", measure_plain(world, count=count)


def read_range(path: Path) -> Runs:
    """Return the recorded runs."""
    return yaml.safe_load(path.read_text(encoding="utf-8")) or {} if path.exists() else {}


def write_range(path: Path, runs: dict[str, Any]) -> None:
    """Write the recorded runs."""
    path.write_text(_HEADER + yaml.safe_dump(runs, sort_keys=False, default_flow_style=None, width=120), encoding="utf-8")


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=__doc__)
    parser.add_argument("--part", action="append", choices=PARTS, help="one part alone; may be given several times")
    parser.add_argument("--jobs", type=int, help=f"number of FineTuneJobs instead of {_FULL}")
    parser.add_argument("--quick", action="store_true", help=f"show that it runs: {_QUICK}")
    parser.add_argument("--run-seconds", type=float, default=2, help="how long each pod runs")
    parser.add_argument("--rest-seconds", type=float, default=300, help="how long nothing may happen")
    parser.add_argument("--healthy", type=int, default=500, help="number of healthy jobs beside the failing ones")
    parser.add_argument("--rate", type=float, default=5, help="how many of these a second")
    parser.add_argument("--from", dest="start", metavar="COMMIT", help="where the upgrade starts")
    parser.add_argument("--record", action="store_true", help=f"add the figures to {RANGE.name} instead of checking them")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

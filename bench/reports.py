"""Progress of many trainers at once: how old the status is that users see, and what that costs the API server."""

import argparse
import math
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from bench.operator import Api, prepare, read_audit, read_cpu, read_memory, run_control_plane, run_operator
from bench.reporters import SECONDS_BETWEEN_POSTS, Course, count_lost, report_all, start_trainers


def main() -> int:
    """Print the table, and return 1 if a goal was missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="30 trainers for 20 s: shows that it runs, not how well")
    parser.add_argument("--reporters", type=int, default=1000, help="number of trainers (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=120, help="how long they report (default: %(default)s)")
    arguments = parser.parse_args()
    number, seconds = (30, 20.0) if arguments.quick else (arguments.reporters, arguments.seconds)
    with run_control_plane() as kubeconfig, tempfile.TemporaryDirectory() as folder:
        api = Api(kubeconfig)
        prepare(api)
        with run_operator(kubeconfig, Path(folder)) as process:
            trainers = start_trainers(api, number=number)
            load = Path("/proc/loadavg").read_text(encoding="ascii").split()[0]
            cpu, begun_at = read_cpu(process.pid), datetime.now(UTC)
            course = report_all(kubeconfig, trainers, seconds=seconds)
            ended_at = datetime.now(UTC)
            writes = list_status_writes(kubeconfig.parent / "audit.log", begin=begun_at, end=ended_at)
            return print_table(
                course,
                writes=writes,
                number=number,
                load=load,
                cpu_share=(read_cpu(process.pid) - cpu) / (ended_at - begun_at).total_seconds(),
                memory=read_memory(process.pid),
            )


def list_ages(course: Course) -> list[float]:
    """Return how old the shown report was, for every trainer and half second from its first report's first 15 s to the end."""
    ages = []
    for trainer in course.trainers:
        at = course.begun + 15.0
        while at < course.begun + course.seconds:
            step = max((step for shown_at, step in trainer.shown if shown_at <= at), default=None)
            begun = min(trainer.sent.values(), default=course.begun)
            ages.append(at - (begun if step is None else trainer.sent.get(step, begun)))
            at += 0.5
    return sorted(ages)


def list_first_ages(course: Course) -> list[float]:
    """Return how old each report was when its status came to its watchers."""
    return sorted(
        shown_at - trainer.sent[step] for trainer in course.trainers for shown_at, step in trainer.shown if step in trainer.sent
    )


def list_status_writes(audit_log: Path, *, begin: datetime, end: datetime) -> list[datetime]:
    """Return when the operator wrote a status."""
    found = []
    for entry in read_audit(audit_log):
        is_ours = entry["verb"] == "patch" and entry["userAgent"] == "finetune-operator"
        at = datetime.fromisoformat(entry["stageTimestamp"])
        if is_ours and entry["objectRef"].get("subresource") == "status" and begin <= at <= end:
            found.append(at)
    return sorted(found)


def count_busiest(writes: Sequence[datetime], *, seconds: int) -> float:
    """Return the highest rate of writes in any whole span of so many seconds, a second."""
    counts = Counter(math.floor(at.timestamp() / seconds) for at in writes)
    return max(counts.values(), default=0) / seconds


def pick(ordered: Sequence[float], share: float) -> float:
    """Return a percentile."""
    return ordered[min(len(ordered) - 1, math.floor(len(ordered) * share))]


def print_table(course: Course, *, writes: Sequence[datetime], number: int, load: str, cpu_share: float, memory: int) -> int:
    """Print the figures as a Markdown table, and return 1 if a goal was missed."""
    ages, lost, busiest = list_ages(course), count_lost(course), count_busiest(writes, seconds=5)
    answered, first_ages = sorted(course.post_seconds), list_first_ages(course)
    accepted, total = course.answers[200], sum(course.answers.values())
    rows = (
        ("reports sent, a second", f"{total / course.seconds:.0f}"),
        ("reports accepted", f"{accepted} of {total}"),
        ("age of the report that a status shows, p50", f"{pick(ages, 0.5):.1f} s"),
        ("age of the report that a status shows, p99", f"{pick(ages, 0.99):.1f} s"),
        ("of these: until the POST is answered, p50", f"{pick(answered, 0.5):.1f} s"),
        ("of these: until the POST is answered, p99", f"{pick(answered, 0.99):.1f} s"),
        ("of these: until a watcher sees the status, p50", f"{pick(first_ages, 0.5):.1f} s"),
        ("of these: until a watcher sees the status, p99", f"{pick(first_ages, 0.99):.1f} s"),
        ("status writes a second, mean", f"{len(writes) / course.seconds:.0f}"),
        ("status writes a second, busiest 5 s", f"{busiest:.0f}"),
        ("final reports that no status shows", str(lost)),
        ("operator CPU", f"{cpu_share:.2f} cores"),
        ("operator memory", f"{memory / 2**20:.0f} MiB"),
    )
    title = f"## Reports: {number} trainers, one report each in {SECONDS_BETWEEN_POSTS:.0f} s, for {course.seconds:.0f} s"
    print(f"{title}, load {load} at the start\n\n| what | measured |\n| --- | ---: |")
    for what, measured in rows:
        print(f"| {what} | {measured} |")
    print(f"\nother answers: {dict(course.answers)}", file=sys.stderr)
    return int(lost > 0 or pick(ages, 0.99) > 15 or busiest > 100)


if __name__ == "__main__":
    sys.exit(main())

"""Metrics of the operator. Labels come from closed sets: never a name, a uid or a message."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar, get_args

from finetune_api.profile import AcceleratorKind
from finetune_api.v1alpha1 import StateReason
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from finetune_operator.views import Kind

M = TypeVar("M", bound=MetricWrapperBase)

OTHER = "Other"
STATES = (*get_args(StateReason), OTHER)
RESULTS = ("success", "requeue", "refused", "error")
VERBS = ("get", "list", "create", "patch", "delete")
RESOURCES = (
    "finetunejobs", "finetunejobs/status", "finetuneprofiles", "jobs", "pods", "services", "resourceclaimtemplates", "events",
    "tokenreviews",
)  # fmt: skip
CODES = ("2xx", "4xx", "5xx", "none")
REPORTS = ("accepted", "unauthorized", "forbidden", "not_found", "too_large", "malformed", "invalid", "throttled", "error")
EVENTS = ("created", "repeated", "limited", "dropped", "error")
AUDITS = ("clean", "repaired", "deaf", "error")
ENDS = ("Complete", "Failed")
CAUSES = ("disruption", "oom", "error", "stop")
KINDS = tuple(kind.value for kind in Kind)
ACCELERATORS = tuple(kind.value for kind in AcceleratorKind)

_WORK_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_START_BUCKETS = (1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600, 10_800, 43_200, 86_400)
_END_BUCKETS = (30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14_400, 28_800, 86_400, 259_200, 604_800)


@dataclass(frozen=True, slots=True, kw_only=True)
class Definition:
    """One metric: its name, what it means, and every value that its labels can have."""

    type: str
    name: str
    help: str
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    buckets: tuple[float, ...] = ()


JOBS = Definition(
    type="gauge",
    name="finetune_jobs",
    help="Number of FineTuneJobs by state, where Other is every state that names a problem.",
    labels={"state": STATES},
)
RECONCILES = Definition(
    type="counter",
    name="finetune_reconciles_total",
    help="Number of reconciles by how they ended.",
    labels={"result": RESULTS},
)
RECONCILE_SECONDS = Definition(
    type="histogram",
    name="finetune_reconcile_duration_seconds",
    help="Time that a reconcile took, its requests to the API server included.",
    buckets=_WORK_BUCKETS,
)
QUEUE_KEYS = Definition(
    type="gauge", name="finetune_queue_keys", help="Number of FineTuneJobs that wait for a worker to reconcile them."
)
QUEUE_WAIT_SECONDS = Definition(
    type="histogram",
    name="finetune_queue_wait_seconds",
    help="Time that a FineTuneJob waited for a worker, delays that were asked for not included.",
    buckets=_WORK_BUCKETS,
)
API_REQUESTS = Definition(
    type="counter",
    name="finetune_api_requests_total",
    help="Number of requests to the API server by verb, resource and class of the answer, watches not included.",
    labels={"verb": VERBS, "resource": RESOURCES, "code": CODES},
)
RETRIES = Definition(
    type="counter",
    name="finetune_job_retries_total",
    help="Number of attempts that ended early and were followed by a retry, by cause: disruptions, evictions by a queue among "
    "them, do not count towards backoffLimit.",
    labels={"cause": CAUSES[:-1]},
)
LOST_SECONDS = Definition(
    type="counter",
    name="finetune_lost_seconds_total",
    help="Running time between the last checkpoint of an attempt and its early end, by cause, where stop is a suspension, a "
    "replacement or a deletion of its Job.",
    labels={"cause": CAUSES},
)
ACCELERATOR_SECONDS = Definition(
    type="counter",
    name="finetune_accelerator_seconds_total",
    help="Number of accelerators (of CPU jobs: pods) times the seconds that their trainers ran, added when an attempt ends, by "
    "kind of accelerator. An attempt that a new run replaced is not in it.",
    labels={"kind": ACCELERATORS},
)
WASTED_ACCELERATOR_SECONDS = Definition(
    type="counter",
    name="finetune_wasted_accelerator_seconds_total",
    help="The part of the accelerator seconds that lay after the last checkpoint of attempts that ended early, by kind of "
    "accelerator.",
    labels={"kind": ACCELERATORS},
)
START_SECONDS = Definition(
    type="histogram",
    name="finetune_job_start_seconds",
    help="Time from the creation of a FineTuneJob, whose spec did not change since, to the start of its first trainer.",
    buckets=_START_BUCKETS,
)
END_SECONDS = Definition(
    type="histogram",
    name="finetune_job_duration_seconds",
    help="Time from the creation of a FineTuneJob, whose spec did not change since, to its end.",
    labels={"result": ENDS},
    buckets=_END_BUCKETS,
)
REPORTS_RECEIVED = Definition(
    type="counter",
    name="finetune_reports_total",
    help="Number of progress reports from trainers by how they were answered.",
    labels={"result": REPORTS},
)
WATCH_EVENTS = Definition(
    type="counter",
    name="finetune_watch_events_total",
    help="Number of watch events and listed objects by resource.",
    labels={"resource": KINDS},
)
EVENTS_RECORDED = Definition(
    type="counter",
    name="finetune_events_total",
    help="Number of Kubernetes events for users by what became of them.",
    labels={"result": EVENTS},
)
AUDITS_DONE = Definition(
    type="counter",
    name="finetune_audits_total",
    help="Number of comparisons of what was seen with what the API server has, by what they found.",
    labels={"result": AUDITS},
)
AUDIT_PURGES = Definition(
    type="counter",
    name="finetune_audit_purges_total",
    help="Number of objects whose deletion was missed until an audit, by resource.",
    labels={"resource": KINDS},
)

DEFINITIONS = (
    JOBS, RECONCILES, RECONCILE_SECONDS, QUEUE_KEYS, QUEUE_WAIT_SECONDS, API_REQUESTS, RETRIES, LOST_SECONDS,
    ACCELERATOR_SECONDS, WASTED_ACCELERATOR_SECONDS, START_SECONDS, END_SECONDS, REPORTS_RECEIVED, WATCH_EVENTS,
    EVENTS_RECORDED, AUDITS_DONE, AUDIT_PURGES,
)  # fmt: skip


class Metrics:
    """The metrics of one operator, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._metrics = {each.name: _build_metric(each, registry=self.registry) for each in DEFINITIONS if each is not JOBS}

    def watch_states(self, count_states: Callable[[], Mapping[str, int]]) -> None:
        """Count the FineTuneJobs by state at every scrape."""
        self.registry.register(StateCollector(count_states))

    def watch_queue(self, count_keys: Callable[[], int]) -> None:
        """Read the length of the queue at every scrape."""
        gauge = self._metrics[QUEUE_KEYS.name]
        assert isinstance(gauge, Gauge)
        gauge.set_function(count_keys)

    def count(self, definition: Definition, amount: float = 1, **labels: str) -> None:
        """Count one case of a counter, or an amount. Label values outside the closed set are a mistake of ours."""
        metric = self._metrics[definition.name]
        assert isinstance(metric, Counter)
        _child(metric, definition, labels).inc(amount)

    def observe(self, definition: Definition, value: float, **labels: str) -> None:
        """Add a measured value to a histogram."""
        metric = self._metrics[definition.name]
        assert isinstance(metric, Histogram)
        _child(metric, definition, labels).observe(value)


class StateCollector(Collector):
    """Counts FineTuneJobs by state when it is asked."""

    def __init__(self, count_states: Callable[[], Mapping[str, int]]) -> None:
        self._count_states = count_states

    def collect(self) -> Iterable[Metric]:
        """Return the number of FineTuneJobs in each state, those in none included."""
        family = GaugeMetricFamily(JOBS.name, JOBS.help, labels=list(JOBS.labels))
        numbers = dict.fromkeys(STATES, 0)
        for state, number in self._count_states().items():
            numbers[state if state in numbers else OTHER] += number
        for state, number in numbers.items():
            family.add_metric([state], number)
        return [family]


def classify_code(status: int) -> str:
    """Return the class of an HTTP status, such as 2xx; `none` when there was no answer."""
    code = f"{status // 100}xx"
    return code if code in CODES else "none"


def _build_metric(definition: Definition, *, registry: CollectorRegistry) -> Counter | Gauge | Histogram:
    labels = tuple(definition.labels)
    if definition.type == "counter":
        return Counter(definition.name, definition.help, labels, registry=registry)
    if definition.type == "gauge":
        return Gauge(definition.name, definition.help, labels, registry=registry)
    return Histogram(definition.name, definition.help, labels, registry=registry, buckets=definition.buckets)


def _child(metric: M, definition: Definition, labels: Mapping[str, str]) -> M:
    for name, value in labels.items():
        assert value in definition.labels[name], f"{definition.name}: {name}={value!r} is outside the closed set"
    return metric.labels(**labels) if labels else metric


def build_reference() -> str:
    """Return the Markdown page that lists every metric."""
    lines = [
        "# Metrics",
        "",
        "The operator serves these at `/metrics` in the Prometheus format.",
        "Labels have a fixed set of values: never a name, a uid or a message.",
        "",
        "| metric | type | labels | meaning |",
        "| --- | --- | --- | --- |",
    ]
    lines += [f"| `{each.name}` | {each.type} | {_describe_labels(each)} | {each.help} |" for each in DEFINITIONS]
    return "\n".join(lines) + "\n"


def _describe_labels(definition: Definition) -> str:
    return "<br>".join(f"`{name}`: {', '.join(values)}" for name, values in definition.labels.items()) or "-"


def main() -> None:
    """Print the reference page."""
    print(build_reference(), end="")  # noqa: T201  the page is this program's output


if __name__ == "__main__":
    main()

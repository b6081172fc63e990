"""Metrics of the operator. Labels come from closed sets: never a name, a uid or a message."""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar, get_args

from finetune_api.profile import AcceleratorKind
from finetune_api.v1alpha1 import StateReason
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from finetune_operator.views import Kind

M = TypeVar("M", bound=MetricWrapperBase)

OTHER = "Other"
STATES = (*get_args(StateReason), OTHER)
RESULTS = ("success", "deferred", "requeue", "refused", "error")
VERBS = ("get", "list", "create", "update", "patch", "delete")
RESOURCES = (
    "finetunejobs", "finetunejobs/status", "finetuneprofiles", "jobs", "pods", "services", "resourceclaimtemplates", "events",
    "tokenreviews", "leases",
)  # fmt: skip
CODES = ("2xx", "4xx", "5xx", "none")
REPORTS = (
    "accepted",
    "forwarded",
    "unauthorized",
    "forbidden",
    "not_found",
    "too_large",
    "malformed",
    "invalid",
    "throttled",
    "no_leader",
    "error",
)
EVENTS = ("created", "repeated", "limited", "dropped", "error")
AUDITS = ("clean", "repaired", "deaf", "rewound", "error")
ENDS = ("Complete", "Failed")
CAUSES = ("disruption", "oom", "error", "stop")
# Reasons of failed attempts; any other is a problem that kept one from starting, or comes from a trainer that is not ours.
FAILURES = (
    "CheckpointStoreUnavailable", "DatasetNotFound", "DeadlineExceeded", "DeviceMissing", "Disrupted", "Diverged",
    "DownloadFailed", "Evicted", "ImagePullBackOff", "InsufficientResources", "InternalError", "Interrupted", "InvalidData",
    "InvalidSpec", "Killed", "ModelNotFound", "ModelUnreadable", "NodeLost", "NodeShutdown", "OOMKilled", "OutOfMemory",
    "OutputNotDurable", "OutputNotWritable", "PeerLost", "PeersMissing", "PodDeleted", "PodFailed", "PodLost", "Preempted",
    "QueueEvicted", "ResultMissing", "Superseded", "TrainerError", OTHER,
)  # fmt: skip
KINDS = tuple(kind.value for kind in Kind)
ACCELERATORS = tuple(kind.value for kind in AcceleratorKind)

# A counter with fewer combinations of labels than this shows all of them from the start: the first case of a series that appears
# with it would be none to Prometheus, which sees differences alone.
_MAX_SHOWN = 50
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
    """Empty values mean that the label is open: a namespace, of which a cluster has a bounded number."""
    buckets: tuple[float, ...] = ()


LEADER = Definition(
    type="gauge", name="finetune_leader", help="Whether this replica leads (1), so that it may write, or stands by (0)."
)
LEADER_TRANSITIONS = Definition(
    type="gauge",
    name="finetune_leader_transitions",
    help="Number of changes of the leader since the Lease was created, as this replica saw it last.",
)
JOBS = Definition(
    type="gauge",
    name="finetune_jobs",
    help="Number of FineTuneJobs by state, where Other is every state that names a problem. Only the leader counts them.",
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
API_REQUEST_SECONDS = Definition(
    type="histogram",
    name="finetune_api_request_duration_seconds",
    help="Time until the API server had answered a request, by verb, without the wait for the operator's own limit.",
    labels={"verb": VERBS},
    buckets=_WORK_BUCKETS,
)
FAILED_ATTEMPTS = Definition(
    type="counter",
    name="finetune_job_failures_total",
    help="Number of attempts that failed by reason, those that a retry followed included. Other is every reason that has no row "
    "of its own.",
    labels={"reason": FAILURES},
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
    "kind of accelerator and namespace of the FineTuneJob. An attempt that a new run replaced is not in it.",
    labels={"kind": ACCELERATORS, "job_namespace": ()},
)
WASTED_ACCELERATOR_SECONDS = Definition(
    type="counter",
    name="finetune_wasted_accelerator_seconds_total",
    help="The part of the accelerator seconds that lay after the last checkpoint of attempts that ended early, by kind of "
    "accelerator and namespace of the FineTuneJob.",
    labels={"kind": ACCELERATORS, "job_namespace": ()},
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
AUDIT_LAGGING = Definition(
    type="gauge",
    name="finetune_audit_lagging_objects",
    help="Number of objects whose latest change an audit knows of and the watches have not brought yet; when it stays above 0 "
    "for FINETUNE_DEAF_SECONDS, the process ends and starts anew.",
    labels={"resource": KINDS},
)

SYNCED = Definition(
    type="gauge",
    name="finetune_synced",
    help="Whether the operator has seen everything that the API server holds (1), before which it does nothing (0).",
)
AUDIT_AGE_SECONDS = Definition(
    type="gauge", name="finetune_audit_age_seconds", help="Time since the last comparison with the API server that succeeded."
)
AUDIT_INTERVAL_SECONDS = Definition(
    type="gauge", name="finetune_audit_interval_seconds", help="Time between two such comparisons, as it is set."
)
LOOP_LAG_SECONDS = Definition(
    type="histogram",
    name="finetune_loop_lag_seconds",
    help="Time by which the event loop was late, looked at twice a second.",
    buckets=_WORK_BUCKETS,
)

DEFINITIONS = (
    LEADER, LEADER_TRANSITIONS, JOBS, RECONCILES, RECONCILE_SECONDS, QUEUE_KEYS, QUEUE_WAIT_SECONDS, API_REQUESTS,
    API_REQUEST_SECONDS, FAILED_ATTEMPTS, RETRIES, LOST_SECONDS, ACCELERATOR_SECONDS, WASTED_ACCELERATOR_SECONDS,
    START_SECONDS, END_SECONDS, REPORTS_RECEIVED, WATCH_EVENTS, EVENTS_RECORDED, AUDITS_DONE, AUDIT_PURGES, AUDIT_LAGGING,
    AUDIT_AGE_SECONDS, AUDIT_INTERVAL_SECONDS, SYNCED, LOOP_LAG_SECONDS,
)  # fmt: skip

# What prometheus_client measures of the process itself, on Linux alone.
PROCESS_DEFINITIONS = (
    Definition(type="counter", name="finetune_process_cpu_seconds_total", help="CPU time of the operator."),
    Definition(type="gauge", name="finetune_process_resident_memory_bytes", help="Memory of the operator."),
    Definition(type="gauge", name="finetune_process_virtual_memory_bytes", help="Address space of the operator."),
    Definition(type="gauge", name="finetune_process_open_fds", help="Number of open files and connections of the operator."),
    Definition(type="gauge", name="finetune_process_max_fds", help="Number that it may open."),
    Definition(type="gauge", name="finetune_process_start_time_seconds", help="Start of the process as Unix time."),
)


class Metrics:
    """The metrics of one operator, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._metrics = {each.name: _build_metric(each, registry=self.registry) for each in DEFINITIONS if each is not JOBS}
        ProcessCollector(namespace="finetune", registry=self.registry)

    def watch_states(self, count_states: Callable[[], Mapping[str, int]]) -> None:
        """Count the FineTuneJobs by state at every scrape."""
        self.registry.register(StateCollector(count_states))

    def watch_queue(self, count_keys: Callable[[], int]) -> None:
        """Read the length of the queue at every scrape."""
        self.watch(QUEUE_KEYS, count_keys)

    def watch(self, definition: Definition, read: Callable[[], float]) -> None:
        """Read the value of a gauge at every scrape."""
        gauge = self._metrics[definition.name]
        assert isinstance(gauge, Gauge)
        gauge.set_function(read)

    def count(self, definition: Definition, amount: float = 1, **labels: str) -> None:
        """Count one case of a counter, or an amount. Label values outside the closed set are a mistake of ours."""
        metric = self._metrics[definition.name]
        assert isinstance(metric, Counter)
        _child(metric, definition, labels).inc(amount)

    def set(self, definition: Definition, value: float, **labels: str) -> None:
        """Set a gauge."""
        metric = self._metrics[definition.name]
        assert isinstance(metric, Gauge)
        _child(metric, definition, labels).set(value)

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
        counter = Counter(definition.name, definition.help, labels, registry=registry)
        if labels and 0 < math.prod(map(len, definition.labels.values())) <= _MAX_SHOWN:
            for values in itertools.product(*definition.labels.values()):
                counter.labels(*values)
        return counter
    if definition.type == "gauge":
        return Gauge(definition.name, definition.help, labels, registry=registry)
    return Histogram(definition.name, definition.help, labels, registry=registry, buckets=definition.buckets)


def _child(metric: M, definition: Definition, labels: Mapping[str, str]) -> M:
    for name, value in labels.items():
        allowed = definition.labels[name]
        assert not allowed or value in allowed, f"{definition.name}: {name}={value!r} is outside the closed set"
    return metric.labels(**labels) if labels else metric


def list_rows(definitions: Iterable[Definition]) -> list[str]:
    """Return the rows of a table of metrics."""
    return [f"| `{each.name}` | {each.type} | {_describe_labels(each)} | {each.help} |" for each in definitions]


def _describe_labels(definition: Definition) -> str:
    return "<br>".join(f"`{name}`: {', '.join(values) or 'any namespace'}" for name, values in definition.labels.items()) or "-"

"""Metrics of a trainer pod, served to Prometheus from a thread of their own. Labels come from closed sets.

The training only replaces values; all that costs time is done when somebody scrapes.
"""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, ProcessCollector, disable_created_metrics, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

logger = logging.getLogger(__name__)

PREFIX = "finetune_trainer"
RESULTS = ("saved", "failed")


@dataclass
class Totals:
    """What this process has done and how it stands; each field is a metric, whose help is in FIELDS."""

    phase: str = ""
    progress_ratio: float = 0.0
    steps: int = 0
    samples: int = 0
    step_seconds: float = 0.0
    data_wait_seconds: float = 0.0
    exchange_seconds: float = 0.0
    samples_per_second: float = 0.0
    loss: float | None = None
    checkpoints_saved: int = 0
    checkpoints_failed: int = 0
    checkpoint_seconds: float = 0.0
    checkpoint_bytes: int = 0
    device_memory_peak_bytes: int | None = None


@dataclass(frozen=True)
class Definition:
    """One metric: its type, its name and what it means."""

    type: str
    name: str
    help: str
    labels: tuple[str, ...] = ()
    values: tuple[str, ...] = ()


PHASES = ("reading the data", "computing features", "fitting the probe", "fine-tuning", "selecting and publishing")
PHASE = Definition("gauge", f"{PREFIX}_phase", "The phase that the job is in (1); 0 for the others.", ("phase",), PHASES)
CHECKPOINTS = Definition(
    "counter", f"{PREFIX}_checkpoints_total", "Number of checkpoints by whether they are durable.", ("result",), RESULTS
)
# The field of Totals that each metric shows.
FIELDS = {
    "progress_ratio": Definition("gauge", f"{PREFIX}_progress_ratio", "Share of the job that is done, from 0 to 1."),
    "steps": Definition("counter", f"{PREFIX}_steps_total", "Number of steps of the optimizer that this process took."),
    "samples": Definition(
        "counter", f"{PREFIX}_samples_total", "Number of examples in those steps, over all processes of the job."
    ),
    "step_seconds": Definition(
        "counter", f"{PREFIX}_step_seconds_total", "Time that those steps took, the wait for their data included."
    ),
    "data_wait_seconds": Definition(
        "counter", f"{PREFIX}_data_wait_seconds_total", "Time that those steps waited for their data."
    ),
    "exchange_seconds": Definition(
        "counter",
        f"{PREFIX}_exchange_seconds_total",
        "Time that this process spent in exchanges with the others of its job, the waits for them included. The exchange of "
        "gradients, which overlaps with their computation, is not in it.",
    ),
    "samples_per_second": Definition(
        "gauge", f"{PREFIX}_samples_per_second", "Examples per second since the fine-tuning began, over all processes of the job."
    ),
    "loss": Definition("gauge", f"{PREFIX}_loss", "Mean training loss of the latest steps; absent before the first."),
    "checkpoint_seconds": Definition(
        "counter", f"{PREFIX}_checkpoint_seconds_total", "Time that the training waited while checkpoints were saved."
    ),
    "checkpoint_bytes": Definition("counter", f"{PREFIX}_checkpoint_bytes_total", "Size of the checkpoints that were saved."),
    "device_memory_peak_bytes": Definition(
        "gauge", f"{PREFIX}_device_memory_peak_bytes", "Most memory that torch held on the GPU; absent elsewhere."
    ),
}
PROCESS = (
    Definition("counter", f"{PREFIX}_process_cpu_seconds_total", "CPU time of the process."),
    Definition("gauge", f"{PREFIX}_process_resident_memory_bytes", "Memory of the process."),
    Definition("gauge", f"{PREFIX}_process_virtual_memory_bytes", "Address space of the process."),
    Definition("gauge", f"{PREFIX}_process_open_fds", "Number of open files and connections of the process."),
    Definition("gauge", f"{PREFIX}_process_max_fds", "Number that it may open."),
    Definition("gauge", f"{PREFIX}_process_start_time_seconds", "Start of the process as Unix time."),
)
DEFINITIONS = (PHASE, *FIELDS.values(), CHECKPOINTS, *PROCESS)


class TotalsCollector(Collector):
    """Shows the totals as they are when it is asked."""

    def __init__(self, totals: Totals) -> None:
        self._totals = totals

    def collect(self) -> Iterable[Metric]:
        """Return every metric that has a value."""
        yield self._family(PHASE, {phase: float(phase == self._totals.phase) for phase in PHASES})
        yield self._family(CHECKPOINTS, {"saved": self._totals.checkpoints_saved, "failed": self._totals.checkpoints_failed})
        yield from self._list_plain()

    def _list_plain(self) -> Iterator[Metric]:
        for name, definition in FIELDS.items():
            value = getattr(self._totals, name)
            if value is not None:
                yield self._family(definition, {"": value})

    @staticmethod
    def _family(definition: Definition, values: dict[str, float]) -> Metric:
        kind = CounterMetricFamily if definition.type == "counter" else GaugeMetricFamily
        family = kind(definition.name, definition.help, labels=definition.labels)
        for label, value in values.items():
            family.add_metric([label] if definition.labels else [], value)
        return family


def build_registry(totals: Totals) -> CollectorRegistry:
    """Return what is served: the totals, and CPU time and memory of the process."""
    registry = CollectorRegistry()
    registry.register(TotalsCollector(totals))
    ProcessCollector(namespace=PREFIX, registry=registry)
    return registry


def serve(totals: Totals, *, port: int, address: str = "0.0.0.0") -> None:  # noqa: S104  Prometheus comes from other pods
    """Serve the metrics until the process ends; training is more important, so a port that is taken is only logged."""
    disable_created_metrics()
    try:
        start_http_server(port, addr=address, registry=build_registry(totals))
    except OSError as error:
        logger.warning("metrics are not served on port %d: %s", port, error)

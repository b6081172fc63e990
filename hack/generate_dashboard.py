"""The Grafana dashboard of the chart, from a table of panels (pure)."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
_COLUMNS, _HEIGHT = 24, 8
_USED, _WASTED = (f'finetune_{word}accelerator_seconds_total{{job_namespace=~"$namespace"}}' for word in ("", "wasted_"))


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One panel: what it shows, of what, and how."""

    title: str
    description: str
    queries: tuple[tuple[str, str], ...]
    """Expressions with their legends."""
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8
    stack: bool = False


def _sum_rate(metric: str, by: str, *, legend: str | None = None) -> tuple[tuple[str, str], ...]:
    return ((f"sum by ({by}) (rate({metric}[$__rate_interval]))", legend or f"{{{{{by}}}}}"),)


def _quantiles(metric: str, *quantiles: float, by: str = "") -> tuple[tuple[str, str], ...]:
    labels, legend = (f"le, {by}", f" {{{{{by}}}}}") if by else ("le", "")
    return tuple(
        (f"histogram_quantile({each}, sum by ({labels}) (rate({metric}_bucket[$__rate_interval])))", f"p{each * 100:.0f}{legend}")
        for each in quantiles
    )


ROWS: dict[str, tuple[Panel, ...]] = {
    "Jobs": (
        Panel(
            title="Jobs by state",
            description="Other is every state that names a problem, such as InsufficientResources.",
            queries=(("sum by (state) (finetune_jobs)", "{{state}}"),),
            stack=True,
            width=16,
        ),
        Panel(
            title="Jobs at this moment",
            description="The same numbers at the end of the range.",
            queries=(("sum by (state) (finetune_jobs)", "{{state}}"),),
            kind="bargauge",
        ),
        Panel(
            title="Time to start",
            description="From the creation of a FineTuneJob to its first trainer.",
            queries=tuple(
                (f"histogram_quantile({each}, sum by (le) (increase(finetune_job_start_seconds_bucket[$__range])))", legend)
                for each, legend in ((0.5, "half of the jobs"), (0.9, "9 of 10"), (0.99, "99 of 100"))
            ),
            unit="s",
            kind="stat",
        ),
        Panel(
            title="Ends per hour",
            description="FineTuneJobs that ended, by result; jobs whose spec changed are not counted.",
            queries=(("sum by (result) (increase(finetune_job_duration_seconds_count[1h]))", "{{result}}"),),
        ),
        Panel(
            title="Time to the end",
            description="From the creation of a FineTuneJob to its end, of 9 in 10.",
            queries=(
                (
                    "histogram_quantile(0.9, sum by (le, result) (increase(finetune_job_duration_seconds_bucket[$__range])))",
                    "{{result}}",
                ),
            ),
            unit="s",
            kind="stat",
        ),
        Panel(
            title="Failures by reason",
            description="Failed attempts within an hour; most are retried.",
            queries=(("sum by (reason) (increase(finetune_job_failures_total[1h])) > 0", "{{reason}}"),),
            stack=True,
            width=12,
        ),
        Panel(
            title="Restarts by cause",
            description="Attempts that ended early and were followed by a retry, within an hour.",
            queries=(("sum by (cause) (increase(finetune_job_retries_total[1h]))", "{{cause}}"),),
            stack=True,
            width=12,
        ),
    ),
    "Accelerators": (
        Panel(
            title="Accelerator-hours used",
            description="By namespace, of attempts that ended within the range; pods of CPU jobs count as accelerators.",
            queries=((f"sum by (job_namespace) (increase({_USED}[$__range])) / 3600", "{{job_namespace}}"),),
            unit="h",
            kind="bargauge",
        ),
        Panel(
            title="Accelerator-hours wasted",
            description="The part that lay after the last checkpoint of attempts that ended early.",
            queries=((f"sum by (job_namespace) (increase({_WASTED}[$__range])) / 3600", "{{job_namespace}}"),),
            unit="h",
            kind="bargauge",
        ),
        Panel(
            title="Share wasted",
            description="Wasted of used, by namespace.",
            queries=(
                (
                    (
                        f"sum by (job_namespace) (increase({_WASTED}[$__range])) / "
                        f"sum by (job_namespace) (increase({_USED}[$__range]))"
                    ),
                    "{{job_namespace}}",
                ),
            ),
            unit="percentunit",
            kind="bargauge",
        ),
        Panel(
            title="Accelerator-hours by kind",
            description="Added when an attempt ends, so a long one is seen at its end.",
            queries=((f"sum by (kind) (increase({_USED}[1h])) / 3600", "{{kind}}"),),
            unit="h",
            stack=True,
            width=12,
        ),
        Panel(
            title="Lost running time by cause",
            description="Running time after the last checkpoint; stop is a suspension, a replacement or a deletion.",
            queries=(("sum by (cause) (increase(finetune_lost_seconds_total[1h]))", "{{cause}}"),),
            unit="s",
            stack=True,
            width=12,
        ),
    ),
    "Queue": (
        Panel(
            title="Queue depth",
            description="FineTuneJobs that wait for a worker of the operator.",
            queries=(("sum(finetune_queue_keys)", "keys"),),
        ),
        Panel(
            title="Queue wait",
            description="How long they waited, delays that were asked for not included.",
            queries=_quantiles("finetune_queue_wait_seconds", 0.5, 0.99),
            unit="s",
        ),
        Panel(
            title="Reconciles",
            description="By result, per second.",
            queries=_sum_rate("finetune_reconciles_total", "result"),
            unit="ops",
        ),
        Panel(
            title="Reconcile duration",
            description="Requests to the API server included.",
            queries=_quantiles("finetune_reconcile_duration_seconds", 0.5, 0.99),
            unit="s",
        ),
        Panel(
            title="Reports",
            description="Progress reports of trainers by how they were answered, per second.",
            queries=_sum_rate("finetune_reports_total", "result"),
            unit="ops",
        ),
        Panel(
            title="Kubernetes events",
            description="Events for users by what became of them, per second.",
            queries=_sum_rate("finetune_events_total", "result"),
            unit="ops",
        ),
    ),
    "Operator": (
        Panel(
            title="Leaders",
            description="Replicas that may write: one, but for the seconds of a change.",
            queries=(("sum(finetune_leader)", "leaders"),),
            kind="stat",
            width=4,
        ),
        Panel(
            title="Synced",
            description="Whether the operator has seen all objects (1).",
            queries=(("max(finetune_synced)", "synced"),),
            kind="stat",
            width=4,
        ),
        Panel(
            title="Restarts within a day",
            description="Starts of the process beyond the first.",
            queries=(("max(changes(finetune_process_start_time_seconds[1d]))", "restarts"),),
            kind="stat",
            width=4,
        ),
        Panel(
            title="Audit age",
            description="Time since what was seen was last compared with the API server, and the interval that is set.",
            queries=(("max(finetune_audit_age_seconds)", "age"), ("max(finetune_audit_interval_seconds)", "interval")),
            unit="s",
            width=12,
        ),
        Panel(
            title="Audits",
            description="By what they found, within an hour, and the missed deletions.",
            queries=(
                ("sum by (result) (increase(finetune_audits_total[1h]))", "{{result}}"),
                ("sum(increase(finetune_audit_purges_total[1h]))", "missed deletions"),
            ),
        ),
        Panel(
            title="API requests",
            description="By class of the answer, per second; none is no answer.",
            queries=_sum_rate("finetune_api_requests_total", "code"),
            unit="reqps",
        ),
        Panel(
            title="API errors",
            description="Requests that failed by resource and verb, per second.",
            queries=(
                (
                    'sum by (verb, resource) (rate(finetune_api_requests_total{code=~"5xx|none"}[$__rate_interval])) > 0',
                    "{{verb}} {{resource}}",
                ),
            ),
            unit="reqps",
        ),
        Panel(
            title="API latency",
            description="Time of 99 in 100 requests, by verb.",
            queries=_quantiles("finetune_api_request_duration_seconds", 0.99, by="verb"),
            unit="s",
        ),
        Panel(
            title="Watch events",
            description="By resource, per second.",
            queries=_sum_rate("finetune_watch_events_total", "resource"),
            unit="ops",
        ),
        Panel(
            title="Event loop lag",
            description="By how much the event loop was late.",
            queries=_quantiles("finetune_loop_lag_seconds", 0.5, 0.99),
            unit="s",
        ),
        Panel(
            title="Memory",
            description="Resident memory of the operator.",
            queries=(("max(finetune_process_resident_memory_bytes)", "memory"),),
            unit="bytes",
        ),
        Panel(
            title="CPU",
            description="Cores that the operator uses.",
            queries=(("sum(rate(finetune_process_cpu_seconds_total[$__rate_interval]))", "cores"),),
        ),
        Panel(
            title="Changes of the leader",
            description="Since the Lease was created, by its own count.",
            queries=(("max(finetune_leader_transitions)", "changes"),),
        ),
    ),
    "Trainers": (
        Panel(
            title="Trainers by phase",
            description="Trainer pods that are scraped.",
            queries=(("sum by (phase) (finetune_trainer_phase)", "{{phase}}"),),
            stack=True,
        ),
        Panel(
            title="Examples per second",
            description="In steps of the optimizer; the pods of one job each count all of its examples.",
            queries=(("sum(rate(finetune_trainer_samples_total[$__rate_interval]))", "examples"),),
            unit="ops",
        ),
        Panel(
            title="Share of step time",
            description="What the steps waited for data, and what exchanges between processes took.",
            queries=(
                (
                    (
                        "sum(rate(finetune_trainer_data_wait_seconds_total[$__rate_interval]))"
                        " / sum(rate(finetune_trainer_step_seconds_total[$__rate_interval]))"
                    ),
                    "waiting for data",
                ),
                (
                    (
                        "sum(rate(finetune_trainer_exchange_seconds_total[$__rate_interval]))"
                        " / sum(rate(finetune_trainer_step_seconds_total[$__rate_interval]))"
                    ),
                    "exchanges",
                ),
            ),
            unit="percentunit",
        ),
        Panel(
            title="Checkpoints",
            description="Seconds for one checkpoint, on average.",
            queries=(
                (
                    (
                        "sum(rate(finetune_trainer_checkpoint_seconds_total[$__rate_interval]))"
                        " / sum(rate(finetune_trainer_checkpoints_total[$__rate_interval]))"
                    ),
                    "seconds each",
                ),
            ),
            unit="s",
        ),
        Panel(
            title="Checkpoint bytes",
            description="Written per second.",
            queries=(("sum(rate(finetune_trainer_checkpoint_bytes_total[$__rate_interval]))", "written"),),
            unit="Bps",
        ),
        Panel(
            title="Memory of trainers",
            description="The largest process, and the largest peak on a GPU.",
            queries=(
                ("max(finetune_trainer_process_resident_memory_bytes)", "process"),
                ("max(finetune_trainer_device_memory_peak_bytes)", "GPU"),
            ),
            unit="bytes",
        ),
    ),
}


def build_dashboard() -> str:
    """Return the dashboard as JSON."""
    content = {
        "uid": "finetune-operator",
        "title": "FineTuneJobs",
        "tags": ["finetune-operator"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "1m",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": _build_variables()},
        "panels": list(_lay_out()),
    }
    return json.dumps(content, indent=1) + "\n"


def _build_variables() -> list[dict[str, Any]]:
    query = "label_values(finetune_accelerator_seconds_total, job_namespace)"
    return [
        {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"},
        {
            "name": "namespace",
            "label": "Namespace of the jobs (accelerators)",
            "type": "query",
            "datasource": _DATASOURCE,
            "query": {"query": query, "refId": "namespaces"},
            "refresh": 2,
            "multi": True,
            "includeAll": True,
            "allValue": ".*",
            "current": {"text": "All", "value": "$__all"},
        },
    ]


def _lay_out() -> Iterator[dict[str, Any]]:
    """Yield rows and panels from the top left to the bottom right."""
    numbers, y = itertools.count(1), 0
    for title, panels in ROWS.items():
        yield {
            "id": next(numbers),
            "type": "row",
            "title": title,
            "collapsed": False,
            "panels": [],
            "gridPos": _place(0, y, 24, 1),
        }
        x, y = 0, y + 1
        for panel in panels:
            if x + panel.width > _COLUMNS:
                x, y = 0, y + _HEIGHT
            yield _build_panel(panel, number=next(numbers)) | {"gridPos": _place(x, y, panel.width, _HEIGHT)}
            x += panel.width
        y += _HEIGHT


def _place(x: int, y: int, width: int, height: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": width, "h": height}


def _build_panel(panel: Panel, *, number: int) -> dict[str, Any]:
    targets = [
        {"refId": chr(ord("A") + index), "datasource": _DATASOURCE, "expr": query, "legendFormat": legend, **_read_once(panel)}
        for index, (query, legend) in enumerate(panel.queries)
    ]
    custom = {"stacking": {"mode": "normal"}, "fillOpacity": 30} if panel.stack else {}
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0, **({"custom": custom} if custom else {})}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": _DATASOURCE,
        "targets": targets,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {"orientation": "horizontal"} if panel.kind == "bargauge" else {},
    }


def _read_once(panel: Panel) -> dict[str, bool]:
    """Panels of single values ask for one moment, the others for a range."""
    return {"range": True} if panel.kind == "timeseries" else {"instant": True, "range": False}

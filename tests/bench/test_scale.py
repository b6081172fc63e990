"""The pure parts of the load test: figures and gates, the audit log, and what kwok is told."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import yaml
from finetune_operator.policies.progress import parse_termination_message

from bench.scale.audit import Write, count_writes, find_latencies, parse_writes
from bench.scale.figures import Figure, compute_gate, find_exceeded, find_quantile, format_table, record
from bench.scale.load import copy_as_plain_job
from bench.scale.operators import parse_metric
from bench.scale.stages import LAST_WORD, build_stages
from bench.scale.upgrade import contains, read_environment

_START = datetime(2026, 1, 1, tzinfo=UTC)


def build_figure(value: float, **fields: Any) -> Figure:
    return Figure(name="seconds", text="time", value=value, unit="s", **fields)


def build_line(**fields: Any) -> str:
    reference = {"resource": "jobs", "namespace": "burst", "name": "done-1-abc-1"}
    entry = {
        "verb": "patch",
        "userAgent": "finetune-operator",
        "objectRef": reference,
        "responseStatus": {"code": 201},
        "requestReceivedTimestamp": "2026-01-01T00:00:00.150000Z",
        "stageTimestamp": "2026-01-01T00:00:00.250000Z",
    }
    return json.dumps(entry | fields, separators=(",", ":")) + "\n"


def build_write(agent: str, resource: str, name: str, *, seconds: float, code: int = 201) -> Write:
    at = _START + timedelta(seconds=seconds)
    received_at = at - timedelta(seconds=0.1)
    return Write(
        agent=agent, resource=resource, namespace="burst", name=name, verb="patch", code=code, received_at=received_at, at=at
    )


def test_gate_is_the_mean_of_the_runs_and_a_fifth() -> None:
    assert pytest.approx(3.6) == compute_gate([2, 4])


def test_gate_of_zeros_is_zero() -> None:
    assert 0 == compute_gate([0, 0])


def test_figure_without_a_recorded_run_has_no_gate() -> None:
    assert [] == find_exceeded("burst", [build_figure(1e9)], recorded={})


@pytest.mark.parametrize(
    ("value", "is_gated", "number"),
    [
        pytest.param(2.4, True, 0, id="at the gate"),
        pytest.param(2.5, True, 1, id="beyond it"),
        pytest.param(2.5, False, 0, id="beyond it, but only explains others"),
    ],
)
def test_figure_beyond_its_gate_is_told(*, value: float, is_gated: bool, number: int) -> None:
    found = find_exceeded("burst", [build_figure(value, is_gated=is_gated)], recorded={"burst": {"seconds": [2.0]}})

    assert number == len(found)


def test_recording_adds_a_run_and_keeps_the_others() -> None:
    before = {"burst": {"seconds": [2.0]}, "rest": {"writes": [0.0]}}

    after = record("burst", [build_figure(4), build_figure(5, is_gated=False)], recorded=before)

    assert {"burst": {"seconds": [2.0, 4.0]}, "rest": {"writes": [0.0]}} == after
    assert {"burst": {"seconds": [2.0]}, "rest": {"writes": [0.0]}} == before


def test_table_marks_a_goal_that_is_missed() -> None:
    table = format_table("burst", [build_figure(4, goal=3), build_figure(2, goal=3)], recorded={"burst": {"seconds": [2.0]}})

    assert "| time | 4.00 s (missed) | <= 3.00 s | 2.40 s |" in table
    assert "| time | 2.00 s | <= 3.00 s | 2.40 s |" in table


def test_quantile_of_nothing_is_zero() -> None:
    assert (0.0, 99, 100) == (find_quantile([], 0.99), find_quantile(range(100), 0.99), find_quantile(range(1, 101), 0.995))


def test_log_gives_the_writes_of_a_namespace_alone() -> None:
    other = build_line(objectRef={"resource": "jobs", "namespace": "plain", "name": "x"})
    status = build_line(objectRef={"resource": "finetunejobs", "subresource": "status", "namespace": "burst", "name": "x"})
    lines = [build_line(verb="get"), other, status, build_line(userAgent="kube-scheduler/v1.34 (linux)"), build_line()[:-9]]

    found = [(each.agent, each.resource) for each in parse_writes(lines, namespace="burst")]

    assert [("finetune-operator", "finetunejobs/status"), ("kube-scheduler", "jobs")] == found


@pytest.mark.parametrize(
    ("until", "seconds"),
    [pytest.param("jobs", 0.5, id="first Job"), pytest.param("finetunejobs/status", 0.7, id="first status")],
)
def test_latency_counts_from_the_users_apply_to_the_first_answer(until: str, seconds: float) -> None:
    writes = [
        build_write("bench", "finetunejobs", "done-1", seconds=0),
        build_write("finetune-operator", "jobs", "done-1-abc-1", seconds=0.2, code=409),
        build_write("finetune-operator", "jobs", "done-1-abc-1", seconds=0.5),
        build_write("finetune-operator", "finetunejobs/status", "done-1", seconds=0.7),
        build_write("finetune-operator", "finetunejobs/status", "done-1", seconds=3),
        build_write("finetune-operator", "jobs", "done-1-abc-2", seconds=9),
        build_write("finetune-operator", "jobs", "unknown-abc-1", seconds=9),
    ]

    assert {"done-1": seconds} == find_latencies(writes, until=until)


def test_writes_are_the_operators_without_its_lease() -> None:
    writes = [
        build_write("finetune-operator", "leases", "finetune-operator", seconds=5),
        build_write("finetune-operator", "jobs", "a", seconds=1),
        build_write("finetune-operator", "jobs", "b", seconds=5),
        build_write("bench", "jobs", "c", seconds=5),
    ]

    assert {"jobs": 1} == count_writes(writes, since=_START + timedelta(seconds=2))


def test_last_word_of_a_pod_is_one_that_the_operator_understands() -> None:
    report = parse_termination_message(json.dumps(LAST_WORD))

    assert report is not None
    assert report.output is not None


def test_stages_are_plain_yaml_and_complete_only_the_pods_of_jobs() -> None:
    stages = {each["metadata"]["name"]: each["spec"] for each in yaml.safe_load(yaml.safe_dump(build_stages(run_seconds=2)))}
    operators = [each["operator"] for each in stages["pod-complete"]["selector"]["matchExpressions"]]

    assert {"durationMilliseconds": 2000} == stages["pod-complete"]["delay"]
    assert ["DoesNotExist", "In", "Exists", "NotIn"] == operators


def test_plain_job_has_the_same_pod_and_no_owner() -> None:
    metadata = {"labels": {"finetune.dev/job": "a"}, "annotations": {"finetune.dev/ca.crt": "PEM"}}
    spec = {
        "completionMode": "Indexed",
        "completions": 1,
        "parallelism": 1,
        "backoffLimit": 0,
        "podReplacementPolicy": "Failed",
        "selector": {"matchLabels": {"batch.kubernetes.io/controller-uid": "u"}},
        "template": {"metadata": metadata, "spec": {"containers": [{"name": "trainer"}]}},
    }

    job = copy_as_plain_job({"metadata": {"ownerReferences": [{}]}, "spec": spec})

    assert "metadata" not in job
    assert "selector" not in job["spec"]
    assert spec["template"]["spec"] == job["spec"]["template"]["spec"]  # type: ignore[index]
    assert {"labels": {"bench": "plain"}, "annotations": metadata["annotations"]} == job["spec"]["template"]["metadata"]


def test_metric_is_read_by_its_label() -> None:
    page = '# HELP finetune_jobs x\nfinetune_jobs{state="Complete"} 3.0\nfinetune_jobs_other 1.0\nfinetune_queue_keys 2.0\n'

    assert ({"Complete": 3.0}, {"": 2.0}) == (parse_metric(page, "finetune_jobs"), parse_metric(page, "finetune_queue_keys"))


@pytest.mark.parametrize(
    ("after", "is_kept"),
    [
        pytest.param({"run": "a", "conditions": [{"type": "Ready", "status": "True"}], "new": 1}, True, id="a field has come"),
        pytest.param({"run": "a"}, False, id="a list has gone"),
        pytest.param({"run": "b", "conditions": [{"type": "Ready"}]}, False, id="a value has changed"),
        pytest.param({"run": "a", "conditions": [{"type": "Failed"}]}, False, id="an item has changed"),
        pytest.param(None, False, id="all has gone"),
    ],
)
def test_status_is_kept_when_nothing_of_it_is_lost(*, after: Any, is_kept: bool) -> None:
    assert is_kept == contains(after, {"run": "a", "conditions": [{"type": "Ready"}]})


def test_deployment_gives_the_settings_but_not_those_of_its_pods_network() -> None:
    env = [
        {"name": "FINETUNE_WORKERS", "value": "16"},
        {"name": "FINETUNE_REPORT_PORT", "value": "10443"},
        {"name": "FINETUNE_BIND_ADDRESS", "value": "0.0.0.0"},
        {"name": "POD", "valueFrom": {"fieldRef": {"fieldPath": "metadata.namespace"}}},
    ]
    deployment = {"spec": {"template": {"spec": {"containers": [{"env": env}]}}}}

    assert {"FINETUNE_WORKERS": "16", "POD": "finetune"} == read_environment(deployment)

"""Metrics: closed label sets, and a page that lists them all."""

import itertools

import pytest
from finetune_operator.metrics import (
    API_REQUESTS,
    DEFINITIONS,
    FAILURES,
    PROCESS_DEFINITIONS,
    RECONCILES,
    Definition,
    Metrics,
    classify_code,
)
from finetune_operator.policies import failure
from prometheus_client import generate_latest


@pytest.mark.parametrize("definition", DEFINITIONS, ids=lambda definition: definition.name)
def test_every_metric_is_documented_and_closed(definition: Definition) -> None:
    assert definition.name.startswith("finetune_")
    assert definition.help[0].isupper()
    assert definition.help.endswith(".")
    assert all(values or name == "job_namespace" for name, values in definition.labels.items())


def test_label_value_outside_its_set_is_refused() -> None:
    with pytest.raises(AssertionError, match="closed set"):
        Metrics().count(RECONCILES, result="team/emoji")


def test_unknown_states_are_counted_as_other() -> None:
    metrics = Metrics()
    metrics.watch_states(lambda: {"Running": 2, "Unschedulable": 3, "": 1})
    page = generate_latest(metrics.registry).decode()

    assert 'finetune_jobs{state="Running"} 2.0' in page
    assert 'finetune_jobs{state="Other"} 4.0' in page
    assert "Unschedulable" not in page


def test_number_of_series_is_bounded() -> None:
    metrics = Metrics()
    for definition in DEFINITIONS:
        if definition.type != "counter":
            continue
        for values in itertools.product(*(values or ("team",) for values in definition.labels.values())):
            metrics.count(definition, **dict(zip(definition.labels, values, strict=True)))
    page = generate_latest(metrics.registry).decode()

    assert len([line for line in page.splitlines() if not line.startswith("#")]) < 950


@pytest.mark.parametrize(
    ("status", "expected"),
    [(200, "2xx"), (201, "2xx"), (404, "4xx"), (503, "5xx"), (0, "none"), (301, "none"), (999, "none")],
)
def test_code_has_a_class(status: int, expected: str) -> None:
    assert classify_code(status) == expected
    assert expected in API_REQUESTS.labels["code"]


def test_series_of_few_labels_are_there_before_their_first_case() -> None:
    page = generate_latest(Metrics().registry).decode()

    assert 'finetune_job_retries_total{cause="disruption"} 0.0' in page
    assert 'finetune_reports_total{result="forbidden"} 0.0' in page


def test_process_metrics_are_those_that_are_documented() -> None:
    page = generate_latest(Metrics().registry).decode()
    found = {line.split()[2] for line in page.splitlines() if line.startswith("# TYPE finetune_process_")}

    assert found == {each.name for each in PROCESS_DEFINITIONS}


def test_every_reason_of_the_table_of_failures_has_a_series() -> None:
    reasons = {reason for reason, _ in failure._EXITS.values()} | failure._DISRUPTED | failure.MEMORY_REASONS | {"PodFailed"}

    assert set() == reasons - set(FAILURES)

"""Metrics: closed label sets, and a page that lists them all."""

import itertools

import pytest
from finetune_operator.metrics import (
    API_REQUESTS,
    DEFINITIONS,
    JOBS,
    RECONCILES,
    Definition,
    Metrics,
    build_reference,
    classify_code,
)
from prometheus_client import generate_latest


@pytest.mark.parametrize("definition", DEFINITIONS, ids=lambda definition: definition.name)
def test_every_metric_is_documented_and_closed(definition: Definition) -> None:
    assert definition.name.startswith("finetune_")
    assert definition.help[0].isupper()
    assert definition.help.endswith(".")
    assert all(definition.labels.values())


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
        for values in itertools.product(*definition.labels.values()):
            metrics.count(definition, **dict(zip(definition.labels, values, strict=True)))
    page = generate_latest(metrics.registry).decode()

    assert len([line for line in page.splitlines() if not line.startswith("#")]) < 700


@pytest.mark.parametrize(
    ("status", "expected"),
    [(200, "2xx"), (201, "2xx"), (404, "4xx"), (503, "5xx"), (0, "none"), (301, "none"), (999, "none")],
)
def test_code_has_a_class(status: int, expected: str) -> None:
    assert classify_code(status) == expected
    assert expected in API_REQUESTS.labels["code"]


def test_reference_lists_every_metric() -> None:
    page = build_reference()

    assert all(f"`{definition.name}`" in page for definition in DEFINITIONS)
    assert JOBS.help in page

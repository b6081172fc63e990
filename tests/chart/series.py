"""The series that operator and trainer can show, for checks of rules and dashboards against them."""

import re
from collections.abc import Iterator

from finetune_operator.metrics import DEFINITIONS, PROCESS_DEFINITIONS
from finetune_trainer.metrics import DEFINITIONS as TRAINER_DEFINITIONS


def list_metrics() -> set[str]:
    """Return the names of all series, each part of a histogram for itself."""
    return {*_list_operator_names(), *(each.name for each in TRAINER_DEFINITIONS)}


def find_label_problem(series: str) -> str | None:
    """Return what a series in the notation of Prometheus has that the operator never shows."""
    match = re.fullmatch(r"([a-z_]+)(?:\{(.*)\})?", series)
    assert match
    name = re.sub(r"_(count|sum|bucket)$", "", match[1])
    definition = next((each for each in (*DEFINITIONS, *PROCESS_DEFINITIONS) if each.name == name), None)
    if definition is None:
        return f"{name} is no metric of the operator"
    labels = dict(re.findall(r'(\w+)="([^"]*)"', match[2] or ""))
    if set(labels) != set(definition.labels):
        return f"{name} has the labels {sorted(definition.labels)}"
    wrong = {label for label, value in labels.items() if definition.labels[label] and value not in definition.labels[label]}
    return f"{name}: other values of {sorted(wrong)}" if wrong else None


def _list_operator_names() -> Iterator[str]:
    for each in (*DEFINITIONS, *PROCESS_DEFINITIONS):
        if each.type == "histogram":
            yield from (f"{each.name}_{part}" for part in ("bucket", "count", "sum"))
        else:
            yield each.name

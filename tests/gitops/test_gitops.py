"""kstatus, Flux and Argo CD read every state right; their own libraries are asked."""

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from finetune_operator.state import Phase
from judges import DOCS, find_faults, judge
from statuses import Shape, read_corpus

pytestmark = pytest.mark.apiserver  # Go compiles the judge, as it does the control plane

_STATES = DOCS.parent / "concepts" / "states.md"
_CORPUS = sorted({Shape(()), *read_corpus()})


def _vary(shape: Shape) -> list[Shape]:
    """Return a shape as it is, after a change of the spec, and while the object is being deleted."""
    flags = (False, True) if shape.conditions else (False,)
    return [Shape(shape.conditions, *each) for each in itertools.product(flags, (False, True))]


def test_every_status_that_tests_have_seen_is_read_right(tmp_path: Path) -> None:
    shapes = sorted({each for shape in _CORPUS for each in _vary(shape)})
    verdicts = judge((each.build() for each in shapes), folder=tmp_path)

    assert len(shapes) == len(verdicts)
    assert not [fault for shape, verdict in zip(shapes, verdicts, strict=True) for fault in find_faults(shape, verdict)]


def test_nothing_is_current_or_healthy_before_it_is_complete_or_while_it_is_failed(tmp_path: Path) -> None:
    shapes = sorted({each for shape in _CORPUS for each in _vary(shape)})
    verdicts = judge((each.build() for each in shapes), folder=tmp_path)
    fit = [shape for shape, each in zip(shapes, verdicts, strict=True) if each["kstatus"] == "Current"]
    healthy = [shape for shape, each in zip(shapes, verdicts, strict=True) if each["argo"]["complete"]["status"] == "Healthy"]

    assert fit == healthy
    assert fit
    assert all(each.has("Complete") and not each.has("Failed") and not each.is_stale for each in fit)


def test_the_corpus_has_every_state_and_no_contradiction() -> None:
    states = {shape.state for shape in _CORPUS}
    rows = re.findall(
        r"^\| ([A-Z]\w+(?:, [A-Z]\w+)*)", _STATES.read_text(encoding="utf-8").split("## What a job")[0], re.MULTILINE
    )
    documented = {word for row in rows for word in row.split(", ")} - {"STATE"}

    assert set(Phase) - states == set()
    assert documented - states - {each for shape in _CORPUS for _, _, each in shape.conditions} == set()
    for shape in _CORPUS:
        assert shape.has("Ready") == shape.has("Complete")
        assert sum(shape.has(kind) for kind in ("Complete", "Failed", "Running", "Suspended")) <= 1
        assert shape.has("Stalled") or not shape.has("Failed")


def test_a_job_that_no_operator_has_seen_is_in_progress(api: Any, tmp_path: Path) -> None:
    path = "/apis/finetune.dev/v1alpha1/namespaces/default/finetunejobs"
    spec = {"task": "image-classification", "dataset": {"uri": "pvc://a/b"}, "output": {"uri": "pvc://c/d"}}
    body = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "unseen"}, "spec": spec}
    api.create(path, body)
    seen = api.get(f"{path}/unseen")
    api.delete(f"{path}/unseen")
    (verdict,) = judge([seen], folder=tmp_path)

    assert seen["status"]["observedGeneration"] == -1
    assert not find_faults(Shape(()), verdict)


def test_a_profile_is_healthy_by_itself(tmp_path: Path) -> None:
    metadata = {"name": "team", "generation": 1}
    profile = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneProfile", "metadata": metadata, "spec": {}}
    (verdict,) = judge([profile], folder=tmp_path)

    assert ("Current", "Healthy") == (verdict["kstatus"], verdict["argo"]["complete"]["status"])


def test_argo_cd_shows_the_operators_words(tmp_path: Path) -> None:
    shape = next(each for each in _CORPUS if each.state == "Failed" and not each.is_stale and not each.is_deleted)
    (verdict,) = judge([shape.build()], folder=tmp_path)

    assert verdict["argo"]["complete"] == {"status": "Degraded", "message": "Failed: Failed."}


def test_argo_cd_page_shows_the_script_that_is_tested() -> None:
    page = (DOCS / "argo-cd.md").read_text(encoding="utf-8")

    assert "resource.customizations.health.finetune.dev_FineTuneJob" in page
    assert "(health.lua)" in page

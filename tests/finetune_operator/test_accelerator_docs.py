"""The manifests of docs/accelerators and examples: valid, with a class, and with the pods that the pages show."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerators import CHART_CLASSES
from finetune_api.v1alpha1 import FineTuneJob
from finetune_operator.accelerator_classes import AcceleratorClass, AcceleratorClasses
from finetune_operator.manifests.claim import build_claim_template
from finetune_operator.manifests.job import build_job
from finetune_operator.observed import JobView
from finetune_operator.policies.accelerator import PodShape, explain_missing_class, shape_pods
from finetune_operator.settings import TrainerSettings
from pydantic import TypeAdapter
from world import build_view

_ROOT = Path(__file__).resolve().parents[2]
_PAGES = sorted((_ROOT / "docs" / "accelerators").glob("*.md"))
_EXAMPLES = sorted((_ROOT / "examples").glob("*.yaml"))
_PATH = "/apis/finetune.dev/v1alpha1/namespaces/default/finetunejobs?dryRun=All&fieldValidation=Strict"

Document = dict[str, Any]


def _read_blocks(page: Path) -> list[Document]:
    blocks = re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [document for block in blocks for document in yaml.safe_load_all(block)]


def _is_job(document: Document) -> bool:
    return document.get("kind") == "FineTuneJob"


def _merge(base: Any, change: Any) -> Any:
    """Merge values as helm does: null removes."""
    if not isinstance(base, dict) or not isinstance(change, dict):
        return change
    merged = base | {key: _merge(base.get(key), value) for key, value in change.items()}
    return {key: value for key, value in merged.items() if value is not None}


def _parse(classes: Document) -> dict[str, AcceleratorClass]:
    return TypeAdapter(AcceleratorClasses).validate_python(classes)


def _add_classes() -> dict[str, AcceleratorClass]:
    """Return the classes of the chart with the changes that the pages show."""
    classes: Document = CHART_CLASSES
    for change in (block["accelerators"] for page in _PAGES for block in _read_blocks(page) if "accelerators" in block):
        classes = _merge(classes, change)
    return _parse(classes)


_CLASSES, _MORE_CLASSES = _parse(CHART_CLASSES), _add_classes()
_SETTINGS = TrainerSettings(image="trainer:1", report_url="https://operator:10443", report_ca="ca")
_EXAMPLE_JOBS = [pytest.param(each, id=path.name) for path in _EXAMPLES for each in yaml.safe_load_all(path.read_text("utf-8"))]
_DOC_JOBS = [
    pytest.param(each, id=f"{page.stem}-{each['metadata']['name']}")
    for page in _PAGES
    for each in _read_blocks(page)
    if _is_job(each)
]
_JOBS = [*_DOC_JOBS, *(each for each in _EXAMPLE_JOBS if _is_job(each.values[0]))]


def _render(document: Document) -> tuple[PodShape, Document, JobView]:
    job = FineTuneJob.model_validate(document)
    view = build_view(namespace="default", name=document["metadata"]["name"], uid="0b6e5f1c-77d0", spec=job.spec)
    shape = shape_pods(job.spec, _MORE_CLASSES if explain_missing_class(job.spec, _CLASSES) else _CLASSES)
    return shape, build_job(view, job.spec, attempt=1, shape=shape, settings=_SETTINGS), view


def _is_part(part: Any, whole: Any) -> bool:
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(_is_part(value, whole.get(key)) for key, value in part.items())
    if isinstance(part, list):
        return len(part) == len(whole) and all(_is_part(*pair) for pair in zip(part, whole, strict=True))
    return bool(part == whole)


@pytest.mark.parametrize("document", _JOBS)
def test_job_has_no_unknown_field_and_a_class(document: Document) -> None:
    job = FineTuneJob.model_validate(document)

    assert document["spec"] == job.model_dump(mode="json", by_alias=True, exclude_unset=True)["spec"]
    assert explain_missing_class(job.spec, _MORE_CLASSES) is None


@pytest.mark.parametrize(
    "page", [page for page in _PAGES if page.stem not in ("README", "add-a-class")], ids=lambda page: page.stem
)
def test_page_shows_what_the_child_job_has(page: Path) -> None:
    blocks = _read_blocks(page)
    jobs = [_render(each) for each in blocks if _is_job(each)]
    parts = [each for each in blocks if "template" in each]
    claims = [each for each in blocks if each.get("kind") == "ResourceClaimTemplate"]

    assert jobs
    assert len(jobs) == len(parts)
    for (_, job, _), part in zip(jobs, parts, strict=True):
        assert _is_part(part, job["spec"]), yaml.safe_dump(job["spec"])
    for claim in claims:
        devices = jobs[0][0].devices
        assert devices is not None
        assert _is_part(claim, build_claim_template(jobs[0][2], devices))


def test_table_has_the_processes_device_and_backend_of_each_class() -> None:
    rows = re.findall(
        r"^\| `([a-zA-Z]+): \{(.*)\}` \| (.*?) \| (.*?) \| `(\w+)`.*? \| `(\w+)`", _read_overview(), flags=re.MULTILINE
    )
    names = {"nvidia,count": "nvidia", "nvidia,mig": "mig", "neuron,devices": "neuron", "neuron,cores": "neuroncore"}
    seen = set()
    for member, fields, requests, processes, device, backend in rows:
        name = names.get(f"{member},{fields.partition(':')[0]}", member)
        found = _CLASSES[name]
        seen.add(name)

        assert (device, backend) == (found.device, found.backend)
        assert processes.startswith(f"{found.processes_per_accelerator} for each")
        assert str(found.resource).replace("{profile}", "PROFILE") in requests
        assert all(f"`{resource}`" in requests for resource in found.extra_resources)
    assert seen == {name for name, each in _CLASSES.items() if each.resource}


def test_the_changes_on_the_page_do_what_it_says() -> None:
    product = {"product": "Tesla-T4"}

    assert {"npu", "small-slices"} == set(_MORE_CLASSES) - set(_CLASSES)
    assert {"cloud.example/gpu-model": "Tesla-T4"} == _MORE_CLASSES["nvidia"].fill_node_selector(product)
    assert 4 == _MORE_CLASSES["neuron"].processes_per_accelerator


def _read_overview() -> str:
    return (_ROOT / "docs" / "accelerators" / "README.md").read_text(encoding="utf-8")


@pytest.mark.apiserver
@pytest.mark.parametrize("document", _JOBS)
def test_job_and_its_child_are_accepted_by_the_api_server(api: Any, document: Document) -> None:
    _, child, _ = _render(document)
    job = api.request("POST", _PATH, document)
    made = api.request("POST", "/apis/batch/v1/namespaces/default/jobs?dryRun=All&fieldValidation=Strict", child)

    assert (201, 201) == (job[0], made[0]), (job[1], made[1])

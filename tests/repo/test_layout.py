"""Rules of this repository that no tool checks otherwise."""

import ast
import re
import subprocess
from pathlib import Path
from typing import get_args

import pytest
import yaml
from finetune_api.base import ApiModel
from finetune_api.profile import FineTuneProfile
from finetune_api.v1alpha1 import FineTuneJob, StateReason
from finetune_operator.state import Phase

ROOT = Path(__file__).resolve().parents[2]


def _list_files(*patterns: str) -> list[Path]:
    """Return the files of the repository, those not yet committed included, by glob patterns of git."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    return [ROOT / name for name in sorted(names) if (ROOT / name).is_file()]


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _list_imports(path: Path) -> set[str]:
    """Return the first names of all modules that a file imports, wherever it does."""
    imports = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imports |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            imports.add((node.module or "").partition(".")[0])
    return imports


@pytest.mark.parametrize("folder", ["operator", "trainer", "api"])
def test_project_folders_are_no_packages(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()


def test_tests_lie_in_their_folder_alone() -> None:
    stray = [
        _name(path) for path in _list_files("*test_*.py", "*_test.py", "*conftest.py") if not _name(path).startswith("tests/")
    ]

    assert [] == stray
    assert [] == _list_files("tests/**/__init__.py", "tests/__init__.py")


def test_every_test_folder_is_named_after_what_it_tests() -> None:
    folders = {_name(path).split("/")[1] for path in _list_files("tests/**/*.py") if len(path.relative_to(ROOT).parts) > 2}

    assert folders <= {
        "bench", "chart", "cluster", "data", "finetune_api", "finetune_operator", "finetune_trainer",
        "gitops", "hack", "node", "repo",
    }  # fmt: skip


def test_handlers_stay_thin() -> None:
    lines = (ROOT / "operator/finetune_operator/handlers.py").read_text(encoding="utf-8").splitlines()

    assert len(lines) <= 150


@pytest.mark.parametrize(
    ("module", "importer"),
    [
        ("kopf", "operator/finetune_operator/handlers.py"),
        ("kubernetes", "operator/finetune_operator/transport.py"),
    ],
)
def test_one_module_alone_imports(module: str, importer: str) -> None:
    importers = {
        _name(path) for path in _list_files("api/*.py", "operator/*.py", "trainer/*.py") if module in _list_imports(path)
    }

    assert {importer} == importers


def test_states_of_the_api_are_those_of_the_operator() -> None:
    states = get_args(StateReason)
    page = (ROOT / "docs/concepts/states.md").read_text(encoding="utf-8")

    assert {phase.value for phase in Phase} == set(states)
    assert [] == [state for state in states if f"| {state} |" not in page]


def test_nothing_unpickles() -> None:
    users = [
        _name(path)
        for path in _list_files("*.py")
        if {"pickle", "cPickle", "dill", "cloudpickle", "joblib"} & _list_imports(path)
    ]

    assert [] == users


def test_weights_are_loaded_without_code() -> None:
    calls = [
        (_name(path), ast.unparse(node))
        for path in _list_files("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]

    assert [] == [call for call in calls if "weights_only=True" not in call[1]]


def test_sources_are_ascii() -> None:
    patterns = ("*.py", "*.md", "*.yaml", "*.yml", "*.toml", "*.json", "*.tpl", "*.txt", "*.go", "*.c", "Makefile", "Dockerfile")
    files = [path for path in _list_files(*patterns) if not path.read_text(encoding="utf-8").isascii()]

    assert [] == [_name(path) for path in files]


_MODELS: dict[str, type[ApiModel]] = {"FineTuneJob": FineTuneJob, "FineTuneProfile": FineTuneProfile}


@pytest.mark.parametrize("path", _list_files("examples/*.yaml"), ids=_name)
def test_examples_are_valid(path: Path) -> None:
    documents = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))

    assert documents
    for document in documents:
        assert "finetune.dev/v1alpha1" == document["apiVersion"]
        parsed = _MODELS[document["kind"]].model_validate(document)
        known = parsed.model_dump(mode="json", by_alias=True, exclude_unset=True)
        assert document["spec"] == known["spec"], "the example has fields that the API does not know"


@pytest.mark.parametrize("path", _list_files("docs/tasks/*.md"), ids=_name)
def test_jobs_in_the_docs_are_valid(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    documents = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)]

    for document in documents:
        if document.get("kind") == "FineTuneJob":
            job = FineTuneJob.model_validate(document)
            assert document["spec"] == job.model_dump(mode="json", by_alias=True, exclude_unset=True)["spec"]


@pytest.mark.parametrize("path", _list_files("*.md"), ids=_name)
def test_links_resolve(path: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        linked = (path.parent / name).resolve() if name else path
        if not linked.exists() or (anchor and anchor not in _list_anchors(linked)):
            broken.append(target)

    assert [] == broken


def _list_anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ +(.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}

"""helm and renderings of the chart."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]

Values = dict[str, Any]
Helm = Callable[..., "subprocess.CompletedProcess[str]"]
Render = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="session")
def helm() -> Helm:
    """Run helm; the result is returned whatever the exit status. CHART stands for the chart's folder."""
    command = [sys.executable, str(ROOT / "hack" / "cluster"), "path", "helm"]
    program = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def run(*words: str, values: Values | None = None) -> "subprocess.CompletedProcess[str]":
        chart = str(ROOT / "charts" / "finetune-operator")
        arguments = [chart if word == "CHART" else word for word in words]
        stdin = ["--values", "-"] if values is not None else []
        return subprocess.run(
            [program, *arguments, *stdin], input=json.dumps(values), capture_output=True, text=True, check=False
        )

    return run


@pytest.fixture(scope="session")
def template(helm: Helm) -> Callable[[Values], str]:
    """Return what `helm template` prints for some values, once for all tests."""
    rendered: dict[str, str] = {}

    def render(values: Values) -> str:
        key = json.dumps(values, sort_keys=True)
        if key not in rendered:
            words = ("template", "finetune-operator", "CHART", "--namespace", "finetune", "--kube-version", "1.34.0")
            result = helm(*words, values=values)
            assert 0 == result.returncode, result.stderr
            rendered[key] = result.stdout
        return rendered[key]

    return render


@pytest.fixture(scope="session")
def render(template: Callable[[Values], str]) -> Render:
    """Return the objects of a rendering, of one kind if it is given."""

    def read(values: Values | None = None, *, kind: str | None = None) -> list[dict[str, Any]]:
        documents = [document for document in yaml.safe_load_all(template(values or {})) if document]
        return [document for document in documents if kind in (None, document["kind"])]

    return read

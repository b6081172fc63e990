"""What GitOps tools say of a FineTuneJob, by their own libraries, and what they should say."""

import json
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from localcluster.binaries import JUDGES, binary, binary_path
from statuses import Shape

DOCS = Path(__file__).parents[2] / "docs" / "gitops"

_SWITCH = "local healthy_when_running = false"


def is_compiled() -> bool:
    """Return whether the program is there that has the tools' libraries in it."""
    return all(binary_path(program).exists() for program in JUDGES)


def judge(objects: Iterable[dict[str, Any]], *, folder: Path) -> list[dict[str, Any]]:
    """Return what kstatus, Flux's and Argo CD's health checks of the documentation say of each object."""
    arguments = _write_checks(folder)
    lines = "".join(f"{json.dumps(each)}\n" for each in objects)
    result = subprocess.run([binary("kstatus"), *arguments], input=lines, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def find_faults(shape: Shape, verdict: dict[str, Any]) -> list[str]:
    """Return in which of its words a verdict is wrong."""
    actual = {
        "kstatus": verdict["kstatus"],
        "Flux when running": verdict["flux"]["running"].split(":")[0],
        "Argo CD": verdict["argo"]["complete"]["status"],
        "Argo CD when running": verdict["argo"]["running"]["status"],
    }
    return [f"{tool} says {actual[tool]} of {shape}, not {word}" for tool, word in _expect(shape).items() if actual[tool] != word]


def _expect(shape: Shape) -> dict[str, str]:
    tools = ("kstatus", "Flux when running", "Argo CD", "Argo CD when running")
    words = _choose_words(shape)
    return dict(zip(tools, words, strict=True))


def _choose_words(shape: Shape) -> tuple[str, str, str, str]:
    if shape.is_deleted:
        return "Terminating", "InProgress", "Progressing", "Progressing"
    if shape.is_stale or not shape.conditions:
        return "InProgress", "InProgress", "Progressing", "Progressing"
    if shape.has("Failed") or shape.has("Stalled"):
        return "Failed", "Failed", "Degraded", "Degraded"
    if shape.has("Complete"):
        return "Current", "Current", "Healthy", "Healthy"
    if shape.has("Running"):
        return "InProgress", "Current", "Progressing", "Healthy"
    if shape.has("Suspended"):
        return "InProgress", "Current", "Suspended", "Suspended"
    return "InProgress", "InProgress", "Progressing", "Progressing"


def _write_checks(folder: Path) -> list[str]:
    script = (DOCS / "health.lua").read_text(encoding="utf-8")
    assert script.count(_SWITCH) == 1
    (folder / "complete.lua").write_text(script, encoding="utf-8")
    (folder / "running.lua").write_text(script.replace(_SWITCH, _SWITCH.replace("false", "true")), encoding="utf-8")
    (folder / "running.json").write_text(json.dumps(read_flux_expressions()), encoding="utf-8")
    return [
        f"-flux=running={folder / 'running.json'}",
        f"-argo=complete={folder / 'complete.lua'}",
        f"-argo=running={folder / 'running.lua'}",
    ]


def read_flux_expressions() -> dict[str, str]:
    """Return the health check expressions that the documentation of Flux gives."""
    text = (DOCS / "flux.md").read_text(encoding="utf-8")
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]
    (checks,) = [block["spec"]["healthCheckExprs"] for block in blocks if "healthCheckExprs" in block["spec"]]
    (check,) = [each for each in checks if each["kind"] == "FineTuneJob"]
    return {name: expression for name, expression in check.items() if name not in ("apiVersion", "kind")}

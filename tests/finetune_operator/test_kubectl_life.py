"""What people see of a life with kubectl: `wait`, `get -w` and `describe` beside a real operator."""

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cluster_client
import pytest
from harness import PUBLISHED

pytestmark = pytest.mark.apiserver


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(control_plane: Path, team: Any) -> Iterator[Start]:
    """Start kubectl in the team's namespace; what still runs at the end is stopped."""
    program = cluster_client.program("kubectl")
    processes: list[subprocess.Popen[str]] = []

    def run(*words: str) -> "subprocess.Popen[str]":
        arguments = [program, "--kubeconfig", str(control_plane), "--namespace", team.namespace, *words]
        processes.append(subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        return processes[-1]

    yield run
    for process in processes:
        process.kill()
        process.communicate()


def _read_until(process: "subprocess.Popen[str]", word: str) -> list[str]:
    """Return the lines up to the one that has a word; pytest's timeout ends it when none has."""
    lines: list[str] = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line.rstrip())
        if word in line:
            return lines
    raise AssertionError(f"{word} never came: {lines}")


def _without_repetition(words: list[str]) -> list[str]:
    return [word for index, word in enumerate(words) if index == 0 or words[index - 1] != word]


def test_kubectl_tells_the_life_of_a_job(team: Any, operator: Any, start: Start, until: Any) -> None:
    operator.start()
    team.apply()
    team.wait("Unschedulable")
    watching = start("get", "ftj", "emoji", "--watch")
    head = _read_until(watching, "Unschedulable")
    waiting = start("wait", "--for=condition=Complete", "--timeout=300s", "ftj/emoji")
    pod = team.wait_for_pod()
    team.run_pod(pod)
    team.wait("Running")
    early = waiting.poll()
    team.end_pod(pod, message=json.dumps(PUBLISHED))
    told = waiting.communicate(timeout=300)[0]
    rows = [line.split() for line in (*head[1:], *_read_until(watching, "Complete"))]
    until(lambda: ("Normal", "Complete") in team.events(), what="the event of the end")
    described = start("describe", "ftj", "emoji").communicate(timeout=300)[0]

    assert early is None, "it does not end before the job is complete"
    assert (0, "finetunejob.finetune.dev/emoji condition met\n") == (waiting.returncode, told)
    assert ["NAME", "STATE", "PROGRESS", "ETA", "METRIC", "AGE"] == head[0].split()
    assert ["Unschedulable", "Running", "Complete"] == _without_repetition([row[1] for row in rows])
    assert ["emoji", "Complete", "100", "0", "test_accuracy=0.81"] == rows[-1][:5]
    _check_description(described)


def _check_description(text: str) -> None:
    status, _, events = text.partition("\nEvents:")
    rows = [line.split(maxsplit=4) for line in events.splitlines()[3:] if line.strip()]

    assert re.search(r"Observed Generation: +1\n", status)
    assert "the model is in pvc://models/emoji" in status
    assert {"Unschedulable", "Running", "Complete"} <= {row[1] for row in rows}
    assert {"finetune.dev/operator"} == {row[3] for row in rows}
    assert {"Normal", "Warning"} == {row[0] for row in rows}
    assert "<unknown>" not in events


def test_kubectl_wait_ends_when_a_job_fails(team: Any, operator: Any, start: Start) -> None:
    operator.start()
    team.apply(runPolicy={"backoffLimit": 0})
    waiting = start("wait", "--for=condition=Failed", "--timeout=300s", "ftj/emoji")
    pod = team.wait_for_pod()
    team.end_pod(pod, 1, message="no")
    told = waiting.communicate(timeout=300)[0]
    shown = start("get", "ftj", "emoji", "--no-headers").communicate(timeout=300)[0]
    path = "jsonpath={.status.failure.reason}"
    cause = start("get", "ftj", "emoji", "--output", path).communicate(timeout=300)[0]

    assert (0, "finetunejob.finetune.dev/emoji condition met\n") == (waiting.returncode, told)
    assert ["emoji", "Failed"] == shown.split()[:2]
    assert "TrainerError" == cause


def test_events_tell_transitions_alone(team: Any, operator: Any, until: Any) -> None:
    operator.start()
    team.apply()
    pod = team.wait_for_pod()
    team.run_pod(pod)
    team.wait("Running")
    operator.stop()
    operator.start()
    team.end_pod(pod, message=json.dumps(PUBLISHED))
    team.wait("Complete")
    until(lambda: ("Normal", "Complete") in team.events(), what="the event of the end")
    items = team.api.get(team.path("events"))["items"]
    mine = [each for each in items if each["regarding"]["kind"] == "FineTuneJob"]
    reasons = [each["reason"] for each in mine]

    assert set(reasons) <= {"Pending", "Unschedulable", "Running", "Complete"}
    assert (1, 1) == (reasons.count("Running"), reasons.count("Complete"))
    assert not [each for each in mine if each.get("series")], "nothing has repeated"
    assert {"finetune.dev/operator"} == {each["reportingController"] for each in mine}

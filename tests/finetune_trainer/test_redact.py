"""Secrets of the environment stay out of logs, tracebacks, reports and last words."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from finetune_api import names
from finetune_api.contract import ExitCode, FailureReport, TrainerReport
from finetune_api.v1alpha1 import Result, ResultMetric, TrainerStatus
from finetune_trainer.redact import build_redact, redact_report

_CANARY = "canary-7f3a9c/+='x"
_PLAIN = "canary-7f3a9c"


@pytest.mark.parametrize(
    "name",
    ["AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "DB_PASSWORD", "passwd", "GIT_CREDENTIALS", "AWS_ACCESS_KEY_ID", "HTTP_AUTH"],
)
def test_value_of_a_secret_variable_is_redacted(name: str) -> None:
    assert "a [redacted] b" == build_redact({name: "hunter22"})("a hunter22 b")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param("HF_TOKEN", "short", id="a short value"),
        pytest.param("AWS_ENDPOINT_URL", "https://store", id="another name"),
        pytest.param("AWS_WEB_IDENTITY_TOKEN_FILE", "/var/run/token", id="a path"),
        pytest.param(names.ENV_REPORT_TOKEN, names.REPORT_TOKEN_FILE, id="the path of the report token"),
    ],
)
def test_what_is_no_secret_stays(name: str, value: str) -> None:
    assert value == build_redact({name: value})(value)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(_CANARY, id="as it is"),
        pytest.param("https://store/?key=canary-7f3a9c%2F%2B%3D%27x&more", id="in a URL"),
        pytest.param(repr(OSError(f"no '{_CANARY}' and \"more\"")), id="in the text of an error"),
    ],
)
def test_secret_is_found_in_other_forms(text: str) -> None:
    assert _PLAIN not in build_redact({"HF_TOKEN": f"{_CANARY}\n"})(text)


def test_every_line_of_a_long_secret_is_redacted() -> None:
    redact = build_redact({"TLS_KEY": "first-line\nsecond-line\n"})

    assert "[redacted] and [redacted]" == redact("second-line and first-line")


def test_of_two_secrets_the_longer_one_goes_first() -> None:
    assert "[redacted]" == build_redact({"A_TOKEN": "abcdef", "B_TOKEN": "abcdefgh"})("abcdefgh")


def test_reports_hold_no_secret() -> None:
    result = Result(candidate="probe", metrics=(ResultMetric(name="loss", value="0.1"),), warnings=(f"skipped {_CANARY}",))
    failure = FailureReport(reason="InvalidData", message=f"no {_CANARY}")
    report = TrainerReport(trainer_status=TrainerStatus(), failure=failure, log_tail=_CANARY, result=result)

    redacted = redact_report(report, build_redact({"HF_TOKEN": _CANARY}))

    assert _PLAIN not in redacted.model_dump_json()
    assert redacted.result
    assert "probe" == redacted.result.candidate


def _run(*command: str, folder: Path, **environment: str) -> tuple[int, str, str]:
    """Run a program as a pod does; return its exit code, all that it printed, and its last word."""
    last = folder / "termination-log"
    last.touch()
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("FINETUNE_", "KUBEFLOW_"))}  # noqa: TID251
    result = subprocess.run(
        [sys.executable, *command], env=clean | environment, capture_output=True, text=True, check=False, timeout=300
    )
    return result.returncode, result.stdout + result.stderr, last.read_text()


_CAUSES = [
    pytest.param("absent", "DatasetNotFound", ExitCode.INVALID_DATA, id="an error of the trainer's own"),
    pytest.param("x" * 300, "InternalError", ExitCode.INTERNAL_ERROR, id="a bug"),
]


@pytest.mark.parametrize(("name", "reason", "code"), _CAUSES)
def test_failing_trainer_tells_no_secret(make_config: Any, tmp_path: Path, name: str, reason: str, code: int) -> None:
    # The operating system refuses so long a name with an error that the trainer does not expect.
    (tmp_path / _PLAIN).mkdir()
    config = make_config(tmp_path / _PLAIN / name)
    words = ("-m", "finetune_trainer", "--termination-message-file", str(tmp_path / "termination-log"))
    environment = {names.ENV_TRAINER_CONFIG: config.model_dump_json(by_alias=True)}

    actual, output, last = _run(*words, folder=tmp_path, **environment, HF_TOKEN=_PLAIN)

    report = TrainerReport.model_validate_json(last)
    assert (code, reason) == (actual, report.failure.reason if report.failure else None), output
    assert report.failure
    assert "/[redacted]/" in report.failure.message
    assert "/[redacted]/" in output
    assert _PLAIN not in output + last
    assert (report.log_tail is not None) == (reason == "InternalError")


_PROGRAM = """
import logging, os, sys, threading, warnings
from finetune_trainer.redact import build_redact, redact_output
redact_output(build_redact(os.environ))
secret = os.environ["HF_TOKEN"]
print(secret)
logging.basicConfig(stream=sys.stderr)
logging.error("%s", secret)
warnings.warn(secret)
thread = threading.Thread(target=lambda: 1 / len({}[secret]))
thread.start()
thread.join()
raise RuntimeError(f"no {secret}")
"""


def test_nothing_that_python_prints_holds_a_secret(tmp_path: Path) -> None:
    code, output, _ = _run("-c", _PROGRAM, folder=tmp_path, HF_TOKEN=_CANARY)

    assert 1 == code
    assert _PLAIN not in output
    assert 5 <= output.count("[redacted]")
    assert "RuntimeError: no [redacted]" in output

"""kubectl against the tests' control plane."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

_ROOT = Path(__file__).resolve().parents[2]

Kubectl = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def kubectl(control_plane: Path, api: Any) -> Kubectl:
    """Run kubectl as the administrator; the result is returned whatever the exit status."""
    command = [sys.executable, str(_ROOT / "hack" / "cluster"), "path", "kubectl"]
    program = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def run(*words: str, stdin: str = "") -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [program, "--kubeconfig", str(control_plane), *words], input=stdin, capture_output=True, text=True, check=False
        )

    # kubectl reads the OpenAPI document, which the API server publishes some time after a CRD is established.
    deadline = time.monotonic() + 30
    while (explained := run("explain", "finetunejobs")).returncode:
        assert time.monotonic() < deadline, explained.stderr
        time.sleep(0.1)
    return run

"""kubectl against the tests' control plane."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cluster_client
import pytest

Kubectl = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def kubectl(control_plane: Path, api: Any) -> Kubectl:
    """Run kubectl as the administrator; the result is returned whatever the exit status."""
    program = cluster_client.program("kubectl")

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

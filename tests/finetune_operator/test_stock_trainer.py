"""An unmodified script with Hugging Face's Trainer, run as in a trainer's pod, reports to the operator by itself."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.apiserver

_SCRIPT = Path(__file__).parent / "scripts" / "stock_trainer.py"
# More than any machine does in the time of the test, which ends the training itself.
_STEPS = 1_000_000


@contextmanager
def _run_script(team: Any, pod: dict[str, Any], folder: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Run the script with the environment of the pod's container, and with its mounts in a folder."""
    mounts = folder / "mounts"
    mounts.mkdir()
    (mounts / "token").write_text(team.create_token(pod), encoding="ascii")
    (mounts / "ca.crt").write_text(pod["metadata"]["annotations"]["finetune.dev/ca.crt"], encoding="ascii")
    container = pod["spec"]["containers"][0]
    mount = next(each["mountPath"] for each in container["volumeMounts"] if each["name"] == "report")
    environment = {each["name"]: each["value"].replace(mount, str(mounts)) for each in container["env"] if "value" in each}
    environment |= {"PATH": os.environ["PATH"], "HOME": str(folder), "OMP_NUM_THREADS": "1"}  # noqa: TID251
    command = [sys.executable, str(_SCRIPT), str(folder / "model"), "--steps", str(_STEPS)]
    with (folder / "script.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait(30)


def test_stock_hugging_face_script_reports_with_no_code_for_us(team: Any, operator: Any, tmp_path: Path, until: Any) -> None:
    operator.start()
    team.apply()
    pod = team.wait_for_pod()
    team.run_pod(pod)
    team.wait("Running")

    with _run_script(team, pod, tmp_path) as process:

        def find_progress() -> dict[str, Any]:
            assert process.poll() in (None, 0), (tmp_path / "script.log").read_text(encoding="utf-8")
            status = dict(team.status()["trainerStatus"])
            shown = {each["name"]: each["value"] for each in status["metrics"]}
            assert {"current_step", "total_steps", "loss"} <= shown.keys()
            assert status["estimatedRemainingSeconds"] >= 0
            return status | {"metrics": shown}

        during = until(find_progress, what="the script's steps, metrics and remaining time are shown", seconds=240)
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / "stop").touch()
        until(lambda: process.poll() == 0, what="the script ends", seconds=240)
    after = until(lambda: team.status()["trainerStatus"].get("progressPercentage") == 100, what="the last report is shown")

    assert 0 <= during["progressPercentage"] <= 99
    assert 0 < int(during["metrics"]["current_step"]) < int(during["metrics"]["total_steps"]) == _STEPS
    assert float(during["metrics"]["loss"]) > 0
    assert "learning_rate" in during["metrics"]
    assert after
    assert 'result="accepted"' in operator.scrape()
    assert team.state() == "Running"

"""An unmodified script with Hugging Face's Trainer in a pod of a FineTuneJob: its status tells of it with no code for us."""

import io
import json
import re
import tarfile
from collections.abc import Iterator
from importlib.metadata import distribution
from typing import Any

import cluster_client
import pytest
from finetune_api import names
from localcluster.containers import ctr
from localcluster.images import image_reference
from localcluster.oci import import_on_top
from localcluster.shell import try_run

pytestmark = [pytest.mark.node, pytest.mark.slow]

_SCRIPT = cluster_client.ROOT / "tests" / "finetune_operator" / "scripts" / "stock_trainer.py"
_IMAGE = "docker.io/library/finetune-stock-script:1"
_NAME = "stock-script"
# What transformers needs and the trainer's image does not have, in whose folder of packages they go; both have Python 3.11.
_PACKAGES = ("transformers", "tokenizers", "accelerate", "regex", "psutil")
_FOLDER = "opt/app"
# More than any machine does in the time of the test, which ends the training itself.
_STEPS = 1_000_000


@pytest.fixture(scope="module")
def profile(node: None) -> Iterator[str]:
    """A profile whose image is the trainer's, with transformers and the script, which is all that it starts."""
    entrypoint = ("python", f"/{_FOLDER}/{_SCRIPT.name}", f"{names.OUTPUT_MOUNT}/{_NAME}", "--steps", str(_STEPS))
    import_on_top(pack_script(), base=image_reference(cluster_client.ROOT, "trainer"), entrypoint=entrypoint, reference=_IMAGE)
    manifest = {
        "apiVersion": names.API_VERSION,
        "kind": names.PROFILE_KIND,
        "metadata": {"name": _NAME},
        "spec": {"image": _IMAGE},
    }
    cluster_client.kubectl("apply", "-f", "-", stdin=json.dumps(manifest))
    yield _NAME
    cluster_client.kubectl("delete", names.PROFILE_SINGULAR, _NAME)
    try_run([*ctr(), "images", "remove", _IMAGE])


def pack_script() -> bytes:
    """Return a layer with the script as it lies in the repository, and the packages of the tests' own environment."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.add(_SCRIPT, arcname=f"{_FOLDER}/{_SCRIPT.name}", filter=_give_to_root)
        for file in (file for package in _PACKAGES for file in distribution(package).files or ()):
            # Programs go elsewhere, by a path with dots.
            if ".." not in file.parts and "__pycache__" not in file.parts:
                archive.add(file.locate(), arcname=f"{_FOLDER}/{file}", filter=_give_to_root)
    return buffer.getvalue()


def _give_to_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid, member.gid, member.mode = 0, 0, 0o644
    return member


def test_a_stock_hugging_face_script_in_a_pod_reports_with_no_code_for_us(team: Any, profile: str, until: Any) -> None:
    team.apply(_NAME, profileRef={"name": profile}, resources={"cpu": "900m", "memory": "2Gi"}, runPolicy={"backoffLimit": 0})
    team.wait(_NAME, "Running")

    during = until(lambda: find_progress(team), what="all is shown", timeout_seconds=180, explain=lambda: explain(team))
    row = team.kubectl("get", "ftj", _NAME).strip().splitlines()[-1]
    (pod,) = team.get("pods", "-l", f"{names.LABEL_JOB}={_NAME}")["items"]
    (container,) = pod["spec"]["containers"]
    (team.models / _NAME / "stop").touch()
    team.wait(_NAME, "Failed")

    assert (_IMAGE, True) == (container["image"], container["securityContext"]["readOnlyRootFilesystem"])
    assert not {"command", "args"} & container.keys()
    assert 0 < int(during["current_step"]) < int(during["total_steps"]) == _STEPS
    assert float(during["loss"]) > 0
    assert re.match(rf"{_NAME} +Running +0 +[1-9]", row), row
    # The script ends well; a model of the operator's it cannot name, so the job is none that is complete.
    assert "ResultMissing" == team.job(_NAME)["status"]["failure"]["reason"]
    assert 100 == team.job(_NAME)["status"]["trainerStatus"]["progressPercentage"]


def find_progress(team: Any) -> dict[str, str] | None:
    """Return the metrics in the status once they are those that the script logs, and the remaining time is known."""
    status = team.job(_NAME)["status"].get("trainerStatus", {})
    shown = {each["name"]: each["value"] for each in status.get("metrics", [])}
    is_complete = {"current_step", "total_steps", "loss", "learning_rate"} <= shown.keys()
    return shown if is_complete and status.get("estimatedRemainingSeconds", 0) > 0 else None


def explain(team: Any) -> str:
    log = team.kubectl("logs", "-l", f"{names.LABEL_JOB}={_NAME}", "--tail=50")
    return f"{json.dumps(team.job(_NAME)['status'], indent=1)}\n{log}"

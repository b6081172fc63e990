"""What a cluster does to pods every day: the job goes on from its checkpoint and ends with the model it would have had."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cluster_client
import fsspec
import pytest
from localcluster.paths import Instance
from localcluster.processes import read_record, stop_process

pytestmark = [pytest.mark.node, pytest.mark.slow]

# The address of this machine in the network of the pods.
_GATEWAY = "10.88.0.1"
_CLUSTER = Instance(cluster_client.ROOT / ".local" / "clusters" / "main")
# In a process of its own, as containerd goes on for longer than this one.
_START_CONTAINERD = f"""
import sys
sys.path.insert(0, {str(cluster_client.ROOT / "hack" / "cluster")!r})
from pathlib import Path
from localcluster.containers import containerd_component
from localcluster.paths import Instance
from localcluster.processes import ensure_running
cluster = Instance(Path({str(_CLUSTER.folder)!r}))
ensure_running(cluster, containerd_component(cluster))
"""
# Long enough to be disturbed in the middle of fine-tuning.
_STEADY: dict[str, Any] = {
    "hyperparameters": {"maxSteps": 60, "imageSize": 64, "batchSize": 16},
    "checkpoint": {"intervalSeconds": 2},
    "runPolicy": {"backoffLimit": 2},
}


@pytest.fixture(scope="session")
def undisturbed(team: Any) -> list[dict[str, Any]]:
    """The metrics of a run that nothing disturbs."""
    team.apply("undisturbed", **_STEADY)
    assert "Complete" == team.wait("undisturbed", "Complete", "Failed")
    return read_metrics(team, "undisturbed")


def read_metrics(team: Any, name: str) -> list[dict[str, Any]]:
    return list(json.loads((team.models / name / "metrics.json").read_text(encoding="utf-8"))["metrics"])


def find_pod(team: Any, name: str) -> dict[str, Any]:
    """Return the newest pod of a job."""
    pods = team.get("pods", "-l", f"finetune.dev/job={name}")["items"]
    return max(pods, key=lambda pod: int(pod["metadata"]["labels"]["finetune.dev/attempt"]))


def find_trainer(pod: dict[str, Any]) -> int:
    """Return the process of a pod's trainer on this machine. Raises LookupError when it has ended."""
    marker = f"pod{pod['metadata']['uid']}"
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if marker in (folder / "cgroup").read_text() and b"finetune_trainer" in (folder / "cmdline").read_bytes():
                return int(folder.name)
        except OSError:  # the process has ended meanwhile
            continue
    raise LookupError(f"no process of pod {pod['metadata']['name']} runs")


def wait_for_checkpoint(team: Any, name: str, *, until: Callable[..., Any]) -> None:
    """Wait until the fine-tuning of a job has saved its state for the first time, in the middle of its steps."""
    folder = team.models / name / ".finetune" / "checkpoints"
    until(lambda: list(folder.glob("checkpoint-*-steps/manifest.json")), what=f"{name} has a checkpoint")


def delete_pod(team: Any, pod: dict[str, Any]) -> None:
    team.kubectl("delete", "pod", pod["metadata"]["name"], "--wait=false")


def evict_pod(team: Any, pod: dict[str, Any]) -> None:
    name = pod["metadata"]["name"]
    body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name, "namespace": team.name}}
    path = f"/api/v1/namespaces/{team.name}/pods/{name}/eviction"
    cluster_client.kubectl("create", "--raw", path, "-f", "-", stdin=json.dumps(body))


def kill_trainer(team: Any, pod: dict[str, Any]) -> None:
    os.kill(find_trainer(pod), signal.SIGKILL)


@pytest.mark.parametrize(
    ("disturb", "reason", "num_counted"),
    [
        pytest.param(delete_pod, "PodDeleted", 0, id="pod deleted"),
        pytest.param(evict_pod, "Evicted", 0, id="pod evicted"),
        pytest.param(kill_trainer, "Killed", 1, id="trainer killed"),
    ],
)
def test_a_disturbed_job_goes_on_and_ends_with_the_same_metrics(
    team: Any, undisturbed: list[dict[str, Any]], until: Any, disturb: Any, reason: str, num_counted: int
) -> None:
    name = f"disturbed-{reason.lower()}"
    team.apply(name, **_STEADY)
    team.wait(name, "Running")
    wait_for_checkpoint(team, name, until=until)

    disturb(team, find_pod(team, name))

    until(lambda: team.job(name)["status"]["restarts"] == 1, what="the restart")
    assert "Complete" == team.wait(name, "Complete", "Failed")
    status = team.job(name)["status"]
    restart = status["restartHistory"][-1]
    assert (reason, bool(num_counted)) == (restart["reason"], restart["counted"])
    assert (1, num_counted, 2) == (status["restarts"], status["restartsCountedTowardsLimit"], status["attempt"])
    assert 2 == status["checkpoint"]["attempt"]
    # SIGTERM saves, SIGKILL costs at most what the interval and a busy machine leave between two checkpoints.
    assert restart["lostSeconds"] <= (2 if num_counted == 0 else 15)
    assert undisturbed == read_metrics(team, name)


def test_a_job_goes_on_from_checkpoints_in_an_object_store(
    team: Any, undisturbed: list[dict[str, Any]], until: Any, start_s3: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "canary-of-the-store", "AWS_DEFAULT_REGION": "us-east-1"}
    access = {**keys, "AWS_ENDPOINT_URL": start_s3(_GATEWAY)}
    for name, value in access.items():
        monkeypatch.setenv(name, value)
    store = fsspec.filesystem("s3", use_listings_cache=False, skip_instance_cache=True)
    store.mkdir("states")
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "store"}, "stringData": access}
    team.kubectl("apply", "-f", "-", stdin=json.dumps(secret))
    place = {"uri": "s3://states/stored", "secretRef": {"name": "store"}, "intervalSeconds": 2}
    team.apply("stored", **_STEADY | {"checkpoint": place})
    team.wait("stored", "Running")
    until(lambda: store.glob("states/stored/checkpoint-*-steps/manifest.json"), what="a checkpoint is in the store")

    delete_pod(team, find_pod(team, "stored"))

    until(lambda: team.job("stored")["status"]["restarts"] == 1, what="the restart")
    assert "Complete" == team.wait("stored", "Complete", "Failed")
    assert "going on from checkpoint-" in team.kubectl("logs", find_pod(team, "stored")["metadata"]["name"])
    assert undisturbed == read_metrics(team, "stored")
    assert "canary-of-the-store" not in team.kubectl("get", "ftj,jobs,pods,events", "-o", "yaml")


def kill_kubelet() -> None:
    record = read_record(_CLUSTER, "kubelet")
    assert record is not None
    os.kill(record.pid, signal.SIGKILL)
    time.sleep(3)
    cluster_client.cluster("up")


def restart_containerd() -> None:
    record = read_record(_CLUSTER, "containerd")
    assert record is not None
    stop_process(record)
    # Not by `up`, which takes a node without containerd for a dead one and clears it away.
    subprocess.run([sys.executable, "-c", _START_CONTAINERD], check=True)


@pytest.mark.parametrize(
    "disturb", [pytest.param(kill_kubelet, id="kubelet killed"), pytest.param(restart_containerd, id="containerd restarted")]
)
def test_a_restarted_node_agent_does_not_disturb_the_trainer(
    team: Any, undisturbed: list[dict[str, Any]], until: Any, disturb: Callable[[], None]
) -> None:
    name = disturb.__name__.replace("_", "-")
    team.apply(name, **_STEADY)
    team.wait(name, "Running")
    wait_for_checkpoint(team, name, until=until)

    disturb()

    assert "Complete" == team.wait(name, "Complete", "Failed")
    status = team.job(name)["status"]
    assert (0, 1) == (status["restarts"], status["attempt"])
    assert undisturbed == read_metrics(team, name)


def test_suspend_keeps_the_progress_and_resume_ends_with_the_same_metrics(
    team: Any, undisturbed: list[dict[str, Any]], until: Any
) -> None:
    team.apply("paused", **_STEADY)
    team.wait("paused", "Running")
    wait_for_checkpoint(team, "paused", until=until)

    team.kubectl("patch", "ftj", "paused", "--type=merge", "-p", '{"spec":{"suspend":true}}')
    team.wait("paused", "Suspended")
    suspended = team.job("paused")["status"]
    assert [] == team.get("pods", "-l", "finetune.dev/job=paused")["items"]
    assert suspended["checkpoint"]["step"] > 0
    assert suspended["activeSeconds"] > 0
    assert suspended.get("lostSeconds", 0) <= 2

    team.kubectl("patch", "ftj", "paused", "--type=merge", "-p", '{"spec":{"suspend":false}}')
    assert "Complete" == team.wait("paused", "Complete", "Failed")
    assert undisturbed == read_metrics(team, "paused")


def test_the_active_deadline_saves_before_it_fails(team: Any, until: Any) -> None:
    endless = _STEADY["hyperparameters"] | {"maxSteps": 5000}
    team.apply("late", **_STEADY | {"hyperparameters": endless, "runPolicy": {"activeDeadlineSeconds": 30}})

    team.wait("late", "Failed")

    status = team.job("late")["status"]
    assert "DeadlineExceeded" == team.condition("late", "Failed")["reason"]
    assert 30 <= status["activeSeconds"] <= 45
    assert status["checkpoint"]["step"] > 0
    until(lambda: not team.get("jobs,pods", "-l", "finetune.dev/job=late")["items"], what="nothing is left running")


def test_children_go_after_their_time_and_the_job_stays(team: Any, until: Any) -> None:
    policy = {"backoffLimit": 0, "ttlSecondsAfterFinished": 3}
    team.apply("brief", dataset={"uri": "pvc://datasets/none-such"}, runPolicy=policy)
    team.wait("brief", "Failed")

    until(lambda: not team.get("jobs,pods", "-l", "finetune.dev/job=brief")["items"], what="the children are gone")

    time.sleep(3)
    assert "Failed" == team.state("brief")
    assert [] == team.get("jobs", "-l", "finetune.dev/job=brief")["items"]


@pytest.mark.faults
def test_a_lost_node_costs_no_retry(team: Any, undisturbed: list[dict[str, Any]], until: Any) -> None:
    team.apply("stranded", **_STEADY)
    team.wait("stranded", "Running")
    wait_for_checkpoint(team, "stranded", until=until)
    record = read_record(_CLUSTER, "kubelet")
    assert record is not None

    os.kill(record.pid, signal.SIGKILL)
    os.kill(find_trainer(find_pod(team, "stranded")), signal.SIGKILL)
    cluster_client.kubectl("delete", "node", "--all")
    until(
        # The operator goes on without a kubelet for a while, and may have made the next one.
        lambda: not team.get("pods", "-l", "finetune.dev/job=stranded,finetune.dev/attempt=1")["items"],
        what="the pod of the lost node is collected",
        timeout_seconds=180,
    )
    cluster_client.cluster("up")

    until(lambda: team.job("stranded")["status"]["restarts"] == 1, what="the restart", timeout_seconds=180)
    assert "Complete" == team.wait("stranded", "Complete", "Failed")
    restart = team.job("stranded")["status"]["restartHistory"][-1]
    # With its only node, the operator was gone as well, and saw no more of the pod than that it is missing.
    assert restart["reason"] in ("NodeLost", "PodLost")
    assert not restart["counted"]
    assert undisturbed == read_metrics(team, "stranded")


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(5))
def test_ten_random_disturbances_change_nothing(team: Any, undisturbed: list[dict[str, Any]], until: Any, seed: int) -> None:
    name, chance = f"random-{seed}", random.Random(seed)
    # So that the first one always finds it at work, on a fast machine too.
    longest = 0.7 * team.job("undisturbed")["status"]["activeSeconds"]
    team.apply(name, **_STEADY | {"runPolicy": {"backoffLimit": 20}})

    for number in (1, 2):
        team.wait(name, "Running", "Complete")
        time.sleep(chance.uniform(0, longest))
        if team.state(name) != "Running":
            break
        with contextlib.suppress(LookupError):  # it ends by itself at this moment
            chance.choice((delete_pod, evict_pod, kill_trainer))(team, find_pod(team, name))
        until(
            lambda number=number: team.job(name)["status"]["restarts"] == number or team.state(name) == "Complete",
            what="the restart",
        )

    assert "Complete" == team.wait(name, "Complete", "Failed")
    assert team.job(name)["status"]["restarts"] >= 1
    assert undisturbed == read_metrics(team, name)

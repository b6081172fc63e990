"""The life of a FineTuneJob on a real node: kubelet, containerd, real images, real pictures and a real pretrained model."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cluster_client
import pytest
import yaml

pytestmark = [pytest.mark.node, pytest.mark.slow]

# The longest training that these tests ask for; more only means that a broken suspend cannot end by itself.
_LONG = {"maxSteps": 2000, "imageSize": 64, "batchSize": 16}


@pytest.fixture(scope="session")
def complete(team: Any) -> dict[str, Any]:
    """A job that ran to Complete, with its manifest."""
    manifest: dict[str, Any] = team.apply("complete")
    team.wait("complete", "Complete", "Failed")
    return manifest


def test_the_job_completes_and_its_status_tells_the_model(team: Any, complete: dict[str, Any]) -> None:
    status = team.job("complete")["status"]
    folder = team.models / "complete"
    manifest = (folder / "manifest.json").read_bytes()

    assert "Complete" == team.state("complete")
    assert f"sha256:{hashlib.sha256(manifest).hexdigest()}" == status["output"]["digest"]
    assert (folder / "COMPLETE").exists()
    assert "test_accuracy" in {metric["name"] for metric in status["result"]["metrics"]}
    assert status["startTime"] < status["completionTime"]
    assert (1, 0) == (status["attempt"], status["restarts"])


def test_the_columns_show_state_progress_and_metric(team: Any, complete: dict[str, Any]) -> None:
    header, row = team.kubectl("get", "ftj", "complete").strip().splitlines()

    assert ["NAME", "STATE", "PROGRESS", "ETA", "METRIC", "AGE"] == header.split()
    assert ["complete", "Complete", "100", "0"] == row.split()[:4]
    assert row.split()[4].startswith("test_accuracy=")


def test_progress_is_reported_while_a_job_runs(team: Any, until: Any) -> None:
    team.apply("reported", hyperparameters=_LONG)
    team.wait("reported", "Running")

    # Past 20 % the fine-tuning has begun; only reports tell of it, as the last word comes when the pod ends.
    until(lambda: team.job("reported")["status"].get("trainerStatus", {}).get("progressPercentage", 0) >= 20, what="progress")
    until(lambda: count_reports("accepted") > 0, what="a report is counted")

    assert "Running" == team.state("reported")
    team.kubectl("delete", "ftj", "reported", "--wait=false")


def count_reports(result: str) -> float:
    """Return the number of reports with a result since the operator has started."""
    metrics = cluster_client.kubectl(
        "get", "--raw", "/api/v1/namespaces/finetune/services/http:finetune-operator-metrics:8080/proxy/metrics"
    )
    lines = [line for line in metrics.splitlines() if line.startswith("finetune_reports_") and f'"{result}"' in line]
    return float(lines[0].split()[-1]) if lines else 0.0


def test_events_tell_the_transitions(team: Any, complete: dict[str, Any]) -> None:
    events = team.get("events.events.k8s.io")["items"]

    reasons = [each["reason"] for each in events if each["regarding"]["name"] == "complete"]
    assert {"Pending", "Running", "Complete"} <= set(reasons)


def test_applying_the_same_manifest_again_writes_nothing(team: Any, complete: dict[str, Any]) -> None:
    before = team.job("complete")["metadata"]["resourceVersion"]

    team.kubectl("apply", "-f", "-", stdin=json.dumps(complete))

    assert before == team.job("complete")["metadata"]["resourceVersion"]


def test_the_trainer_pod_has_no_token_for_the_api_server(team: Any, complete: dict[str, Any]) -> None:
    pods = team.get("pods", "-l", "finetune.dev/job=complete")["items"]

    paths = [mount["mountPath"] for pod in pods for mount in pod["spec"]["containers"][0]["volumeMounts"]]
    assert paths
    assert "/var/run/secrets/kubernetes.io/serviceaccount" not in paths


def test_the_same_job_gives_the_same_metrics_without_a_cluster(
    team: Any, complete: dict[str, Any], pictures: Path, tmp_path: Path
) -> None:
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(complete), encoding="utf-8")
    trainer = Path(sys.executable).with_name("finetune-trainer")

    # The pod has 900m of CPU, so one thread; the sums of floating point numbers depend on that.
    one_cpu = {min(os.sched_getaffinity(0))}
    subprocess.run(
        [str(trainer), "run", str(tmp_path / "job.yaml"), "--data", str(pictures), "--output", str(tmp_path / "model")],
        check=True,
        preexec_fn=lambda: os.sched_setaffinity(0, one_cpu),
    )

    here = json.loads((tmp_path / "model" / "metrics.json").read_text(encoding="utf-8"))
    there = json.loads((team.models / "complete" / "metrics.json").read_text(encoding="utf-8"))
    assert there["metrics"] == here["metrics"]


def test_suspend_frees_the_pods_and_resume_goes_on(team: Any) -> None:
    team.apply("suspended", hyperparameters=_LONG)
    team.wait("suspended", "Running")

    team.kubectl("patch", "ftj", "suspended", "--type=merge", "-p", '{"spec":{"suspend":true}}')
    team.wait("suspended", "Suspended")
    assert [] == team.get("pods", "-l", "finetune.dev/job=suspended")["items"]

    team.kubectl("patch", "ftj", "suspended", "--type=merge", "-p", '{"spec":{"suspend":false}}')
    team.wait("suspended", "Running")
    status = team.job("suspended")["status"]
    team.kubectl("delete", "ftj", "suspended", "--wait=false")
    assert (2, 0) == (status["attempt"], status["restarts"])


def test_a_job_created_suspended_starts_when_it_is_resumed(team: Any) -> None:
    team.apply("held", suspend=True)
    team.wait("held", "Suspended")

    team.kubectl("patch", "ftj", "held", "--type=merge", "-p", '{"spec":{"suspend":false}}')

    team.wait("held", "Complete", "Failed")
    assert "Complete" == team.state("held")


def test_a_lost_pod_is_retried_and_the_job_completes(team: Any) -> None:
    team.apply("lost")
    team.wait("lost", "Running")

    team.kubectl("delete", "pod", "-l", "finetune.dev/job=lost", "--grace-period=0", "--force")
    team.wait("lost", "Complete", "Failed")

    status = team.job("lost")["status"]
    assert ("Complete", 2, 1) == (team.state("lost"), status["attempt"], status["restarts"])


def test_too_little_memory_fails_with_the_cause_and_more_memory_mends_it(team: Any) -> None:
    # Enough for the imports, and less than half of what the first batch takes: with a limit that the imports alone come close
    # to, the kernel reads the libraries again and again instead of killing the process.
    team.apply(
        "small",
        method={"type": "probe"},
        hyperparameters={"imageSize": 320},
        resources={"cpu": "400m", "memory": "700Mi"},
    )
    team.wait("small", "Failed")

    failure = team.job("small")["status"]["failure"]
    assert ("OOMKilled", 137, "trainer") == (failure["reason"], failure["exitCode"], failure["container"])
    assert "True" == team.condition("small", "Stalled")["status"]
    assert 1 == team.job("small")["status"]["restarts"]

    team.kubectl("patch", "ftj", "small", "--type=merge", "-p", '{"spec":{"resources":{"cpu":"900m","memory":"3Gi"}}}')
    team.wait("small", "Running")
    assert "Complete" == team.wait("small", "Complete", "Failed")


@pytest.fixture(scope="session")
def wrong(team: Any) -> Iterator[Any]:
    """Jobs with one mistake each, applied together."""
    good = team.datasets / "pictures"
    (team.datasets / "nothing" / "cat").mkdir(parents=True, exist_ok=True)
    classes = sorted(path for path in good.iterdir() if path.is_dir())
    shutil.copytree(classes[0], team.datasets / "one" / "only", dirs_exist_ok=True)
    shutil.copytree(good, team.datasets / "corrupt", dirs_exist_ok=True)
    (team.datasets / "corrupt" / classes[0].name / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n no picture")
    locked = team.models / "locked"
    locked.mkdir(exist_ok=True)
    os.chown(locked, 0, 0)
    locked.chmod(0o555)
    small = {"cpu": "300m", "memory": "2Gi"}
    team.apply("no-claim", dataset={"uri": "pvc://missing/pictures"}, resources=small)
    team.apply("no-model", model={"uri": "timm://no_such_model"}, resources=small)
    team.apply("no-weights", model={"uri": "pvc://models/nothing-here"}, resources=small)
    team.apply("no-pictures", dataset={"uri": "pvc://datasets/nothing"}, resources=small)
    team.apply("one-class", dataset={"uri": "pvc://datasets/one"}, resources=small)
    team.apply("read-only", output={"uri": "pvc://models/locked"}, resources=small)
    team.apply("corrupt", dataset={"uri": "pvc://datasets/corrupt"}, method={"type": "probe"}, hyperparameters={"imageSize": 64})
    yield team
    locked.chmod(0o755)


@pytest.mark.parametrize(
    ("name", "code", "reason", "words"),
    [
        pytest.param("no-model", 78, "UnknownModel", ("no_such_model",), id="unknown timm model"),
        pytest.param("no-weights", 78, "ModelNotFound", ("nothing-here",), id="folder without a model"),
        pytest.param("no-pictures", 65, None, ("nothing",), id="no pictures"),
        pytest.param("one-class", 65, None, ("only",), id="one class only"),
        pytest.param("read-only", 64, "OutputNotWritable", ("65532",), id="output not writable"),
    ],
)
def test_a_wrong_input_fails_at_once_and_says_what_to_do(
    wrong: Any, name: str, code: int, reason: str | None, words: tuple[str, ...]
) -> None:
    wrong.wait(name, "Failed")

    failure = wrong.job(name)["status"]["failure"]
    assert (code, 0) == (failure["exitCode"], wrong.job(name)["status"]["restarts"])
    assert reason in (None, failure["reason"])
    assert all(word in failure["message"] for word in words), failure["message"]
    assert failure["message"] in wrong.condition(name, "Failed")["message"]


def test_a_missing_claim_is_shown_while_pending(wrong: Any) -> None:
    wrong.wait("no-claim", "ClaimNotFound")

    assert '"missing" not found' in wrong.condition("no-claim", "Ready")["message"]
    assert "False" == wrong.condition("no-claim", "Stalled")["status"]


def test_one_corrupt_picture_is_reported_and_the_job_completes(wrong: Any) -> None:
    wrong.wait("corrupt", "Complete", "Failed")

    assert "Complete" == wrong.state("corrupt")
    assert any("broken.png" in warning for warning in wrong.job("corrupt")["status"]["result"]["warnings"])


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        pytest.param({"task": "speech"}, ("spec.task", "image-classification"), id="unknown task"),
        pytest.param({"budget": {"trainingSeconds": 0}}, ("spec.budget.trainingSeconds", "10"), id="budget 0"),
    ],
)
def test_an_impossible_spec_is_refused_at_apply(team: Any, spec: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(cluster_client.CommandError) as refusal:
        team.apply("refused", **spec)

    assert all(word in str(refusal.value) for word in words)


def test_deleting_a_job_removes_everything_even_without_the_operator(team: Any) -> None:
    team.apply("deleted", hyperparameters=_LONG)
    team.wait("deleted", "Running")
    scale = ("-n", "finetune", "scale", "deployment", "finetune-operator")
    cluster_client.kubectl(*scale, "--replicas=0")
    try:
        team.kubectl("delete", "ftj", "deleted", "--cascade=foreground", "--timeout=120s")

        assert [] == team.get("jobs,pods", "-l", "finetune.dev/job=deleted")["items"]
    finally:
        cluster_client.kubectl(*scale, "--replicas=1")
        cluster_client.kubectl("-n", "finetune", "rollout", "status", "deployment", "finetune-operator", "--timeout=120s")

"""Many trainers report at once: real pods and tokens, a real API server, a real operator process."""

import json
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from harness import build_operator, grant_rights, write_kubeconfig

pytestmark = pytest.mark.apiserver

_NUM_TRAINERS = 30
_NUM_REPORTS = 20
_WRITES_PER_SECOND = 5


@dataclass(frozen=True)
class Trainer:
    """A trainer as far as the receiver can tell: where it reports, and the token of its pod."""

    job: str
    url: str
    token: str

    def post(self, context: ssl.SSLContext, percentage: int) -> int:
        body = json.dumps({"trainerStatus": {"progressPercentage": percentage}}).encode()
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url, body, headers), context=context, timeout=60) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            error.close()
            return error.code


def _start_trainers(team: Any, until: Any) -> list[Trainer]:
    """Have the operator and the Job controller make the pods, and show each as running."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: team.apply(f"job-{number:02d}"), range(_NUM_TRAINERS)))
        pods = until(lambda: pods if len(pods := team.pods()) == _NUM_TRAINERS else None, what="all pods are there", seconds=120)
        list(pool.map(team.run_pod, pods))
        tokens = list(pool.map(team.create_token, pods))
    until(lambda: _count_states(team)["Running"] == _NUM_TRAINERS, what="all run", seconds=120)
    trainers = []
    for pod, token in zip(pods, tokens, strict=True):
        environment = {each["name"]: each.get("value") for each in pod["spec"]["containers"][0]["env"]}
        job = pod["metadata"]["labels"]["finetune.dev/job"]
        trainers.append(Trainer(job, environment["KUBEFLOW_TRAINER_SERVER_URL"], token))
    return trainers


def _count_states(team: Any) -> Counter[str]:
    jobs = team.api.get(team.path("finetunejobs"))["items"]
    conditions = (each for job in jobs for each in job.get("status", {}).get("conditions", ()))
    return Counter(each["reason"] for each in conditions if each["type"] == "Ready")


def test_every_final_report_is_shown_and_writes_stay_below_their_limit(
    team: Any, tls: tuple[Path, Path], tmp_path: Path, until: Any, requests: Any
) -> None:
    grant_rights(team)
    write_kubeconfig(team, tmp_path / "kubeconfig")
    limits = {"progress_writes_per_second": str(_WRITES_PER_SECOND), "progress_seconds": "0.1"}
    operator = build_operator(team, tls=tls, folder=tmp_path, **limits)
    try:
        operator.start()
        trainers = _start_trainers(team, until)
        context = ssl.create_default_context(cafile=tls[0])
        begun_at = time.time()
        answers: Counter[int] = Counter()
        lock = threading.Lock()

        def report(trainer: Trainer) -> None:
            for percentage in (*range(_NUM_REPORTS - 1), 100):
                code = trainer.post(context, percentage)
                with lock:
                    answers[code] += 1

        with ThreadPoolExecutor(_NUM_TRAINERS) as pool:
            list(pool.map(report, trainers))
        until(lambda: _count_done(team) == _NUM_TRAINERS, what="every final report is shown", seconds=120)
        ended_at = time.time()
    finally:
        operator.stop()

    writes = _list_status_writes(requests(), team, begin=begun_at)
    assert answers == Counter({200: _NUM_TRAINERS * _NUM_REPORTS})
    # One more than the rate allows for what the bucket holds at first, and one for the edge of the span.
    assert _NUM_TRAINERS <= len(writes) <= _WRITES_PER_SECOND * (ended_at - begun_at) + 2


def _count_done(team: Any) -> int:
    jobs = team.api.get(team.path("finetunejobs"))["items"]
    return sum(job["status"].get("trainerStatus", {}).get("progressPercentage") == 100 for job in jobs)


def _list_status_writes(entries: list[dict[str, Any]], team: Any, *, begin: float) -> list[float]:
    user = f"system:serviceaccount:{team.namespace}:operator"
    mine = [
        each for each in entries if each["user"]["username"] == user and each.get("objectRef", {}).get("subresource") == "status"
    ]
    times = [datetime.fromisoformat(each["requestReceivedTimestamp"]).timestamp() for each in mine]
    return [each for each in times if each >= begin]

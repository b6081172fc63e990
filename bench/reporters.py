"""Fake trainers that report like real ones: with the token of a real pod object, to a real operator process."""

import asyncio
import base64
import contextlib
import json
import random
import ssl
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from bench.operator import FINETUNEJOBS, JOBS, NAMESPACE, Api, apply_all

PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
TOKENS = f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts/default/token"
SECONDS_BETWEEN_POSTS = 5.0
LAST_STEP = 1_000_000
"""The step of a final report, which no other one has."""


@dataclass
class Trainer:
    """One fake trainer: a real pod object's token, and what it has sent and has seen of it in the status."""

    job: str
    url: str
    ca: str
    token: str
    sent: dict[int, float] = field(default_factory=dict)
    """When each step was reported, for the last time."""
    shown: list[tuple[float, int]] = field(default_factory=list)
    """When the status began to show a step, and which."""


@dataclass
class Course:
    """What all trainers did."""

    trainers: Sequence[Trainer]
    seconds: float
    begun: float
    answers: Counter[int] = field(default_factory=Counter)
    post_seconds: list[float] = field(default_factory=list)
    """How long each report took until it was answered."""


def start_trainers(api: Api, *, number: int) -> list[Trainer]:
    """Have the operator and the Job controller make the pods, show them as running, and get a token for each."""
    print(f"starting {number} pods", file=sys.stderr)
    apply_all(api, number=number)
    while len(pods := api.request("GET", PODS)["items"]) < number:
        time.sleep(1)
    with ThreadPoolExecutor(16) as pool:
        trainers = list(pool.map(lambda pod: start_trainer(api, pod), pods))
    while sum(job.get("status", {}).get("active", 0) for job in api.request("GET", JOBS)["items"]) < number:
        time.sleep(1)
    while sum(is_running(job) for job in api.request("GET", FINETUNEJOBS)["items"]) < number:
        time.sleep(1)
    return trainers


def start_trainer(api: Api, pod: Any) -> Trainer:
    """Show a pod as running, as its kubelet would, and get the token that the kubelet would project into it."""
    name, uid = pod["metadata"]["name"], pod["metadata"]["uid"]
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    container = {"name": "trainer", "image": "trainer", "imageID": "", "ready": True, "restartCount": 0}
    container["state"] = {"running": {"startedAt": now}}
    pod["status"] |= {"phase": "Running", "startTime": now, "containerStatuses": [container]}
    # A scheduler that condemns the pod in the same moment does not matter: the write is repeated.
    pod["metadata"].pop("resourceVersion")
    api.request("PUT", f"{PODS}/{name}/status", pod)
    bound = {"apiVersion": "v1", "kind": "Pod", "name": name, "uid": uid}
    request = {"spec": {"audiences": ["finetune.dev/reports"], "expirationSeconds": 3600, "boundObjectRef": bound}}
    environment = {each["name"]: each.get("value") for each in pod["spec"]["containers"][0]["env"]}
    return Trainer(
        job=pod["metadata"]["labels"]["finetune.dev/job"],
        url=environment["KUBEFLOW_TRAINER_SERVER_URL"],
        ca=pod["metadata"]["annotations"]["finetune.dev/ca.crt"],
        token=api.request("POST", TOKENS, request)["status"]["token"],
    )


def is_running(job: Any) -> bool:
    """Return whether the operator has seen that the trainer runs."""
    conditions = job.get("status", {}).get("conditions", ())
    return any(each["type"] == "Ready" and each["reason"] == "Running" for each in conditions)


def report_all(kubeconfig: Path, trainers: Sequence[Trainer], *, seconds: float) -> Course:
    """Let all trainers report and watch what becomes of it, until every final report is shown or a minute has passed."""
    return asyncio.run(_report_all(*load_client(kubeconfig), trainers, seconds=seconds))


async def _report_all(server: str, credentials: ssl.SSLContext, trainers: Sequence[Trainer], *, seconds: float) -> Course:
    context = ssl.create_default_context(cadata=trainers[0].ca)
    # Trainers open a connection for each report, and so do these.
    connector = aiohttp.TCPConnector(ssl=context, force_close=True, limit=0)
    course = Course(trainers, seconds, time.monotonic())
    async with aiohttp.ClientSession(connector=connector) as session:
        shown = asyncio.Event()
        watching = asyncio.create_task(watch(server, credentials, course, shown=shown))
        await asyncio.gather(*(report(session, trainer, course) for trainer in trainers))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(shown.wait(), timeout=60)
        watching.cancel()
    return course


async def report(session: aiohttp.ClientSession, trainer: Trainer, course: Course) -> None:
    """Report a step every five seconds, and at the end the last one, which is tried again until it is accepted."""
    chance = random.Random(trainer.job)
    due = course.begun + chance.uniform(0, SECONDS_BETWEEN_POSTS)
    step = 0
    while due < course.begun + course.seconds:
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        step += 1
        await post(session, trainer, course, step=step, percentage=min(99, step))
        due += SECONDS_BETWEEN_POSTS
    for _ in range(5):
        if await post(session, trainer, course, step=LAST_STEP, percentage=100):
            return
        await asyncio.sleep(1)


async def post(session: aiohttp.ClientSession, trainer: Trainer, course: Course, *, step: int, percentage: int) -> bool:
    """Send one report with the body that Hugging Face's Trainer sends; return whether it was accepted."""
    values = {"loss": 1 / (1 + step), "learning_rate": 1e-5, "grad_norm": 0.5, "epoch": step / 10}
    values |= {"current_step": step, "total_steps": LAST_STEP, "current_epoch": step / 10}
    metrics = [{"name": name, "value": str(value)} for name, value in values.items()]
    body = {"trainerStatus": {"progressPercentage": percentage, "estimatedRemainingSeconds": 60, "metrics": metrics}}
    trainer.sent[step] = time.monotonic()
    headers = {"Authorization": f"Bearer {trainer.token}"}
    try:
        async with session.post(trainer.url, json=body, headers=headers, timeout=aiohttp.ClientTimeout(total=5)) as answer:
            course.answers[answer.status] += 1
            course.post_seconds.append(time.monotonic() - trainer.sent[step])
            return answer.status == 200
    except (aiohttp.ClientError, TimeoutError):
        course.answers[0] += 1
        return False


async def watch(server: str, credentials: ssl.SSLContext, course: Course, *, shown: asyncio.Event) -> None:
    """Note when the status of each FineTuneJob shows which step, and when all show the last one."""
    by_job = {trainer.job: trainer for trainer in course.trainers}
    timeout = aiohttp.ClientTimeout(total=None)
    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=credentials), timeout=timeout, read_bufsize=2**20) as session,
        session.get(f"{server}{FINETUNEJOBS}", params={"watch": "1"}) as stream,
    ):
        async for line in stream.content:
            found = json.loads(line)["object"]
            metrics = found.get("status", {}).get("trainerStatus", {}).get("metrics", ())
            step = next((int(each["value"]) for each in metrics if each["name"] == "current_step"), None)
            trainer = by_job[found["metadata"]["name"]]
            if step is not None and (not trainer.shown or trainer.shown[-1][1] != step):
                trainer.shown.append((time.monotonic(), step))
                if step == LAST_STEP and not count_lost(course):
                    shown.set()


def count_lost(course: Course) -> int:
    """Return the number of trainers whose final report the status does not show."""
    return sum(not trainer.shown or trainer.shown[-1][1] != LAST_STEP for trainer in course.trainers)


def load_client(kubeconfig: Path) -> tuple[str, ssl.SSLContext]:
    """Return the URL of the API server, and the administrator's credentials for it."""
    config = yaml.safe_load(kubeconfig.read_text(encoding="utf-8"))
    cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
    context = ssl.create_default_context(cadata=base64.b64decode(cluster["certificate-authority-data"]).decode())
    with tempfile.NamedTemporaryFile() as pair:
        pair.write(base64.b64decode(user["client-certificate-data"]) + base64.b64decode(user["client-key-data"]))
        pair.flush()
        context.load_cert_chain(pair.name)
    return cluster["server"], context

"""The progress receiver over real HTTPS, with a fake in the place of the API server's token review."""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from finetune_operator.errors import ApiError
from finetune_operator.metrics import Metrics
from finetune_operator.report_server import ReportServer
from finetune_operator.reports import ReportReceiver
from finetune_operator.store import Store
from finetune_operator.views import Key, Kind, Reviewed

_NOW = datetime(2026, 1, 1, tzinfo=UTC)
_BODY = {"trainerStatus": {"progressPercentage": 40, "metrics": [{"name": "loss", "value": "0.5"}]}, "extra": 1}
_PATH = "/apis/trainer.kubeflow.org/v1alpha1/namespaces/{}/trainjobs/{}/status"


@dataclass
class FakeReviewer:
    """Knows a few tokens, and counts how often it is asked."""

    owners: dict[str, Reviewed]
    is_down: bool = False
    asked: list[str] = field(default_factory=list)

    async def review_token(self, token: str) -> Reviewed | None:
        self.asked.append(token)
        if self.is_down:
            raise ApiError("no answer", status=0, reason="NoAnswer")
        return self.owners.get(token)


@dataclass
class Bench:
    """A receiver that listens, and its surroundings."""

    store: Store
    reviewer: FakeReviewer
    url: str
    session: aiohttp.ClientSession
    enqueued: list[Key]
    now: list[float]

    async def post(
        self, token: str | None = "mine", *, job: str = "emoji", namespace: str = "team", body: Any = _BODY, method: str = "POST"
    ) -> tuple[int, Any]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        async with self.session.request(method, self.url + _PATH.format(namespace, job), data=data, headers=headers) as answer:
            return answer.status, await answer.json()

    @property
    def report(self) -> Any:
        seen = self.store.read(("team", "emoji"))
        return seen and seen[1].report


def _owner(pod: str, *, namespace: str = "team", uid: str | None = None) -> Reviewed:
    return Reviewed(username=f"system:serviceaccount:{namespace}:default", pod=pod, pod_uid=uid or f"uid-{namespace}-{pod}")


@pytest.fixture
async def bench(objects: Any, tls: tuple[Path, Path]) -> AsyncIterator[Bench]:
    store = Store()
    foreign = objects.job("foreign", spec={"managedBy": "kueue.x-k8s.io/multikueue"})
    for raw in (objects.job(), objects.job("other"), objects.job(namespace="else"), foreign):
        store.observe(Kind.FINETUNEJOB, raw)
    store.observe(Kind.JOB, objects.child(attempt=2))
    for raw in (
        objects.pod("mine"),
        objects.pod("second", index=1),
        objects.pod("of-another-job", job="other"),
        objects.pod("of-another-manager", job="foreign"),
        objects.pod("of-a-predecessor", job_uid="old"),
        objects.pod("elsewhere", namespace="else"),
    ):
        store.observe(Kind.POD, raw)
    reviewer = FakeReviewer(
        owners={
            "mine": _owner("mine"),
            "second": _owner("second"),
            "another-job": _owner("of-another-job"),
            "another-manager": _owner("of-another-manager"),
            "predecessor": _owner("of-a-predecessor"),
            "earlier-pod": _owner("mine", uid="earlier"),
            "unknown-pod": _owner("unknown"),
            "elsewhere": _owner("elsewhere", namespace="else"),
            "person": Reviewed(username="jane", pod=None, pod_uid=None),
            "no-pod": Reviewed(username="system:serviceaccount:team:default", pod=None, pod_uid=None),
        }
    )
    enqueued: list[Key] = []
    now = [0.0]
    receiver = ReportReceiver(
        store=store,
        reviewer=reviewer,
        enqueue=enqueued.append,
        metrics=Metrics(),
        clock=lambda: _NOW,
        monotonic=lambda: now[0],
        body_seconds=0.5,
    )
    server = ReportServer(receiver.build_app(), address="127.0.0.1", port=0, certificate=tls[0], key=tls[1])
    await server.start()
    context = ssl.create_default_context(cafile=tls[0])
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context, force_close=True)) as session:
        url = f"https://localhost:{server.port}"
        yield Bench(store=store, reviewer=reviewer, url=url, session=session, enqueued=enqueued, now=now)
    await server.stop()


async def test_report_of_the_jobs_pod_is_kept_and_echoed(bench: Bench) -> None:
    assert await bench.post() == (200, _BODY)

    assert (bench.report.run, bench.report.attempt, bench.report.received_at) == ("0a1b2c3d", 2, _NOW)
    assert bench.report.report.trainer_status.progress_percentage == 40
    assert bench.enqueued == [("team", "emoji")]


@pytest.mark.parametrize(
    ("request_", "code", "reason"),
    [
        pytest.param({"token": None}, 401, "Unauthorized", id="no token"),
        pytest.param({"token": "nonsense"}, 401, "Unauthorized", id="wrong token"),
        pytest.param({"token": "x" * 20_000}, 400, None, id="header over the server's limit"),
        pytest.param({"token": "unknown-pod"}, 403, "Forbidden", id="pod that is not known"),
        pytest.param({"token": "earlier-pod"}, 403, "Forbidden", id="earlier pod of the same name"),
        pytest.param({"token": "another-job"}, 403, "Forbidden", id="pod of another job"),
        pytest.param({"token": "predecessor"}, 403, "Forbidden", id="pod of a deleted job of the same name"),
        pytest.param({"token": "elsewhere"}, 403, "Forbidden", id="pod of another namespace"),
        pytest.param({"token": "person"}, 403, "Forbidden", id="token of a person"),
        pytest.param({"token": "second"}, 403, "Forbidden", id="token of a pod that is not the first of its attempt"),
        pytest.param({"token": "no-pod"}, 403, "Forbidden", id="token that belongs to no pod"),
        pytest.param({"job": "absent"}, 404, "NotFound", id="no such job"),
        pytest.param({"token": "another-manager", "job": "foreign"}, 404, "NotFound", id="job of another manager"),
        pytest.param({"body": b"x" * 70_000}, 413, "RequestEntityTooLarge", id="too large"),
        pytest.param({"body": b"{"}, 400, "BadRequest", id="not JSON"),
        pytest.param({"body": {}}, 422, "Invalid", id="no trainerStatus"),
        pytest.param({"body": []}, 422, "Invalid", id="not an object"),
        pytest.param({"body": {"trainerStatus": {"progressPercentage": 101}}}, 422, "Invalid", id="out of bounds"),
        pytest.param(
            {"body": {"trainerStatus": {"metrics": [{"name": "a", "value": "1"}] * 257}}}, 422, "Invalid", id="many metrics"
        ),
        pytest.param(
            {"body": {"trainerStatus": {"metrics": [{"name": "a" * 65, "value": "1"}]}}}, 422, "Invalid", id="long name"
        ),
        pytest.param({"method": "GET"}, 405, "NotFound", id="wrong method"),
    ],
)
async def test_other_reports_are_refused_and_leave_nothing(
    bench: Bench, request_: dict[str, Any], code: int, reason: str | None
) -> None:
    if reason is None:
        async with bench.session.post(
            bench.url + _PATH.format("team", "emoji"), headers={"Authorization": f"Bearer {request_['token']}"}
        ) as answer:
            status, body = answer.status, {"reason": None}
    else:
        status, body = await bench.post(**request_)
        assert (body["kind"], body["apiVersion"], body["code"]) == ("Status", "v1", code)
        assert body["message"]

    assert (status, body["reason"]) == (code, reason)
    assert (bench.report, bench.enqueued) == (None, [])


async def test_sender_that_never_ends_its_body_is_cut_off(bench: Bench) -> None:
    async def drip() -> AsyncIterator[bytes]:
        yield b'{"trainerStatus": '
        await asyncio.Event().wait()

    url, headers = bench.url + _PATH.format("team", "emoji"), {"Authorization": "Bearer mine"}
    async with bench.session.post(url, data=drip(), headers=headers) as answer:
        body = await answer.json()

    assert (answer.status, body["reason"]) == (408, "Timeout")
    assert (bench.report, bench.enqueued) == (None, [])


async def test_body_of_a_stranger_is_not_waited_for(bench: Bench) -> None:
    async def drip() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    url = bench.url + _PATH.format("team", "emoji")
    async with bench.session.post(url, data=drip(), headers={"Authorization": "Bearer nonsense"}) as answer:
        assert answer.status == 401


async def test_hundreds_of_silent_connections_leave_room_for_reports(bench: Bench) -> None:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    port = int(bench.url.rpartition(":")[2])
    silent = [(await asyncio.open_connection("127.0.0.1", port, ssl=context))[1] for _ in range(200)]
    for writer in silent:
        writer.write(b"POST / HTTP/1.1\r\nX-Slow: ")

    assert await bench.post() == (200, _BODY)
    for writer in silent:
        writer.close()


async def test_most_telling_metrics_of_many_are_kept(bench: Bench) -> None:
    names = [f"eval_{number}" for number in range(100)] + ["current_step", "total_steps"]
    body = {"trainerStatus": {"metrics": [{"name": name, "value": "1"} for name in names]}}

    assert await bench.post(body=body) == (200, body)
    kept = [metric.name for metric in bench.report.report.trainer_status.metrics]
    assert kept == [*names[:30], "current_step", "total_steps"]


async def test_remaining_time_follows_from_the_reports_of_the_attempt(bench: Bench) -> None:
    for seconds, percentage in ((0, 10), (10, 20), (20, 30)):
        bench.now[0] = seconds
        await bench.post(body={"trainerStatus": {"progressPercentage": percentage, "estimatedRemainingSeconds": 9999}})

    assert bench.report.seconds_left == pytest.approx(70)


async def test_unknown_path_is_answered_with_a_status(bench: Bench) -> None:
    async with bench.session.post(bench.url + "/elsewhere") as answer:
        body = await answer.json()

    assert (answer.status, body["kind"]) == (404, "Status")


async def test_token_is_checked_once_a_minute(bench: Bench) -> None:
    for seconds in (0, 59, 60, 61):
        bench.now[0] = seconds
        await bench.post()

    assert bench.reviewer.asked == ["mine", "mine"]


async def test_refusal_is_remembered_as_well(bench: Bench) -> None:
    for _ in range(3):
        await bench.post("nonsense")

    assert bench.reviewer.asked == ["nonsense"]


async def test_accepted_token_is_worthless_once_its_pod_is_gone(bench: Bench, objects: Any) -> None:
    await bench.post()
    bench.store.observe(Kind.POD, objects.pod("mine", version=2), is_deleted=True)

    assert (await bench.post())[0] == 403


async def test_outage_of_the_api_server_asks_for_patience(bench: Bench) -> None:
    bench.reviewer.is_down = True
    assert (await bench.post())[0] == 503
    bench.reviewer.is_down = False

    assert (await bench.post())[0] == 200


async def test_renewed_certificate_is_served_without_a_restart(
    bench: Bench, tmp_path: Path, certify: Callable[..., tuple[Path, Path]]
) -> None:
    certificate, key = certify(tmp_path, name="first")
    receiver = ReportReceiver(
        store=Store(), reviewer=bench.reviewer, enqueue=bench.enqueued.append, metrics=Metrics(), clock=lambda: _NOW
    )
    server = ReportServer(receiver.build_app(), address="127.0.0.1", port=0, certificate=certificate, key=key)
    await server.start()
    first = await _fetch_certificate(server.port)
    key.write_bytes(b"half of a pair")
    between = await _fetch_certificate(server.port)
    certify(tmp_path, name="second")
    second = await _fetch_certificate(server.port)
    await server.stop()

    assert first == between
    assert second == ssl.PEM_cert_to_DER_cert(certificate.read_text(encoding="ascii")) != first


async def _fetch_certificate(port: int) -> bytes:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    certificate = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    await writer.wait_closed()
    return bytes(certificate)

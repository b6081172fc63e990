"""Reports that a standby receives reach the leader, over real HTTPS between two receivers."""

import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from finetune_operator.forward import HEADER, Forwarder
from finetune_operator.metrics import Metrics
from finetune_operator.report_server import ReportServer
from finetune_operator.reports import ReportReceiver
from finetune_operator.store import Store
from finetune_operator.views import Kind, Reviewed
from prometheus_client import generate_latest

_BODY = {"trainerStatus": {"progressPercentage": 40}, "extra": 1}
_PATH = "/apis/trainer.kubeflow.org/v1alpha1/namespaces/team/trainjobs/emoji/status"


class OneOwner:
    """Knows one token."""

    async def review_token(self, token: str) -> Reviewed | None:
        username = "system:serviceaccount:team:default"
        return Reviewed(username=username, pod="mine", pod_uid="uid-team-mine") if token == "mine" else None


@dataclass
class Replica:
    """A receiver of one of several processes."""

    url: str = ""
    leads: bool = False
    leader: str | None = None
    store: Store = field(default_factory=Store)
    metrics: Metrics = field(default_factory=Metrics)

    async def post(
        self, ca: Path, *, token: str = "mine", headers: dict[str, str] | None = None, body: Any = _BODY
    ) -> tuple[int, str | None, Any]:
        context = ssl.create_default_context(cafile=ca)
        context.check_hostname = False
        headers = {"Authorization": f"Bearer {token}"} | (headers or {})
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as session,
            session.post(self.url + _PATH, json=body, headers=headers) as answer,
        ):
            return answer.status, answer.headers.get("Retry-After"), await answer.json()

    @property
    def progress(self) -> Any:
        seen = self.store.read(("team", "emoji"))
        return seen and seen[1].report and seen[1].report.report.trainer_status.progress_percentage


Start = Callable[..., Any]


@pytest.fixture
async def start(objects: Any, tls: tuple[Path, Path]) -> AsyncIterator[Start]:
    """Start a replica; its certificate is good for localhost, and other replicas reach it by its address."""
    async with AsyncExitStack() as stack:

        async def begin(*, name: str = "localhost", certificate: tuple[Path, Path] = tls) -> Replica:
            return await stack.enter_async_context(_serve(objects, name=name, ca=tls[0], certificate=certificate))

        yield begin


@asynccontextmanager
async def _serve(objects: Any, *, name: str, ca: Path, certificate: tuple[Path, Path]) -> AsyncIterator[Replica]:
    replica = Replica()
    replica.store.observe(Kind.FINETUNEJOB, objects.job())
    replica.store.observe(Kind.JOB, objects.child())
    replica.store.observe(Kind.POD, objects.pod("mine"))
    forwarder = Forwarder(find_leader=lambda: replica.leader, report_url=f"https://{name}:10443", ca_file=ca, identity="replica")
    receiver = ReportReceiver(
        store=replica.store,
        reviewer=OneOwner(),
        enqueue=lambda _: None,
        metrics=replica.metrics,
        clock=lambda: datetime(2026, 1, 1, tzinfo=UTC),
        is_leading=lambda: replica.leads,
        forwarder=forwarder,
    )
    server = ReportServer(receiver.build_app(), address="127.0.0.1", port=0, certificate=certificate[0], key=certificate[1])
    await server.start()
    replica.url = f"https://127.0.0.1:{server.port}"
    yield replica
    await server.stop()
    await forwarder.close()


async def test_report_to_a_standby_reaches_the_leader(start: Start, tls: tuple[Path, Path]) -> None:
    leader, standby = await start(), await start()
    leader.leads, standby.leader = True, leader.url
    answer = await standby.post(tls[0])

    assert (200, None, _BODY) == answer
    assert (40, None) == (leader.progress, standby.progress)
    assert 'finetune_reports_total{result="forwarded"} 1.0' in generate_latest(standby.metrics.registry).decode()


async def test_standby_passes_on_what_the_leader_refuses(start: Start, tls: tuple[Path, Path]) -> None:
    leader, standby = await start(), await start()
    leader.leads, standby.leader = True, leader.url

    assert 401 == (await standby.post(tls[0], token="nonsense"))[0]
    assert 422 == (await standby.post(tls[0], body={}))[0]
    assert 413 == (await standby.post(tls[0], body="x" * 70_000))[0]
    assert leader.progress is None


async def test_without_a_leader_the_trainer_shall_come_again(start: Start, tls: tuple[Path, Path]) -> None:
    standby = await start()
    status, retry_after, body = await standby.post(tls[0])

    assert (503, "5", "Status") == (status, retry_after, body["kind"])
    standby.leader = "https://127.0.0.1:1"
    assert (503, "5") == (await standby.post(tls[0]))[:2]


async def test_report_goes_no_further_than_one_hop(start: Start, tls: tuple[Path, Path]) -> None:
    first, second = await start(), await start()
    first.leader, second.leader = second.url, first.url

    assert 503 == (await first.post(tls[0]))[0]
    assert 503 == (await first.post(tls[0], headers={HEADER: "x"}))[0]


@pytest.mark.parametrize("fault", ["name", "authority"])
async def test_token_goes_to_nobody_without_the_receivers_certificate(
    start: Start, tls: tuple[Path, Path], tmp_path: Path, certify: Callable[..., tuple[Path, Path]], fault: str
) -> None:
    impostor = await start(certificate=certify(tmp_path, name="localhost") if fault == "authority" else tls)
    standby = await start(name="finetune-operator.finetune.svc" if fault == "name" else "localhost")
    impostor.leads, standby.leader = True, impostor.url

    assert 503 == (await standby.post(tls[0]))[0]
    assert impostor.progress is None

"""How requests are repeated: against a server that answers what the test wants."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import pytest
from aiohttp import ClientPayloadError, web
from finetune_operator.cluster import Cluster
from finetune_operator.errors import ApiError, NotFoundError, NotLeaderError, RefusedError, StartError, UnauthorizedError
from finetune_operator.gate import WriteGate
from finetune_operator.metrics import Metrics
from finetune_operator.outcome import Deletion
from finetune_operator.policies.refusal import explain_refusal
from finetune_operator.transport import ClientSettings, Transport
from finetune_operator.views import Kind, RawObject
from kubernetes.aio.client import Configuration
from prometheus_client import generate_latest

_KEY = ("team", "emoji")


@dataclass
class Server:
    """Answers in order; the last answer stays."""

    answers: list[tuple[int, dict[str, str], str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    barrier: asyncio.Barrier | None = None

    async def answer(self, request: web.Request) -> web.Response:
        self.paths.append(request.path_qs)
        if self.barrier is not None:
            await self.barrier.wait()
        status, headers, text = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return web.Response(status=status, headers=headers, text=text)


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def gate() -> WriteGate:
    return WriteGate(open_until=float("inf"))


@pytest.fixture
async def transport(server: Server, metrics: Metrics, gate: WriteGate) -> AsyncIterator[Transport]:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", server.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    configuration = Configuration(host=f"http://127.0.0.1:{runner.addresses[0][1]}")
    configuration.connection_pool_maxsize = 4
    settings = ClientSettings(requests_per_second=500, burst=500, connections=4)
    transport = _Fixed(configuration, settings=settings, metrics=metrics, gate=gate)
    yield transport
    await transport.close()
    await runner.cleanup()


@pytest.fixture
def cluster(transport: Transport) -> Cluster:
    return Cluster(transport)


class _Fixed(Transport):
    """A transport whose credentials are the same however often they are loaded."""

    async def reload(self) -> None:
        pass


def _status(code: int, reason: str, message: str = "m") -> tuple[int, dict[str, str], str]:
    return code, {}, f'{{"kind": "Status", "reason": "{reason}", "message": "{message}"}}'


_OK: tuple[int, dict[str, str], str] = (200, {}, '{"kind": "Job"}')
_BUSY = (429, {"Retry-After": "0"}, '{"reason": "TooManyRequests"}')


async def _get(cluster: Cluster) -> RawObject:
    return await cluster.get(Kind.JOB, _KEY)


async def test_busy_server_is_asked_again(cluster: Cluster, server: Server, metrics: Metrics) -> None:
    server.answers = [_BUSY, _BUSY, _OK]

    assert await _get(cluster) == {"kind": "Job"}
    page = generate_latest(metrics.registry).decode()
    assert 'finetune_api_requests_total{code="4xx",resource="jobs",verb="get"} 2.0' in page


async def test_server_that_stays_busy_is_left_alone_in_the_end(cluster: Cluster, server: Server) -> None:
    server.answers = [_BUSY]
    with pytest.raises(ApiError, match="429"):
        await _get(cluster)

    assert len(server.paths) == 5


async def test_credentials_are_loaded_again_once(cluster: Cluster, server: Server) -> None:
    server.answers = [_status(401, "Unauthorized"), _OK]
    assert await _get(cluster) == {"kind": "Job"}
    server.answers = [_status(401, "Unauthorized")]
    with pytest.raises(UnauthorizedError):
        await _get(cluster)

    assert len(server.paths) == 4


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        pytest.param(_status(404, "NotFound"), NotFoundError, id="not found"),
        pytest.param(_status(422, "Invalid", "spec.x: no"), RefusedError, id="invalid"),
        pytest.param((502, {}, "<html>bad gateway</html>"), ApiError, id="a proxy in between"),
        pytest.param((200, {}, "half of a"), ApiError, id="no JSON"),
    ],
)
async def test_errors_keep_the_servers_words(
    cluster: Cluster, server: Server, answer: tuple[int, dict[str, str], str], error: type[ApiError]
) -> None:
    server.answers = [answer]
    with pytest.raises(error) as caught:
        await _get(cluster)

    assert caught.type is error
    assert any(word in str(caught.value) for word in ("m", "spec.x: no", "bad gateway", "half"))


_TEMPLATE = {
    "apiVersion": "resource.k8s.io/v1",
    "kind": "ResourceClaimTemplate",
    "metadata": {"namespace": "team", "name": "emoji-0b6e-0a1b2c3d"},
}


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(_status(404, "NotFound", "the server could not find the requested resource"), id="no such kind"),
        pytest.param((404, {}, "404 page not found"), id="no such group"),
    ],
)
async def test_a_kind_that_the_cluster_lacks_is_refused_with_what_is_needed(
    cluster: Cluster, server: Server, answer: tuple[int, dict[str, str], str]
) -> None:
    server.answers = [answer]
    with pytest.raises(RefusedError) as caught:
        await cluster.apply_child(_TEMPLATE)

    reason, message = explain_refusal(caught.value.message, subject="Job emoji-0a1b2c3d-1")
    assert "DeviceClaimsUnsupported" == reason
    assert "does not serve ResourceClaimTemplate of resource.k8s.io/v1" in message
    assert "needs Kubernetes 1.34" in message


async def test_a_namespace_that_is_gone_is_no_refusal(cluster: Cluster, server: Server) -> None:
    server.answers = [_status(404, "NotFound", "namespaces 'team' not found")]
    with pytest.raises(NotFoundError):
        await cluster.apply_child(_TEMPLATE)


async def test_list_is_read_in_chunks(cluster: Cluster, server: Server) -> None:
    def chunk(uid: str, *, more: str) -> tuple[int, dict[str, str], str]:
        item = f'{{"metadata": {{"uid": "{uid}", "namespace": "team", "name": "{uid}", "resourceVersion": "5"}}}}'
        return 200, {}, f'{{"metadata": {{"resourceVersion": "9", "continue": "{more}"}}, "items": [{item}]}}'

    server.answers = [chunk("a", more="token"), chunk("b", more="")]
    listing = await cluster.list_versions(Kind.POD, namespace="team")

    assert (listing.version, listing.objects) == (9, {"a": (("team", "a"), 5), "b": (("team", "b"), 5)})
    assert ["continue=token" in path for path in server.paths] == [False, True]
    assert all("limit=500" in path and "labelSelector=app.kubernetes.io" in path for path in server.paths)


async def test_server_that_is_gone_is_an_error_like_others(metrics: Metrics) -> None:
    configuration = Configuration(host="http://127.0.0.1:1")
    settings = ClientSettings(requests_per_second=9, burst=9, connections=1)
    cluster = Cluster(Transport(configuration, settings=settings, metrics=metrics))
    with pytest.raises(ApiError, match="NoAnswer"):
        await _get(cluster)
    await cluster.close()


_EMPTY = (200, {}, '{"metadata": {"resourceVersion": "7"}, "items": []}')
_ABSENT = (404, {}, '{"reason": "NotFound", "message": "the server could not find the requested resource"}')
_FORBIDDEN = (403, {}, '{"reason": "Forbidden", "message": "cannot list"}')


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        pytest.param([_ABSENT], "finetunejobs.finetune.dev is not installed; apply crds/ or the Helm chart", id="no jobs"),
        pytest.param([_EMPTY, _ABSENT], "finetuneprofiles.finetune.dev is not installed", id="no profiles"),
        pytest.param([_EMPTY, _FORBIDDEN], "may not list finetuneprofiles.finetune.dev", id="no right to profiles"),
    ],
)
async def test_start_tells_which_resource_is_missing(
    cluster: Cluster, server: Server, answers: list[tuple[int, dict[str, str], str]], message: str
) -> None:
    server.answers = list(answers)

    with pytest.raises(StartError, match=message):
        await cluster.check_custom_resources(namespaces=("team",))


async def test_start_waits_for_a_server_that_has_an_outage(cluster: Cluster, server: Server) -> None:
    server.answers = [(503, {}, "etcd is away")]
    await cluster.check_custom_resources(namespaces=())

    assert 1 == len(server.paths)


@pytest.mark.parametrize(
    ("query", "expectation"),
    [
        pytest.param("limit=500&continue=token", pytest.raises(ClientPayloadError, match="listing anew"), id="rest of a list"),
        pytest.param("limit=500", contextlib.nullcontext(), id="other"),
    ],
)
async def test_list_whose_rest_has_expired_looks_cut_off_to_kopf(
    transport: Transport, server: Server, query: str, expectation: AbstractContextManager[object]
) -> None:
    """It ends for the answer that it is, and lists anew after an error of the payload."""
    server.answers = [(410, {}, '{"reason": "Expired"}')]
    async with await transport.open_watch_session() as session:
        with expectation:
            async with session.get(f"{transport.server}/api/v1/pods?{query}") as answer:
                assert 410 == answer.status


async def test_start_looks_for_profiles_in_the_whole_cluster(cluster: Cluster, server: Server) -> None:
    server.answers = [_EMPTY]
    await cluster.check_custom_resources(namespaces=("team", "other"))

    prefix = "/apis/finetune.dev/v1alpha1"
    assert [path.partition("?")[0] for path in server.paths] == [
        f"{prefix}/namespaces/team/finetunejobs",
        f"{prefix}/finetuneprofiles",
    ]


_WRITES: dict[str, Callable[[Cluster], Awaitable[object]]] = {
    "apply": lambda cluster: cluster.apply_child(_TEMPLATE),
    "delete": lambda cluster: cluster.delete_child("team", Deletion(name="emoji-1", uid="u", resource_version="1")),
    "create an event": lambda cluster: cluster.create_event("team", {}),
    "repeat an event": lambda cluster: cluster.patch_event("team", "e", {}),
}


@pytest.mark.parametrize("write", _WRITES)
async def test_no_write_leaves_a_process_that_does_not_lead(
    cluster: Cluster, server: Server, gate: WriteGate, write: str
) -> None:
    server.answers = [_OK]
    gate.close()
    with pytest.raises(NotLeaderError):
        await _WRITES[write](cluster)
    assert [] == server.paths
    gate.open_until(float("inf"))
    await _WRITES[write](cluster)

    assert 1 == len(server.paths)


async def test_reads_and_token_reviews_need_no_leader(cluster: Cluster, server: Server, gate: WriteGate) -> None:
    gate.close()
    server.answers = [_EMPTY, (201, {}, '{"status": {"authenticated": false}}')]
    await cluster.list_versions(Kind.POD, namespace="team")
    await cluster.review_token("token")

    assert 2 == len(server.paths)


async def test_write_that_waited_for_a_connection_is_not_sent_too_late(cluster: Cluster, server: Server, gate: WriteGate) -> None:
    server.answers, server.barrier = [_OK], asyncio.Barrier(5)
    reads = [asyncio.create_task(_get(cluster)) for _ in range(4)]
    write = asyncio.create_task(cluster.apply_child(_TEMPLATE))
    while server.barrier.n_waiting < len(reads):  # noqa: ASYNC110  all connections are in use
        await asyncio.sleep(0.01)
    gate.close()
    await server.barrier.wait()
    with pytest.raises(NotLeaderError):
        await write
    await asyncio.gather(*reads)

    assert len(reads) == len(server.paths)


class ClosingGate(WriteGate):
    """Lets a number of questions pass, then none."""

    def __init__(self, passes: int) -> None:
        super().__init__()
        self.passes = passes

    @property
    def is_open(self) -> bool:
        self.passes -= 1
        return self.passes >= 0


@pytest.mark.parametrize("gate", [ClosingGate(1)], ids=["closed after the request was made"])
async def test_write_is_not_sent_when_the_gate_closes_behind_its_connection(
    cluster: Cluster, server: Server, gate: WriteGate
) -> None:
    server.answers = [_OK]
    async with asyncio.timeout(60):
        with pytest.raises(NotLeaderError):
            await cluster.apply_child(_TEMPLATE)

    assert ([], gate.is_open) == (server.paths, False)

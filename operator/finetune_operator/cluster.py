"""Requests to the API server: the only importer of `kubernetes`.

The client's dynamic layer reads the whole discovery of the cluster first, and its models know no FineTuneJob; so the paths are
written here, and the client gives the transport: credentials, TLS, connections.
"""

import asyncio
import json
import logging
import socket
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, Protocol, cast
from urllib.parse import urlencode

import aiohttp
from aiohttp.abc import AbstractStreamWriter
from aiohttp.connector import Connection
from finetune_api import names
from finetune_api.v1alpha1 import FineTuneJobStatus
from kubernetes.aio import config as kubernetes_config
from kubernetes.aio.client import ApiClient, Configuration
from kubernetes.aio.config import kube_config

from finetune_operator.errors import ApiError, NotFoundError, RefusedError, StartError, UnauthorizedError, build_api_error
from finetune_operator.manifests.owner import build_owner
from finetune_operator.metrics import API_REQUEST_SECONDS, API_REQUESTS, Metrics, classify_code
from finetune_operator.observed import ChildView, JobView
from finetune_operator.outcome import Deletion
from finetune_operator.throttle import TokenBucket
from finetune_operator.views import Key, Kind, Listing, RawObject, Reviewed

logger = logging.getLogger(__name__)

SELECTOR = f"{names.LABEL_MANAGED_BY}={names.MANAGED_BY},{names.LABEL_JOB}"
_USER_AGENT = "finetune-operator"
_TIMEOUT_SECONDS = 30
_MAX_TRIES = 5
_CHUNK = 500
_METADATA_ONLY = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
_APPLY = "application/apply-patch+yaml"
_MERGE = "application/merge-patch+json"
_JSON = "application/json"

_PREFIXES = {
    Kind.FINETUNEJOB: f"/apis/{names.API_VERSION}",
    Kind.JOB: "/apis/batch/v1",
    Kind.POD: "/api/v1",
    Kind.FINETUNEPROFILE: f"/apis/{names.API_VERSION}",
}
_CHILDREN = {"Job": "jobs", "Service": "services", "ResourceClaimTemplate": "resourceclaimtemplates"}
_EVENTS = "/apis/events.k8s.io/v1"
_LEASES = "/apis/coordination.k8s.io/v1"
_TOKEN_REVIEWS = "/apis/authentication.k8s.io/v1/tokenreviews"  # noqa: S105  a path


class Cluster:
    """The API server as the operator uses it."""

    def __init__(
        self, configuration: Configuration, *, settings: "ClientSettings", metrics: Metrics, gate: "Gate | None" = None
    ) -> None:
        self._settings = settings
        self._gate = gate
        self._metrics = metrics
        self._bucket = TokenBucket(rate=settings.requests_per_second, burst=settings.burst, clock=time.monotonic)
        self._configuration = configuration
        self._api = _open_client(configuration, gate)
        self._reloading = asyncio.Lock()

    @classmethod
    async def connect(cls, settings: "ClientSettings", *, metrics: Metrics, gate: "Gate | None" = None) -> "Cluster":
        """Load the credentials of the kubeconfig, if there is one, or of the pod's service account.

        Every write asks the gate first, if there is one, at the last moment before it is sent.
        """
        return cls(await _load_configuration(settings), settings=settings, metrics=metrics, gate=gate)

    async def close(self) -> None:
        """Close all connections."""
        await self._api.close()

    @property
    def server(self) -> str:
        """Return the URL of the API server."""
        return self._configuration.host

    async def open_watch_session(self) -> aiohttp.ClientSession:
        """Return a session for watches, whose owner closes it. Each request reads the token anew, as tokens rotate."""

        async def authorize(request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
            request.headers.update(await self._build_headers())
            return await handler(request)

        async def begin_anew(request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
            response = await handler(request)
            if response.status == HTTPStatus.GONE and "continue" in request.url.query:
                response.close()
                # The rest of the list has expired. kopf ends for that answer, and lists anew after one that was cut off.
                raise aiohttp.ClientPayloadError(f"{request.url.path}: the list has expired; listing anew")
            return response

        connector = aiohttp.TCPConnector(limit=0, ssl=self._api.rest_client.ssl_context, socket_factory=_open_socket)
        return aiohttp.ClientSession(connector=connector, middlewares=(authorize, begin_anew))

    async def reload(self) -> None:
        """Load the credentials again, after the API server refused them."""
        stale = self._api
        async with self._reloading:
            if self._api is not stale:
                return
            self._configuration = await _load_configuration(self._settings)
            self._api = _open_client(self._configuration, self._gate)
            await stale.close()

    async def apply_child(self, manifest: RawObject) -> RawObject:
        """Create a child by server-side apply, and return it.

        It is not forced: where another manager, such as a queue, has changed the child, this raises ConflictError, so the
        operator never takes back what others decided.
        """
        namespace, name = manifest["metadata"]["namespace"], manifest["metadata"]["name"]
        version, plural = manifest["apiVersion"], _CHILDREN[manifest["kind"]]
        prefix = "/api/v1" if version == "v1" else f"/apis/{version}"
        path = f"{prefix}/namespaces/{namespace}/{plural}/{name}"
        query = {"fieldManager": names.FIELD_MANAGER}
        try:
            return await self._request("patch", path, resource=plural, query=query, body=manifest, content_type=_APPLY)
        except NotFoundError as error:
            # An apply creates what is not there, so either the namespace is missing or the whole kind.
            if "namespaces" in error.message:
                raise
            message = f"the cluster does not serve {manifest['kind']} of {manifest['apiVersion']}"
            raise RefusedError(message, status=error.status, reason=error.reason) from error

    async def apply_status(self, job: JobView, status: FineTuneJobStatus) -> RawObject:
        """Make this the whole status of a FineTuneJob, and return the object. What the status lacks is removed.

        The resourceVersion is that of the object which the status was derived from: when it has changed since, or is another
        one of the same name, this raises ConflictError. (A uid alone is ignored by the status subresource.)
        """
        body = {
            "apiVersion": names.API_VERSION,
            "kind": names.KIND,
            "metadata": {"name": job.name, "namespace": job.namespace, "uid": job.uid, "resourceVersion": job.resource_version},
            "status": status.model_dump(mode="json", by_alias=True, exclude_none=True),
        }
        path = f"{_path(Kind.FINETUNEJOB, job.namespace)}/{job.name}/status"
        query = {"fieldManager": names.STATUS_FIELD_MANAGER, "force": "true"}
        return await self._request("patch", path, resource="finetunejobs/status", query=query, body=body, content_type=_APPLY)

    async def adopt_child(self, job: JobView, child: ChildView) -> RawObject:
        """Give a child the reference to its owner once more, beside those to others, or raise ConflictError if it is gone."""
        body = {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": child.name, "namespace": job.namespace, "uid": child.uid, "ownerReferences": [build_owner(job)]},
        }
        # An apply of the field manager that owns the rest would remove all that is not in it.
        query = {"fieldManager": names.OWNER_FIELD_MANAGER}
        path = f"{_path(Kind.JOB, job.namespace)}/{child.name}"
        return await self._request("patch", path, resource="jobs", query=query, body=body, content_type=_APPLY)

    async def delete_child(self, namespace: str, deletion: Deletion) -> RawObject:
        """Delete a child with its pods gone before it, if it is still what was seen; else raise ConflictError."""
        body = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "propagationPolicy": "Foreground",
            "preconditions": {"uid": deletion.uid, "resourceVersion": deletion.resource_version},
        }
        return await self._request("delete", f"{_path(Kind.JOB, namespace)}/{deletion.name}", resource="jobs", body=body)

    async def get(self, kind: Kind, key: Key) -> RawObject:
        """Return an object as the API server has it at this time."""
        namespace, name = key
        return await self._request("get", f"{_path(kind, namespace)}/{name}", resource=kind.value)

    async def list_versions(self, kind: Kind, *, namespace: str | None) -> Listing:
        """Return what exists of a kind, by metadata alone and in chunks."""
        objects: dict[str, tuple[Key, int]] = {}
        selector = "" if kind.is_ours else SELECTOR
        version = 0
        async for chunk in self._list_chunks(kind, namespace=namespace, selector=selector, accept=_METADATA_ONLY):
            for each in (item["metadata"] for item in chunk.get("items") or ()):
                objects[each["uid"]] = (each.get("namespace", ""), each["name"]), int(each["resourceVersion"])
            version = int(chunk["metadata"]["resourceVersion"])
        return Listing(version=version, objects=objects)

    async def list_pods(self, namespace: str, child: str) -> tuple[RawObject, ...]:
        """Return the pods of a child Job as the API server has them at this time."""
        selector = f"{SELECTOR},batch.kubernetes.io/job-name={child}"
        chunks = self._list_chunks(Kind.POD, namespace=namespace, selector=selector)
        return tuple([pod async for chunk in chunks for pod in chunk.get("items") or ()])

    async def _list_chunks(
        self, kind: Kind, *, namespace: str | None, selector: str, accept: str = _JSON
    ) -> AsyncIterator[RawObject]:
        """Yield the parts of a list as the API server gives them."""
        query = {"limit": str(_CHUNK)} | ({"labelSelector": selector} if selector else {})
        while True:
            chunk = await self._request("list", _path(kind, namespace), resource=kind.value, query=query, accept=accept)
            yield chunk
            if not (token := chunk["metadata"].get("continue")):
                return
            query = query | {"continue": token}

    async def list_refusals(self, namespace: str, uid: str) -> tuple[str, ...]:
        """Return why the Job controller could not create pods for the Job of this uid, the latest last.

        Its events are the one place that tells of it.
        """
        query = {"fieldSelector": f"regarding.uid={uid},reason=FailedCreate", "limit": str(_CHUNK)}
        found = await self._request("list", f"{_EVENTS}/namespaces/{namespace}/events", resource="events", query=query)
        events = sorted(found.get("items") or (), key=lambda event: int(event["metadata"]["resourceVersion"]))
        return tuple(event.get("note") or "" for event in events)

    async def create_event(self, namespace: str, event: RawObject) -> None:
        """Create an events.k8s.io/v1 Event."""
        await self._request("create", f"{_EVENTS}/namespaces/{namespace}/events", resource="events", body=event)

    async def patch_event(self, namespace: str, name: str, patch: RawObject) -> None:
        """Change an events.k8s.io/v1 Event."""
        path = f"{_EVENTS}/namespaces/{namespace}/events/{name}"
        await self._request("patch", path, resource="events", body=patch, content_type=_MERGE)

    async def get_lease(self, key: Key) -> RawObject:
        """Return a Lease."""
        return await self._request("get", f"{_LEASES}/namespaces/{key[0]}/leases/{key[1]}", resource="leases")

    async def create_lease(self, lease: RawObject) -> RawObject:
        """Create a Lease, or raise ConflictError if there is one."""
        path = f"{_LEASES}/namespaces/{lease['metadata']['namespace']}/leases"
        return await self._request("create", path, resource="leases", body=lease)

    async def replace_lease(self, lease: RawObject) -> RawObject:
        """Replace a Lease, or raise ConflictError if it is not the one of this resourceVersion."""
        path = f"{_LEASES}/namespaces/{lease['metadata']['namespace']}/leases/{lease['metadata']['name']}"
        return await self._request("update", path, resource="leases", body=lease)

    async def review_token(self, token: str) -> Reviewed | None:
        """Return whom a token belongs to, or None if it is not valid for our audience."""
        body = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": {"token": token, "audiences": [names.REPORT_AUDIENCE]},
        }
        review = await self._request("create", _TOKEN_REVIEWS, resource="tokenreviews", body=body)
        status = review.get("status") or {}
        # An API server that ignores audiences answers without them: such a token may be meant for anything.
        if not status.get("authenticated") or names.REPORT_AUDIENCE not in (status.get("audiences") or ()):
            return None
        user = status.get("user") or {}
        extra = user.get("extra") or {}
        return Reviewed(
            username=user.get("username", ""),
            pod=next(iter(extra.get("authentication.kubernetes.io/pod-name") or ()), None),
            pod_uid=next(iter(extra.get("authentication.kubernetes.io/pod-uid") or ()), None),
        )

    async def _request(
        self,
        verb: str,
        path: str,
        *,
        resource: str,
        query: Mapping[str, str] | None = None,
        body: RawObject | None = None,
        content_type: str = _JSON,
        accept: str = _JSON,
    ) -> RawObject:
        """Make a request, and again when the API server is too busy or the credentials were replaced."""
        url = path + (f"?{urlencode(query)}" if query else "")
        is_reloaded = False
        for tries_left in reversed(range(_MAX_TRIES)):
            await self._bucket.wait()
            answer = await self._send(verb, url, resource=resource, body=body, content_type=content_type, accept=accept)
            if answer.status == 429 and tries_left:
                self._bucket.block(answer.retry_after)
            elif answer.status == 401 and tries_left and not is_reloaded:
                await self.reload()
                is_reloaded = True
            else:
                break
        return answer.parse()

    async def _send(
        self, verb: str, url: str, *, resource: str, body: RawObject | None, content_type: str, accept: str
    ) -> "Answer":
        headers = await self._build_headers() | {"Accept": accept, "Content-Type": content_type}
        status, started_at = 0, time.monotonic()
        try:
            response = await self._api.call_api(
                _METHODS[verb],
                self.server + url,
                header_params=headers,
                body=body,
                _request_timeout=aiohttp.ClientTimeout(total=_TIMEOUT_SECONDS),
            )
            content = await response.read()
            status = response.status
            return Answer(status=status, content=content, retry_after=_parse_seconds(response.headers.get("Retry-After")))
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ApiError(f"{verb} {url}: {error!r}", status=0, reason="NoAnswer") from error
        finally:
            self._metrics.count(API_REQUESTS, verb=verb, resource=resource, code=classify_code(status))
            self._metrics.observe(API_REQUEST_SECONDS, time.monotonic() - started_at, verb=verb)

    async def _build_headers(self) -> dict[str, str]:
        headers = {"User-Agent": "/".join(filter(None, (_USER_AGENT, self._settings.identity)))}
        if token := await self._configuration.get_api_key_with_prefix("BearerToken", alias="authorization"):
            headers["Authorization"] = token
        return headers


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientSettings:
    """How the API server is reached, and how hard it may be used."""

    requests_per_second: float
    burst: int
    connections: int
    identity: str = ""
    """Name of this process among its replicas, told to the API server, whose audit log has it."""


class Gate(Protocol):
    """Who knows whether this process may write."""

    def check(self) -> None:
        """Raise NotLeaderError unless a write may be sent at this very time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An answer of the API server."""

    status: int
    content: bytes
    retry_after: float

    def parse(self) -> RawObject:
        """Return the object in the answer. Raises the ApiError that the answer stands for."""
        try:
            parsed = json.loads(self.content)
        except ValueError as error:
            text = self.content[:256].decode(errors="replace")
            raise build_api_error(self.status, reason="NotJson", message=text) from error
        if 200 <= self.status <= 299:
            return cast("RawObject", parsed)
        raise build_api_error(self.status, reason=parsed.get("reason") or "Unknown", message=parsed.get("message") or "")


async def check_custom_resources(cluster: Cluster, *, namespaces: tuple[str, ...]) -> None:
    """Raise StartError if the API server does not know our custom resources, or does not let us list them.

    One that has an outage is waited for by all that comes after; a process that ended would be started again ever later.
    """
    for kind in (each for each in Kind if each.is_ours):
        crd = f"{kind.value}.{names.GROUP}"
        try:
            await cluster.list_versions(kind, namespace=kind.list_scopes(namespaces)[0])
        except NotFoundError as error:
            raise StartError(f"the CustomResourceDefinition {crd} is not installed; apply crds/ or the Helm chart") from error
        except RefusedError as error:
            raise StartError(f"the operator may not list {crd}; the Helm chart has the roles for it: {error}") from error
        except UnauthorizedError as error:
            raise StartError(f"the API server at {cluster.server} does not accept the credentials: {error}") from error
        except ApiError as error:
            logger.warning("cannot look for %s: %s", crd, error)
            return


async def _load_configuration(settings: ClientSettings) -> Configuration:
    configuration = Configuration()
    configuration.connection_pool_maxsize = settings.connections
    try:
        if _has_kubeconfig():
            await kubernetes_config.load_kube_config(client_configuration=configuration, persist_config=False)
        else:
            kubernetes_config.load_incluster_config(client_configuration=configuration)
    except kubernetes_config.ConfigException as error:
        raise StartError(f"no credentials for an API server: {error}; set KUBECONFIG or run in a pod") from error
    return configuration


def _open_client(configuration: Configuration, gate: Gate | None) -> ApiClient:
    # With trust_env aiohttp reads ~/.netrc in a thread, twice for each request.
    configuration.client_session_kwargs = {"trust_env": False} | ({} if gate is None else {"request_class": _guard(gate)})
    return ApiClient(configuration)


def _guard(gate: Gate) -> type[aiohttp.ClientRequest]:
    """Return requests that ask the gate when they have a connection and nothing lies between them and the wire.

    Asked any earlier, a write could wait for its turn, or for a connection, until the process no longer leads.
    """

    class GuardedRequest(aiohttp.ClientRequest):
        async def send(self, conn: Connection) -> aiohttp.ClientResponse:
            if self._is_write():
                gate.check()
            return await super().send(conn)

        # Up to Python 3.11 this is a task, which begins later than send() ends; head and body leave together in it.
        async def write_bytes(self, writer: AbstractStreamWriter, conn: Connection, content_length: int | None = None) -> None:
            try:
                if self._is_write():
                    gate.check()
            except ApiError as error:
                if conn.protocol is not None:
                    conn.protocol.set_exception(error)
                conn.close()
                return
            await super().write_bytes(writer, conn, content_length)

        def _is_write(self) -> bool:
            # To check a token changes nothing, though it is a POST.
            return self.method != "GET" and not self.url.path.endswith(_TOKEN_REVIEWS)

    return GuardedRequest


def _has_kubeconfig() -> bool:
    """Return whether there is a kubeconfig, which the client finds through KUBECONFIG; without one we run in a pod."""
    paths = (Path(part) for part in kube_config.KUBE_CONFIG_DEFAULT_LOCATION.split(":") if part)
    return any(path.expanduser().is_file() for path in paths)


def _open_socket(address: tuple[Any, ...]) -> socket.socket:
    """Return a socket that notices within a minute that the other end is gone, whatever lies between."""
    family, kind, protocol, _, _ = address
    opened = socket.socket(family, kind, protocol)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 50_000)):
        if hasattr(socket, option):  # macOS lacks some of them
            opened.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return opened


def _path(kind: Kind, namespace: str | None) -> str:
    return _PREFIXES[kind] + (f"/namespaces/{namespace}" if namespace else "") + f"/{kind.value}"


def _parse_seconds(value: str | None) -> float:
    """Return the seconds of a Retry-After header; the API server sends no dates."""
    return float(value) if value and value.isdecimal() else 1.0


_METHODS = {"get": "GET", "list": "GET", "create": "POST", "update": "PUT", "patch": "PATCH", "delete": "DELETE"}

"""What the operator asks of the API server.

The client's dynamic layer reads the whole discovery of the cluster first, and its models know no FineTuneJob; so the paths are
written here, and the client gives the transport.
"""

import logging
from collections.abc import AsyncIterator

from finetune_api import names
from finetune_api.v1alpha1 import FineTuneJobStatus

from finetune_operator.errors import ApiError, NotFoundError, RefusedError, StartError, UnauthorizedError
from finetune_operator.manifests.owner import build_owner
from finetune_operator.observed import ChildView, JobView
from finetune_operator.outcome import Deletion
from finetune_operator.transport import JSON, TOKEN_REVIEWS, Transport
from finetune_operator.views import Key, Kind, Listing, RawObject, Reviewed

logger = logging.getLogger(__name__)

SELECTOR = f"{names.LABEL_MANAGED_BY}={names.MANAGED_BY},{names.LABEL_JOB}"
_CHUNK = 500
_METADATA_ONLY = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
_APPLY = "application/apply-patch+yaml"
_MERGE = "application/merge-patch+json"

_PREFIXES = {
    Kind.FINETUNEJOB: f"/apis/{names.API_VERSION}",
    Kind.JOB: "/apis/batch/v1",
    Kind.POD: "/api/v1",
    Kind.FINETUNEPROFILE: f"/apis/{names.API_VERSION}",
}
_CHILDREN = {"Job": "jobs", "Service": "services", "ResourceClaimTemplate": "resourceclaimtemplates"}
_EVENTS = "/apis/events.k8s.io/v1"
_LEASES = "/apis/coordination.k8s.io/v1"


class Cluster:
    """The API server as the operator uses it."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    async def close(self) -> None:
        """Close all connections."""
        await self._transport.close()

    async def check_custom_resources(self, *, namespaces: tuple[str, ...]) -> None:
        """Raise StartError if the API server does not know our custom resources, or does not let us list them.

        One that has an outage is waited for by all that comes after; a process that ended would be started again ever later.
        """
        for kind in (each for each in Kind if each.is_ours):
            crd = f"{kind.value}.{names.GROUP}"
            try:
                await self.list_versions(kind, namespace=kind.list_scopes(namespaces)[0])
            except NotFoundError as error:
                raise StartError(f"the CustomResourceDefinition {crd} is not installed; apply crds/ or the Helm chart") from error
            except RefusedError as error:
                raise StartError(f"the operator may not list {crd}; the Helm chart has the roles for it: {error}") from error
            except UnauthorizedError as error:
                raise StartError(
                    f"the API server at {self._transport.server} does not accept the credentials: {error}"
                ) from error
            except ApiError as error:
                logger.warning("cannot look for %s: %s", crd, error)
                return

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
            return await self._transport.request("patch", path, resource=plural, query=query, body=manifest, content_type=_APPLY)
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
        return await self._transport.request(
            "patch", path, resource="finetunejobs/status", query=query, body=body, content_type=_APPLY
        )

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
        return await self._transport.request("patch", path, resource="jobs", query=query, body=body, content_type=_APPLY)

    async def delete_child(self, namespace: str, deletion: Deletion) -> RawObject:
        """Delete a child with its pods gone before it, if it is still what was seen; else raise ConflictError."""
        body = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "propagationPolicy": "Foreground",
            "preconditions": {"uid": deletion.uid, "resourceVersion": deletion.resource_version},
        }
        return await self._transport.request(
            "delete", f"{_path(Kind.JOB, namespace)}/{deletion.name}", resource="jobs", body=body
        )

    async def get(self, kind: Kind, key: Key) -> RawObject:
        """Return an object as the API server has it at this time."""
        namespace, name = key
        return await self._transport.request("get", f"{_path(kind, namespace)}/{name}", resource=kind.value)

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
        self, kind: Kind, *, namespace: str | None, selector: str, accept: str = JSON
    ) -> AsyncIterator[RawObject]:
        """Yield the parts of a list as the API server gives them."""
        query = {"limit": str(_CHUNK)} | ({"labelSelector": selector} if selector else {})
        while True:
            chunk = await self._transport.request("list", _path(kind, namespace), resource=kind.value, query=query, accept=accept)
            yield chunk
            if not (token := chunk["metadata"].get("continue")):
                return
            query = query | {"continue": token}

    async def list_refusals(self, namespace: str, uid: str) -> tuple[str, ...]:
        """Return why the Job controller could not create pods for the Job of this uid, the latest last.

        Its events are the one place that tells of it.
        """
        query = {"fieldSelector": f"regarding.uid={uid},reason=FailedCreate", "limit": str(_CHUNK)}
        found = await self._transport.request("list", f"{_EVENTS}/namespaces/{namespace}/events", resource="events", query=query)
        events = sorted(found.get("items") or (), key=lambda event: int(event["metadata"]["resourceVersion"]))
        return tuple(event.get("note") or "" for event in events)

    async def create_event(self, namespace: str, event: RawObject) -> None:
        """Create an events.k8s.io/v1 Event."""
        await self._transport.request("create", f"{_EVENTS}/namespaces/{namespace}/events", resource="events", body=event)

    async def patch_event(self, namespace: str, name: str, patch: RawObject) -> None:
        """Change an events.k8s.io/v1 Event."""
        path = f"{_EVENTS}/namespaces/{namespace}/events/{name}"
        await self._transport.request("patch", path, resource="events", body=patch, content_type=_MERGE)

    async def get_lease(self, key: Key) -> RawObject:
        """Return a Lease."""
        return await self._transport.request("get", f"{_LEASES}/namespaces/{key[0]}/leases/{key[1]}", resource="leases")

    async def create_lease(self, lease: RawObject) -> RawObject:
        """Create a Lease, or raise ConflictError if there is one."""
        path = f"{_LEASES}/namespaces/{lease['metadata']['namespace']}/leases"
        return await self._transport.request("create", path, resource="leases", body=lease)

    async def replace_lease(self, lease: RawObject) -> RawObject:
        """Replace a Lease, or raise ConflictError if it is not the one of this resourceVersion."""
        path = f"{_LEASES}/namespaces/{lease['metadata']['namespace']}/leases/{lease['metadata']['name']}"
        return await self._transport.request("update", path, resource="leases", body=lease)

    async def review_token(self, token: str) -> Reviewed | None:
        """Return whom a token belongs to, or None if it is not valid for our audience."""
        body = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": {"token": token, "audiences": [names.REPORT_AUDIENCE]},
        }
        review = await self._transport.request("create", TOKEN_REVIEWS, resource="tokenreviews", body=body)
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


def _path(kind: Kind, namespace: str | None) -> str:
    return _PREFIXES[kind] + (f"/namespaces/{namespace}" if namespace else "") + f"/{kind.value}"

"""The batch/v1 Job that runs one attempt (pure)."""

from typing import Any

from finetune_api import names
from finetune_api.contract import TrainerConfig, build_trainer_config, claim_of, compute_pod_shape, compute_run
from finetune_api.v1alpha1 import FineTuneJobSpec

from finetune_operator.manifests.claim import CLAIM, name_claim_template
from finetune_operator.manifests.owner import build_owner
from finetune_operator.observed import JobView
from finetune_operator.policies.accelerator import PodShape
from finetune_operator.settings import TrainerSettings

_USER = 65532


def build_job(
    job: JobView,
    spec: FineTuneJobSpec,
    *,
    attempt: int,
    shape: PodShape,
    micro_batch_divisor: int = 1,
    training_seconds: int | None = None,
    pod_shape: str | None = None,
    settings: TrainerSettings,
) -> dict[str, Any]:
    """Return the Job of an attempt: Indexed, never retried by Kubernetes itself, as the operator decides on that.

    A spec that holds defaults of a profile needs the pod shape of the spec as the user wrote it.
    """
    name = names.child_name(job.name, compute_run(spec), attempt)
    service = names.service_name(job.name, job.uid)
    config = build_trainer_config(
        spec,
        namespace=job.namespace,
        name=job.name,
        attempt=attempt,
        uid=job.uid,
        generation=job.generation,
        micro_batch_divisor=micro_batch_divisor,
        grace_seconds=settings.termination_grace_seconds,
        training_seconds=training_seconds,
        world=shape.build_world(rendezvous_host=f"{name}-0.{service}" if shape.nodes > 1 else None),
    )
    labels = _build_labels(job, config=config, pod_shape=pod_shape or compute_pod_shape(spec))
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": name,
            "namespace": job.namespace,
            # Not on the pods, which a queue would then count for themselves.
            "labels": {**labels, **job.queue_labels} if job.queue_labels else labels,
            **({"annotations": {names.ANNOTATION_QUEUE: job.queue_request}} if job.queue else {}),
            "ownerReferences": [build_owner(job)],
        },
        "spec": {
            # The queue has to find it suspended; from then on the field is the queue's.
            **({"suspend": True} if job.queue else {}),
            "completionMode": "Indexed",
            "completions": shape.nodes,
            "parallelism": shape.nodes,
            "backoffLimit": 0,
            # A pod counts as failed only when it is gone, so that two attempts never write at once.
            "podReplacementPolicy": "Failed",
            "template": {
                "metadata": {"labels": labels, "annotations": {names.ANNOTATION_CA: settings.report_ca, **job.topology}},
                "spec": _build_pod_spec(job, spec, config=config, shape=shape, settings=settings),
            },
        },
    }


def _build_labels(job: JobView, *, config: TrainerConfig, pod_shape: str) -> dict[str, str]:
    return {
        names.LABEL_MANAGED_BY: names.MANAGED_BY,
        names.LABEL_JOB: job.name,
        names.LABEL_JOB_UID: job.uid,
        names.LABEL_RUN: config.run,
        names.LABEL_ATTEMPT: str(config.attempt),
        names.LABEL_POD_SHAPE: pod_shape,
    }


def _build_pod_spec(
    job: JobView, spec: FineTuneJobSpec, *, config: TrainerConfig, shape: PodShape, settings: TrainerSettings
) -> dict[str, Any]:
    # One volume for each claim: a pod that names a claim in two volumes never gets past ContainerCreating.
    volumes = {volume: claim for volume, claim, _, _ in _list_mounts(spec)}
    return {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        # Gives the pods host names that the others can look up.
        **({"subdomain": names.service_name(job.name, job.uid)} if shape.nodes > 1 else {}),
        **_build_placement(job, shape),
        "terminationGracePeriodSeconds": settings.termination_grace_seconds,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _USER,
            "runAsGroup": _USER,
            "fsGroup": _USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_build_container(spec, config=config, shape=shape, settings=settings)],
        "volumes": [
            *({"name": name, "persistentVolumeClaim": {"claimName": claim}} for name, claim in volumes.items()),
            {"name": "report", "projected": {"sources": _build_report_sources()}},
            {"name": "tmp", "emptyDir": {}},
            *_build_shared_memory(shape),
        ],
    }


def _build_placement(job: JobView, shape: PodShape) -> dict[str, Any]:
    """Return what decides on the pod's node beside its resources."""
    placement: dict[str, Any] = {}
    if shape.node_selector:
        placement["nodeSelector"] = dict(shape.node_selector)
    if shape.tolerations:
        placement["tolerations"] = [dict(each) for each in shape.tolerations]
    if shape.devices:
        template = name_claim_template(job, shape.devices)
        placement["resourceClaims"] = [{"name": CLAIM, "resourceClaimTemplateName": template}]
    return placement


def _build_shared_memory(shape: PodShape) -> list[dict[str, Any]]:
    """Return the volume of /dev/shm, which lies in memory like the one that it replaces."""
    return [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": shape.shared_memory}}] if shape.shared_memory else []


def _build_container(
    spec: FineTuneJobSpec, *, config: TrainerConfig, shape: PodShape, settings: TrainerSettings
) -> dict[str, Any]:
    amounts = {"cpu": spec.resources.cpu, "memory": spec.resources.memory, **shape.resources}
    claims = {"claims": [{"name": CLAIM}]} if shape.devices else {}
    url = settings.report_url + names.report_path(config.namespace, config.name)
    return {
        "name": names.CONTAINER,
        "image": settings.image,
        "imagePullPolicy": settings.image_pull_policy,
        "env": [
            {"name": names.ENV_TRAINER_CONFIG, "value": config.model_dump_json(by_alias=True, exclude_none=True)},
            {"name": names.ENV_REPORT_URL, "value": url},
            {"name": names.ENV_REPORT_CA, "value": names.REPORT_CA_FILE},
            {"name": names.ENV_REPORT_TOKEN, "value": names.REPORT_TOKEN_FILE},
            {"name": names.ENV_METRICS_PORT, "value": str(names.PORT_METRICS)},
            # The root file system is read-only: caches of the libraries go to the pod's own temporary folder.
            {"name": "HOME", "value": "/tmp"},  # noqa: S108
            *({"name": name, "value": value} for name, value in shape.environment.items()),
        ],
        **_build_secrets(spec),
        # By this name the chart's PodMonitor finds the port; a service mesh and network policies read it as well.
        "ports": [{"name": "metrics", "containerPort": names.PORT_METRICS}],
        "resources": {"requests": amounts, "limits": amounts} | claims,
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
        "terminationMessagePath": names.TERMINATION_MESSAGE_FILE,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            *(
                {"name": name, "mountPath": path} | ({"readOnly": True} if is_read_only else {})
                for name, _, path, is_read_only in _list_mounts(spec)
            ),
            {"name": "report", "mountPath": names.REPORT_MOUNT, "readOnly": True},
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108
            *([{"name": "shm", "mountPath": "/dev/shm"}] if shape.shared_memory else []),  # noqa: S108
        ],
    }


def _build_secrets(spec: FineTuneJobSpec) -> dict[str, Any]:
    """Return the Secret with the credentials of the object store; the kubelet reads it, as the operator may not."""
    secret = spec.checkpoint.secret_ref
    return {"envFrom": [{"secretRef": {"name": secret.name}}]} if secret else {}


def _list_mounts(spec: FineTuneJobSpec) -> list[tuple[str, str, str, bool]]:
    """Return volume, claim, mount path and whether it is read-only, for every `pvc://` URI; a volume has its first use's name."""
    uses = (
        ("model", spec.model.uri, names.MODEL_MOUNT, True),
        ("dataset", spec.dataset.uri, names.DATASET_MOUNT, True),
        ("output", spec.output.uri, names.OUTPUT_MOUNT, False),
        ("checkpoint", spec.checkpoint.uri or "", names.CHECKPOINT_MOUNT, False),
    )
    mounts: list[tuple[str, str, str, bool]] = []
    for use, uri, path, is_read_only in uses:
        if claim := claim_of(uri):
            volume = next((name for name, each, _, _ in mounts if each == claim), use)
            mounts.append((volume, claim, path, is_read_only))
    return mounts


def _build_report_sources() -> list[dict[str, Any]]:
    """Return the sources of the report volume: a token for our receiver alone, and the CA from the pod's own annotation."""
    return [
        {"serviceAccountToken": {"audience": names.REPORT_AUDIENCE, "expirationSeconds": 3600, "path": "token"}},
        {
            "downwardAPI": {
                "items": [{"path": "ca.crt", "fieldRef": {"fieldPath": f"metadata.annotations['{names.ANNOTATION_CA}']"}}]
            }
        },
    ]

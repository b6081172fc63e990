"""What a profile adds to the Job of an attempt (pure). What the Job has already stays: the operator's own, the accelerator's."""

from collections.abc import Iterable
from typing import Any

from finetune_api.profile import FineTuneProfileSpec, ProfileVolume

from finetune_operator.snapshot import Snapshot

Manifest = dict[str, Any]


def add_profile(job: Manifest, profile: FineTuneProfileSpec | None, *, snapshot: Snapshot) -> Manifest:
    """Return the Job with a profile's parts in its pods, and with what it was begun with in its annotations."""
    annotations = job["metadata"].get("annotations", {}) | snapshot.build_annotations()
    job = job | {"metadata": job["metadata"] | {"annotations": annotations}}
    if profile is None:
        return job
    template = job["spec"]["template"]
    template = template | {"spec": _add_to_pod(template["spec"], profile)}
    return job | {"spec": job["spec"] | {"template": template}}


def _add_to_pod(pod: Manifest, profile: FineTuneProfileSpec) -> Manifest:
    selector = profile.node_selector | pod.get("nodeSelector", {})
    tolerations = list(pod.get("tolerations", ()))
    mine = (each.model_dump(mode="json", by_alias=True, exclude_none=True) for each in profile.tolerations)
    tolerations += [each for each in mine if each not in tolerations]
    volumes, mounts = _list_volumes(pod["volumes"], profile.volumes)
    trainer, *others = pod["containers"]
    added = {
        "nodeSelector": selector,
        "tolerations": tolerations,
        "priorityClassName": profile.priority_class_name,
        "containers": [_add_to_container(trainer, profile, mounts=mounts), *others],
        "volumes": [*pod["volumes"], *volumes],
    }
    return pod | {name: value for name, value in added.items() if value}


def _add_to_container(container: Manifest, profile: FineTuneProfileSpec, *, mounts: Iterable[Manifest]) -> Manifest:
    taken = {each["name"] for each in container["env"]}
    variables = ({"name": each.name, "value": each.value} for each in profile.environment if each.name not in taken)
    added = {"env": [*container["env"], *variables], "volumeMounts": [*container["volumeMounts"], *mounts]}
    return container | added | ({"image": profile.image} if profile.image else {})


def _list_volumes(present: Iterable[Manifest], wanted: Iterable[ProfileVolume]) -> tuple[list[Manifest], list[Manifest]]:
    """Return the volumes to add and the mounts of all that are wanted.

    A claim that the pod has already is mounted from there: a pod that names a claim in two volumes never starts.
    """
    by_claim = {each["persistentVolumeClaim"]["claimName"]: each["name"] for each in present if "persistentVolumeClaim" in each}
    volumes: list[Manifest] = []
    mounts: list[Manifest] = []
    for each in wanted:
        name = by_claim.get(each.claim_name or "", f"profile-{each.name}")
        if each.claim_name is None:
            volumes.append({"name": name, "configMap": {"name": each.config_map_name}})
        elif each.claim_name not in by_claim:
            by_claim[each.claim_name] = name
            volumes.append({"name": name, "persistentVolumeClaim": {"claimName": each.claim_name}})
        mounts.append({"name": name, "mountPath": each.mount_path} | ({"readOnly": True} if each.read_only else {}))
    return volumes, mounts

"""The real scheduler puts the pods of each accelerator on nodes that have it, and on no others."""

import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerators import CASES, CLASSES, Case
from finetune_api.contract import TrainerConfig
from finetune_api.v1alpha1 import FineTuneJobSpec
from finetune_operator.manifests.claim import build_claim_template
from finetune_operator.manifests.job import build_job
from finetune_operator.policies.accelerator import shape_pods
from finetune_operator.policies.gang import Gang
from finetune_operator.policies.pending import explain_pending
from finetune_operator.settings import TrainerSettings
from finetune_operator.state import State
from finetune_operator.views import project_child, project_pod
from world import build_view

pytestmark = pytest.mark.apiserver

_GOLDEN = Path(__file__).parent / "golden"
_RESOURCE = "/apis/resource.k8s.io/v1"
_SETTINGS = TrainerSettings(image="trainer:1", report_url="https://operator:10443", report_ca="ca", accelerators=CLASSES)
_SPEC = {"task": "image-classification", "dataset": {"uri": "pvc://data"}, "output": {"uri": "pvc://models"}}
_CORES = {"cpu": "64", "memory": "256Gi", "pods": "110"}
_WITH_ACCELERATORS = [case for case in CASES if case.accelerator]

Until = Callable[..., Any]


class Site:
    """A namespace with volumes, and nodes that exist in the API alone."""

    def __init__(self, api: Any, until: Until) -> None:
        self.api = api
        self.until = until
        self.namespace = f"site-{secrets.token_hex(4)}"
        self.nodes: list[str] = []
        api.create("/api/v1/namespaces", {"metadata": {"name": self.namespace}})
        for claim in ("data", "models"):
            self._add_volume(claim)
        self.until(self._are_volumes_bound, what="the claims are bound", seconds=60)

    def path(self, plural: str, name: str = "") -> str:
        prefix = {"jobs": "/apis/batch/v1", "resourceclaims": _RESOURCE, "resourceclaimtemplates": _RESOURCE}
        path = f"{prefix.get(plural, '/api/v1')}/namespaces/{self.namespace}/{plural}"
        return f"{path}/{name}" if name else path

    def _add_volume(self, claim: str) -> None:
        """Add a claim and the volume that it is bound to."""
        name = f"{self.namespace}-{claim}"
        size = {"accessModes": ["ReadWriteMany"], "storageClassName": ""}
        reference = {"claimRef": {"namespace": self.namespace, "name": claim}, "hostPath": {"path": "/tmp"}}
        self.api.create(
            "/api/v1/persistentvolumes", {"metadata": {"name": name}, "spec": size | reference | _storage("capacity")}
        )
        spec = size | {"volumeName": name, "resources": _storage("requests")}
        self.api.create(self.path("persistentvolumeclaims"), {"metadata": {"name": claim}, "spec": spec})

    def _are_volumes_bound(self) -> bool:
        """Return whether pods can use the claims: the scheduler looks at nothing else in a pod whose claims are not bound."""
        return all(each["status"].get("phase") == "Bound" for each in self.api.get(self.path("persistentvolumeclaims"))["items"])

    def add_node(
        self, kind: str, *, resources: dict[str, str], labels: dict[str, str] | None = None, taint: str | None = None
    ) -> str:
        """Add a ready node, and return its name."""
        name = f"{kind}-{secrets.token_hex(4)}"
        amounts = _CORES | resources
        taints = [{"key": taint, "value": "lab", "effect": "NoSchedule"}] if taint else []
        node = {
            "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name, **(labels or {})}},
            "spec": {"taints": taints},
            "status": {
                "capacity": amounts,
                "allocatable": amounts,
                "conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady"}],
            },
        }
        self.nodes.append(name)
        self.api.create("/api/v1/nodes", node)
        return name

    def add_devices(self, node: str, *, count: int) -> None:
        """Offer devices on a node, as the driver for gpu.nvidia.com does."""
        devices = [{"name": f"gpu-{number}"} for number in range(count)]
        pool = {"name": node, "generation": 1, "resourceSliceCount": 1}
        spec = {"driver": "gpu.nvidia.com", "nodeName": node, "pool": pool, "devices": devices}
        self.api.create(f"{_RESOURCE}/resourceslices", {"metadata": {"name": node}, "spec": spec})

    def submit(self, case: Case) -> None:
        """Create the Job of a case, and what its pods need beside it."""
        spec = FineTuneJobSpec.model_validate(_SPEC | {"accelerator": case.accelerator} | case.spec)
        shape = shape_pods(spec, CLASSES)
        view = build_view(namespace=self.namespace, uid="0b6e", spec=spec)
        if shape.devices:
            self.api.create(self.path("resourceclaimtemplates"), _disown(build_claim_template(view, shape.devices)))
        self._wait_for_nodes()
        self.api.create(self.path("jobs"), _disown(build_job(view, spec, attempt=1, shape=shape, settings=_SETTINGS)))

    def _wait_for_nodes(self) -> None:
        """Wait until the taint is gone that the API server gives to every node at its creation."""

        def check() -> bool:
            taints = [
                each["key"] for name in self.nodes for each in self.api.get(f"/api/v1/nodes/{name}")["spec"].get("taints", ())
            ]
            return not any(key.startswith("node.kubernetes.io/") for key in taints)

        self.until(check, what="the nodes are ready", seconds=60)

    def pods(self) -> list[dict[str, Any]]:
        return list(self.api.get(self.path("pods"))["items"])

    def wait_for_refusal(self, *words: str) -> None:
        """Wait until the scheduler finds no node for any of the pods, and gives these causes."""

        def check() -> bool:
            placements = [_find_placement(pod) for pod in self.pods()]
            messages = [each.get("message", "") for each in placements if each.get("status") == "False"]
            assert placements
            assert len(placements) == len(messages)
            assert all(word in message for message in messages for word in words), messages
            return True

        self.until(check, what=f"all pods are refused with {words}", seconds=60)

    def wait_for_nodes(self, count: int) -> list[str]:
        """Return the nodes of all pods."""

        def read() -> list[str] | None:
            nodes = [pod["spec"].get("nodeName") for pod in self.pods()]
            return nodes if len(nodes) == count and all(nodes) else None

        return list(self.until(read, what=f"{count} pods have nodes", seconds=60))

    def explain(self, case: Case) -> State:
        """Return the state that users read."""
        (job,) = self.api.get(self.path("jobs"))["items"]
        child, pods = project_child(job), [project_pod(each) for each in self.pods()]
        assert child is not None
        gang = Gang(pods=tuple(each.content for each in pods if each is not None))
        spec = FineTuneJobSpec.model_validate(_SPEC | {"accelerator": case.accelerator})
        return explain_pending(gang, child=child.content, spec=spec)

    def clear(self) -> None:
        """Remove Jobs, pods and nodes."""
        for job in self.api.get(self.path("jobs"))["items"]:
            self.api.delete(self.path("jobs", job["metadata"]["name"]), propagation="Orphan")
        for pod in self.pods():
            self.api.patch(self.path("pods", pod["metadata"]["name"]), {"metadata": {"finalizers": None}})
            self.api.request("DELETE", self.path("pods", pod["metadata"]["name"]), {"gracePeriodSeconds": 0})
        for template in self.api.get(self.path("resourceclaimtemplates"))["items"]:
            self.api.delete(self.path("resourceclaimtemplates", template["metadata"]["name"]))
        for name in self.nodes:
            self.api.request("DELETE", f"{_RESOURCE}/resourceslices/{name}")
            self.api.delete(f"/api/v1/nodes/{name}")
        self.nodes.clear()

    def close(self) -> None:
        self.clear()
        self.api.delete(f"/api/v1/namespaces/{self.namespace}")
        for claim in ("data", "models"):
            self.api.delete(f"/api/v1/persistentvolumes/{self.namespace}-{claim}")


def _storage(key: str) -> dict[str, Any]:
    return {key: {"storage": "1Gi"}}


def _disown(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest without its owner: there is none, so the garbage collector would remove the object."""
    return manifest | {"metadata": {key: value for key, value in manifest["metadata"].items() if key != "ownerReferences"}}


def _find_placement(pod: dict[str, Any]) -> dict[str, Any]:
    conditions = pod["status"].get("conditions") or ()
    return next((dict(each) for each in conditions if each["type"] == "PodScheduled"), {})


def _list_selected(case: Case) -> dict[str, str]:
    spec = FineTuneJobSpec.model_validate(_SPEC | {"accelerator": case.accelerator} | case.spec)
    return dict(shape_pods(spec, CLASSES).node_selector)


@pytest.fixture(scope="module")
def whole_site(api: Any, until: Until) -> Iterator[Site]:
    site = Site(api, until)
    selector = {"cel": {"expression": "device.driver == 'gpu.nvidia.com'"}}
    api.create(f"{_RESOURCE}/deviceclasses", {"metadata": {"name": "gpu.nvidia.com"}, "spec": {"selectors": [selector]}})
    yield site
    api.delete(f"{_RESOURCE}/deviceclasses/gpu.nvidia.com")
    site.close()


@pytest.fixture
def site(whole_site: Site) -> Iterator[Site]:
    """A site without nodes and pods."""
    yield whole_site
    whole_site.clear()


def _add_fitting(site: Site, case: Case) -> list[str]:
    nodes = [site.add_node("fit", resources=case.resources, labels=case.labels, taint=case.taint) for _ in range(case.nodes)]
    if "deviceClass" in case.accelerator:
        for node in nodes:
            site.add_devices(node, count=4)
    return nodes


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_golden_job_is_accepted_by_the_api_server(site: Site, case: Case) -> None:
    job = yaml.safe_load((_GOLDEN / f"accelerator-{case.name}.yaml").read_text(encoding="utf-8"))
    job["metadata"]["namespace"] = site.namespace
    status, answer = site.api.request("POST", site.path("jobs") + "?dryRun=All&fieldValidation=Strict", job)

    assert 201 == status, answer["message"]


def test_the_golden_claim_template_is_accepted_by_the_api_server(site: Site) -> None:
    template = yaml.safe_load((_GOLDEN / "claim-template.yaml").read_text(encoding="utf-8"))
    template["metadata"]["namespace"] = site.namespace
    path = site.path("resourceclaimtemplates") + "?dryRun=All&fieldValidation=Strict"
    status, answer = site.api.request("POST", path, template)

    assert 201 == status, answer["message"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_pods_go_to_nodes_that_have_the_accelerator(site: Site, case: Case) -> None:
    plain = [] if not case.accelerator else [site.add_node("plain", resources={})]
    fitting = _add_fitting(site, case)
    site.submit(case)

    nodes = site.wait_for_nodes(case.nodes)
    worlds = [_read_world(pod) for pod in site.pods()]
    assert set(nodes) <= set(fitting)
    assert not set(nodes) & set(plain)
    assert {(case.nodes, case.processes, case.device, case.backend)} == set(worlds)
    if "tpu" in case.accelerator:
        assert sorted(fitting) == sorted(nodes), "each host of a slice has one pod"


@pytest.mark.parametrize("case", _WITH_ACCELERATORS, ids=lambda case: case.name)
def test_pods_stay_off_nodes_that_lack_the_accelerator(site: Site, case: Case) -> None:
    selected = _list_selected(case)
    site.add_node("plain", resources={})
    site.add_node("bare", resources={}, labels=case.labels, taint=case.taint)
    if selected:
        site.add_node("other", resources=case.resources, labels=dict.fromkeys(selected, "other"), taint=case.taint)
    site.submit(case)

    missing = "cannot allocate all claims" if "deviceClass" in case.accelerator else f"Insufficient {next(iter(case.resources))}"
    site.wait_for_refusal(missing, *(["didn't match Pod's node affinity/selector"] if selected else []))
    state = site.explain(case)
    assert "InsufficientResources" == state.reason
    assert "check spec.accelerator" in state.message
    assert all(f"{label}={value}" in state.message for label, value in selected.items())


@pytest.mark.parametrize("case", [case for case in CASES if _list_selected(case)], ids=lambda case: case.name)
def test_labels_that_no_node_has_are_named(site: Site, case: Case) -> None:
    selected = _list_selected(case)
    site.add_node("other", resources=case.resources, labels=dict.fromkeys(selected, "other"), taint=case.taint)
    site.submit(case)
    site.wait_for_refusal("didn't match Pod's node affinity/selector")

    state = site.explain(case)
    assert "NoMatchingNode" == state.reason
    assert all(f"{label}={value}" in state.message for label, value in selected.items())


def test_the_scheduler_allocates_the_devices_of_a_claim(site: Site) -> None:
    case = next(case for case in CASES if "deviceClass" in case.accelerator)
    (node,) = _add_fitting(site, case)
    site.submit(case)
    site.wait_for_nodes(1)

    (claim,) = site.api.get(site.path("resourceclaims"))["items"]
    allocated = claim["status"]["allocation"]["devices"]["results"]
    assert [("gpu.nvidia.com", node)] * 2 == [(each["driver"], each["pool"]) for each in allocated]
    assert 2 == len({each["device"] for each in allocated})


def _read_world(pod: dict[str, Any]) -> tuple[int, int, str, str]:
    """Return nodes, processes per node, device and backend as the trainer in a pod reads them."""
    variables = {each["name"]: each.get("value") for each in pod["spec"]["containers"][0]["env"]}
    world = TrainerConfig.model_validate_json(variables["FINETUNE_TRAINER_CONFIG"]).world
    return world.nodes, world.processes_per_node, str(world.device), str(world.backend)

"""The rights of the chart's roles on a real API server: they suffice for a whole life, and each of them is used."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import Answer, Fault, FaultProxy, Match
from harness import (
    CLUSTER_RULES,
    LEASE_RULES,
    RULES,
    Operator,
    Team,
    build_operator,
    grant_rights,
    post_progress,
    wait_until,
    write_kubeconfig,
)
from replicas import election

pytestmark = pytest.mark.apiserver

_MODES = ["namespaced", "clusterwide"]
_DEVICE = {"deviceClass": {"name": "gpu.nvidia.com"}}
# It is not asked for by a request: the API server checks it when a child with blockOwnerDeletion is created.
_CHECKED_BY_ADMISSION = "finetunejobs/finalizers update"


@pytest.fixture(params=_MODES)
def any_operator(
    request: pytest.FixtureRequest, team: Team, tls: tuple[Path, Path], tmp_path: Path
) -> Iterator[tuple[Operator, FaultProxy]]:
    """An operator with the rights of the chart for one namespace, or for all, and the proxy that it goes through."""
    clusterwide = request.param == "clusterwide"
    grant_rights(team, clusterwide=clusterwide)
    write_kubeconfig(team, tmp_path / "kubeconfig")
    settings = election(("15", "10", "2")) | ({"namespaces": ""} if clusterwide else {})
    operator = build_operator(team, tls=tls, folder=tmp_path, **settings)
    with FaultProxy(team.api, folder=tmp_path) as proxy:
        proxy.route(tmp_path / "kubeconfig")
        yield operator.start(), proxy
        operator.stop()


def test_rights_suffice_for_a_whole_life_and_all_are_used(
    team: Team, any_operator: tuple[Operator, FaultProxy], tls: tuple[Path, Path], requests: Any, until: Any
) -> None:
    operator, proxy = any_operator
    _live(team, operator, proxy, ca=tls[0])
    operator.stop()
    done = [each for each in requests() if each["user"]["username"] == f"system:serviceaccount:{team.namespace}:operator"]
    # Jobs of other tests lie in namespaces that are about to go, where nothing can be created.
    mine = [each for each in done if each.get("objectRef", {}).get("namespace", team.namespace) == team.namespace]
    used = {right for each in mine for right in _list_rights(each)}
    rules = [*RULES, *CLUSTER_RULES, *LEASE_RULES]
    granted = {f"{resource} {verb}" for rule in rules for resource in rule["resources"] for verb in rule["verbs"]}

    assert [each["requestURI"] for each in mine if each["responseStatus"].get("code") in (401, 403)] == []
    assert granted == used | {_CHECKED_BY_ADMISSION}


def _live(team: Team, operator: Operator, proxy: FaultProxy, *, ca: Path) -> None:
    """Go through everything for which the operator asks the API server."""
    quota = {"metadata": {"name": "small"}, "spec": {"hard": {"requests.cpu": "100"}}}
    team.api.create(team.path("resourcequotas"), quota)
    wait_until(
        lambda: team.api.get(team.path("resourcequotas", "small")).get("status", {}).get("used"), what="the quota is in force"
    )
    team.apply(accelerator=_DEVICE)
    pod = team.wait_for_pod()
    team.run_pod(pod)
    team.wait("Running")
    url = f"{operator.report_url}/apis/trainer.kubeflow.org/v1alpha1/namespaces/{team.namespace}/trainjobs/emoji/status"
    post_progress(url, token=team.create_token(pod), ca=ca)
    team.apply("gang", nodes=2, accelerator=_DEVICE)
    wait_until(lambda: team.state("gang"), what="the Service, the ResourceClaimTemplate and the Job are there")
    # The pod of this Job is refused, so the events about it are listed.
    team.apply("large", resources={"cpu": "1000"})
    team.wait("QuotaExceeded", "large")
    # Somebody deletes the attempt, so the next one asks whether it is really gone; the suspension deletes that one.
    team.api.delete(team.path("jobs", f"emoji-{team.status()['run']}-1"))
    wait_until(lambda: team.status()["attempt"] == 2, what="the next attempt")
    for _ in range(2):
        # The second event about the same is one more in its series.
        team.apply(accelerator=_DEVICE, suspend=True)
        team.wait("Suspended")
        team.apply(accelerator=_DEVICE, suspend=False)
        team.wait("Unschedulable")
    wait_until(lambda: _is_counted(operator, "events", "patch"), what="an event is repeated")
    _interfere(team, operator, proxy)


def _interfere(team: Team, operator: Operator, proxy: FaultProxy) -> None:
    """Refuse a status write as that of somebody who has not seen the latest change: then the operator reads the job anew."""
    status = Match(verb="patch", resource="finetunejobs/status", name="busy")
    proxy.plan(Fault(match=status, action=Answer(409, reason="Conflict")))
    team.apply("busy", suspend=True)
    wait_until(lambda: _is_counted(operator, "finetunejobs", "get"), what="the operator reads a FineTuneJob")


def _is_counted(operator: Operator, resource: str, verb: str) -> bool:
    lines = operator.scrape().splitlines()
    return any(f'resource="{resource}"' in line and f'verb="{verb}"' in line for line in lines if "_requests_total" in line)


def _list_rights(request: dict[str, Any]) -> list[str]:
    """Return the rights that a request needed; an apply that creates is checked for both verbs and logged as a patch."""
    reference = request.get("objectRef", {})
    if "resource" not in reference:
        return []
    resource = "/".join(filter(None, (reference["resource"], reference.get("subresource"))))
    verbs = [request["verb"], *(["create"] if request["responseStatus"].get("code") == 201 else [])]
    return [f"{resource} {verb}" for verb in verbs]


def test_a_child_that_blocks_its_owners_deletion_needs_the_right_on_finalizers(team: Team, until: Any) -> None:
    grant_rights(team)
    _grant_all_but_finalizers(team, "blind")
    job = team.apply()
    owner = {"apiVersion": job["apiVersion"], "kind": job["kind"], "name": "emoji", "uid": job["metadata"]["uid"]}
    container = {"name": "trainer", "image": "trainer:test"}
    child = {
        "metadata": {"name": "child", "ownerReferences": [owner | {"controller": True, "blockOwnerDeletion": True}]},
        "spec": {"template": {"spec": {"restartPolicy": "Never", "containers": [container]}}},
    }

    def create(account: str) -> tuple[int, str]:
        api = team.api.acting_as(f"system:serviceaccount:{team.namespace}:{account}")
        status, answer = api.request("POST", team.path("jobs") + "?dryRun=All", child)
        return status, answer.get("message", "")

    until(lambda: create("operator")[0] == 201, what="the rights count")
    until(lambda: "blockOwnerDeletion" in create("blind")[1], what="the refusal, and not that of missing rights")
    assert 403 == create("blind")[0]


def _grant_all_but_finalizers(team: Team, account: str) -> None:
    prefix = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{team.namespace}"
    rules = [rule for rule in RULES if "finetunejobs/finalizers" not in rule["resources"]]
    reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": account}
    subject = {"kind": "ServiceAccount", "name": account, "namespace": team.namespace}
    team.api.create(f"{prefix}/roles", {"metadata": {"name": account}, "rules": rules})
    team.api.create(f"{prefix}/rolebindings", {"metadata": {"name": account}, "roleRef": reference, "subjects": [subject]})

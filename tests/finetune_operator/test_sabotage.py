"""What a third party does to the children of a FineTuneJob, on a real control plane, and the end that each comes to."""

import re
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from fault_life import PUBLISHED, Witness
from finetune_api import names
from finetune_api.contract import compute_run
from finetune_api.v1alpha1 import FineTuneJobSpec
from harness import SPEC, Operator, Team, build_operator, grant_rights, wait_until, write_kubeconfig
from kubelet_stand_in import KubeletStandIn

pytestmark = pytest.mark.apiserver

_KINDS = {
    "jobs": "/apis/batch/v1",
    "pods": "/api/v1",
    "services": "/api/v1",
    "resourceclaimtemplates": "/apis/resource.k8s.io/v1",
}
# Ours by which children are found. Without any label at all a Job gets those of its pod template back.
_NO_LABELS = {"finetune.dev/job": None, "app.kubernetes.io/managed-by": None}
# Of the Job, its Service and the status, for each attempt.
_MAX_WRITES = 10

Writes = Callable[..., list[tuple[str, str]]]


@dataclass(frozen=True)
class Stage:
    """A namespace with an operator and a stand-in for its nodes, which all tests of this module share."""

    team: Team
    operator: Operator
    kubelet: KubeletStandIn
    witness: Witness


@pytest.fixture(scope="module")
def stage(api: Any, tls: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    team = Team(api, f"team-{secrets.token_hex(4)}")
    folder = tmp_path_factory.mktemp("sabotage")
    grant_rights(team)
    write_kubeconfig(team, folder / "kubeconfig")
    operator = build_operator(team, tls=tls, folder=folder)
    try:
        with KubeletStandIn(team) as kubelet, Witness(team) as witness:
            yield Stage(team=team, operator=operator.start(), kubelet=kubelet, witness=witness)
            _remove(team)
    finally:
        operator.stop()
        api.delete(f"/api/v1/namespaces/{team.namespace}")
    assert "Traceback" not in operator.log, operator.log


def _remove(team: Team) -> None:
    for job in team.api.get(team.path("finetunejobs"))["items"]:
        team.api.delete(team.path("finetunejobs", job["metadata"]["name"]))
    wait_until(lambda: not _list_all(team, ""), what="all is gone with the FineTuneJobs")


def _list_all(team: Team, name: str) -> list[str]:
    """Return kind and name of whatever there is that could be a FineTuneJob's child."""
    found = []
    for plural, prefix in _KINDS.items():
        items = team.api.get(f"{prefix}/namespaces/{team.namespace}/{plural}")["items"]
        found += [f"{plural}/{each['metadata']['name']}" for each in items if each["metadata"]["name"].startswith(name)]
    return found


@dataclass
class Victim:
    """A FineTuneJob of a test."""

    stage: Stage
    name: str
    spec: dict[str, Any] = field(default_factory=dict)

    def begin(self) -> "Victim":
        """Create it, and wait until it runs."""
        self.apply()
        self.wait_until_running(1)
        return self

    def apply(self, **spec: Any) -> None:
        self.stage.team.apply(self.name, **self.spec | spec)

    @property
    def team(self) -> Team:
        return self.stage.team

    @property
    def status(self) -> dict[str, Any]:
        return self.team.status(self.name)

    @property
    def ready(self) -> dict[str, Any]:
        return self.team.condition("Ready", self.name)

    def child(self, attempt: int = 1) -> str:
        return names.child_name(self.name, self.status["run"], attempt)

    def child_path(self, attempt: int = 1) -> str:
        return self.team.path("jobs", self.child(attempt))

    def patch_child(self, body: dict[str, Any]) -> None:
        self.team.api.patch(self.child_path(), body)

    def pods(self) -> list[dict[str, Any]]:
        """Return the pods of all attempts, in the order of their names."""
        items = self.team.api.get(self.team.path("pods"))["items"]
        mine = [each for each in items if each["metadata"]["name"].rsplit("-", 4)[0] == self.name]
        return sorted(mine, key=lambda each: str(each["metadata"]["name"]))

    def wait(self, state: str, *, part: str = "") -> None:
        """Wait for a STATE whose message has a part."""
        wait_until(
            lambda: self.ready.get("reason") == state and part in self.ready["message"],
            what=f"{self.name} is {state} with {part!r}",
        )

    def wait_until_running(self, attempt: int) -> None:
        def is_there() -> bool:
            status = self.status
            return status.get("attempt") == attempt and self.team.state(self.name) == "Running"

        try:
            wait_until(is_there, what=f"attempt {attempt} of {self.name} runs")
        except AssertionError as error:
            children = [each for each in self.team.children() if each["metadata"]["name"].startswith(self.name)]
            raise AssertionError(f"{error}: {self.ready} {children} {self.pods()}") from error

    def end(self, exit_code: int = 0) -> None:
        """Let the running trainers end, with a model if they end well."""
        for number, pod in enumerate(each for each in self.pods() if each["status"]["phase"] == "Running"):
            self.team.end_pod(pod, exit_code, message="" if number or exit_code else PUBLISHED)

    def complete(self) -> dict[str, Any]:
        self.end()
        return self.team.wait("Complete", self.name)

    def list_writes(self, writes: Writes) -> list[tuple[str, str]]:
        """Return what the operator wrote to it and its children; events have a limit of their own."""
        mine = re.compile(rf"/(finetunejobs|jobs|services)/{self.name}(/status|-[0-9a-f]{{8}}(-[0-9]+)?)$")
        paths = [(verb, path.split("?")[0]) for verb, path in writes(self.team, about=self.name)]
        return [(verb, path) for verb, path in paths if mine.search(path)]

    def check(self, writes: Writes, *, attempts: int, extra: int = 0) -> None:
        """Check what is never so, with extra writes for what was tried in vain or begun twice."""
        mine = self.list_writes(writes)
        applied = {path for verb, path in mine if verb == "patch" and "/jobs/" in path}

        assert attempts == len(applied), applied
        assert self.name not in self.stage.witness.overlaps, "two attempts at a time"
        assert len(mine) <= _MAX_WRITES * attempts + extra, mine


@dataclass(frozen=True)
class Case:
    """What is done to the Job of a running attempt, and which attempt goes on from there."""

    name: str
    strike: Callable[[Victim], object]
    nodes: int = 1
    attempt: int = 2
    restarts: tuple[tuple[str, bool], ...] = ()


def _patch(body: dict[str, Any]) -> Callable[[Victim], object]:
    return lambda victim: victim.patch_child(body)


def _label(name: str, value: str | None) -> Callable[[Victim], object]:
    return _patch({"metadata": {"labels": {f"finetune.dev/{name}": value}}})


def _delete(propagation: str) -> Callable[[Victim], object]:
    return lambda victim: victim.team.api.delete(victim.child_path(), propagation=propagation)


def _seize(victim: Victim) -> None:
    """Take a field by server-side apply, as a rival controller does."""
    body = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": victim.child()}, "spec": {"parallelism": 0}}
    victim.team.api.apply(victim.child_path(), body, manager="rival")


CASES = (
    Case("background", _delete("Background"), nodes=2),
    Case("foreground", _delete("Foreground"), nodes=2),
    Case("parallelism", _patch({"spec": {"parallelism": 0}})),
    Case("seized", _seize),
    Case("more-pods", _patch({"spec": {"parallelism": 2, "completions": 2}})),
    Case("fewer-pods", _patch({"spec": {"parallelism": 1, "completions": 1}}), nodes=2),
    Case("deadline", _patch({"spec": {"activeDeadlineSeconds": 1}}), restarts=(("PodDeleted", False),)),
    Case("pod-shape", _label("pod-shape", "another")),
    Case("run", _label("run", "0badcafe")),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_attempt_that_was_tampered_with_is_replaced(stage: Stage, writes: Writes, case: Case) -> None:
    victim = Victim(stage, case.name, {"nodes": case.nodes, "runPolicy": {"backoffLimit": 0}}).begin()
    case.strike(victim)
    victim.wait_until_running(case.attempt)
    status = victim.complete()

    assert case.restarts == tuple((each["reason"], each["counted"]) for each in status.get("restartHistory", ()))
    assert status.get("restartsCountedTowardsLimit", 0) == 0
    victim.check(writes, attempts=2)


@pytest.mark.parametrize("propagation", ["Background", "Orphan"])
def test_next_attempt_waits_for_the_pods_of_a_job_that_somebody_deleted(stage: Stage, writes: Writes, propagation: str) -> None:
    victim = Victim(stage, f"slow-{propagation.lower()}", {"nodes": 2}).begin()
    stage.kubelet.held.add(victim.name)
    first = victim.pods()
    _delete(propagation)(victim)
    victim.wait("Pending", part=f"waits until pod {first[0]['metadata']['name']}, {first[1]['metadata']['name']} has stopped")
    victim.team.end_pod(first[0], 75)
    victim.wait("Pending", part=f"waits until pod {first[1]['metadata']['name']} has stopped")
    victim.team.end_pod(first[1], 75)
    victim.wait_until_running(2)
    stage.kubelet.held.remove(victim.name)
    victim.complete()
    for pod in first:
        _remove_orphan(victim, pod)

    victim.check(writes, attempts=2)


def _remove_orphan(victim: Victim, pod: dict[str, Any]) -> None:
    """Delete a pod that belongs to no Job any more, as only a person can."""
    path = victim.team.path("pods", pod["metadata"]["name"])
    if victim.team.api.exists(path):
        victim.team.api.delete(path)


def test_jobs_that_are_deleted_as_soon_as_they_come_cost_a_bounded_number_of_writes(stage: Stage, writes: Writes) -> None:
    victim = Victim(stage, "again-and-again")
    victim.apply()
    wait_until(lambda: victim.status.get("run"), what="it has begun")
    for attempt in range(1, 11):
        wait_until(lambda: victim.team.api.exists(victim.child_path(attempt)), what=f"there is attempt {attempt}")  # noqa: B023
        victim.team.api.delete(victim.child_path(attempt))
    victim.wait_until_running(11)
    status = victim.complete()

    assert status.get("restartsCountedTowardsLimit", 0) == 0
    victim.check(writes, attempts=11)


def test_attempt_that_somebody_suspends_goes_on_when_it_is_resumed(stage: Stage, writes: Writes) -> None:
    victim = Victim(stage, "suspended", {"runPolicy": {"backoffLimit": 0}}).begin()
    created_at = datetime.fromisoformat(victim.pods()[0]["metadata"]["creationTimestamp"])
    victim.patch_child({"spec": {"suspend": True}})
    victim.wait("Queued", part="the manager that suspended the Job has to admit attempt 1")
    # Pods are ordered by the second of their creation.
    wait_until(lambda: datetime.now(UTC) - created_at > timedelta(seconds=1), what="a second is over")
    victim.patch_child({"spec": {"suspend": False}})
    victim.wait_until_running(1)
    status = victim.complete()

    assert [("QueueEvicted", False)] == [(each["reason"], each["counted"]) for each in status["restartHistory"]]
    victim.check(writes, attempts=1, extra=_MAX_WRITES)


def test_model_counts_though_its_job_goes_at_once(stage: Stage, writes: Writes) -> None:
    victim = Victim(stage, "no-time-to-live").begin()
    victim.patch_child({"spec": {"ttlSecondsAfterFinished": 0}})
    victim.complete()
    wait_until(lambda: not _list_all(victim.team, f"{victim.name}-"), what="the Job is gone")

    assert "Complete" == victim.ready["reason"]
    victim.check(writes, attempts=1)


@pytest.mark.parametrize("label", ["app.kubernetes.io/managed-by", "finetune.dev/job", "finetune.dev/job-uid"])
def test_job_that_lost_its_labels_is_told_of_when_it_is_in_the_way(stage: Stage, writes: Writes, label: str) -> None:
    victim = Victim(stage, f"unlabelled-{label[-3:]}").begin()
    victim.patch_child({"metadata": {"labels": {label: None}}})
    pod = victim.pods()[0]
    victim.wait("Pending", part=pod["metadata"]["name"])
    victim.end(1)
    victim.wait("NameTaken", part=victim.child())
    victim.team.api.delete(victim.child_path())
    victim.wait_until_running(2)
    victim.complete()

    assert ("Warning", "NameTaken") in victim.team.events(victim.name)
    victim.check(writes, attempts=2)


def test_job_that_lost_its_labels_still_publishes(stage: Stage, writes: Writes) -> None:
    victim = Victim(stage, "unlabelled").begin()
    victim.patch_child({"metadata": {"labels": _NO_LABELS}})
    victim.wait("Pending", part=victim.pods()[0]["metadata"]["name"])
    victim.complete()

    victim.check(writes, attempts=1)


def test_labels_that_come_back_bring_the_attempt_back(stage: Stage, writes: Writes) -> None:
    victim = Victim(stage, "relabelled").begin()
    labels = victim.team.api.get(victim.child_path())["metadata"]["labels"]
    victim.patch_child({"metadata": {"labels": _NO_LABELS}})
    victim.wait("Pending", part=victim.pods()[0]["metadata"]["name"])
    victim.patch_child({"metadata": {"labels": labels}})
    victim.wait_until_running(1)
    victim.complete()

    victim.check(writes, attempts=1)


def test_job_that_lost_its_owner_gets_it_back_and_goes_with_it(stage: Stage, writes: Writes) -> None:
    victim = Victim(stage, "disowned").begin()
    owners = victim.team.api.get(victim.child_path())["metadata"]["ownerReferences"]
    for _ in range(3):
        victim.patch_child({"metadata": {"ownerReferences": None}})
        wait_until(
            lambda: owners == victim.team.api.get(victim.child_path())["metadata"].get("ownerReferences"),
            what="the owner is back",
        )
    victim.team.api.delete(victim.team.path("finetunejobs", victim.name))

    wait_until(lambda: not _list_all(victim.team, f"{victim.name}-"), what="all is gone")
    victim.check(writes, attempts=1)


def test_job_that_is_orphaned_on_purpose_is_not_taken_back(stage: Stage, writes: Writes) -> None:
    victim = Victim(stage, "let-go").begin()
    path = victim.child_path()
    victim.team.api.delete(victim.team.path("finetunejobs", victim.name), propagation="Orphan")
    wait_until(lambda: not victim.team.api.exists(victim.team.path("finetunejobs", victim.name)), what="the job is gone")

    assert victim.team.api.get(path)["metadata"].get("ownerReferences", []) == []
    victim.apply()
    victim.wait("NameTaken", part=path.rsplit("/", 1)[1])
    victim.team.api.delete(path)
    victim.wait_until_running(1)
    victim.complete()
    assert victim.name not in stage.witness.overlaps


def test_pod_that_lost_our_labels_ends_its_attempt_and_no_more(stage: Stage, writes: Writes) -> None:
    victim = Victim(stage, "unlabelled-pod", {"runPolicy": {"backoffLimit": 0}}).begin()
    pod = victim.pods()[0]
    victim.team.api.patch(victim.team.path("pods", pod["metadata"]["name"]), {"metadata": {"labels": _NO_LABELS}})
    victim.end(1)
    victim.wait_until_running(2)
    status = victim.complete()

    assert [("PodLost", False)] == [(each["reason"], each["counted"]) for each in status["restartHistory"]]
    victim.check(writes, attempts=2)


def test_next_attempt_waits_for_a_pod_that_its_job_was_made_to_release(stage: Stage, writes: Writes) -> None:
    victim = Victim(stage, "released-pod").begin()
    released = victim.pods()[0]
    path = victim.team.path("pods", released["metadata"]["name"])
    labels = {"batch.kubernetes.io/controller-uid": None, "controller-uid": None}
    victim.team.api.patch(path, {"metadata": {"labels": labels}})
    wait_until(lambda: len(victim.pods()) == 2, what="the Job controller makes another pod")
    other = next(each for each in victim.pods() if each["metadata"]["name"] != released["metadata"]["name"])
    wait_until(lambda: _phase(victim, other) == "Running", what="it runs")
    victim.team.end_pod(other, 1)
    victim.wait("Pending", part=f"waits until pod {released['metadata']['name']} has stopped")
    victim.team.end_pod(released, 1)
    victim.wait_until_running(2)
    victim.complete()
    _remove_orphan(victim, released)

    victim.check(writes, attempts=2)


def _phase(victim: Victim, pod: dict[str, Any]) -> str:
    return str(victim.team.api.get(victim.team.path("pods", pod["metadata"]["name"]))["status"]["phase"])


def _find_service(victim: Victim) -> str:
    uid = victim.team.job(victim.name)["metadata"]["uid"]
    return victim.team.path("services", names.service_name(victim.name, uid))


def test_deleted_service_is_there_again_for_the_next_attempt(stage: Stage, writes: Writes) -> None:
    victim = Victim(stage, "no-service", {"nodes": 2}).begin()
    path = _find_service(victim)
    victim.team.api.delete(path)
    victim.end(76)
    victim.wait_until_running(2)

    assert victim.team.api.exists(path)
    victim.complete()
    victim.check(writes, attempts=2)


def test_service_that_somebody_changed_is_told_of_and_holds_the_next_attempt(stage: Stage, writes: Writes) -> None:
    victim = Victim(stage, "bent-service", {"nodes": 2}).begin()
    path = _find_service(victim)
    victim.team.api.patch(path, {"spec": {"selector": {"finetune.dev/job-uid": "another"}}})
    victim.end(1)
    victim.wait("FieldConflict", part=path.rsplit("/", 1)[1])
    before = len(victim.list_writes(writes))
    _let_another_job_pass(stage, "passes-bent-service")
    tries = len(victim.list_writes(writes)) - before
    victim.team.api.delete(path)
    victim.wait_until_running(2)
    victim.complete()

    assert tries <= _MAX_WRITES
    victim.check(writes, attempts=2, extra=_MAX_WRITES)


def _let_another_job_pass(stage: Stage, name: str) -> None:
    """Wait for as long as a job takes, without sleeping."""
    Victim(stage, name).begin().complete()


def test_wiped_status_is_derived_anew(stage: Stage, writes: Writes) -> None:
    victim = Victim(stage, "wiped").begin()
    before = victim.status
    for _ in range(2):
        body = {"status": dict.fromkeys(victim.status)}
        victim.team.api.patch(victim.team.path("finetunejobs", victim.name) + "/status", body)
        victim.wait_until_running(1)
    after = victim.status
    complete = victim.complete()
    victim.team.api.patch(victim.team.path("finetunejobs", victim.name) + "/status", {"status": dict.fromkeys(complete)})
    again = victim.team.wait("Complete", victim.name)

    assert [before[each] for each in ("run", "attempt", "podShape")] == [after[each] for each in ("run", "attempt", "podShape")]
    assert complete["output"] == again["output"]
    victim.check(writes, attempts=1)


def test_name_that_a_foreign_job_has_is_told_of_and_taken_when_it_is_free(stage: Stage, writes: Writes) -> None:
    run = compute_run(FineTuneJobSpec.model_validate(SPEC))
    container = {"name": "stranger", "image": "i"}
    pod = {"spec": {"restartPolicy": "Never", "containers": [container]}}
    name = names.child_name("squatted", run, 1)
    foreign = stage.team.api.create(
        stage.team.path("jobs"), {"metadata": {"name": name}, "spec": {"suspend": True, "template": pod}}
    )
    victim = Victim(stage, "squatted")
    victim.apply()
    victim.wait("NameTaken", part=name)
    _let_another_job_pass(stage, "passes-squatted")
    tries = len(victim.list_writes(writes))
    left = victim.team.api.get(victim.team.path("jobs", name))
    victim.team.api.delete(victim.team.path("jobs", name))
    victim.wait_until_running(1)
    victim.complete()

    assert tries <= _MAX_WRITES
    assert (foreign["metadata"]["uid"], foreign["spec"]) == (left["metadata"]["uid"], left["spec"])
    assert ("Warning", "NameTaken") in victim.team.events(victim.name)


def test_name_of_a_later_attempt_that_a_foreign_job_has_is_told_of(stage: Stage, writes: Writes) -> None:
    victim = Victim(stage, "ambushed").begin()
    foreign = {"metadata": {"name": victim.child(2)}, "spec": {"suspend": True, "template": _pod_template()}}
    victim.team.api.create(victim.team.path("jobs"), foreign)
    victim.end(1)
    victim.wait("NameTaken", part=victim.child(2))
    victim.team.api.delete(victim.child_path(2))
    victim.wait_until_running(2)
    victim.complete()

    victim.check(writes, attempts=2)


def _pod_template() -> dict[str, Any]:
    return {"spec": {"restartPolicy": "Never", "containers": [{"name": "stranger", "image": "i"}]}}


def test_deletion_while_the_operator_is_down_leaves_nothing_of_many_pods(stage: Stage, writes: Writes) -> None:
    victim = Victim(stage, "bereft", {"nodes": 2}).begin()
    uid = victim.team.job(victim.name)["metadata"]["uid"]
    children = [victim.child_path(), _find_service(victim)]
    stage.operator.stop()
    owners = [victim.team.api.get(path)["metadata"]["ownerReferences"] for path in children]
    victim.team.api.delete(victim.team.path("finetunejobs", victim.name))
    wait_until(lambda: not _list_all(victim.team, f"{victim.name}-"), what="all is gone")
    before = writes(victim.team, about=victim.name)
    stage.operator.start()
    _let_another_job_pass(stage, "passes-bereft")

    assert [(uid, True, True)] * 2 == [(each["uid"], each["controller"], each["blockOwnerDeletion"]) for (each,) in owners]
    assert before == writes(victim.team, about=victim.name)
    victim.check(writes, attempts=1)


@pytest.mark.faults
def test_namespace_that_goes_takes_all_with_it_and_leaves_the_operator(
    api: Any, team: Team, tls: tuple[Path, Path], tmp_path: Path, requests: Any
) -> None:
    """The operator watches another namespace than its own."""
    doomed = Team(api, f"{team.namespace}-doomed")
    grant_rights(team, clusterwide=True)
    write_kubeconfig(team, tmp_path / "kubeconfig")
    operator = build_operator(team, tls=tls, folder=tmp_path, namespaces=doomed.namespace)
    try:
        with KubeletStandIn(doomed):
            operator.start()
            for name, nodes in (("one", 1), ("two", 2)):
                doomed.apply(name, nodes=nodes)
                doomed.wait("Running", name)
            api.delete(f"/api/v1/namespaces/{doomed.namespace}")
            wait_until(lambda: not api.exists(f"/api/v1/namespaces/{doomed.namespace}"), what="it is gone", seconds=120)
        written = _list_writes_of(team, requests())
        again = Team(api, doomed.namespace)
        with KubeletStandIn(again):
            again.apply("one")
            again.wait("Running", "one")
            assert operator.is_healthy()
            api.delete(f"/api/v1/namespaces/{again.namespace}")
    finally:
        operator.stop()

    assert "Traceback" not in operator.log, operator.log
    assert len(written) <= 4 * _MAX_WRITES, written


def _list_writes_of(team: Team, requests: list[dict[str, Any]]) -> list[tuple[str, str, int]]:
    user = f"system:serviceaccount:{team.namespace}:operator"
    mine = [each for each in requests if each["user"]["username"] == user and each["verb"] in ("patch", "delete")]
    lines = [(each["verb"], each["requestURI"].split("?")[0], each["responseStatus"].get("code", 0)) for each in mine]
    return [line for line in lines if "/events/" not in line[1]]

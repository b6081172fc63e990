"""Faults of etcd behind a real API server: its history is compacted, it hangs, and it comes back from a backup.

The control plane is the module's own, as all others that use it are harmed as well.
"""

import contextlib
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from etcd import Etcd
from fault_life import LIFE, PUBLISHED, Keeper, await_state, live, run_attempt
from fault_proxy import WRITES, Answer, Fault, FaultProxy, Match
from harness import Operator, Team, grant_rights, post_progress, wait_until, write_kubeconfig
from plane import Plane
from replicas import Replicas, seed_lease

pytestmark = pytest.mark.apiserver

_KINDS = ("finetunejobs", "jobs", "pods", "finetuneprofiles")
_EXPIRED = Answer(410, reason="Expired", message="The provided continue parameter is too old")
_REST = Match(verb="list", query="continue=")
_SECONDS = 240.0


@pytest.fixture(scope="module")
def control_plane(run_control_plane: Callable[[str], AbstractContextManager[Path]]) -> Iterator[Path]:
    with run_control_plane("etcd") as kubeconfig:
        yield kubeconfig


@pytest.fixture(scope="module")
def api(control_plane: Path, open_api: Callable[[Path], AbstractContextManager[Any]]) -> Iterator[Any]:
    with open_api(control_plane) as api:
        yield api


@pytest.fixture
def plane(control_plane: Path) -> Plane:
    return Plane(control_plane)


@pytest.fixture
def audited(operator: Operator) -> Operator:
    """The team's operator, with an audit every second or so."""
    operator._environment["FINETUNE_AUDIT_SECONDS"] = "1"
    return operator


def _hold_by_signal(operator: Operator, proxy: FaultProxy) -> Callable[[], None]:
    operator.send(signal.SIGSTOP)
    proxy.cut_watches()
    return lambda: operator.send(signal.SIGCONT)


def _hold_by_network(operator: Operator, proxy: FaultProxy) -> Callable[[], None]:
    proxy.plan(Fault(match=Match(verb="watch"), action=Answer(503), times=None))
    proxy.cut_watches()
    return proxy.heal


@pytest.mark.parametrize(
    "hold",
    [
        pytest.param(_hold_by_signal, id="stopped"),
        pytest.param(_hold_by_network, id="without watches", marks=pytest.mark.faults),
    ],
)
def test_what_happens_in_a_gap_that_is_compacted_is_made_up_for(
    team: Team,
    audited: Operator,
    proxy: FaultProxy,
    plane: Plane,
    control_plane: Path,
    created: Any,
    hold: Callable[[Operator, FaultProxy], Callable[[], None]],
) -> None:
    """Things come, change and go; then no API server can tell of it any more but by new lists."""
    audited.start()
    pods = _run_first(team, "stays", "goes", "fails", "loses", "again")
    stays = _uid(team, "stays")
    let_go = hold(audited, proxy)
    _change_much(team, pods)
    Etcd(control_plane).compact()
    plane.restart("kube-apiserver")
    since = time.monotonic()
    let_go()
    _run_first(team, "comes", "again")
    run_attempt(team, 2, "fails")
    run_attempt(team, 2, "loses")
    seconds = time.monotonic() - since
    wait_until(lambda: _count_jobs(audited) == {"Running": 5}, what="it knows the five that there are")
    purges, audits = _read(audited, "finetune_audit_purges_total"), _read(audited, 'finetune_audits_total{result="clean"}')
    wait_until(lambda: _read(audited, 'finetune_audits_total{result="clean"}') > audits + 1, what="audits find nothing")

    assert set(_KINDS) == {resource for resource, code in proxy.ended if code == 410}
    assert stays == _uid(team, "stays")
    assert {
        "stays-1": 1,
        "goes-1": 1,
        "fails-1": 1,
        "fails-2": 1,
        "loses-1": 1,
        "loses-2": 1,
        "again-1": 2,
        "comes-1": 1,
    } == _name(created(team))
    assert purges == _read(audited, "finetune_audit_purges_total") > 0
    print(f"all is as it should be after {seconds:.1f} s, {purges:.0f} missed deletions")


def _run_first(team: Team, *names: str) -> dict[str, Any]:
    """Have FineTuneJobs run that may have been applied before."""
    for name in names:
        team.apply(name)
    return {name: run_attempt(team, 1, name) for name in names}


def _change_much(team: Team, pods: dict[str, Any]) -> None:
    team.end_pod(pods["fails"], 1, message="Traceback: no")
    for name in ("goes", "again"):
        team.api.delete(team.path("finetunejobs", name))
    for name in ("goes", "again", "loses"):
        _remove_job(team, pods[name])
    wait_until(lambda: {"stays", "fails"} == {_owner(each) for each in team.children()}, what="the Jobs are gone")
    wait_until(lambda: {"stays", "fails"} == {_owner(each) for each in team.pods()}, what="the pods are gone")
    team.apply("again")
    team.apply("comes")
    team.apply("flashes")
    team.api.delete(team.path("finetunejobs", "flashes"))


def test_list_that_expires_half_way_is_made_anew_at_the_start(
    team: Team, operator: Operator, proxy: FaultProxy, created: Any
) -> None:
    for name in ("a", "b", "c"):
        team.apply(name)
    proxy.chunk = 1
    expired = Fault(match=_REST, action=_EXPIRED, times=3)
    proxy.plan(expired)
    operator.start()
    for name in ("a", "b", "c"):
        run_attempt(team, 1, name)

    assert 3 == expired.struck
    assert {"a-1": 1, "b-1": 1, "c-1": 1} == _name(created(team))


@pytest.mark.faults
def test_audits_whose_lists_expire_half_way_are_made_up_for(
    team: Team, audited: Operator, proxy: FaultProxy, created: Any
) -> None:
    for name in ("a", "b"):
        team.apply(name, suspend=True)
    proxy.chunk = 1
    # The lists of the start come first.
    expired = Fault(match=_REST, action=_EXPIRED, nth=5, every=3, times=None)
    proxy.plan(expired)
    with Keeper(audited) as keeper:
        wait_until(lambda: expired.struck, what="a list expires")
        assert LIFE == live(team)
        for result in ("error", "clean"):
            # How many audits a life sees depends on the machine.
            wait_until(lambda: _read(audited, f'finetune_audits_total{{result="{result}"}}') > 0, what=result)  # noqa: B023

    assert [] == keeper.exits
    assert 3 == len(created(team))
    print(f"expired {expired.struck} lists")


@pytest.mark.parametrize("seconds", [10, pytest.param(60, marks=pytest.mark.faults)])
def test_etcd_that_hangs_ends_no_process_and_is_caught_up(
    team: Team,
    operator: Operator,
    proxy: FaultProxy,
    plane: Plane,
    created: Any,
    tls: tuple[Path, Path],
    seconds: float,
) -> None:
    """Writes are in flight when it begins, and a trainer reports meanwhile."""
    names = [f"starts-{number}" for number in range(5)]
    operator.start()
    pod = _run_first(team, "runs")["runs"]
    token = team.create_token(pod)
    for name in names:
        team.apply(name)
    with plane.freeze("etcd"):
        before = len(proxy.requests)
        _report(team, operator, "runs", token=token, ca=tls[0])
        time.sleep(seconds)
        rate = (len(proxy.requests) - before) / seconds
        assert operator.is_healthy()
    since = time.monotonic()
    wait_until(lambda: _progress(team, "runs") == 40, what="the report is shown", seconds=_SECONDS)
    _catch_up(team, names, pod=pod)
    took = time.monotonic() - since

    print(f"{rate:.1f} requests/s for {seconds} s, all is caught up after {took:.1f} s")
    assert operator.is_running
    _check_created(team, created(team), {"runs-1", *(f"{name}-1" for name in names)})
    assert rate <= 5
    assert took <= 30


def test_write_finds_that_etcd_was_restored(
    team: Team,
    operator: Operator,
    proxy: FaultProxy,
    plane: Plane,
    created: Any,
    tls: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    """What was seen is newer than what there is, and the audit is minutes away; the trainer only knows that it trains."""
    with Keeper(operator) as keeper:
        wait_until(operator._is_ready, what="it is ready", seconds=_SECONDS)
        pod = _run_first(team, "stays")["stays"]
        token = team.create_token(pod)
        backup = plane.back_up(tmp_path)
        _report(team, operator, "stays", token=token, ca=tls[0])
        wait_until(lambda: _progress(team, "stays") == 40, what="progress is shown")
        _run_first(team, "vanishes")
        plane.restore(backup)
        assert _progress(team, "stays") is None
        before, num_created = len(proxy.requests), len(created(team))

        def report() -> bool:
            return _report(team, operator, "stays", token=token, ca=tls[0], percentage=50) and _progress(team, "stays") == 50

        since = time.monotonic()
        wait_until(report, what="progress is shown again", seconds=_SECONDS)
        seconds = time.monotonic() - since
        team.end_pod(pod, message=PUBLISHED)
        await_state(team, "Complete", "stays")

    writes = [each for each in proxy.requests[before:] if each.is_write]
    assert [1] == keeper.exits
    assert "as of before what was seen" in operator.log
    assert len(writes) <= 20, writes
    assert [] == created(team)[num_created:]
    assert {"stays"} == {_owner(each) for each in team.children()}
    print(f"all is as it should be after {seconds:.1f} s and {len(writes)} writes")


@pytest.mark.faults
@pytest.mark.parametrize("is_bumped", [False, True], ids=["revisions go back", "revisions go on"])
def test_operator_begins_anew_when_etcd_is_restored(
    team: Team,
    audited: Operator,
    proxy: FaultProxy,
    plane: Plane,
    control_plane: Path,
    requests: Any,
    created: Any,
    tmp_path: Path,
    *,
    is_bumped: bool,
) -> None:
    """What was done since the backup is undone: failures, retries, ends, suspensions, creations and deletions."""
    with Keeper(audited) as keeper:
        wait_until(audited._is_ready, what="it is ready", seconds=_SECONDS)
        pods = _run_first(team, "stays", "failed", "ended", "suspended", "deleted")
        uids = {name: _uid(team, name) for name in pods}
        backup = plane.back_up(tmp_path)
        _go_on(team, pods)
        # Much else happens in a cluster; else the start of the control plane makes up for the revisions that are lost.
        Etcd(control_plane).age(300)
        num_requests, num_created, version = len(requests()), len(created(team)), _version(team)
        since = time.monotonic()
        plane.restore(backup, is_revision_bumped=is_bumped)
        serves = time.monotonic()
        assert is_bumped == (_version(team) > version)
        wait_until(lambda: _count_jobs(audited) == {"Running": 5}, what="it knows what there is", seconds=_SECONDS)
        seconds = time.monotonic() - serves
        assert uids == {name: _uid(team, name) for name in pods}
        team.end_pod(pods["failed"], 1, message="Traceback: no")
        again = run_attempt(team, 2, "failed")
        for name, pod in (pods | {"failed": again}).items():
            team.end_pod(pod, message=PUBLISHED)
            await_state(team, "Complete", name)
        _run_first(team, "vanishes")
        wait_until(lambda: _count_jobs(audited) == {"Running": 1, "Complete": 5}, what="all is known", seconds=_SECONDS)
        total = time.monotonic() - since

    ours = _select(requests()[num_requests:], team)
    codes = Counter(each["responseStatus"]["code"] for each in ours if each["verb"] in WRITES)
    assert [1] == keeper.exits
    assert "as of before what was seen" in audited.log
    assert {"failed-2": 1, "vanishes-1": 1} == _name(created(team)[num_created:])
    assert codes.keys() <= {200, 201, 404, 409}
    assert sum(codes.values()) < 100, codes
    print(f"all is known {seconds:.1f} s after the restore, writes in {total:.0f} s: {dict(codes)}")


def _go_on(team: Team, pods: dict[str, Any]) -> None:
    team.end_pod(pods["failed"], 1, message="Traceback: no")
    run_attempt(team, 2, "failed")
    team.end_pod(pods["ended"], message=PUBLISHED)
    await_state(team, "Complete", "ended")
    team.apply("suspended", suspend=True)
    await_state(team, "Suspended", "suspended")
    team.api.delete(team.path("finetunejobs", "deleted"))
    _remove_job(team, pods["deleted"])
    wait_until(lambda: "deleted" not in {_owner(each) for each in team.children()}, what="its Job is gone")
    _run_first(team, "vanishes")


@pytest.mark.faults
def test_only_the_leader_begins_anew_while_etcd_hangs(
    team: Team, plane: Plane, created: Any, tls: tuple[Path, Path], tmp_path: Path
) -> None:
    """It must not write when its Lease may be another's; the start of a process waits for the API server."""
    names = [f"starts-{number}" for number in range(5)]
    grant_rights(team)
    write_kubeconfig(team, tmp_path / "kubeconfig")
    replicas = Replicas(team, tls=tls, folder=tmp_path, lease=("15", "10", "2"))
    seed_lease(team)
    with FaultProxy(team.api, folder=tmp_path) as proxy, contextlib.ExitStack() as stack:
        proxy.route(tmp_path / "kubeconfig")
        stack.callback(replicas.stop)
        keepers = [stack.enter_context(Keeper(each)) for each in replicas.operators]
        for operator in replicas.operators:
            operator.wait_until_ready()
        leader = replicas.operators.index(replicas.find_leader())
        pod = _run_first(team, "runs")["runs"]
        for name in names:
            team.apply(name)
        with plane.freeze("etcd"):
            before = len(proxy.requests)
            time.sleep(60)
            rate = (len(proxy.requests) - before) / 60
        since = time.monotonic()
        _catch_up(team, names, pod=pod)
        took = time.monotonic() - since

    print(f"{rate:.1f} requests/s, all is caught up after {took:.1f} s")
    assert [[1] if number == leader else [] for number in range(2)] == [keeper.exits for keeper in keepers]
    _check_created(team, created(team), {"runs-1", *(f"{name}-1" for name in names)})
    assert rate <= 10
    assert took <= 30


def _catch_up(team: Team, names: list[str], *, pod: dict[str, Any]) -> None:
    """Wait until the jobs of these names run, and the one that ran before has completed."""
    for name in names:
        run_attempt(team, 1, name)
    team.end_pod(pod, message=PUBLISHED)
    await_state(team, "Complete", "runs")


def _report(team: Team, operator: Operator, name: str, *, token: str, ca: Path, percentage: int = 40) -> bool:
    """Report progress as a trainer does, and return whether that was accepted."""
    url = f"{operator.report_url}/apis/trainer.kubeflow.org/v1alpha1/namespaces/{team.namespace}/trainjobs/{name}/status"
    return post_progress(url, token=token, ca=ca, percentage=percentage)[0] == 200


def _remove_job(team: Team, pod: dict[str, Any]) -> None:
    """Delete the Job of a pod, as the garbage collector may not yet: it needs half a minute to hear of a new kind of owners."""
    path = team.path("jobs", pod["metadata"]["labels"]["job-name"])
    status, _ = team.api.request("DELETE", path, {"propagationPolicy": "Background"})
    assert status in (200, 404)


def _progress(team: Team, name: str) -> int | None:
    value: int | None = team.status(name).get("trainerStatus", {}).get("progressPercentage")
    return value


def _version(team: Team) -> int:
    return int(team.api.get(team.path("jobs"))["metadata"]["resourceVersion"])


def _uid(team: Team, name: str) -> str:
    """Return the uid of the only Job of a FineTuneJob."""
    (child,) = (each for each in team.children() if _owner(each) == name)
    return str(child["metadata"]["uid"])


def _owner(raw: dict[str, Any]) -> str:
    return str(raw["metadata"]["labels"]["finetune.dev/job"])


def _name(children: list[str]) -> Counter[str]:
    """Count Jobs by their names without the run."""
    return Counter(re.sub(r"-[0-9a-f]{8}-(\d+)$", r"-\1", each) for each in children)


def _check_created(team: Team, created: list[str], expected: set[str]) -> None:
    """Check that these Jobs exist, and that none was created twice.

    The audit log has another code than 201 for a creation that took effect when its client had given up, or had ended.
    """
    assert Counter(expected) == _name([each["metadata"]["name"] for each in team.children()])
    assert _name(created) <= Counter(expected), created


def _count_jobs(operator: Operator) -> dict[str, int]:
    """Return how many FineTuneJobs of each state the operator knows."""
    found = re.findall(r'^finetune_jobs\{state="(\w+)"\} (\S+)$', operator.scrape(), re.MULTILINE)
    return {state: int(float(number)) for state, number in found if float(number)}


def _read(operator: Operator, sample: str) -> float:
    """Return the sum of the samples whose names begin so."""
    lines = (line.rsplit(" ", 1) for line in operator.scrape().splitlines() if line.startswith(sample))
    return sum(float(value) for _, value in lines)


def _select(requests: list[dict[str, Any]], team: Team) -> list[dict[str, Any]]:
    user = f"system:serviceaccount:{team.namespace}:operator"
    return [each for each in requests if each["user"]["username"] == user]

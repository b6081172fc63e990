"""Several operators on a real control plane: one leads, and whatever happens, no two of them write."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import grant_rights, post_progress, write_kubeconfig
from replicas import LEASE, Replicas, count_writers, find_intruders, read_lease

pytestmark = pytest.mark.apiserver

_LEASE = ("5", "3.5", "0.5")


@pytest.fixture
def replicas(team: Any, tls: tuple[Path, Path], tmp_path: Path) -> Iterator[Replicas]:
    """Two operators, of which one leads."""
    grant_rights(team)
    write_kubeconfig(team, tmp_path / "kubeconfig")
    replicas = Replicas(team, tls=tls, folder=tmp_path, lease=_LEASE)
    try:
        yield replicas.start()
    finally:
        replicas.stop()
    for operator in replicas.operators:
        assert "Traceback" not in operator.log, operator.log


@pytest.fixture
def intruders(requests: Callable[[], list[dict[str, Any]]], team: Any) -> Callable[[], list[str]]:
    return lambda: find_intruders(requests(), team, lease_seconds=float(_LEASE[0]))


def test_standby_hands_reports_on_and_takes_over_from_a_leader_that_ends(
    team: Any, replicas: Replicas, tls: tuple[Path, Path], until: Any, intruders: Any, writes: Any
) -> None:
    leader, standby = replicas.find_both()
    team.apply()
    pod = team.wait_for_pod()
    team.run_pod(pod)
    team.wait("Running")
    url = f"{standby.report_url}/apis/trainer.kubeflow.org/v1alpha1/namespaces/{team.namespace}/trainjobs/emoji/status"
    until(lambda: post_progress(url, token=team.create_token(pod), ca=tls[0])[0] == 200, what="the pod is known")
    until(lambda: team.status().get("trainerStatus", {}).get("progressPercentage") == 40, what="progress is shown")
    assert "finetune_leader 1.0" in leader.scrape()
    assert "finetune_leader 0.0" in standby.scrape()
    assert 'finetune_jobs{state="Running"} 0.0' in standby.scrape()
    until(lambda: ("Normal", "Running") in team.events(), what="the event")
    before = writes(team, about="emoji")

    assert 0 == leader.stop()
    replicas.find_leader(other_than=leader)
    team.apply("marker")
    team.wait("Unschedulable", "marker")

    assert before == writes(team, about="emoji")
    assert [] == intruders()
    assert 'finetune_jobs{state="Running"} 1.0' in standby.scrape()
    assert "finetune_leader_transitions 2.0" in standby.scrape()


def test_standby_takes_over_from_a_leader_that_is_killed(team: Any, replicas: Replicas, intruders: Any, requests: Any) -> None:
    killed, standby = replicas.find_both()
    team.apply()
    pod = team.wait_for_pod()
    killed.stop(signal.SIGKILL)
    team.run_pod(pod)
    team.wait("Running")
    killed.start()
    team.apply("marker")
    team.wait("Unschedulable", "marker")

    assert standby is replicas.find_leader()
    assert 2 == len(team.children())
    assert (2, []) == (count_writers(requests(), team), intruders())


def test_leader_that_was_stopped_writes_nothing_when_it_goes_on(team: Any, replicas: Replicas, intruders: Any) -> None:
    zombie, standby = replicas.find_both()
    team.apply()
    team.wait("Unschedulable")
    # Work for the process to be in the middle of.
    for number in range(5):
        team.apply(f"job-{number}")
    zombie.send(signal.SIGSTOP)
    replicas.find_leader(other_than=zombie)
    for number in range(5):
        team.wait("Unschedulable", f"job-{number}")
        team.apply(f"job-{number}", suspend=True)
    zombie.send(signal.SIGCONT)

    assert 1 == zombie.wait()
    assert "beginning anew as a standby" in zombie.log
    for number in range(5):
        team.wait("Suspended", f"job-{number}")
    assert standby is replicas.find_leader()
    assert [] == intruders()


def test_lease_that_others_delete_or_change_brings_no_second_leader(
    team: Any, replicas: Replicas, until: Any, intruders: Any
) -> None:
    leader, standby = replicas.find_both()
    first = read_lease(team)
    team.api.delete(team.path("leases", LEASE))
    again = until(lambda: read_lease(team), what="the Lease is made again")
    team.apply("deleted")
    team.wait("Unschedulable", "deleted")
    assert first["spec"]["holderIdentity"] == again["spec"]["holderIdentity"]

    team.api.patch(team.path("leases", LEASE), {"spec": {"holderIdentity": "somebody"}})
    assert 1 == leader.wait()
    assert standby is replicas.find_leader(other_than=leader)
    team.apply("changed")
    team.wait("Unschedulable", "changed")

    assert [] == intruders()
    assert {"deleted", "changed"} == {each["metadata"]["labels"]["finetune.dev/job"] for each in team.children()}

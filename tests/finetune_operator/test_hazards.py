"""The hazards of kopf, shown with plain kopf at the real API server, and that the operator is guarded against each.

docs/design/kopf-hazards.md describes them. A test of plain kopf fails when kopf has mended the hazard: then the guard can go.
"""

import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import Answer, Fault, Match
from harness import Operator, build_operator, grant_rights, wait_until, write_kubeconfig
from nursery import Nursery
from plain_kopf import PlainKopf, WatchProxy

pytestmark = pytest.mark.apiserver

_MENDED = "kopf has mended this hazard; see docs/design/kopf-hazards.md for the guard that can go"
_RBAC = "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings"

StartKopf = Callable[..., PlainKopf]
StartOperator = Callable[..., Operator]


@pytest.fixture
def watch_proxy(api: Any, tmp_path: Path) -> Iterator[WatchProxy]:
    with WatchProxy(api, folder=tmp_path) as proxy:
        yield proxy


@pytest.fixture
def start_kopf(team: Any, watch_proxy: WatchProxy, tmp_path: Path) -> Iterator[StartKopf]:
    """Start `kopf run` behind the proxy with scripts of hazards/."""
    kubeconfig = tmp_path / "plain"
    write_kubeconfig(team, kubeconfig, account="plain")
    watch_proxy.route(kubeconfig)
    subject = {"kind": "ServiceAccount", "name": "plain", "namespace": team.namespace}
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"}
    team.api.create(_RBAC, {"metadata": {"name": f"plain-{team.namespace}"}, "roleRef": role, "subjects": [subject]})
    started: list[PlainKopf] = []

    def start(*scripts: str, **environment: str) -> PlainKopf:
        log = tmp_path / f"{'-'.join(scripts)}.log"
        started.append(PlainKopf(*scripts, team=team, kubeconfig=kubeconfig, log=log, **environment))
        return started[-1].start()

    yield start
    for each in started:
        each.stop()
    team.api.delete(f"{_RBAC}/plain-{team.namespace}")


@pytest.fixture
def start_operator(
    team: Any, tls: tuple[Path, Path], watch_proxy: WatchProxy, nursery: Nursery, tmp_path: Path
) -> Iterator[StartOperator]:
    """Start the team's operator behind the proxy with settings."""
    grant_rights(team)
    write_kubeconfig(team, tmp_path / "kubeconfig")
    watch_proxy.route(tmp_path / "kubeconfig")
    started: list[Operator] = []

    def start(**settings: str) -> Operator:
        started.append(build_operator(team, tls=tls, folder=tmp_path, spawn=nursery.spawn, **settings))
        return started[-1].start()

    yield start
    for each in started:
        each.stop()
        assert "Traceback" not in each.log, each.log


def _wait(check: Callable[[], Any], *, what: str, seconds: float = 240) -> None:
    """Wait for long: on a busy machine a process alone takes a minute to start."""
    wait_until(check, what=what, seconds=seconds)


def _create_map(team: Any, name: str, **labels: str) -> None:
    team.api.create(team.path("configmaps"), {"metadata": {"name": name, "labels": labels}})


def _delete_unseen(team: Any, proxy: WatchProxy, name: str) -> None:
    """Delete a FineTuneJob while nobody can watch, and let the version from which they want to go on expire."""
    refused = Fault(match=Match(verb="watch", resource="finetunejobs"), action=Answer(503), times=None)
    proxy.plan(refused)
    assert proxy.cut_watches("finetunejobs") == 1
    _wait(lambda: refused.struck, what="the watch is away")
    team.api.delete(team.path("finetunejobs", name))
    _wait(lambda: not team.api.exists(team.path("finetunejobs", name)), what="the object is gone")
    proxy.expire("finetunejobs")
    proxy.heal()
    _wait(lambda: proxy.num_expired, what="a watch from an expired version")


def test_plain_kopf_keeps_what_was_deleted_before_a_relist(
    team: Any,
    watch_proxy: WatchProxy,
    start_kopf: StartKopf,
) -> None:
    team.apply("goes")
    team.apply("stays")
    kopf = start_kopf("lost_deletions")
    _wait(lambda: watch_proxy.count_watches("finetunejobs"), what="kopf watches")
    kopf.wait_for("None stays index: goes stays")
    _delete_unseen(team, watch_proxy, "goes")
    _wait(lambda: len([each for each in kopf.lines if each.startswith("None stays")]) == 2, what="kopf lists again")
    team.apply("later")

    assert kopf.wait_for("ADDED later") == "ADDED later index: goes later stays", _MENDED
    assert "DELETED goes" not in kopf.log, _MENDED


def test_operator_purges_what_was_deleted_before_a_relist(
    team: Any, watch_proxy: WatchProxy, start_operator: StartOperator
) -> None:
    team.apply("goes", suspend=True)
    operator = start_operator(audit_seconds="1")
    team.wait("Suspended", "goes")
    _wait(lambda: watch_proxy.count_watches("finetunejobs"), what="kopf watches")
    _delete_unseen(team, watch_proxy, "goes")
    _wait(lambda: 'finetune_audit_purges_total{resource="finetunejobs"} 1.0' in operator.scrape(), what="a purge")
    team.apply("later", suspend=True)
    team.wait("Suspended", "later")

    assert 'finetune_jobs{state="Suspended"} 1.0' in operator.scrape()
    assert "missed a deletion among the finetunejobs" in operator.log


def test_plain_kopf_goes_deaf_without_a_word(team: Any, watch_proxy: WatchProxy, start_kopf: StartKopf) -> None:
    # A turn of 6 s: the event falls into the right one though it be 3 s early or late on a busy machine.
    plain = start_kopf("silent_death", INACTIVITY_TIMEOUT="27")

    assert _find_dead_watchers(team, watch_proxy, plain, window=27) == {"configmaps.v1"}, _MENDED
    assert "configmap after" not in plain.lines
    with urllib.request.urlopen(plain.health_url, timeout=60) as answer:
        assert answer.status == 200


@pytest.mark.faults
def test_busy_kopf_goes_deaf_with_the_default_settings_and_not_with_the_operators(
    team: Any, watch_proxy: WatchProxy, start_kopf: StartKopf
) -> None:
    plain = start_kopf("silent_death")
    guarded = start_kopf("silent_death", "guard")

    assert _find_dead_watchers(team, watch_proxy, plain, guarded, window=70) == {"configmaps.v1"}, _MENDED
    assert "configmap after" not in plain.lines
    guarded.wait_for("configmap after")


def _find_dead_watchers(team: Any, proxy: WatchProxy, plain: PlainKopf, *others: PlainKopf, window: float) -> set[str]:
    """Hand an event on just when the window of inactivity ends; return the resources that plain kopf no longer watches."""
    all_of_them = (plain, *others)
    # Kubernetes promises no interval of bookmarks; each of them would begin the window anew.
    proxy.hold_bookmarks = True
    for resource in ("configmaps", "secrets"):
        _wait(lambda resource=resource: proxy.count_watches(resource) == len(all_of_them), what="they watch")
    _create_map(team, "first")
    for each in all_of_them:
        each.wait_for("busy")
    # The window ends in the middle of a turn of the event loop, and the event comes in the middle of the turn before.
    time.sleep(window / 4.5 * 3.5)
    _create_map(team, "late")
    for each in all_of_them:
        each.wait_for("idle")
    _create_map(team, "after")
    team.api.create(team.path("secrets"), {"metadata": {"name": "after"}})
    for each in all_of_them:
        each.wait_for("secret after")
    alive = plain.wait_for("secret after").split("alive:")[1]
    return {each for each in ("configmaps.v1", "secrets.v1") if f"watcher for {each}@" not in alive}


def test_plain_kopf_loses_objects_when_its_first_stream_is_cut(team: Any, watch_proxy: WatchProxy, start_kopf: StartKopf) -> None:
    # The API server streams them by name, not by age.
    for name in ("zebra", "yak", "ant"):
        _create_map(team, name, hazard="c")
    watch_proxy.cut_after("configmaps", events=1)
    plain = start_kopf("initial_streaming")
    plain.wait_for("None ant")
    _wait(lambda: watch_proxy.count_watches("configmaps"), what="it watches again")
    _create_map(team, "later", hazard="c")
    _wait(lambda: any(each.endswith(" later") for each in plain.lines), what="it sees what comes later")

    assert {"None yak", "None zebra", "ADDED yak", "ADDED zebra"}.isdisjoint(plain.lines), _MENDED


def test_kopf_with_the_operators_settings_sees_all_objects_whatever_is_cut(
    team: Any, watch_proxy: WatchProxy, start_kopf: StartKopf
) -> None:
    for name in ("zebra", "yak", "ant"):
        _create_map(team, name, hazard="c")
    watch_proxy.cut_after("configmaps", events=0)
    guarded = start_kopf("initial_streaming", "guard")
    for name in ("zebra", "yak", "ant"):
        guarded.wait_for(f"None {name}")
    _create_map(team, "later", hazard="c")
    guarded.wait_for("ADDED later")


@pytest.mark.faults
def test_outage_ends_plain_kopf_and_not_the_operator(
    team: Any, watch_proxy: WatchProxy, start_kopf: StartKopf, start_operator: StartOperator
) -> None:
    plain = start_kopf("fatal_watch")
    operator = start_operator()
    _wait(lambda: watch_proxy.count_watches("configmaps"), what="kopf watches")
    watch_proxy.plan(Fault(match=Match(verb=frozenset({"list", "watch"})), action=Answer(503), times=None))
    watch_proxy.cut_watches()
    _wait(lambda: plain.exit_code is not None, what=f"plain kopf ends; {_MENDED}", seconds=300)
    assert operator.is_healthy()
    watch_proxy.heal()
    team.apply(suspend=True)
    team.wait("Suspended")

    assert "APIServerError" in plain.log
    assert plain.exit_code not in (0, None)


def test_deaf_operator_is_found_and_an_idle_one_is_left_alone(
    team: Any, watch_proxy: WatchProxy, start_operator: StartOperator
) -> None:
    operator = start_operator(audit_seconds="0.5", deaf_seconds="3")
    team.apply("seen", suspend=True)
    team.wait("Suspended", "seen")
    _wait(lambda: _read(operator, 'finetune_audits_total{result="clean"}') >= 5, what="audits of an idle operator")
    assert _read(operator, 'finetune_audits_total{result="deaf"}') == 0
    assert operator.is_healthy()

    watch_proxy.freeze_watches("finetunejobs")
    team.apply("unseen", suspend=True)
    _wait(lambda: _read(operator, 'finetune_audit_lagging_objects{resource="finetunejobs"}') == 1, what="the lag is shown")

    assert operator.wait(seconds=240) == 1
    assert "1 changes of finetunejobs did not arrive within 3 s" in operator.log

    watch_proxy.heal()
    operator.start()
    team.wait("Suspended", "unseen")


def _read(operator: Operator, sample: str) -> float:
    lines = (line.rsplit(" ", 1) for line in operator.scrape().splitlines())
    return next((float(value) for name, value in lines if name == sample), 0.0)

"""Bring a cluster up and down: the order of things, and what is cleaned when."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from localcluster.binaries import CLUSTER, CONTROL_PLANE, ensure_binaries
from localcluster.controlplane import NAMES as CONTROL_PLANE_NAMES
from localcluster.controlplane import ensure_control_plane
from localcluster.errors import ClusterError
from localcluster.locks import locked
from localcluster.network import node_address
from localcluster.node import NAMES as NODE_NAMES
from localcluster.node import (
    claim_machine,
    clean_machine,
    ensure_containerd,
    ensure_node,
    owner_of_machine,
    prepare_machine,
    release_machine,
)
from localcluster.paths import CLUSTERS, MACHINE, Instance
from localcluster.processes import boot_id, is_running, stop
from localcluster.shell import say
from localcluster.state import (
    ClusterState,
    choose_ports,
    find_free_port,
    is_free_port,
    preferred_ports,
    read_state,
    write_state,
)

# What a cluster leaves when it goes down: the users' data and the logs.
KEPT = ("volumes", "logs")


def up(instance: Instance, *, mode: str, has_audit_log: bool) -> None:
    """Bring a cluster up, or what is missing of it."""
    has_node = mode == "node"
    if has_node:
        prepare_machine()
    ensure_binaries(CLUSTER if has_node else CONTROL_PLANE)
    with _locked(instance, has_node=has_node):
        if has_node:
            claim_machine(instance)
        state = _recover_state(instance, mode=mode)
        ensure_control_plane(instance, state, has_audit_log=has_audit_log)
        if has_node:
            ensure_node(instance, state)
    say(f"{instance.name} is up ({mode})")


def down(instance: Instance) -> None:
    """Stop a cluster's processes and remove all it made but volumes and logs."""
    with _locked(instance, has_node=owner_of_machine() == instance.folder):
        _tear_down(instance)
        if owner_of_machine() == instance.folder:
            release_machine()
    say(f"{instance.name} is down")


def up_containerd(instance: Instance) -> None:
    """Start the node's containerd alone, so that images can be imported before the cluster is up."""
    prepare_machine()
    with _locked(instance, has_node=True):
        claim_machine(instance)
        ensure_containerd(instance)


def all_instances() -> tuple[Instance, ...]:
    """Return the clusters of this work tree."""
    if not CLUSTERS.is_dir():
        return ()
    return tuple(Instance(path) for path in sorted(CLUSTERS.iterdir()) if path.is_dir())


def describe(instance: Instance) -> str:
    """Return a few lines on what runs of a cluster, nothing for one that is down."""
    state = read_state(instance)
    if state is None:
        return ""
    names = (*CONTROL_PLANE_NAMES, *(NODE_NAMES if state.mode == "node" else ()))
    rows = (f"  {name:<24} {'running' if is_running(instance, name) else 'not running'}" for name in names)
    return "\n".join((f"{instance.name}: {state.mode}, kubeconfig {instance.kubeconfig}", *rows))


@contextmanager
def _locked(instance: Instance, *, has_node: bool) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(locked(instance.folder.with_suffix(".lock")))
        if has_node:
            stack.enter_context(locked(MACHINE / "lock"))
        yield


def _recover_state(instance: Instance, *, mode: str) -> ClusterState:
    """Return the state to go on with: the recorded one if it is of this boot and mode, else a fresh one."""
    state = read_state(instance)
    if state is not None and state.boot_id != boot_id():
        say(f"{instance.name}: the machine was restarted since, starting afresh")
        _tear_down(instance)
        state = None
    if state is None:
        _stop_lost_programs(instance)
        ports = choose_ports(preferred_ports(instance.name), is_free=is_free_port, any_free_port=find_free_port)
        state = ClusterState(mode=mode, ports=ports, boot_id=boot_id(), node_ip=node_address())
    elif state.mode == "node" and mode == "control-plane":
        raise ClusterError(f"{instance.name} runs with a node; take it down first or give another --name")
    state = ClusterState(mode=mode, ports=state.ports, boot_id=state.boot_id, node_ip=state.node_ip)
    write_state(instance, state)
    return state


def _stop_lost_programs(instance: Instance) -> None:
    """Stop what runs of a cluster whose state is gone, but for a containerd that images were imported into."""
    for name in (*reversed(NODE_NAMES), *reversed(CONTROL_PLANE_NAMES)):
        if name != "containerd":
            stop(instance, name)


def _tear_down(instance: Instance) -> None:
    if owner_of_machine() == instance.folder:
        clean_machine(instance)
    for name in (*reversed(NODE_NAMES), *reversed(CONTROL_PLANE_NAMES)):
        stop(instance, name)
    if instance.folder.is_dir():
        for path in instance.folder.iterdir():
            if path.name not in KEPT:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

"""An upgrade of the chart and the operator while jobs run: nothing that runs is replaced, and no status is lost.

Helm installs the chart of an earlier commit, and the operator of that commit runs beside the cluster with the settings of the
chart's Deployment and the rights of its service account; then the chart and the operator of this tree take over.
"""

import base64
import contextlib
import json
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.operator import ROOT
from bench.scale.client import Client, do_all, wait_until
from bench.scale.cluster import World, find_program, wait_for_crds
from bench.scale.figures import Figure
from bench.scale.load import apply_finetunejob, finetunejobs, jobs, number, read_state
from bench.scale.operators import RunningOperator, run_operator
from bench.scale.stages import HOLD, RELEASE

_NAMESPACE, _RELEASE = "upgrade", "finetune-operator"
_SYSTEM = "finetune"
# A change of one of these is a change of what is installed or of what the operator makes.
_MANIFESTS = ("operator/finetune_operator/manifests", "api/finetune_api", "charts")
_PARTS = ("api", "operator", "charts")


def measure_upgrade(world: World, *, running: int, start: str | None = None) -> list[Figure]:
    """Upgrade from an earlier commit with jobs that run, and return what that has cost them."""
    earlier = world.folder / "earlier"
    commit = start or find_earlier_commit()
    extract_commit(commit, earlier)
    namespace_of_operator = f"/api/v1/namespaces/{_SYSTEM}"
    world.client.create("/api/v1/namespaces", {"metadata": {"name": _SYSTEM}})
    wait_until(lambda: world.client.get(f"{namespace_of_operator}/serviceaccounts/default"), what="an account", seconds=120)
    world.create_namespace(_NAMESPACE)
    held, done = number(HOLD, running), number("done-", max(1, running // 10))
    with _run_release(world, earlier) as operator:
        do_all(lambda name: apply_finetunejob(world.client, _NAMESPACE, name), [*held, *done])
        expected = {"Running": len(held), "Complete": len(done)}
        _wait_for_states(world.client, expected, seconds=300 + running)
        operator.wait_until_quiet()
        before = _take_picture(world.client)
    late = _use_without_operator(world, held[0])
    with _run_release(world, ROOT) as operator:
        _wait_for_states(world.client, expected | {"Complete": len(done) + len(late)}, seconds=300 + running)
        operator.wait_until_quiet()
        after = _take_picture(world.client)
        _release_pods(world.client)
        _wait_for_states(world.client, {"Complete": len(held) + len(done) + len(late)}, seconds=300 + running)
        end = _take_picture(world.client)
    return [
        _count(
            "children-replaced",
            f"child Jobs replaced, of {len(before['jobs'])} (from commit {commit[:7]})",
            before,
            after,
            "jobs",
        ),
        _count("pods-replaced", f"pods replaced, of {len(before['pods'])}", before, after, "pods"),
        _zero("statuses-lost", f"statuses with a field lost or changed, of {len(before['statuses'])}", count_lost(before, after)),
        _zero(
            "restarts",
            "restarts of jobs that ran through the upgrade",
            sum(each.get("restarts", 0) for each in end["statuses"].values()),
        ),
    ]


def find_earlier_commit() -> str:
    """Return the commit before the last one that changed what is installed or what the operator makes."""
    last = _git("log", "-1", "--format=%H", "--", *_MANIFESTS)
    return _git("rev-parse", f"{last}^1")


def extract_commit(commit: str, folder: Path) -> None:
    """Write the operator and the chart of a commit to a folder."""
    folder.mkdir()
    archive = subprocess.run(["git", "archive", commit, *_PARTS], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, check=True)


def count_lost(before: dict[str, Any], after: dict[str, Any]) -> int:
    """Return how many statuses lack or contradict what they said before (pure)."""
    return sum(not contains(after["statuses"].get(name), status) for name, status in before["statuses"].items())


def contains(after: Any, before: Any) -> bool:
    """Return whether a value has everything that an earlier one had; fields may have come (pure)."""
    if isinstance(before, dict):
        return isinstance(after, dict) and all(contains(after.get(key), value) for key, value in before.items())
    if isinstance(before, list):
        return isinstance(after, list) and len(after) >= len(before) and all(any(contains(a, b) for a in after) for b in before)
    return bool(after == before)


@contextlib.contextmanager
def _run_release(world: World, tree: Path) -> Iterator[RunningOperator]:
    """Install or upgrade the chart of a tree and run the operator of that tree as the Deployment says."""
    helm = [find_program("helm"), "--kubeconfig", str(world.kubeconfig), "--namespace", _SYSTEM]
    chart = tree / "charts" / "finetune-operator"
    # The Deployment's pods are kwok's, so the real operator runs here.
    subprocess.run([*helm, "upgrade", "--install", _RELEASE, str(chart)], check=True, stdout=subprocess.DEVNULL)
    wait_for_crds(world.client)
    folder = world.folder / f"release-{len(list(world.folder.glob('release-*')))}"
    folder.mkdir()
    deployment = world.client.get(f"/apis/apps/v1/namespaces/{_SYSTEM}/deployments/{_RELEASE}")
    settings = read_environment(deployment) | _write_secret(world.client, deployment, folder)
    kubeconfig = _write_kubeconfig(world.client, deployment["spec"]["template"]["spec"]["serviceAccountName"], folder)
    path = ":".join(str(tree / part) for part in ("operator", "api"))
    with run_operator(kubeconfig, folder, settings=settings, python_path=path) as operator:
        yield operator


def read_environment(deployment: dict[str, Any]) -> dict[str, str]:
    """Return the settings that a Deployment gives to the operator, without those of the pod's own network (pure)."""
    fields = {"metadata.name": f"{_RELEASE}-0", "metadata.namespace": _SYSTEM, "status.podIP": "127.0.0.1"}
    found: dict[str, str] = {}
    for each in deployment["spec"]["template"]["spec"]["containers"][0]["env"]:
        path = each.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
        found[each["name"]] = str(each.get("value", fields.get(path, "")))
    return {name: value for name, value in found.items() if not name.endswith(("_PORT", "_BIND_ADDRESS"))}


def _write_secret(client: Client, deployment: dict[str, Any], folder: Path) -> dict[str, str]:
    """Write the receiver's certificate to files, and return the settings that name them."""
    volumes = deployment["spec"]["template"]["spec"]["volumes"]
    name = next(each["secret"]["secretName"] for each in volumes if each["name"] == "tls")
    for key, value in client.get(f"/api/v1/namespaces/{_SYSTEM}/secrets/{name}")["data"].items():
        (folder / f"chart-{key}").write_bytes(base64.b64decode(value))
    files = {"REPORT_CA_FILE": "ca.crt", "TLS_CERTIFICATE_FILE": "tls.crt", "TLS_KEY_FILE": "tls.key"}
    return {f"FINETUNE_{setting}": str(folder / f"chart-{file}") for setting, file in files.items()}


def _write_kubeconfig(client: Client, account: str, folder: Path) -> Path:
    """Write a kubeconfig with a token of the chart's service account."""
    path = f"/api/v1/namespaces/{_SYSTEM}/serviceaccounts/{account}/token"
    token = client.create(path, {"spec": {"expirationSeconds": 7200}})["status"]["token"]
    authority = base64.b64encode(client.authority.encode()).decode()
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": client.server, "certificate-authority-data": authority}}],
        "users": [{"name": "u", "user": {"token": token}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    kubeconfig = folder / "kubeconfig"
    kubeconfig.write_text(json.dumps(config), encoding="utf-8")
    return kubeconfig


def _use_without_operator(world: World, held: str) -> list[str]:
    """Use the API while no operator runs, as users do, and return the FineTuneJobs that are left of that."""
    names = number("late-", 3)
    for name in names:
        apply_finetunejob(world.client, _NAMESPACE, name)
    path = f"{finetunejobs(_NAMESPACE)}/{names[-1]}"
    world.client.merge(path, {"spec": {"runPolicy": {"ttlSecondsAfterFinished": 86_400}}})
    # What the CRD says of a FineTuneJob that no operator has looked at.
    assert world.client.get(path)["status"]["observedGeneration"] == -1, "an operator runs that should not"
    world.client.delete(path)
    wait_until(lambda: not _exists(world.client, path), what="a FineTuneJob is deleted without its operator", seconds=60)
    assert read_state(world.client.get(f"{finetunejobs(_NAMESPACE)}/{held}")) == "Running"
    return names[:-1]


def _exists(client: Client, path: str) -> bool:
    try:
        client.get(path)
    except LookupError:
        return False
    return True


def _take_picture(client: Client) -> dict[str, Any]:
    """Return the uids of child Jobs and pods, and all statuses, by name."""
    pods = client.list(f"/api/v1/namespaces/{_NAMESPACE}/pods")
    return {
        "jobs": {each["metadata"]["name"]: each["metadata"]["uid"] for each in client.list(jobs(_NAMESPACE))},
        "pods": {each["metadata"]["name"]: each["metadata"]["uid"] for each in pods},
        "statuses": {each["metadata"]["name"]: each["status"] for each in client.list(finetunejobs(_NAMESPACE))},
    }


def _wait_for_states(client: Client, expected: dict[str, int], *, seconds: float) -> None:
    def read() -> Counter[str]:
        return Counter(read_state(each) for each in client.list(finetunejobs(_NAMESPACE)))

    wait_until(
        lambda: read() == expected,
        what=f"the FineTuneJobs are {expected}",
        seconds=seconds,
        poll_seconds=2,
    )


def _release_pods(client: Client) -> None:
    """Let the trainers that run come to their end."""
    pods = [each for each in client.list(f"/api/v1/namespaces/{_NAMESPACE}/pods") if each["status"]["phase"] == "Running"]
    patch = {"metadata": {"annotations": {RELEASE: "true"}}}
    do_all(lambda pod: client.merge(f"/api/v1/namespaces/{_NAMESPACE}/pods/{pod['metadata']['name']}", patch), pods)


def _count(name: str, text: str, before: dict[str, Any], after: dict[str, Any], kind: str) -> Figure:
    return _zero(name, text, sum(after[kind].get(each) != uid for each, uid in before[kind].items()))


def _zero(name: str, text: str, value: float) -> Figure:
    return Figure(name=name, text=text, value=value, digits=0, goal=0)


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()

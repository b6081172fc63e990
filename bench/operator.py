"""The operator on a control plane without a node: how fast child Jobs are made, at what cost, and what a re-apply writes."""

import argparse
import base64
import contextlib
import http.client
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from finetune_api.crd import build_crds

ROOT = Path(__file__).parents[1]
NAMESPACE = "bench"
JOBS = f"/apis/batch/v1/namespaces/{NAMESPACE}/jobs"
EVENTS = f"/apis/events.k8s.io/v1/namespaces/{NAMESPACE}/events"
FINETUNEJOBS = f"/apis/finetune.dev/v1alpha1/namespaces/{NAMESPACE}/finetunejobs"
_USER_AGENT = "finetune-operator"
_WRITES = frozenset({"create", "update", "patch", "delete"})


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="20 FineTuneJobs: shows that it runs, not how fast it is")
    number = 20 if parser.parse_args().quick else 200
    with run_control_plane() as kubeconfig, tempfile.TemporaryDirectory() as folder:
        api = Api(kubeconfig)
        prepare(api)
        with run_operator(kubeconfig, Path(folder)) as process:
            print_table(measure(api, kubeconfig.parent / "audit.log", process=process, number=number), number=number)
    return 0


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What one run showed."""

    latencies: tuple[float, ...]
    seconds: float
    writes: dict[str, int]
    cpu_seconds: float
    idle_bytes: int
    loaded_bytes: int
    writes_after_reapply: int


class Api:
    """Plain requests to the API server, with a connection for each thread."""

    def __init__(self, kubeconfig: Path) -> None:
        config = yaml.safe_load(kubeconfig.read_text(encoding="utf-8"))
        cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
        self._address = urlsplit(cluster["server"])
        self._tls = ssl.create_default_context(cadata=base64.b64decode(cluster["certificate-authority-data"]).decode())
        with tempfile.NamedTemporaryFile() as pair:
            pair.write(base64.b64decode(user["client-certificate-data"]) + base64.b64decode(user["client-key-data"]))
            pair.flush()
            self._tls.load_cert_chain(pair.name)

    def request(self, method: str, path: str, body: Any = None) -> Any:
        """Return the parsed answer; a PATCH is a server-side apply."""
        link = http.client.HTTPSConnection(str(self._address.hostname), self._address.port, context=self._tls)
        with contextlib.closing(link) as connection:
            kind = "application/apply-patch+yaml" if method == "PATCH" else "application/json"
            query = "?fieldManager=bench&force=true" if method == "PATCH" else ""
            content = None if body is None else json.dumps(body)
            connection.request(method, path + query, content, {"Content-Type": kind, "User-Agent": "bench"})
            answer = connection.getresponse()
            parsed = json.loads(answer.read())
            if answer.status >= 300 and answer.status != 404:
                raise RuntimeError(f"{method} {path}: {parsed.get('message')}")
            return parsed


@contextlib.contextmanager
def run_control_plane() -> Iterator[Path]:
    """Run a control plane of its own and give the path of its kubeconfig."""
    name = f"bench-{os.getpid()}"
    command = [sys.executable, str(ROOT / "hack" / "cluster")]
    try:
        subprocess.run([*command, "up", "--name", name, "--mode", "control-plane"], check=True, stdout=sys.stderr)
        yield ROOT / ".local" / "clusters" / name / "kubeconfig"
    finally:
        subprocess.run([*command, "down", "--name", name], check=False, stdout=sys.stderr)


def prepare(api: Api) -> None:
    """Make the CustomResourceDefinitions and the namespace."""
    for crd in build_crds():
        path = f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{crd['metadata']['name']}"
        api.request("PATCH", path, crd)
        while not any(
            each["type"] == "Established" and each["status"] == "True"
            for each in api.request("GET", path).get("status", {}).get("conditions") or ()
        ):
            time.sleep(0.05)
    api.request("POST", "/api/v1/namespaces", {"metadata": {"name": NAMESPACE}})


@contextlib.contextmanager
def run_operator(kubeconfig: Path, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run the operator with its default settings until it is ready."""
    certificate, key = folder / "tls.crt", folder / "tls.key"
    openssl = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=localhost"
    subprocess.run([*openssl.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    ports = {name: find_port() for name in ("REPORT", "METRICS", "HEALTH")}
    settings = {f"FINETUNE_{name}_PORT": str(port) for name, port in ports.items()} | {
        "KUBECONFIG": str(kubeconfig),
        "FINETUNE_TRAINER_IMAGE": "trainer",
        "FINETUNE_BIND_ADDRESS": "127.0.0.1",
        "FINETUNE_REPORT_URL": f"https://localhost:{ports['REPORT']}",
        "FINETUNE_REPORT_CA_FILE": str(certificate),
        "FINETUNE_TLS_CERTIFICATE_FILE": str(certificate),
        "FINETUNE_TLS_KEY_FILE": str(key),
        "FINETUNE_LEADER_ELECTION": "false",
    }
    environment = os.environ | settings  # noqa: TID251  the operator's own settings travel this way
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "finetune_operator"], env=environment, stderr=log)
    try:
        wait_until_ready(f"http://127.0.0.1:{ports['HEALTH']}/readyz")
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)


def measure(api: Api, audit_log: Path, *, process: subprocess.Popen[bytes], number: int) -> Measurement:
    """Apply all FineTuneJobs at once, wait until all is quiet, then apply them again."""
    idle_bytes, cpu_before = read_memory(process.pid), read_cpu(process.pid)
    started_at = time.monotonic()
    apply_all(api, number=number)
    while len(api.request("GET", JOBS)["items"]) < number:
        time.sleep(0.2)
    seconds = time.monotonic() - started_at
    wait_until_quiet(audit_log)
    writes, named, events = count_writes(audit_log), count_writes(audit_log, about="job-"), count_events(api)
    cpu_seconds = read_cpu(process.pid) - cpu_before
    apply_all(api, number=number)
    # One more job passes through the same queue, so its child shows that the others were dealt with.
    apply(api, "last")
    while len(api.request("GET", JOBS)["items"]) < number + 1:
        time.sleep(0.1)
    wait_until_quiet(audit_log)
    more = sum(count_writes(audit_log, about="job-").values()) - sum(named.values()) + count_events(api) - events
    return Measurement(
        latencies=read_latencies(audit_log),
        seconds=seconds,
        writes=writes,
        cpu_seconds=cpu_seconds,
        idle_bytes=idle_bytes,
        loaded_bytes=read_memory(process.pid),
        writes_after_reapply=more,
    )


def apply_all(api: Api, *, number: int) -> None:
    """Apply the FineTuneJobs, 16 in flight."""
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda index: apply(api, f"job-{index:04d}"), range(number)))


def apply(api: Api, name: str) -> None:
    """Apply one FineTuneJob."""
    body = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {
            "task": "image-classification",
            "dataset": {"uri": "pvc://datasets/pictures"},
            "output": {"uri": f"pvc://models/{name}"},
        },
    }
    api.request("PATCH", f"{FINETUNEJOBS}/{name}", body)


def count_events(api: Api) -> int:
    """Return the number of events about the FineTuneJobs that were applied twice."""
    about = (each["regarding"] for each in api.request("GET", EVENTS)["items"])
    return sum(each["kind"] == "FineTuneJob" and each["name"].startswith("job-") for each in about)


def read_audit(audit_log: Path) -> list[dict[str, Any]]:
    """Return the requests in the namespace that the API server finished."""
    entries = (json.loads(line) for line in audit_log.read_text(encoding="utf-8").splitlines())
    return [each for each in entries if each.get("objectRef", {}).get("namespace") == NAMESPACE]


def read_latencies(audit_log: Path) -> tuple[float, ...]:
    """Return the seconds between the answer to the user's apply and the answer to the operator's, for each FineTuneJob."""
    created: dict[str, datetime] = {}
    latencies: dict[str, float] = {}
    for entry in read_audit(audit_log):
        name, time_ = entry["objectRef"].get("name", ""), datetime.fromisoformat(entry["stageTimestamp"])
        if entry["verb"] != "patch" or not name.startswith("job-"):
            continue
        if entry["userAgent"] == "bench":
            created.setdefault(name, time_)
        elif entry["userAgent"] == _USER_AGENT and entry["objectRef"]["resource"] == "jobs":
            latencies.setdefault(name[:8], (time_ - created[name[:8]]).total_seconds())
    return tuple(sorted(latencies.values()))


def count_writes(audit_log: Path, *, about: str = "") -> dict[str, int]:
    """Return the operator's writes by resource; those about a name leave out events, whose creation the log has no name for."""
    counts: dict[str, int] = {}
    for entry in read_audit(audit_log):
        reference = entry["objectRef"]
        resource = "/".join(filter(None, (reference["resource"], reference.get("subresource"))))
        is_about = reference.get("name", "").startswith(about)
        if entry["userAgent"] == _USER_AGENT and entry["verb"] in _WRITES and is_about:
            counts[resource] = counts.get(resource, 0) + 1
    return counts


def wait_until_quiet(audit_log: Path, *, seconds: float = 3) -> None:
    """Wait until the operator has written nothing for a while."""
    last, since = -1, time.monotonic()
    while time.monotonic() - since < seconds:
        time.sleep(0.25)
        number = sum(count_writes(audit_log).values())
        if number != last:
            last, since = number, time.monotonic()


def wait_until_ready(url: str) -> None:
    """Wait until a probe answers 200."""
    while True:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
            if answer.status == 200:
                return
        time.sleep(0.05)


def read_cpu(pid: int) -> float:
    """Return the CPU time that a process used, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def read_memory(pid: int) -> int:
    """Return the resident memory of a process, in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def find_port() -> int:
    """Return a port that is free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def print_table(result: Measurement, *, number: int) -> None:
    """Print the figures as a Markdown table."""
    count = len(result.latencies)
    rows = (
        ("creation to child Job, p50", f"{result.latencies[count // 2]:.2f} s"),
        ("creation to child Job, p99", f"{result.latencies[min(count - 1, count * 99 // 100)]:.2f} s"),
        ("first apply to last child Job", f"{result.seconds:.1f} s"),
        *((f"writes to {resource} for each job", f"{total / number:.2f}") for resource, total in sorted(result.writes.items())),
        ("operator CPU for each job", f"{1000 * result.cpu_seconds / number:.1f} ms"),
        ("operator memory, idle", f"{result.idle_bytes / 2**20:.0f} MiB"),
        (f"operator memory with {number} jobs", f"{result.loaded_bytes / 2**20:.0f} MiB"),
        ("writes after all were applied again", str(result.writes_after_reapply)),
    )
    print(f"## Operator: {number} FineTuneJobs applied at once\n\n| what | measured |\n| --- | --- |")
    for what, measured in rows:
        print(f"| {what} | {measured} |")


if __name__ == "__main__":
    sys.exit(main())

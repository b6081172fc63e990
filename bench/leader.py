"""How long no operator leads: two replicas with the default durations on a control plane without a node.

A trial ends the leader, and measures the time until a FineTuneJob that is applied right after it has its child Job, which only
another leader can create.
"""

import argparse
import contextlib
import json
import os
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.operator import JOBS, NAMESPACE, Api, apply, find_port, prepare, run_control_plane, wait_until_ready

LEASE = f"/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases/finetune-operator"
_DEADLINE_SECONDS = 120.0


@dataclass
class Replica:
    """One operator process, which can be started again and again."""

    environment: dict[str, str]
    log: Path
    process: "subprocess.Popen[bytes] | None" = field(default=None)

    def start(self) -> None:
        """Start it and wait until it is ready to lead or to stand by."""
        with self.log.open("ab") as log:
            command = [sys.executable, "-m", "finetune_operator"]
            environment = os.environ | self.environment  # noqa: TID251  the operator's own settings travel this way
            self.process = subprocess.Popen(command, env=environment, stderr=log)
        wait_until_ready(f"http://127.0.0.1:{self.environment['FINETUNE_HEALTH_PORT']}/readyz")

    def end(self, number: signal.Signals) -> None:
        """Send a signal, and go on before the process is gone."""
        assert self.process is not None
        self.process.send_signal(number)

    def is_leader(self, lease: dict[str, Any]) -> bool:
        """Return whether the Lease names this replica's receiver."""
        url = (lease["metadata"].get("annotations") or {}).get("finetune.dev/report-url", "")
        return bool(lease["spec"]["holderIdentity"]) and url.endswith(f":{self.environment['FINETUNE_REPORT_PORT']}")


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one trial each: shows that it runs, not how fast it is")
    number = 1 if parser.parse_args().quick else 10
    load = Path("/proc/loadavg").read_text(encoding="ascii").split()[0]
    with run_control_plane() as kubeconfig, tempfile.TemporaryDirectory() as folder:
        api = Api(kubeconfig)
        prepare(api)
        with run_replicas(kubeconfig, Path(folder)) as replicas:
            figures = {each: [measure(api, replicas, each) for _ in range(number)] for each in (signal.SIGTERM, signal.SIGKILL)}
    print_table(figures, load=load)
    return 0


@contextlib.contextmanager
def run_replicas(kubeconfig: Path, folder: Path) -> Iterator[list[Replica]]:
    """Run two operators."""
    certificate, key = folder / "tls.crt", folder / "tls.key"
    openssl = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=localhost"
    subprocess.run([*openssl.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    replicas = [
        Replica(_build_environment(kubeconfig, certificate=certificate, key=key), folder / f"log-{index}") for index in range(2)
    ]
    try:
        for replica in replicas:
            replica.start()
        yield replicas
    finally:
        for replica in replicas:
            if replica.process is not None:
                replica.process.kill()
                replica.process.wait()


def _build_environment(kubeconfig: Path, *, certificate: Path, key: Path) -> dict[str, str]:
    ports = {f"FINETUNE_{name}_PORT": str(find_port()) for name in ("REPORT", "METRICS", "HEALTH")}
    return ports | {
        "KUBECONFIG": str(kubeconfig),
        "FINETUNE_TRAINER_IMAGE": "trainer",
        "FINETUNE_BIND_ADDRESS": "127.0.0.1",
        "FINETUNE_REPORT_URL": "https://localhost:10443",
        "FINETUNE_REPORT_CA_FILE": str(certificate),
        "FINETUNE_TLS_CERTIFICATE_FILE": str(certificate),
        "FINETUNE_TLS_KEY_FILE": str(key),
        "FINETUNE_LEASE_NAMESPACE": NAMESPACE,
    }


def measure(api: Api, replicas: list[Replica], number: signal.Signals) -> float:
    """End the leader, and return the seconds until another one has created a child Job; then start the ended one again."""
    leader = find_leader(api, replicas)
    name = f"job-{secrets.token_hex(3)}"
    started_at = time.monotonic()
    leader.end(number)
    if number is signal.SIGKILL:
        assert leader.process is not None
        leader.process.wait()
    apply(api, name)
    while not any(each["metadata"]["name"].startswith(name) for each in api.request("GET", JOBS)["items"]):
        if time.monotonic() - started_at > _DEADLINE_SECONDS:
            raise RuntimeError(f"no other leader within {_DEADLINE_SECONDS:.0f} s:\n{replicas[0].log.read_text()}")
        time.sleep(0.05)
    seconds = time.monotonic() - started_at
    print(json.dumps({"signal": number.name, "seconds": round(seconds, 2)}), file=sys.stderr, flush=True)
    find_leader(api, [each for each in replicas if each is not leader])
    assert leader.process is not None
    leader.process.wait(60)
    leader.start()
    return seconds


def find_leader(api: Api, replicas: list[Replica]) -> Replica:
    """Wait until one of these leads."""
    deadline = time.monotonic() + _DEADLINE_SECONDS
    while time.monotonic() < deadline:
        lease = api.request("GET", LEASE)
        found = [each for each in replicas if lease.get("kind") == "Lease" and each.is_leader(lease)]
        if found:
            return found[0]
        time.sleep(0.1)
    raise RuntimeError("nobody leads")


def print_table(figures: dict[signal.Signals, list[float]], *, load: str) -> None:
    """Print one row for each way to end."""
    print(f"\nFailover, 2 replicas, Lease 15/10/2 s, load {load} at the start\n")
    print("| the leader gets | trials | median | longest |\n| --- | ---: | ---: | ---: |")
    for number, seconds in figures.items():
        print(f"| {number.name} | {len(seconds)} | {statistics.median(seconds):.1f} s | {max(seconds):.1f} s |")


if __name__ == "__main__":
    sys.exit(main())

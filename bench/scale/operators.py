"""The operator as a process of a load test."""

import contextlib
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from bench.operator import ROOT, find_port
from bench.scale.client import wait_until
from bench.scale.processes import run_process, stop_process

_VALUES = ROOT / "charts" / "finetune-operator" / "values.yaml"


@dataclass(frozen=True, kw_only=True)
class RunningOperator:
    """An operator that was seen to be ready."""

    process: subprocess.Popen[bytes]
    metrics_port: int
    start_seconds: float
    """From the start of the process to its readiness."""

    @property
    def pid(self) -> int:
        """Return its process id."""
        return self.process.pid

    def stop(self) -> None:
        """Stop it as a kubelet does."""
        stop_process(self.process)

    def count_states(self) -> dict[str, int]:
        """Return the number of FineTuneJobs by STATE, from its metrics."""
        return {name: int(value) for name, value in self._read("finetune_jobs").items() if value}

    def count_queued(self) -> int:
        """Return how many FineTuneJobs wait for a worker."""
        return int(sum(self._read("finetune_queue_keys").values()))

    def count_reconciles(self) -> int:
        """Return how many reconciles were made."""
        return int(sum(self._read("finetune_reconciles_total").values()))

    def count_dropped_events(self) -> int:
        """Return how many events were not recorded, because too many waited."""
        return int(self._read("finetune_events_total").get("dropped", 0))

    def count_retries(self) -> int:
        """Return how many attempts have failed and are tried again."""
        return int(sum(self._read("finetune_job_retries_total").values()))

    def wait_until_quiet(self, *, seconds: float = 5) -> None:
        """Wait until the operator has reconciled and recorded nothing for a while."""
        last, since = (-1, -1), time.monotonic()
        while time.monotonic() - since < seconds:
            time.sleep(0.5)
            seen = (self.count_reconciles(), int(sum(self._read("finetune_events_total").values())))
            if seen != last or self.count_queued():
                last, since = seen, time.monotonic()

    def _read(self, metric: str) -> dict[str, float]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=30) as answer:
            return parse_metric(answer.read().decode(), metric)


def parse_metric(page: str, metric: str) -> dict[str, float]:
    """Return the samples of a metric by the value of their one label."""
    samples: dict[str, float] = {}
    for line in page.splitlines():
        name, _, value = line.rpartition(" ")
        if name.partition("{")[0] == metric:
            samples[name.partition('="')[2].partition('"')[0]] = float(value)
    return samples


@contextlib.contextmanager
def run_operator(
    kubeconfig: Path,
    folder: Path,
    *,
    command: tuple[str, ...] = (sys.executable, "-m", "finetune_operator"),
    settings: Mapping[str, str] | None = None,
    python_path: str | None = None,
) -> Iterator[RunningOperator]:
    """Run an operator with its default settings and the chart's accelerator classes until it is ready."""
    ports = {name: find_port() for name in ("REPORT", "METRICS", "HEALTH")}
    environment = build_settings(kubeconfig, folder, ports=ports) | dict(settings or {})
    if python_path is not None:
        environment["PYTHONPATH"] = python_path
    started_at = time.monotonic()
    with run_process(command, log=folder / "operator.log", environment=environment) as process:
        wait_until(
            lambda: _is_ready(process, ports["HEALTH"], log=folder / "operator.log"),
            what="the operator is ready",
            seconds=600,
            poll_seconds=0.05,
        )
        yield RunningOperator(process=process, metrics_port=ports["METRICS"], start_seconds=time.monotonic() - started_at)


def build_settings(kubeconfig: Path, folder: Path, *, ports: Mapping[str, int]) -> dict[str, str]:
    """Return the environment of an operator with a certificate of its own."""
    certificate, key = folder / "tls.crt", folder / "tls.key"
    if not key.exists():
        words = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=localhost"
        subprocess.run([*words.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    classes = yaml.safe_load(_VALUES.read_text(encoding="utf-8"))["accelerators"]
    return {f"FINETUNE_{name}_PORT": str(port) for name, port in ports.items()} | {
        "KUBECONFIG": str(kubeconfig),
        "FINETUNE_TRAINER_IMAGE": "finetune-trainer:bench",
        "FINETUNE_ACCELERATORS": json.dumps(classes),
        "FINETUNE_BIND_ADDRESS": "127.0.0.1",
        # Where an operator that elects a leader keeps its Lease.
        "FINETUNE_LEASE_NAMESPACE": "default",
        "FINETUNE_REPORT_URL": f"https://localhost:{ports['REPORT']}",
        "FINETUNE_REPORT_CA_FILE": str(certificate),
        "FINETUNE_TLS_CERTIFICATE_FILE": str(certificate),
        "FINETUNE_TLS_KEY_FILE": str(key),
    }


def _is_ready(process: subprocess.Popen[bytes], port: int, *, log: Path) -> bool:
    if process.poll() is not None:
        raise RuntimeError(f"the operator has ended:\n{log.read_text(encoding='utf-8', errors='replace')[-3000:]}")
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as answer:
        return bool(answer.status == 200)

"""What tests on a control plane without a node need: a team's namespace, and operator processes for it."""

import base64
import contextlib
import copy
import itertools
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

import yaml
from accelerators import RAW_CLASSES
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

SPEC = {
    "task": "image-classification",
    "dataset": {"uri": "pvc://datasets/emoji"},
    "output": {"uri": "pvc://models/emoji"},
}
# The last word of a trainer that has published a model.
PUBLISHED = {
    "trainerStatus": {"progressPercentage": 100, "metrics": [{"name": "loss", "value": "0.1"}]},
    "output": {"uri": "pvc://models/emoji", "digest": "sha256:00", "bytes": 7},
    "result": {"candidate": "finetuned", "metrics": [{"name": "test_accuracy", "value": "0.81", "low": "0.77", "high": "0.86"}]},
}

_CHART_ROLE = Path(__file__).parents[2] / "charts" / "finetune-operator" / "templates" / "rbac.yaml"


def _read_rules(name: str) -> list[dict[str, list[str]]]:
    """Return rules as the chart has them: its definitions are plain YAML."""
    text = _CHART_ROLE.read_text(encoding="utf-8")
    block = text.split(f'{{{{- define "finetune-operator.{name}" -}}}}', 1)[1].split("{{- end -}}", 1)[0]
    block = block.replace('{{ include "finetune-operator.fullname" . }}', "finetune-operator")
    return list(yaml.safe_load(block))


RULES = _read_rules("rules")
CLUSTER_RULES = _read_rules("clusterRules")
LEASE_RULES = _read_rules("leaseRules")
_RBAC = "/apis/rbac.authorization.k8s.io/v1"


def wait_until(check: Callable[[], Any], *, what: str, seconds: float = 60, every: float = 0.05) -> Any:
    """Return the first true value of a check; a check that fails an assertion is tried again as well."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if value := check():
                return value
            problem = "not yet true"
        except (AssertionError, LookupError, OSError) as error:
            problem = repr(error)
        if time.monotonic() > deadline:
            raise AssertionError(f"not seen within {seconds} s: {what} ({problem})")
        time.sleep(every)


class Process(Protocol):
    """What is used of a subprocess.Popen."""

    pid: int

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def send_signal(self, number: int, /) -> None: ...


Spawn = Callable[[Mapping[str, str], Path], Process]


def spawn_operator(environment: Mapping[str, str], log: Path) -> Process:
    """Start an operator with this added to the environment; it writes into a log."""
    with log.open("ab") as file:
        command = [sys.executable, "-m", "finetune_operator"]
        return subprocess.Popen(command, env=os.environ | environment, stderr=file)  # noqa: TID251


class Operator:
    """An operator process of a test, limited to one namespace, with the rights of the chart's Role."""

    def __init__(self, *, environment: dict[str, str], log: Path, spawn: Spawn = spawn_operator) -> None:
        self._environment = environment
        self._log = log
        self._spawn = spawn
        self._process: Process | None = None
        self.report_port = environment["FINETUNE_REPORT_PORT"]
        self.report_url = environment["FINETUNE_REPORT_URL"]

    def start(self) -> "Operator":
        self.launch()
        return self.wait_until_ready()

    def launch(self) -> None:
        """Start the process and do not wait."""
        self._process = self._spawn(self._environment, self._log)

    def wait_until_ready(self) -> "Operator":
        # On a machine that is very busy a process takes minutes to begin.
        wait_until(self._is_ready, what=f"the operator is ready, see {self._log}", seconds=240)
        return self

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Stop the process if it runs, and return its exit status."""
        assert self._process is not None
        if self._process.poll() is None:
            self._process.send_signal(number)
        return self._process.wait(timeout=30)

    def send(self, number: int) -> None:
        """Send a signal and do not wait."""
        assert self._process is not None
        self._process.send_signal(number)

    @property
    def process(self) -> Process:
        """The process that was started last."""
        assert self._process is not None
        return self._process

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def exit_status(self) -> int | None:
        """The exit status of a process that has ended."""
        assert self._process is not None
        return self._process.poll()

    def wait(self, *, seconds: float = 60) -> int:
        """Wait until the process ends by itself, and return its exit status."""
        assert self._process is not None
        return self._process.wait(timeout=seconds)

    def replace_token(self, team: "Team") -> None:
        """Make the service account's token void, and put a new one into the kubeconfig."""
        team.api.delete(team.path("serviceaccounts", "operator"))
        write_kubeconfig(team, Path(self._environment["KUBECONFIG"]))

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8")

    @property
    def metrics_address(self) -> str:
        """Return where the metrics are served."""
        return f"127.0.0.1:{self._environment['FINETUNE_METRICS_PORT']}"

    def scrape(self) -> str:
        """Return the metrics page."""
        return self._fetch("METRICS", "/metrics")

    def is_healthy(self) -> bool:
        """Return whether the process runs and its liveness probe is content."""
        assert self._process is not None
        return self._process.poll() is None and self._fetch("HEALTH", "/healthz") == "ok\n"

    def _is_ready(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log
        return self._fetch("HEALTH", "/readyz") == "ok\n"

    def _fetch(self, port: str, path: str) -> str:
        url = f"http://127.0.0.1:{self._environment[f'FINETUNE_{port}_PORT']}{path}"
        with urllib.request.urlopen(url, timeout=5) as answer:
            return str(answer.read().decode())


class Team:
    """A namespace of the control plane, and what happens in it."""

    def __init__(self, api: Any, namespace: str) -> None:
        self.api = api
        self.namespace = namespace
        api.create("/api/v1/namespaces", {"metadata": {"name": namespace}})

    def seen_by(self, api: Any) -> "Team":
        """Return the same team, for another thread."""
        other = copy.copy(self)
        other.api = api
        return other

    def remove(self) -> None:
        """Delete the namespace with all that is in it, and the team's profile."""
        if self.api.exists(self.profile_path):
            self.api.delete(self.profile_path)
        for job in self.api.get(self.path("finetunejobs"))["items"]:
            self.api.delete(self.path("finetunejobs", job["metadata"]["name"]))
        self.api.delete(f"/api/v1/namespaces/{self.namespace}")

    def path(self, plural: str, name: str = "") -> str:
        prefix = {"finetunejobs": "/apis/finetune.dev/v1alpha1", "jobs": "/apis/batch/v1"}.get(plural, "/api/v1")
        prefix = {"events": "/apis/events.k8s.io/v1", "leases": "/apis/coordination.k8s.io/v1"}.get(plural, prefix)
        return f"{prefix}/namespaces/{self.namespace}/{plural}" + (f"/{name}" if name else "")

    def apply(
        self,
        name: str = "emoji",
        *,
        labels: dict[str, str] | None = None,
        annotations: dict[str, str] | None = None,
        **spec: Any,
    ) -> dict[str, Any]:
        """Apply a FineTuneJob."""
        metadata = {"name": name, "namespace": self.namespace, "labels": labels or {}, "annotations": annotations or {}}
        body = {
            "apiVersion": "finetune.dev/v1alpha1",
            "kind": "FineTuneJob",
            "metadata": metadata,
            "spec": SPEC | spec,
        }
        return dict(self.api.apply(self.path("finetunejobs", name), body))

    def apply_profile(self, **spec: Any) -> None:
        """Apply the team's profile, which has the name of its namespace: profiles are for the whole cluster."""
        body = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneProfile", "metadata": {"name": self.namespace}}
        self.api.apply(self.profile_path, body | {"spec": spec})

    @property
    def profile_path(self) -> str:
        return f"/apis/finetune.dev/v1alpha1/finetuneprofiles/{self.namespace}"

    def job(self, name: str = "emoji") -> dict[str, Any]:
        return dict(self.api.get(self.path("finetunejobs", name)))

    def status(self, name: str = "emoji") -> dict[str, Any]:
        return dict(self.job(name).get("status") or {})

    def state(self, name: str = "emoji") -> str:
        return str(self.condition("Ready", name).get("reason", ""))

    def condition(self, type: str, name: str = "emoji") -> dict[str, Any]:
        return next((dict(each) for each in self.status(name).get("conditions", []) if each["type"] == type), {})

    def children(self) -> list[dict[str, Any]]:
        return list(self.api.get(self.path("jobs"))["items"])

    def pods(self) -> list[dict[str, Any]]:
        return [pod for pod in self.api.get(self.path("pods"))["items"] if "deletionTimestamp" not in pod["metadata"]]

    def events(self, name: str = "emoji") -> list[tuple[str, str]]:
        """Return type and reason of the events about a FineTuneJob."""
        items = self.api.get(self.path("events"))["items"]
        about = [each for each in items if (each["regarding"]["kind"], each["regarding"]["name"]) == ("FineTuneJob", name)]
        return sorted((each["type"], each["reason"]) for each in about)

    def wait(self, state: str, name: str = "emoji") -> dict[str, Any]:
        """Wait for a STATE and return the status that has it."""
        wait_until(lambda: self.state(name) == state, what=f"{name} is {state}, not {self.state(name)}")
        return self.status(name)

    def wait_for_pod(self, child: str | None = None) -> dict[str, Any]:
        """Wait for the one pod that the Job controller makes for a child."""

        def find() -> dict[str, Any] | None:
            pods = [pod for pod in self.pods() if child in (None, pod["metadata"]["labels"].get("job-name"))]
            return pods[0] if len(pods) == 1 else None

        return dict(wait_until(find, what=f"there is one pod of {child or 'any Job'}"))

    def wait_for_pods(self, number: int, *, attempt: int = 1) -> list[dict[str, Any]]:
        """Wait for all pods of an attempt, in the order of their indexes."""

        def find() -> list[dict[str, Any]] | None:
            pods = [pod for pod in self.pods() if pod["metadata"]["labels"].get("finetune.dev/attempt") == str(attempt)]
            pods.sort(key=lambda pod: int(pod["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"]))
            return pods if len(pods) == number else None

        return list(wait_until(find, what=f"there are {number} pods of attempt {attempt}"))

    def run_pod(self, pod: dict[str, Any]) -> None:
        """Show a pod as running, as a kubelet would."""
        self._patch_pod(pod, phase="Running", state={"running": {"startedAt": _now()}})

    def end_pod(self, pod: dict[str, Any], exit_code: int = 0, *, message: str = "", reason: str | None = None) -> None:
        """Show a pod as ended, as a kubelet would."""
        terminated = {
            "exitCode": exit_code,
            "reason": reason or ("Error" if exit_code else "Completed"),
            "message": message,
            "startedAt": _now(),
            "finishedAt": _now(),
        }
        self._patch_pod(pod, phase="Failed" if exit_code else "Succeeded", state={"terminated": terminated})

    def evict_pod(self, pod: dict[str, Any], exit_code: int = 75, *, message: str = "") -> None:
        """Evict a pod as `kubectl drain` does, and let its trainer save and leave."""
        metadata = {"name": pod["metadata"]["name"], "namespace": self.namespace}
        eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": metadata}
        self.api.create(self.path("pods", pod["metadata"]["name"]) + "/eviction", eviction)
        self.end_pod(pod, exit_code, message=message)

    def _patch_pod(self, pod: dict[str, Any], *, phase: str, state: dict[str, Any]) -> None:
        container = {"name": "trainer", "image": "trainer:test", "imageID": "", "ready": False, "restartCount": 0, "state": state}
        known = self.api.get(self.path("pods", pod["metadata"]["name"])).get("status", {}).get("conditions", [])
        conditions = [*(each for each in known if each["type"] != "PodScheduled"), {"type": "PodScheduled", "status": "True"}]
        status = {"phase": phase, "conditions": conditions, "containerStatuses": [container], "startTime": _now()}
        self.api.patch(self.path("pods", pod["metadata"]["name"]) + "/status", {"status": status})

    def create_token(self, pod: dict[str, Any], *, audience: str = "finetune.dev/reports") -> str:
        """Return a token as the kubelet projects it into a pod."""
        metadata = pod["metadata"]
        bound = {"apiVersion": "v1", "kind": "Pod", "name": metadata["name"], "uid": metadata["uid"]}
        request = {"spec": {"audiences": [audience], "expirationSeconds": 600, "boundObjectRef": bound}}
        return str(self.api.create(self.path("serviceaccounts", "default") + "/token", request)["status"]["token"])


def build_operator(
    team: Team,
    *,
    tls: tuple[Path, Path],
    folder: Path,
    name: str = "operator",
    spawn: Spawn = spawn_operator,
    **settings: str,
) -> Operator:
    """Return an operator for a team's namespace, with the kubeconfig of a folder, not started yet; several need other names."""
    certificate, key = tls
    ports = {f"FINETUNE_{each}_PORT": str(find_port()) for each in ("REPORT", "METRICS", "HEALTH")}
    environment = ports | {
        "KUBECONFIG": str(folder / "kubeconfig"),
        "FINETUNE_NAMESPACES": team.namespace,
        "FINETUNE_TRAINER_IMAGE": "trainer:test",
        "FINETUNE_ACCELERATORS": json.dumps(RAW_CLASSES),
        "FINETUNE_BIND_ADDRESS": "127.0.0.1",
        "FINETUNE_REPORT_URL": f"https://localhost:{ports['FINETUNE_REPORT_PORT']}",
        "FINETUNE_REPORT_CA_FILE": str(certificate),
        "FINETUNE_TLS_CERTIFICATE_FILE": str(certificate),
        "FINETUNE_TLS_KEY_FILE": str(key),
        "FINETUNE_RETRY_BASE_SECONDS": "0.2",
        "FINETUNE_PROGRESS_SECONDS": "0.2",
        "FINETUNE_EVIDENCE_SECONDS": "2",
        "FINETUNE_LEADER_ELECTION": "false",
        "FINETUNE_LEASE_NAMESPACE": team.namespace,
    }
    settings = {f"FINETUNE_{each.upper()}": value for each, value in settings.items()}
    return Operator(environment=environment | settings, log=folder / f"{name}.log", spawn=spawn)


def grant_rights(team: Team, *, clusterwide: bool = False) -> None:
    """Bind the operator's rights in the team's namespace, or in all, to a service account."""
    subject = {"kind": "ServiceAccount", "name": "operator", "namespace": team.namespace}
    name = f"operator-{team.namespace}"
    for kind, rules, prefix in (
        ("Role", LEASE_RULES if clusterwide else [*RULES, *LEASE_RULES], f"{_RBAC}/namespaces/{team.namespace}"),
        ("ClusterRole", [*RULES, *CLUSTER_RULES] if clusterwide else CLUSTER_RULES, _RBAC),
    ):
        reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": name}
        binding = {"metadata": {"name": name}, "roleRef": reference, "subjects": [subject]}
        team.api.create(f"{prefix}/{kind.lower()}s", {"metadata": {"name": name}, "rules": rules})
        team.api.create(f"{prefix}/{kind.lower()}bindings", binding)


def write_kubeconfig(team: Team, path: Path, *, server: str | None = None, account: str = "operator") -> None:
    """Make a service account and write a kubeconfig with a token of it, for the API server or one before it."""
    team.api.create(team.path("serviceaccounts"), {"metadata": {"name": account}})
    request = {"spec": {"expirationSeconds": 3600}}
    token = team.api.create(team.path("serviceaccounts", account) + "/token", request)["status"]["token"]
    authority = base64.b64encode(team.api.ca.encode()).decode()
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": server or team.api.server, "certificate-authority-data": authority}}],
        "users": [{"name": "u", "user": {"token": token}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    path.write_text(json.dumps(config), encoding="utf-8")


def write_certificate(folder: Path, *, name: str) -> tuple[Path, Path]:
    """Write a certificate that is its own authority, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    certificate_file, key_file = folder / "tls.crt", folder / "tls.key"
    encoding = serialization.Encoding.PEM
    key_bytes = key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    certificate_file.write_bytes(certificate.public_bytes(encoding))
    key_file.write_bytes(key_bytes)
    return certificate_file, key_file


def post_progress(url: str, *, token: str, ca: Path, percentage: int = 40) -> tuple[int, Any]:
    """Report progress as a trainer does, and return status and body of the answer."""
    body = json.dumps({"trainerStatus": {"progressPercentage": percentage, "estimatedRemainingSeconds": 30}}).encode()
    request = urllib.request.Request(url, body, {"Authorization": f"Bearer {token}", "Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, context=ssl.create_default_context(cafile=ca), timeout=10) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


# They lie below those that the kernel gives to outgoing connections, so a process that starts again finds its own free, and begin
# where another test run probably does not.
_PORTS = itertools.count(os.getpid() * 97)


def find_port() -> int:
    """Return a free port that is given to nobody else for long."""
    while True:
        port = 12_000 + next(_PORTS) % 20_000
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

"""Fixtures that tests of every package share."""

import base64
import contextlib
import copy
import difflib
import http.client
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from finetune_api import names
from finetune_api.crd import build_crds
from judges import find_faults, is_compiled, judge
from statuses import SEEN, read_corpus, record_object, write_corpus

Golden = Callable[[str, str], None]


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """Compare text with the file golden/NAME beside the test; `make golden` rewrites the file instead."""

    def check(name: str, text: str) -> None:
        path = Path(request.path).parent / "golden" / name
        if os.environ.get("UPDATE_GOLDEN") == "1":  # noqa: TID251  a switch of the test run itself
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        expected = path.read_text(encoding="utf-8") if path.exists() else ""
        diff = "\n".join(difflib.unified_diff(expected.splitlines(), text.splitlines(), "golden", "actual", lineterm=""))

        assert not diff, f"{path.name} differs; read the diff, then `make golden`:\n{diff}"

    return check


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def every_status_is_read_right_by_gitops_tools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Judge the statuses that this run has come across and no earlier one had; with UPDATE_GOLDEN=1, keep them for later runs."""
    yield
    if os.environ.get("UPDATE_GOLDEN") == "1":  # noqa: TID251  a switch of the test run itself
        write_corpus(read_corpus() | SEEN)
    shapes = sorted(SEEN - read_corpus())
    if shapes and is_compiled():
        verdicts = judge((each.build() for each in shapes), folder=tmp_path_factory.mktemp("judge"))

        assert not [fault for shape, verdict in zip(shapes, verdicts, strict=True) for fault in find_faults(shape, verdict)]


class Api:
    """Plain requests to an API server as the administrator, or as a user whom the administrator impersonates."""

    def __init__(self, kubeconfig: Path) -> None:
        config = yaml.safe_load(kubeconfig.read_text(encoding="utf-8"))
        cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
        self.server: str = cluster["server"]
        self.ca = base64.b64decode(cluster["certificate-authority-data"]).decode()
        self._tls = ssl.create_default_context(cadata=self.ca)
        with tempfile.NamedTemporaryFile() as pair:
            pair.write(base64.b64decode(user["client-certificate-data"]) + base64.b64decode(user["client-key-data"]))
            pair.flush()
            self._tls.load_cert_chain(pair.name)
        self._headers: dict[str, str] = {}
        self._connection: http.client.HTTPSConnection | None = None

    @contextlib.contextmanager
    def keep_open(self) -> Iterator["Api"]:
        """Return the same for one thread, with one connection for all of its requests."""
        other = copy.copy(self)
        with contextlib.closing(self.open()) as connection:
            other._connection = connection
            yield other

    def acting_as(self, user: str) -> "Api":
        """Return the same API server as a user sees it."""
        other = copy.copy(self)
        other._headers = {"Impersonate-User": user}
        return other

    def request(self, method: str, path: str, body: Any = None, *, type: str = "application/json") -> tuple[int, Any]:
        """Return the status and the parsed body of the answer."""
        if self._connection is None:
            with contextlib.closing(self.open()) as connection:
                return self._send(connection, method, path, body, type=type)
        try:
            return self._send(self._connection, method, path, body, type=type)
        except ConnectionError:
            # The API server closes what is idle for long; the connection opens again by itself.
            self._connection.close()
            return self._send(self._connection, method, path, body, type=type)

    def _send(self, connection: http.client.HTTPSConnection, method: str, path: str, body: Any, *, type: str) -> tuple[int, Any]:
        headers = self._headers | {"Content-Type": type}
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())

    def open(self) -> http.client.HTTPSConnection:
        """Return a connection, which its owner closes."""
        address = urlsplit(self.server)
        return http.client.HTTPSConnection(str(address.hostname), address.port, context=self._tls)

    def get(self, path: str) -> Any:
        return self._must("GET", path)

    def create(self, path: str, body: Any) -> Any:
        return self._must("POST", path, body)

    def apply(self, path: str, body: Any, *, manager: str = "test") -> Any:
        return self._must("PATCH", f"{path}?fieldManager={manager}&force=true", body, type="application/apply-patch+yaml")

    def patch(self, path: str, body: Any) -> Any:
        return self._must("PATCH", path, body, type="application/merge-patch+json")

    def delete(self, path: str, *, propagation: str = "Background") -> Any:
        return self._must("DELETE", path, {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": propagation})

    def exists(self, path: str) -> bool:
        return self.request("GET", path)[0] == 200

    def _must(self, method: str, path: str, body: Any = None, *, type: str = "application/json") -> Any:
        status, answer = self.request(method, path, body, type=type)
        assert 200 <= status < 300, f"{method} {path}: {status} {answer.get('message')}"
        return answer


Run = Callable[[str], AbstractContextManager[Path]]
Open = Callable[[Path], AbstractContextManager[Api]]


@pytest.fixture(scope="session")
def control_plane(run_control_plane: Run) -> Iterator[Path]:
    """A control plane without a node; the value is the path of its kubeconfig, beside which its audit.log lies."""
    with run_control_plane("test") as kubeconfig:
        yield kubeconfig


@pytest.fixture(scope="session")
def run_control_plane() -> Run:
    """Start a control plane of a name, and end it. Modules that harm theirs have one of their own."""
    return _run_control_plane


@contextlib.contextmanager
def _run_control_plane(prefix: str) -> Iterator[Path]:
    name = f"{prefix}-{os.getpid()}"
    command = [sys.executable, str(ROOT / "hack" / "cluster")]
    try:
        subprocess.run([*command, "up", "--name", name, "--mode", "control-plane"], check=True, cwd=ROOT)
        yield ROOT / ".local" / "clusters" / name / "kubeconfig"
    finally:
        subprocess.run([*command, "down", "--name", name], check=False, cwd=ROOT)
        shutil.rmtree(ROOT / ".local" / "clusters" / name, ignore_errors=True)


@pytest.fixture(scope="session")
def api(control_plane: Path, open_api: Open) -> Iterator[Api]:
    """The API server of the control plane, which knows FineTuneJobs and FineTuneProfiles."""
    with open_api(control_plane) as api:
        yield api


@pytest.fixture(scope="session")
def open_api() -> Open:
    """Make an API server know our custom resources, and gather the statuses that it shows."""
    return _open_api


@contextlib.contextmanager
def _open_api(control_plane: Path) -> Iterator[Api]:
    api = Api(control_plane)
    for crd in build_crds():
        _establish(api, crd)
    is_over = threading.Event()
    thread = threading.Thread(target=_record_statuses, args=(api, is_over), daemon=True)
    thread.start()
    yield api
    is_over.set()
    thread.join(30)


def _record_statuses(api: Api, is_over: threading.Event) -> None:
    """Watch FineTuneJobs, and remember what each status looks like; the watch is short, so it ends when the tests do."""
    version = ""
    while not is_over.wait(0.1):
        path = f"/apis/{names.API_VERSION}/{names.PLURAL}?watch=true&timeoutSeconds=2&resourceVersion={version}"
        with contextlib.suppress(OSError, ValueError, http.client.HTTPException), contextlib.closing(api.open()) as connection:
            connection.request("GET", path)
            for line in connection.getresponse():
                event = json.loads(line)
                # A Status has another shape: the API server does not serve the kind yet, or has forgotten the version.
                version = event["object"]["metadata"].get("resourceVersion", "") if "object" in event else ""
                if event.get("type") in ("ADDED", "MODIFIED"):
                    record_object(event["object"], manager=names.FIELD_MANAGER)


def _establish(api: Api, crd: dict[str, Any]) -> None:
    path = f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{crd['metadata']['name']}"
    api.apply(path, crd)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        conditions = api.get(path).get("status", {}).get("conditions") or []
        if any(each["type"] == "Established" and each["status"] == "True" for each in conditions):
            return
        time.sleep(0.05)
    raise AssertionError("the CustomResourceDefinition was not established within 30 s")


@pytest.fixture(scope="session")
def start_s3() -> Iterator[Callable[[str], str]]:
    """Start real S3 servers, each on a free port of an address of this machine; they are stopped at the end."""
    servers: list[subprocess.Popen[bytes]] = []

    def start(address: str) -> str:
        with socket.socket() as probe:
            probe.bind((address, 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "moto.server", "-H", address, "-p", str(port)]
        servers.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        _wait_for_port(address, port, servers[-1])
        return f"http://{address}:{port}"

    yield start
    for server in servers:
        server.terminate()
        server.wait(10)


def _wait_for_port(address: str, port: int, server: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.poll() is None:
        try:
            socket.create_connection((address, port), 1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    pytest.fail("the S3 server does not answer")

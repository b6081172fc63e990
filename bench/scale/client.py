"""Requests to the API server over connections that stay open: the load itself must cost little, as it shares the machine."""

import base64
import contextlib
import http.client
import json
import ssl
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import yaml

T = TypeVar("T")
USER_AGENT = "bench"
_THREADS = 16
_TYPES = {"PATCH": "application/apply-patch+yaml", "MERGE": "application/merge-patch+json"}


class Client:
    """The API server as a user with all rights sees it; every thread has a connection of its own."""

    def __init__(self, kubeconfig: Path) -> None:
        config = yaml.safe_load(kubeconfig.read_text(encoding="utf-8"))
        cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
        self.server = str(cluster["server"])
        self.authority = base64.b64decode(cluster["certificate-authority-data"]).decode()
        self._address = urlsplit(self.server)
        self._tls = ssl.create_default_context(cadata=self.authority)
        with tempfile.NamedTemporaryFile() as pair:
            pair.write(base64.b64decode(user["client-certificate-data"]) + base64.b64decode(user["client-key-data"]))
            pair.flush()
            self._tls.load_cert_chain(pair.name)
        self._local = threading.local()

    def get(self, path: str) -> Any:
        """Return an object or a list; LookupError when it is not there."""
        return self._request("GET", path)

    def get_first(self, path: str) -> Any:
        """Return the first object of a list."""
        return self.get(f"{path}?limit=1")["items"][0]

    def create(self, path: str, body: Any) -> Any:
        """Create an object."""
        return self._request("POST", path, body)

    def apply(self, path: str, body: Any) -> Any:
        """Apply an object, as `kubectl apply --server-side` does."""
        return self._request("PATCH", f"{path}?fieldManager=bench&force=true", body)

    def replace(self, path: str, body: Any) -> Any:
        """Replace an object, or its status."""
        return self._request("PUT", path, body)

    def merge(self, path: str, body: Any) -> Any:
        """Change fields of an object."""
        return self._request("MERGE", path, body)

    def delete(self, path: str) -> None:
        """Delete an object, and what belongs to it in the background."""
        self._request("DELETE", path, {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": "Background"})

    def count(self, path: str) -> int:
        """Return how many objects there are of a kind, of which only one is read."""
        page = self.get(f"{path}?limit=1")
        return len(page["items"]) + int(page["metadata"].get("remainingItemCount") or 0)

    def list(self, path: str, *, query: str = "") -> list[Any]:
        """Return all objects, read in chunks."""
        items: list[Any] = []
        token = ""
        while True:
            page = self.get(f"{path}?limit=500{query}{f'&continue={token}' if token else ''}")
            items += page["items"]
            if not (token := page["metadata"].get("continue", "")):
                return items

    def _request(self, method: str, path: str, body: Any = None) -> Any:
        content = None if body is None else json.dumps(body)
        headers = {"Content-Type": _TYPES.get(method, "application/json"), "User-Agent": USER_AGENT}
        verb = "PATCH" if method in _TYPES else method
        for is_last in (False, True):
            connection = self._connect()
            try:
                connection.request(verb, path, content, headers)
                answer = connection.getresponse()
                parsed = json.loads(answer.read())
                break
            except (OSError, http.client.HTTPException):
                self._local.connection = None
                # A connection that the server has closed meanwhile; the request goes out once more, on a new one.
                if is_last:
                    raise
        if answer.status == 404:
            raise LookupError(path)
        if answer.status >= 300:
            raise RuntimeError(f"{verb} {path}: {answer.status} {parsed.get('message')}")
        return parsed

    def _connect(self) -> http.client.HTTPSConnection:
        known: http.client.HTTPSConnection | None = getattr(self._local, "connection", None)
        if known is None:
            known = http.client.HTTPSConnection(str(self._address.hostname), self._address.port, context=self._tls, timeout=60)
            self._local.connection = known
        return known


def do_all(act: Callable[[T], object], items: Iterable[T]) -> None:
    """Act on all items, 16 at a time, and raise the first error."""
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(act, items))


def do_at_rate(act: Callable[[T], object], items: Sequence[T], *, per_second: float) -> None:
    """Act on the items at fixed times, whether or not the ones before have been answered."""
    started_at = time.monotonic()
    with ThreadPoolExecutor(_THREADS) as pool:
        futures = []
        for number, item in enumerate(items):
            time.sleep(max(0.0, started_at + number / per_second - time.monotonic()))
            futures.append(pool.submit(act, item))
        for future in futures:
            future.result()


def wait_until(check: Callable[[], T], *, what: str, seconds: float, poll_seconds: float = 0.2) -> T:
    """Return the first true value of a check. Raises TimeoutError that says what was waited for."""
    deadline = time.monotonic() + seconds
    while True:
        value: T | None = None
        with contextlib.suppress(LookupError, OSError):
            value = check()
        if value:
            return value
        if time.monotonic() > deadline:
            raise TimeoutError(f"not seen within {seconds:.0f} s: {what}")
        time.sleep(poll_seconds)

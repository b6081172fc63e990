"""A real Prometheus that scrapes every two seconds, and the queries of the dashboard as Grafana would send them."""

import json
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cluster_client
from harness import find_port

FILES = cluster_client.ROOT / "charts" / "finetune-operator" / "files"
_VARIABLES = {"$__rate_interval": "1m", "$__range": "1h", "$namespace": ".*"}


class Prometheus:
    """A server with scrape configurations and rules of its own."""

    def __init__(self, folder: Path, *, scrape_configs: Sequence[dict[str, Any]], rules: dict[str, Any] | None = None) -> None:
        (folder / "rules.yaml").write_text(json.dumps(rules or {"groups": []}))
        configuration = {
            "global": {"scrape_interval": "2s", "scrape_timeout": "2s", "evaluation_interval": "1s"},
            "rule_files": ["rules.yaml"],
            "scrape_configs": list(scrape_configs),
        }
        (folder / "prometheus.yaml").write_text(json.dumps(configuration))
        port = find_port()
        self._url = f"http://127.0.0.1:{port}/api/v1/"
        self._log = folder / "prometheus.log"
        program = cluster_client.program("prometheus")
        command = [program, f"--config.file={folder / 'prometheus.yaml'}", f"--storage.tsdb.path={folder / 'data'}"]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()

    def get(self, path: str, **parameters: str) -> Any:
        """Return the data of an answer; a query that is refused is an assertion error with the reason."""
        assert self._process.poll() is None, self._log.read_text(encoding="utf-8")
        try:
            with urllib.request.urlopen(f"{self._url}{path}?{urllib.parse.urlencode(parameters)}", timeout=30) as answer:
                return json.loads(answer.read())["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path} {parameters}: {error.read().decode()}") from error

    def query(self, expression: str) -> list[Any]:
        return list(self.get("query", query=expression)["result"])


def list_queries(row: str | None = None) -> list[str]:
    """Return the expressions of the dashboard, or of one row of it, with the variables that Grafana replaces."""
    dashboard = json.loads((FILES / "dashboard.json").read_text(encoding="utf-8"))
    queries, title = [], ""
    for panel in dashboard["panels"]:
        title = panel["title"] if panel["type"] == "row" else title
        if row in (None, title):
            queries += [target["expr"] for target in panel.get("targets", [])]
    for variable, value in _VARIABLES.items():
        queries = [query.replace(variable, value) for query in queries]
    return queries

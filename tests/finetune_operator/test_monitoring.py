"""A real Prometheus scrapes a real operator: every expression of the rules and the dashboard is evaluated, and an alert fires."""

import json
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cluster_client
import pytest
import yaml
from harness import Operator, Team, find_port, wait_until

pytestmark = pytest.mark.apiserver

_FILES = Path(__file__).resolve().parents[2] / "charts" / "finetune-operator" / "files"
_VARIABLES = {"$__rate_interval": "1m", "$__range": "1h", "$namespace": ".*"}


class Prometheus:
    """A server that scrapes one address every two seconds."""

    def __init__(self, program: str, folder: Path, *, target: str) -> None:
        rules = yaml.safe_load((_FILES / "alerts.yaml").read_text(encoding="utf-8"))
        (folder / "alerts.yaml").write_text(json.dumps(_hurry(rules)))
        configuration = {
            "global": {"scrape_interval": "2s", "scrape_timeout": "2s", "evaluation_interval": "1s"},
            "rule_files": ["alerts.yaml"],
            "scrape_configs": [{"job_name": "finetune-operator", "static_configs": [{"targets": [target]}]}],
        }
        (folder / "prometheus.yaml").write_text(json.dumps(configuration))
        port = find_port()
        self._url = f"http://127.0.0.1:{port}/api/v1/"
        self._log = folder / "prometheus.log"
        command = [program, f"--config.file={folder / 'prometheus.yaml'}", f"--storage.tsdb.path={folder / 'data'}"]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)

    def get(self, path: str, **parameters: str) -> Any:
        """Return the data of an answer; a query that is refused is an assertion error with the reason."""
        assert self.process.poll() is None, self._log.read_text(encoding="utf-8")
        try:
            with urllib.request.urlopen(f"{self._url}{path}?{urllib.parse.urlencode(parameters)}", timeout=30) as answer:
                return json.loads(answer.read())["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path} {parameters}: {error.read().decode()}") from error

    def query(self, expression: str) -> list[Any]:
        return list(self.get("query", query=expression)["result"])


def _hurry(rules: dict[str, Any]) -> dict[str, Any]:
    """Return the rules without the time for which they must hold, which promtool's tests of them are about."""
    for group in rules["groups"]:
        for rule in group["rules"]:
            rule.pop("for", None)
    return rules


@pytest.fixture
def prometheus(tmp_path: Path, operator: Operator) -> Iterator[Prometheus]:
    folder = tmp_path / "prometheus"
    folder.mkdir()
    server = Prometheus(cluster_client.program("prometheus"), folder, target=operator.metrics_address)
    yield server
    server.process.kill()
    server.process.wait()


def test_prometheus_evaluates_everything_and_tells_when_the_operator_is_gone(
    operator: Operator, team: Team, prometheus: Prometheus
) -> None:
    operator.start()
    team.apply()
    pod = team.wait_for_pod()
    team.run_pod(pod)
    team.wait("Running")
    used, wasted = (
        f'finetune_{word}accelerator_seconds_total{{job_namespace="{team.namespace}",kind="cpu"}}' for word in ("", "wasted_")
    )
    _wait_for(prometheus, 'finetune_jobs{state="Running"} == 1')
    _wait_for(prometheus, f"{used} == 0")

    team.end_pod(pod, exit_code=1)
    usage = wait_until(lambda: team.status().get("usage", {}).get("acceleratorSeconds") and team.status()["usage"], what="usage")
    _wait_for(prometheus, f"{used} == {usage['acceleratorSeconds']}")
    _wait_for(prometheus, f"{wasted} == {usage['wastedAcceleratorSeconds']}")
    _wait_for(prometheus, 'increase(finetune_job_failures_total{reason="TrainerError"}[1h]) > 0')
    _wait_for(prometheus, f"sum by (job_namespace) (increase({used}[1h])) > 0")

    wait_until(lambda: {rule["health"] for rule in _list_rules(prometheus)} == {"ok"}, what="all rules are evaluated")
    for expression in _list_queries():
        prometheus.query(expression)
    wait_until(lambda: "FineTuneOperatorDown" not in _list_alerts(prometheus), what="the alert of the first moment is over")

    operator.stop()

    wait_until(lambda: "FineTuneOperatorDown" in _list_alerts(prometheus), what="the alert fires")


def _wait_for(prometheus: Prometheus, expression: str) -> None:
    wait_until(lambda: prometheus.query(expression), what=expression)


def _list_rules(prometheus: Prometheus) -> list[Any]:
    return [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]


def _list_alerts(prometheus: Prometheus) -> set[str]:
    return {alert["labels"]["alertname"] for alert in prometheus.get("alerts")["alerts"] if alert["state"] == "firing"}


def _list_queries() -> list[str]:
    """Return the expressions of the dashboard, with the variables that Grafana replaces."""
    dashboard = json.loads((_FILES / "dashboard.json").read_text(encoding="utf-8"))
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    for variable, value in _VARIABLES.items():
        queries = [query.replace(variable, value) for query in queries]
    assert len(queries) > 30
    return queries

"""A real Prometheus scrapes a real operator: every expression of the rules and the dashboard is evaluated, and an alert fires."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness import Operator, Team, wait_until
from prometheus_server import FILES, Prometheus, list_queries

pytestmark = pytest.mark.apiserver


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
    rules = yaml.safe_load((FILES / "alerts.yaml").read_text(encoding="utf-8"))
    scrape = {"job_name": "finetune-operator", "static_configs": [{"targets": [operator.metrics_address]}]}
    server = Prometheus(folder, scrape_configs=[scrape], rules=_hurry(rules))
    yield server
    server.stop()


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

    # A pod's times are whole seconds, so less than one would be no usage.
    started_at = datetime.fromisoformat(team.status()["startTime"])
    wait_until(lambda: datetime.now(UTC) - started_at >= timedelta(seconds=1), what="a second of usage")
    team.end_pod(pod, exit_code=1)
    usage = wait_until(lambda: team.status().get("usage", {}).get("acceleratorSeconds") and team.status()["usage"], what="usage")
    _wait_for(prometheus, f"{used} == {usage['acceleratorSeconds']}")
    _wait_for(prometheus, f"{wasted} == {usage['wastedAcceleratorSeconds']}")
    _wait_for(prometheus, 'increase(finetune_job_failures_total{reason="TrainerError"}[1h]) > 0')
    _wait_for(prometheus, f"sum by (job_namespace) (increase({used}[1h])) > 0")

    wait_until(lambda: {rule["health"] for rule in _list_rules(prometheus)} == {"ok"}, what="all rules are evaluated")
    queries = list_queries()
    assert len(queries) > 30
    for expression in queries:
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

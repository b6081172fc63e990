"""What the chart brings for Prometheus and Grafana."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import cluster_client
import pytest
import yaml
from finetune_api import names
from series import list_metrics
from test_alerts import ROOT, RULES, RULES_FILE

_ALL = {
    "metrics": {
        "podMonitor": {"enabled": True},
        "prometheusRule": {"enabled": True, "runbookBaseUrl": "https://runbooks.test/"},
        "dashboard": {"enabled": True, "annotations": {"grafana_folder": "Training"}},
    }
}


@pytest.fixture(scope="module")
def dashboard(render: Any) -> dict[str, Any]:
    (config_map,) = render(_ALL, kind="ConfigMap")

    assert "1" == config_map["metadata"]["labels"]["grafana_dashboard"]
    assert {"grafana_folder": "Training"} == config_map["metadata"]["annotations"]
    return dict(json.loads(config_map["data"]["finetunejobs.json"]))


def test_nothing_of_it_is_there_by_default(render: Any) -> None:
    assert {"ConfigMap", "PrometheusRule", "PodMonitor", "ServiceMonitor"} & {each["kind"] for each in render()} == set()


def test_rules_of_the_chart_are_those_of_the_file(render: Any) -> None:
    (rule,) = render(_ALL, kind="PrometheusRule")
    text = RULES_FILE.read_text(encoding="utf-8").replace("docs/runbooks/", "https://runbooks.test/")
    expected = yaml.safe_load(text)

    assert expected == rule["spec"]


def test_trainers_are_found_by_their_labels_and_port(render: Any) -> None:
    (monitor,) = render(_ALL, kind="PodMonitor")
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]

    assert {"any": True} == monitor["spec"]["namespaceSelector"]
    assert {names.LABEL_MANAGED_BY: names.MANAGED_BY} == monitor["spec"]["selector"]["matchLabels"]
    assert [{"key": names.LABEL_JOB_UID, "operator": "Exists"}] == monitor["spec"]["selector"]["matchExpressions"]
    assert "metrics" == endpoint["port"]


def test_names_of_jobs_become_labels_only_when_asked_for(render: Any) -> None:
    asked = {"namespaces": ["team-a"], "metrics": {"podMonitor": {"enabled": True, "perJobLabels": True}}}
    rules = {
        name: render(values, kind="PodMonitor")[0]["spec"]["podMetricsEndpoints"][0]["relabelings"]
        for name, values in (("default", _ALL), ("asked", asked))
    }
    (monitor,) = render(asked, kind="PodMonitor")

    assert [{"action": "labeldrop", "regex": "pod"}] == rules["default"]
    assert ["finetunejob", "attempt"] == [rule["targetLabel"] for rule in rules["asked"]]
    assert {"matchNames": ["team-a"]} == monitor["spec"]["namespaceSelector"]


def test_panels_use_metrics_that_exist(dashboard: dict[str, Any]) -> None:
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    used = {name for query in queries for name in re.findall(r"finetune_[a-z_]+", query)}

    assert set() == used - list_metrics()


def test_panels_do_not_overlap_and_say_what_they_show(dashboard: dict[str, Any]) -> None:
    panels = dashboard["panels"]
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]

    assert len(cells) == len(set(cells))
    assert all(x < 24 for x, _ in cells)
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert all(panel["description"].endswith(".") and panel["targets"] for panel in panels if panel["type"] != "row")


def test_configuration_of_the_page_is_one_for_prometheus(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "tasks" / "monitoring.md").read_text(encoding="utf-8")
    plain, labels = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    configuration = yaml.safe_load(plain)
    configuration["scrape_configs"][1]["relabel_configs"] += yaml.safe_load(labels)["relabel_configs"]
    for scrape in configuration["scrape_configs"]:
        # Debian builds its Prometheus without the discovery in Kubernetes.
        assert {"role"} <= set(scrape.pop("kubernetes_sd_configs")[0])
        scrape["static_configs"] = [{"targets": ["localhost"]}]
    shutil.copy(RULES_FILE, tmp_path)
    (tmp_path / "prometheus.yaml").write_text(json.dumps(configuration))
    command = [cluster_client.program("promtool"), "check", "config", tmp_path / "prometheus.yaml"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)

    assert 0 == result.returncode, result.stdout + result.stderr


def test_every_alert_is_in_the_table_of_the_page() -> None:
    page = (ROOT / "docs" / "tasks" / "monitoring.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| \[(\w+)\]\(\S+\) \| (\w+) \|", page, flags=re.MULTILINE))

    assert {rule["alert"]: rule["labels"]["severity"] for rule in RULES} == rows

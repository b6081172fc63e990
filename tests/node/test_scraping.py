"""A real Prometheus scrapes what the chart's monitors select among real pods, as the Prometheus operator would have it do.

Debian's Prometheus has no discovery in Kubernetes, so the targets are looked up here, by the selectors and ports of the monitors.
"""

import math
import re
import subprocess
from collections.abc import Iterator
from typing import Any

import cluster_client
import pytest
import yaml
from harness import wait_until
from prometheus_server import Prometheus, list_queries

pytestmark = [pytest.mark.node, pytest.mark.slow]

_NAME = "scraped"
_SPEC: dict[str, Any] = {
    # More steps than the tests see.
    "hyperparameters": {"maxSteps": 2000, "imageSize": 64, "batchSize": 16},
    "checkpoint": {"intervalSeconds": 1},
}
# What the Prometheus operator adds of itself, before the relabelings of a monitor.
_NAMES = (
    {"source_labels": ["__meta_kubernetes_namespace"], "target_label": "namespace"},
    {"source_labels": ["__meta_kubernetes_pod_name"], "target_label": "pod"},
)


@pytest.fixture(scope="module")
def training(team: Any, until: Any) -> Iterator[None]:
    """A job in the middle of its fine-tuning."""
    team.apply(_NAME, **_SPEC)
    team.wait(_NAME, "Running")
    until(lambda: team.job(_NAME)["status"].get("trainerStatus", {}).get("progressPercentage", 0) >= 20, what="fine-tuning")
    yield
    team.kubectl("delete", "ftj", _NAME, "--wait=false")


@pytest.fixture(scope="module")
def prometheus(training: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A server with the ServiceMonitor, and with the PodMonitor as it is and with labels of each job."""
    service, pods = render("ServiceMonitor"), render("PodMonitor")
    named = render("PodMonitor", "metrics.podMonitor.perJobLabels=true")
    configs = [
        build_scrape("operator", service["endpoints"], list_endpoints(service)),
        build_scrape("trainers", pods["podMetricsEndpoints"], list_pods(pods)),
        build_scrape("named", named["podMetricsEndpoints"], list_pods(named)),
    ]
    server = Prometheus(tmp_path_factory.mktemp("prometheus"), scrape_configs=configs)
    yield server
    server.stop()


def test_every_query_of_the_trainers_row_has_a_value_during_training(prometheus: Prometheus) -> None:
    queries = [query for query in list_queries("Trainers") if "device_memory" not in query]
    assert len(queries) > 6

    for query in queries:
        wait_until(lambda query=query: has_values(prometheus, query), what=query)
    wait_until(
        lambda: has_values(prometheus, 'finetune_trainer_phase{phase="fine-tuning",job="trainers"} == 1'), what="its phase"
    )


def test_the_operator_is_scraped_at_the_port_of_its_service(prometheus: Prometheus) -> None:
    wait_until(lambda: has_values(prometheus, 'up{job="operator"} == 1'), what="a scrape")

    (leaders,) = prometheus.query("sum by (namespace) (finetune_leader)")
    assert (cluster_client.OPERATOR_NAMESPACE, "1") == (leaders["metric"]["namespace"], leaders["value"][1])
    assert has_values(prometheus, 'finetune_jobs{state="Running"} >= 1')


def test_names_of_jobs_are_labels_only_when_asked_for(prometheus: Prometheus, team: Any) -> None:
    named = f'finetune_trainer_steps_total{{finetunejob="{_NAME}",attempt="1",namespace="{team.name}",pod=~"{_NAME}-.+"}}'
    plain = 'finetune_trainer_steps_total{job="trainers"}'
    for expression in (named, plain):
        wait_until(lambda expression=expression: has_values(prometheus, expression), what=expression)

    assert all(each["metric"].keys() == {"__name__", "instance", "job", "namespace"} for each in prometheus.query(plain))


def has_values(prometheus: Prometheus, expression: str) -> bool:
    values = [float(each["value"][1]) for each in prometheus.query(expression)]
    return bool(values) and all(map(math.isfinite, values))


def render(kind: str, *settings: str) -> dict[str, Any]:
    """Return the spec of one of the chart's monitors."""
    enabled = ("metrics.podMonitor.enabled=true", "metrics.serviceMonitor.enabled=true")
    flags = [word for setting in (*enabled, *settings) for word in ("--set", setting)]
    chart = str(cluster_client.ROOT / "charts" / "finetune-operator")
    # helm's own default is a version of its own.
    flags += ["--namespace", cluster_client.OPERATOR_NAMESPACE, "--kube-version", "1.34.0"]
    command = [cluster_client.program("helm"), "template", "finetune-operator", chart, *flags]
    rendered = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(next(each["spec"] for each in yaml.safe_load_all(rendered.stdout) if each and each["kind"] == kind))


def build_scrape(job: str, endpoints: list[dict[str, Any]], targets: list[dict[str, Any]]) -> dict[str, Any]:
    """Return how Prometheus scrapes the targets of a monitor's only endpoint."""
    (endpoint,) = endpoints
    relabelings = [{_to_snake_case(key): value for key, value in rule.items()} for rule in endpoint.get("relabelings", [])]
    assert targets, f"the monitor of {job} selects nothing"
    return {
        "job_name": job,
        "metrics_path": endpoint.get("path", "/metrics"),
        "static_configs": targets,
        "relabel_configs": [*_NAMES, *relabelings],
    }


def list_pods(monitor: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the targets of a PodMonitor for every namespace."""
    assert {"any": True} == monitor["namespaceSelector"]
    (port,) = (each["port"] for each in monitor["podMetricsEndpoints"])
    pods = cluster_client.get("pods", "-A", "--field-selector=status.phase=Running", "-l", _select(monitor["selector"]))["items"]
    return [
        _build_target(pod, pod["status"]["podIP"], each["containerPort"])
        for pod in pods
        for container in pod["spec"]["containers"]
        for each in container.get("ports", ())
        if each["name"] == port
    ]


def list_endpoints(monitor: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the targets of a ServiceMonitor for its own namespace."""
    namespace = ("-n", cluster_client.OPERATOR_NAMESPACE)
    (port,) = (each["port"] for each in monitor["endpoints"])
    (service,) = cluster_client.get(*namespace, "services", "-l", _select(monitor["selector"]))["items"]
    of_service = f"kubernetes.io/service-name={service['metadata']['name']}"
    slices = cluster_client.get(*namespace, "endpointslices", "-l", of_service)["items"]
    return [
        _build_target(cluster_client.get(*namespace, "pod", each["targetRef"]["name"]), address, number["port"])
        for part in slices
        for number in part["ports"]
        if number["name"] == port
        for each in part["endpoints"]
        for address in each["addresses"]
    ]


def _select(selector: dict[str, Any]) -> str:
    """Return a selector of the API in kubectl's notation; of its operators the chart uses one."""
    assert {"Exists"} >= {each["operator"] for each in selector.get("matchExpressions", [])}
    present = (each["key"] for each in selector.get("matchExpressions", []))
    return ",".join([*(f"{key}={value}" for key, value in selector["matchLabels"].items()), *present])


def _build_target(pod: dict[str, Any], address: str, port: int) -> dict[str, Any]:
    """Return a target with what the discovery in Kubernetes tells of its pod."""
    labels = {
        f"__meta_kubernetes_pod_label_{re.sub('[^a-zA-Z0-9_]', '_', key)}": value
        for key, value in pod["metadata"]["labels"].items()
    }
    names = {
        f"__meta_kubernetes_{key}": pod["metadata"][name] for key, name in (("namespace", "namespace"), ("pod_name", "name"))
    }
    return {"targets": [f"{address}:{port}"], "labels": labels | names}


def _to_snake_case(name: str) -> str:
    return re.sub("[A-Z]", lambda match: f"_{match[0].lower()}", name)

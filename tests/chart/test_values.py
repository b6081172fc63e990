"""Every value does something, and a wrong one is refused."""

import re
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
from generate_chart import read_values

_VALUES = Path(__file__).resolve().parents[2] / "charts" / "finetune-operator" / "values.yaml"
_DIGEST = f"sha256:{'0' * 64}"

# A value other than the default for each, and the values without which it has no effect.
_CHANGES: dict[str, Any] = {
    "replicas": 3,
    "leaderElection.leaseSeconds": 17,
    "leaderElection.renewSeconds": 7.5,
    "leaderElection.retrySeconds": 0.7,
    "image.repository": "registry.test/operator",
    "image.tag": "v9",
    "image.digest": _DIGEST,
    "image.pullPolicy": "Always",
    "imagePullSecrets": ["pull"],
    "trainer.image.repository": "registry.test/trainer",
    "trainer.image.tag": "v9",
    "trainer.image.digest": _DIGEST,
    "trainer.image.pullPolicy": "Never",
    "trainer.terminationGraceSeconds": 7,
    "accelerators": {"npu": {"resource": "corp.test/npu", "device": "cpu", "backend": "gloo"}},
    "namespaces": ["team-a"],
    "crds.enabled": False,
    "crds.keep": False,
    "rbac.aggregateToUserRoles": False,
    "admissionPolicy.enabled": False,
    "networkPolicy.enabled": True,
    "networkPolicy.trainerNamespaces": ["team-a"],
    "networkPolicy.dataEgress": [],
    "networkPolicy.metricsNamespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "prometheus"}},
    "networkPolicy.apiServer.to": [{"ipBlock": {"cidr": "192.0.2.7/32"}}],
    "networkPolicy.apiServer.ports": [8443],
    "tls.existingSecret": "mine",
    "tls.certManager.enabled": True,
    "tls.certManager.issuerRef.name": "corp",
    "tls.certManager.issuerRef.kind": "ClusterIssuer",
    "metrics.serviceMonitor.enabled": True,
    "metrics.serviceMonitor.interval": "7s",
    "metrics.serviceMonitor.labels": {"release": "prometheus"},
    "metrics.podMonitor.enabled": True,
    "metrics.podMonitor.interval": "7s",
    "metrics.podMonitor.labels": {"release": "prometheus"},
    "metrics.podMonitor.perJobLabels": True,
    "metrics.prometheusRule.enabled": True,
    "metrics.prometheusRule.labels": {"release": "prometheus"},
    "metrics.prometheusRule.runbookBaseUrl": "https://runbooks.test",
    "metrics.dashboard.enabled": True,
    "metrics.dashboard.labels": {"grafana_dashboard": "yes"},
    "metrics.dashboard.annotations": {"grafana_folder": "Training"},
    "logs.level": "DEBUG",
    "logs.format": "json",
    "api.requestsPerSecond": 7.5,
    "api.burst": 7,
    "api.connections": 7,
    "workers": 7,
    "retries.baseSeconds": 0.7,
    "retries.limitSeconds": 7.5,
    "retries.evidenceSeconds": 7.5,
    "progress.intervalSeconds": 7.5,
    "progress.writesPerSecond": 25,
    "audit.intervalSeconds": 7.5,
    "audit.deafSeconds": 5.5,
    "resources": {"requests": {"cpu": "700m"}},
    "nodeSelector": {"pool": "system"},
    "tolerations": [{"key": "system", "operator": "Exists"}],
    "priorityClassName": "system-cluster-critical",
}
_NEEDS: dict[str, dict[str, Any]] = {
    "networkPolicy.trainerNamespaces": {"networkPolicy.enabled": True},
    "networkPolicy.dataEgress": {"networkPolicy.enabled": True, "namespaces": ["team-a"]},
    "networkPolicy.metricsNamespaceSelector": {"networkPolicy.enabled": True},
    "networkPolicy.apiServer.to": {"networkPolicy.enabled": True},
    "networkPolicy.apiServer.ports": {"networkPolicy.enabled": True},
    "tls.certManager.issuerRef.name": {"tls.certManager.enabled": True},
    "tls.certManager.issuerRef.kind": {"tls.certManager.enabled": True, "tls.certManager.issuerRef.name": "corp"},
    "metrics.serviceMonitor.interval": {"metrics.serviceMonitor.enabled": True},
    "metrics.serviceMonitor.labels": {"metrics.serviceMonitor.enabled": True},
    "metrics.podMonitor.interval": {"metrics.podMonitor.enabled": True},
    "metrics.podMonitor.labels": {"metrics.podMonitor.enabled": True},
    "metrics.podMonitor.perJobLabels": {"metrics.podMonitor.enabled": True},
    "metrics.prometheusRule.labels": {"metrics.prometheusRule.enabled": True},
    "metrics.prometheusRule.runbookBaseUrl": {"metrics.prometheusRule.enabled": True},
    "metrics.dashboard.labels": {"metrics.dashboard.enabled": True},
    "metrics.dashboard.annotations": {"metrics.dashboard.enabled": True},
}


@pytest.mark.parametrize("path", _CHANGES)
def test_value_changes_the_rendering(template: Any, path: str) -> None:
    needs = _NEEDS.get(path, {})
    before, after = (_mask(template(_nest(values))) for values in (needs, needs | {path: _CHANGES[path]}))

    assert before != after


def test_every_value_is_tried() -> None:
    values = {".".join(value.path) for value in read_values(_VALUES.read_text(encoding="utf-8"))}

    assert values == set(_CHANGES)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        pytest.param("image", "registry.test/a:1", id="operator"),
        pytest.param("trainer.image", "registry.test/a:1", id="trainer"),
    ],
)
def test_image_of_repository_and_tag(template: Any, path: str, expected: str) -> None:
    text = template(_nest({f"{path}.repository": "registry.test/a", f"{path}.tag": "1"}))

    assert f'"{expected}"' in text


def test_digest_wins_over_the_tag(template: Any) -> None:
    assert f'"trainer@{_DIGEST}"' in template(
        _nest({"trainer.image.repository": "trainer", "trainer.image.tag": "1", "trainer.image.digest": _DIGEST})
    )


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("replica", 2),
        ("replicas", -1),
        ("leaderElection.leaseSeconds", 1),
        ("leaderElection.retrySeconds", 0),
        ("image.name", "operator"),
        ("trainer.images.tag", "1"),
        ("tls.certManager.issuer", "corp"),
        ("image.repository", ""),
        ("image.tag", 1),
        ("image.digest", "sha256:1"),
        ("image.pullPolicy", "Sometimes"),
        ("accelerators.npu", {"resource": "corp.test/npu", "device": "cpu"}),
        ("accelerators.npu.processes", 2),
        ("accelerators.nvidia.device", "gpu"),
        ("accelerators.nvidia.nodeSelector.pool", 1),
        ("namespaces", "team-a"),
        ("namespaces", ["team-a", "team-a"]),
        ("namespaces", [""]),
        ("networkPolicy.apiServer.ports", []),
        ("crds.enabled", "yes"),
        ("logs.level", "info"),
        ("logs.format", "xml"),
        ("workers", 0),
        ("workers", 1.5),
        ("api.requestsPerSecond", 0),
        ("retries.baseSeconds", "10"),
        ("metrics.serviceMonitor.interval", "often"),
        ("tls.certManager.issuerRef.kind", "Person"),
    ],
)
def test_wrong_value_is_refused_by_name(helm: Any, path: str, value: Any) -> None:
    result = helm("template", "CHART", "--kube-version", "1.34.0", values=_nest({path: value}))

    assert 0 != result.returncode
    assert any(name in result.stderr for name in path.split(".")[-2:])


def test_chart_works_as_a_dependency_with_global_values(template: Any) -> None:
    assert template({"global": {"anything": 1}})


def _nest(values: dict[str, Any]) -> dict[str, Any]:
    """Return values by dotted path as nested values."""
    nested: dict[str, Any] = {}
    for path, value in values.items():
        *parents, last = path.split(".")
        node = reduce(lambda node, name: node.setdefault(name, {}), parents, nested)
        node[last] = value
    return nested


def _mask(text: str) -> str:
    return re.sub(r"(ca\.crt|tls\.crt|tls\.key|checksum/ca): .*", "", text)

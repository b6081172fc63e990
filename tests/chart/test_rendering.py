"""What the chart renders."""

import base64
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.verification import PolicyBuilder, Store
from finetune_api import names
from finetune_api.crd import build_crds
from finetune_operator.settings import Settings, load_settings

Render = Callable[..., list[dict[str, Any]]]

_MODES: dict[str, dict[str, Any]] = {
    "default": {},
    "namespaced": {"namespaces": ["team-a", "team-b"]},
    "cert-manager": {"tls": {"certManager": {"enabled": True}}},
    "own-issuer": {"tls": {"certManager": {"enabled": True, "issuerRef": {"name": "corp", "kind": "ClusterIssuer"}}}},
    "existing-secret": {"tls": {"existingSecret": "reports-tls"}},
    "network-policies": {"networkPolicy": {"enabled": True}, "namespaces": ["team-a"]},
    "service-monitor": {"metrics": {"serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}}}},
}

_NAMESPACED_RULES = {
    ("finetune.dev", "finetunejobs"): ["get", "list", "watch"],
    ("finetune.dev", "finetunejobs/status"): ["patch"],
    ("finetune.dev", "finetunejobs/finalizers"): ["update"],
    ("batch", "jobs"): ["get", "list", "watch", "create", "patch", "delete"],
    ("", "services"): ["create", "patch"],
    ("resource.k8s.io", "resourceclaimtemplates"): ["create", "patch"],
    ("", "pods"): ["list", "watch"],
    ("events.k8s.io", "events"): ["list", "create", "patch"],
}
_CLUSTER_RULES = {
    ("authentication.k8s.io", "tokenreviews"): ["create"],
    ("finetune.dev", "finetuneprofiles"): ["list", "watch"],
}


@pytest.mark.parametrize("mode", _MODES)
def test_lint_finds_nothing(helm: Any, mode: str) -> None:
    result = helm("lint", "CHART", "--strict", "--kube-version", "1.34.0", values=_MODES[mode])

    assert 0 == result.returncode, result.stdout + result.stderr


@pytest.mark.parametrize("mode", ["default", "namespaced", "cert-manager"])
def test_rendering_is_the_golden_one(template: Any, golden: Any, mode: str) -> None:
    documents = template(_MODES[mode]).split("---\n")
    text = "---\n".join(document for document in documents if "/templates/crds.yaml" not in document)

    golden(f"{mode}.yaml", _mask(text))


def test_network_policies_are_the_golden_ones(template: Any, golden: Any) -> None:
    documents = template(_MODES["network-policies"]).split("---\n")

    golden("network-policies.yaml", "---\n".join(each for each in documents if "kind: NetworkPolicy\n" in each))


def test_network_policies_name_the_ports_and_pods_that_there_are(render: Render) -> None:
    documents = render(_MODES["network-policies"])
    operator, trainers = (each["spec"] for each in documents if each["kind"] == "NetworkPolicy")
    (container,) = _pod(documents)["containers"]
    (deployment,) = (each for each in documents if each["kind"] == "Deployment")
    named = {port["port"] for rule in operator["ingress"] for port in rule["ports"]}

    assert {port["name"] for port in container["ports"]} == named
    assert operator["podSelector"]["matchLabels"].items() <= deployment["spec"]["template"]["metadata"]["labels"].items()
    assert {names.LABEL_MANAGED_BY: names.MANAGED_BY} == trainers["podSelector"]["matchLabels"]
    assert [{"key": names.LABEL_JOB, "operator": "Exists"}] == trainers["podSelector"]["matchExpressions"]


def _mask(text: str) -> str:
    """Replace what is random: the key, the certificates, and the checksum of one."""
    return re.sub(r"(ca\.crt|tls\.crt|tls\.key|checksum/ca): [A-Za-z0-9+/=]{20,}", r"\1: MASKED", text)


def test_the_crds_are_those_of_the_models(render: Render) -> None:
    crds = render(kind="CustomResourceDefinition")

    assert [crd["spec"] for crd in build_crds()] == [crd["spec"] for crd in crds]
    assert [{"helm.sh/resource-policy": "keep"}] * 2 == [crd["metadata"]["annotations"] for crd in crds]


def test_the_crds_can_be_left_to_others(render: Render) -> None:
    assert [] == render({"crds": {"enabled": False}}, kind="CustomResourceDefinition")


def test_the_crds_can_go_with_the_chart(render: Render) -> None:
    crds = render({"crds": {"keep": False}}, kind="CustomResourceDefinition")

    assert not any("annotations" in crd["metadata"] for crd in crds)


def test_rights_for_the_whole_cluster_are_exactly_those_used(render: Render) -> None:
    (role,) = _operator_roles(render({}, kind="ClusterRole"))

    assert _NAMESPACED_RULES | _CLUSTER_RULES == _read_rules(role)
    assert ["finetune-operator-lease"] == [role["metadata"]["name"] for role in render({}, kind="Role")]


def test_rights_for_namespaces_are_roles_and_token_reviews(render: Render) -> None:
    values = _MODES["namespaced"]
    (cluster_role,) = _operator_roles(render(values, kind="ClusterRole"))
    roles, bindings = (_without_lease(render(values, kind=kind)) for kind in ("Role", "RoleBinding"))

    assert _CLUSTER_RULES == _read_rules(cluster_role)
    assert ["team-a", "team-b"] == [role["metadata"]["namespace"] for role in roles]
    assert all(_NAMESPACED_RULES == _read_rules(role) for role in roles)
    assert ["team-a", "team-b"] == [binding["metadata"]["namespace"] for binding in bindings]
    assert {("finetune-operator", "finetune")} == {
        (subject["name"], subject["namespace"]) for binding in bindings for subject in binding["subjects"]
    }


@pytest.mark.parametrize("mode", _MODES)
def test_no_right_is_a_wildcard_or_on_secrets(render: Render, mode: str) -> None:
    roles = [each for each in render(_MODES[mode]) if each["kind"] in ("Role", "ClusterRole")]
    words = {
        word for role in roles for rule in role["rules"] for key in ("apiGroups", "resources", "verbs") for word in rule[key]
    }

    assert roles
    assert not {"*", "secrets", "pods/exec", "escalate", "bind", "impersonate"} & words


def test_user_roles_are_aggregated(render: Render) -> None:
    roles = {role["metadata"]["name"]: role for role in render(kind="ClusterRole")}
    view, edit = roles["finetune-operator-finetune-view"], roles["finetune-operator-finetune-edit"]

    assert ["get", "list", "watch"] == view["rules"][0]["verbs"]
    assert "true" == view["metadata"]["labels"]["rbac.authorization.k8s.io/aggregate-to-view"]
    assert {"create", "update", "patch", "delete"} < set(edit["rules"][0]["verbs"])
    assert "true" == edit["metadata"]["labels"]["rbac.authorization.k8s.io/aggregate-to-edit"]


def test_the_pod_is_restricted(render: Render) -> None:
    pod = _pod(render({}))
    (container,) = pod["containers"]

    assert (True, 65532) == (pod["securityContext"]["runAsNonRoot"], pod["securityContext"]["runAsUser"])
    assert {"type": "RuntimeDefault"} == pod["securityContext"]["seccompProfile"]
    assert {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
    } == container["securityContext"]
    assert {"name": "tmp", "emptyDir": {}} in pod["volumes"]
    assert {"requests", "limits"} == set(container["resources"])


@pytest.mark.parametrize("mode", _MODES)
def test_right_to_the_lease_is_to_the_one_in_the_own_namespace(render: Render, mode: str) -> None:
    (role,) = (each for each in render(_MODES[mode], kind="Role") if each["metadata"]["name"] == "finetune-operator-lease")
    rules = [(rule["resources"], rule.get("resourceNames"), rule["verbs"]) for rule in role["rules"]]

    assert "finetune" == role["metadata"]["namespace"]
    assert [(["leases"], None, ["create"]), (["leases"], ["finetune-operator"], ["get", "update"])] == rules
    assert "finetune-operator" == load_settings(_environment(render(_MODES[mode]))).lease_name


def test_a_standby_is_there_through_upgrades_and_drains(render: Render) -> None:
    (deployment,) = render(kind="Deployment")
    (budget,) = render(kind="PodDisruptionBudget")
    spread = _pod(render({}))["topologySpreadConstraints"]

    assert 2 == deployment["spec"]["replicas"]
    assert {"maxSurge": 1, "maxUnavailable": 0} == deployment["spec"]["strategy"]["rollingUpdate"]
    assert (1, deployment["spec"]["selector"]) == (budget["spec"]["maxUnavailable"], budget["spec"]["selector"])
    assert ["kubernetes.io/hostname", "topology.kubernetes.io/zone"] == [each["topologyKey"] for each in spread]
    assert {"ScheduleAnyway"} == {each["whenUnsatisfiable"] for each in spread}


def test_one_replica_can_be_drained(render: Render) -> None:
    assert [] == render({"replicas": 1}, kind="PodDisruptionBudget")
    assert "topologySpreadConstraints" not in _pod(render({"replicas": 1}))


def test_ports_and_probes_are_those_of_the_operator(render: Render) -> None:
    (container,) = _pod(render({}))["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    services = {each["metadata"]["name"]: each["spec"]["ports"][0]["port"] for each in render(kind="Service")}

    assert {"reports": names.PORT_REPORTS, "metrics": names.PORT_METRICS, "health": names.PORT_HEALTH} == ports
    assert {"finetune-operator": names.PORT_REPORTS, "finetune-operator-metrics": names.PORT_METRICS} == services
    assert ("/healthz", "/readyz") == tuple(container[probe]["httpGet"]["path"] for probe in ("livenessProbe", "readinessProbe"))


@pytest.mark.parametrize("mode", _MODES)
def test_the_environment_is_valid_settings(render: Render, mode: str) -> None:
    environment = _environment(render(_MODES[mode]))
    settings = load_settings(environment)

    assert {name.removeprefix("FINETUNE_").lower() for name in environment} <= set(Settings.model_fields)
    assert tuple(_MODES[mode].get("namespaces", ())) == settings.namespaces
    assert "https://finetune-operator.finetune.svc:10443" == settings.report_url


def test_the_defaults_are_those_of_the_settings(render: Render) -> None:
    settings = load_settings(_environment(render({})))
    of_the_release = {"accelerators", "lease_namespace"}
    fields = {name: field for name, field in Settings.model_fields.items() if name not in of_the_release}
    defaults = {name: field.default for name, field in fields.items() if not field.is_required()}

    assert defaults == settings.model_dump(include=set(defaults))


def test_accelerator_classes_of_the_values_reach_the_operator(render: Render) -> None:
    npu = {"resource": "corp.test/npu", "device": "cpu", "backend": "gloo"}
    changes = {"npu": npu, "amd": None, "neuron": {"processesPerAccelerator": 4}}
    default, changed = (load_settings(_environment(render(values))) for values in ({}, {"accelerators": changes}))

    assert set(default.accelerators) - {"amd"} | {"npu"} == set(changed.accelerators)
    assert (2, 4) == tuple(each.accelerators["neuron"].processes_per_accelerator for each in (default, changed))
    assert "{product}" == changed.accelerators["nvidia"].node_selector["nvidia.com/gpu.product"]


def test_every_setting_but_addresses_is_set_by_the_chart(render: Render) -> None:
    environment = {each["name"] for each in _pod(render({}))["containers"][0]["env"]}
    unset = {name for name in Settings.model_fields if f"FINETUNE_{name.upper()}" not in environment}

    assert {"bind_address", "report_port", "metrics_port", "health_port"} == unset


def test_large_numbers_stay_numbers(render: Render) -> None:
    values = {"api": {"burst": 2_000_000, "requestsPerSecond": 2_000_000}, "trainer": {"terminationGraceSeconds": 1_000_000}}
    settings = load_settings(_environment(render(values)))

    assert (2_000_000, 2_000_000) == (settings.api_burst, settings.api_requests_per_second)
    assert 1_000_000 == settings.trainer_termination_grace_seconds


def test_the_certificate_is_good_for_the_report_url(render: Render) -> None:
    (secret,) = render(kind="Secret")
    data = {name: base64.b64decode(value) for name, value in secret["data"].items()}
    certificate = x509.load_pem_x509_certificate(data["tls.crt"])
    authority = x509.load_pem_x509_certificate(data["ca.crt"])
    key = load_pem_private_key(data["tls.key"], password=None)
    in_nine_years = datetime.now(UTC) + timedelta(days=9 * 365)

    name = x509.DNSName("finetune-operator.finetune.svc")
    policy = PolicyBuilder().store(Store([authority])).time(in_nine_years)
    assert policy.build_server_verifier(name).verify(certificate, [])
    assert certificate.public_key() == key.public_key()


def test_the_pod_mounts_the_secret_of_each_mode(render: Render) -> None:
    mounted = {
        mode: next(each["secret"]["secretName"] for each in _pod(render(values))["volumes"] if each["name"] == "tls")
        for mode, values in _MODES.items()
    }

    assert {
        "default": "finetune-operator-tls",
        "namespaced": "finetune-operator-tls",
        "cert-manager": "finetune-operator-certificate",
        "own-issuer": "finetune-operator-certificate",
        "existing-secret": "reports-tls",
        "network-policies": "finetune-operator-tls",
        "service-monitor": "finetune-operator-tls",
    } == mounted
    assert [] == render(_MODES["existing-secret"], kind="Secret")
    assert [] == render(_MODES["cert-manager"], kind="Secret")


def test_cert_manager_issues_from_an_authority_of_the_chart_or_from_yours(render: Render) -> None:
    own = {each["metadata"]["name"]: each["spec"] for each in render(_MODES["cert-manager"], kind="Certificate")}
    (corporate,) = render(_MODES["own-issuer"], kind="Certificate")

    assert own["finetune-operator-authority"]["isCA"]
    assert "finetune-operator-authority" == own["finetune-operator"]["issuerRef"]["name"]
    assert "finetune-operator-certificate" == own["finetune-operator"]["secretName"]
    assert {"group": "cert-manager.io", "kind": "ClusterIssuer", "name": "corp"} == corporate["spec"]["issuerRef"]
    assert [] == render(_MODES["own-issuer"], kind="Issuer")


def test_two_releases_share_no_name_without_a_namespace(helm: Any) -> None:
    def list_names(namespace: str) -> set[tuple[str, str]]:
        words = ("template", "finetune-operator", "CHART", "--namespace", namespace, "--kube-version", "1.34.0")
        output = helm(*words, values={"crds": {"enabled": False}, "namespaces": ["shared"]}).stdout
        documents = [each for each in yaml.safe_load_all(output) if each]
        return {(each["kind"], f"{each['metadata'].get('namespace')}/{each['metadata']['name']}") for each in documents}

    assert set() == list_names("one") & list_names("two")


def _pod(documents: list[dict[str, Any]]) -> dict[str, Any]:
    (deployment,) = (each for each in documents if each["kind"] == "Deployment")
    return dict(deployment["spec"]["template"]["spec"])


def _environment(documents: list[dict[str, Any]]) -> dict[str, str]:
    return {each["name"]: each["value"] for each in _pod(documents)["containers"][0]["env"] if "value" in each}


def _operator_roles(roles: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [role for role in roles if not role["metadata"]["name"].endswith(("-view", "-edit"))]


def _without_lease(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [each for each in objects if not each["metadata"]["name"].endswith("-lease")]


def _read_rules(role: dict[str, Any]) -> dict[tuple[str, str], list[str]]:
    return {
        (group, resource): rule["verbs"]
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }

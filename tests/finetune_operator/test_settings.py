"""Settings come from the environment and name what is wrong with it."""

import json
from typing import Any

import pytest
from finetune_operator.settings import load_settings
from pydantic import ValidationError

_VALID = {
    "FINETUNE_TRAINER_IMAGE": "trainer:1",
    "FINETUNE_REPORT_URL": "https://operator:10443",
    "FINETUNE_REPORT_CA_FILE": "/tls/ca.crt",
    "FINETUNE_TLS_CERTIFICATE_FILE": "/tls/tls.crt",
    "FINETUNE_TLS_KEY_FILE": "/tls/tls.key",
    "FINETUNE_LEASE_NAMESPACE": "finetune",
    "PATH": "/bin",
}


def test_namespaces_are_split_at_commas() -> None:
    assert ("a", "b") == load_settings(_VALID | {"FINETUNE_NAMESPACES": "a, b,"}).namespaces


def test_no_namespaces_mean_all() -> None:
    assert () == load_settings(_VALID).namespaces


def test_accelerator_classes_are_read_from_json() -> None:
    classes = {"npu": {"resource": "corp.test/npu", "device": "cpu", "backend": "gloo", "processesPerAccelerator": 2}}
    settings = load_settings(_VALID | {"FINETUNE_ACCELERATORS": json.dumps(classes)})

    assert ("corp.test/npu", 2) == (settings.accelerators["npu"].resource, settings.accelerators["npu"].processes_per_accelerator)


def test_variables_of_other_programs_are_ignored() -> None:
    assert load_settings(_VALID | {"FINETUNE_OPERATOR_PORT": "tcp://10.0.0.1:80"}) == load_settings(_VALID)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        pytest.param({"FINETUNE_WORKERS": "0"}, "workers", id="no worker"),
        pytest.param({"FINETUNE_LOG_FORMAT": "xml"}, "log_format", id="unknown format"),
        pytest.param({"FINETUNE_ACCELERATORS": "nvidia"}, "(?s)accelerators.*this is no JSON", id="no JSON"),
        pytest.param({"FINETUNE_ACCELERATORS": '{"npu": {"resource": "a/b", "device": "cpu"}}'}, "npu.backend", id="no class"),
        pytest.param({"FINETUNE_LEASE_NAMESPACE": ""}, "needs FINETUNE_LEASE_NAMESPACE", id="no namespace of the Lease"),
        pytest.param({"FINETUNE_RENEW_SECONDS": "15"}, "lease_seconds must be more", id="renewal as late as the end"),
        pytest.param({"FINETUNE_LEASE_RETRY_SECONDS": "10"}, "more than lease_retry", id="one renewal alone"),
        pytest.param({"FINETUNE_API_REQUESTS_PER_SECOND": "fast"}, "api_requests_per_second", id="not a number"),
    ],
)
def test_a_wrong_value_is_named(change: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError, match=field):
        load_settings(_VALID | change)


def test_a_missing_value_is_named() -> None:
    with pytest.raises(ValidationError, match="trainer_image"):
        load_settings({key: value for key, value in _VALID.items() if key != "FINETUNE_TRAINER_IMAGE"})

"""Jobs on accelerators under an operator with the chart's rights and classes, on a real control plane."""

from typing import Any

import pytest

pytestmark = pytest.mark.apiserver

_TEMPLATES = "/apis/resource.k8s.io/v1/namespaces/{}/resourceclaimtemplates"


def _list_templates(team: Any) -> list[dict[str, Any]]:
    return list(team.api.get(_TEMPLATES.format(team.namespace))["items"])


def _list_claims(team: Any) -> list[str]:
    """Return the names of the templates that the pods of all Jobs claim from."""
    pods = [job["spec"]["template"]["spec"] for job in team.children()]
    return [claim["resourceClaimTemplateName"] for pod in pods for claim in pod.get("resourceClaims", ())]


def test_attempts_claim_from_one_template_which_goes_with_the_job(team: Any, operator: Any, until: Any) -> None:
    operator.start()
    team.apply(accelerator={"deviceClass": {"name": "gpu.nvidia.com", "count": 2}})
    first = team.wait_for_pod()
    team.run_pod(first)
    team.wait("Running")
    team.end_pod(first, 1)
    until(lambda: len(_list_claims(team)) == 2, what="there are two attempts")

    (template,) = _list_templates(team)
    assert [template["metadata"]["name"]] * 2 == _list_claims(team)
    assert [{"name": "accelerator"}] == first["spec"]["containers"][0]["resources"]["claims"]
    (request,) = template["spec"]["spec"]["devices"]["requests"]
    assert ("gpu.nvidia.com", 2) == (request["exactly"]["deviceClassName"], request["exactly"]["count"])
    team.api.delete(team.path("finetunejobs", "emoji"))
    until(lambda: not _list_templates(team), what="the template is collected")


def test_other_devices_are_claimed_from_another_template(team: Any, operator: Any, until: Any) -> None:
    operator.start()
    team.apply(accelerator={"deviceClass": {"name": "gpu.nvidia.com"}})
    pod = team.wait_for_pod()
    before = _list_claims(team)
    team.apply(accelerator={"deviceClass": {"name": "gpu.nvidia.com", "count": 2}})
    until(lambda: pod["metadata"]["uid"] not in {each["metadata"]["uid"] for each in team.pods()}, what="the pod is replaced")
    after = until(lambda: set(_list_claims(team)) - set(before), what="the next attempt claims from another template")

    assert {*before, *after} == {each["metadata"]["name"] for each in _list_templates(team)}
    assert 0 == team.status().get("restarts", 0)


def test_a_missing_class_is_shown_without_a_child_and_mended_by_the_spec(team: Any, operator: Any) -> None:
    operator.start()
    team.apply(accelerator={"custom": {"className": "ipu"}})
    status = team.wait("AcceleratorClassNotFound")
    message = next(each["message"] for each in status["conditions"] if each["type"] == "Ready")
    children = team.children()
    team.apply(accelerator={"custom": {"className": "npu"}})
    pod = team.wait_for_pod()

    assert [] == children
    assert "no accelerator class ipu for this; it has amd, " in message
    assert ", npu, " in message
    assert {"corp.test/npu": "1"}.items() <= pod["spec"]["containers"][0]["resources"]["limits"].items()

"""The chart's ValidatingAdmissionPolicy: who may name which Secret in a FineTuneJob, from the schema (pure)."""

from collections.abc import Iterator
from typing import Any

_HEAD = """\
{{{{- /* {notice} */}}}}
{{{{- if .Values.admissionPolicy.enabled }}}}
# Whoever names a Secret in a FineTuneJob has the kubelet hand its keys to a trainer. So the requester must be allowed to read it.
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicy
metadata:
  name: {{{{ include "finetune-operator.clusterName" . }}}}-secrets
  labels: {{{{- include "finetune-operator.labels" . | nindent 4 }}}}
spec:
  failurePolicy: Fail
  matchConstraints:
    {{{{- with .Values.namespaces }}}}
    namespaceSelector:
      matchExpressions:
        - key: kubernetes.io/metadata.name
          operator: In
          values: {{{{- toYaml . | nindent 12 }}}}
    {{{{- end }}}}
    resourceRules:
      - apiGroups: [{group}]
        apiVersions: ["*"]
        operations: [CREATE, UPDATE]
        resources: [{plural}]
"""

_TAIL = """\
---
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicyBinding
metadata:
  name: {{ include "finetune-operator.clusterName" . }}-secrets
  labels: {{- include "finetune-operator.labels" . | nindent 4 }}
spec:
  policyName: {{ include "finetune-operator.clusterName" . }}-secrets
  validationActions: [Deny]
{{- end }}
"""

# An update that leaves the Secret and its use alone is let through: a controller that sets spec.suspend need not read Secrets.
_VARIABLES = """\
    - name: {variable}
      expression: object.?{path}.name.orValue('')
    - name: {variable}Kept
      expression: >-
        oldObject != null && {same}
"""

_VALIDATION = """\
    - expression: >-
        variables.{variable} == '' || variables.{variable}Kept ||
        authorizer.group('').resource('secrets').namespace(request.namespace).name(variables.{variable}).check('get').allowed()
      messageExpression: >-
        '{path}: you may not get the Secret ' + variables.{variable} + ' in the namespace ' + request.namespace +
        '; ask for that right, or name a Secret that you may read'
      reason: Forbidden
"""


class UnboundedReferenceError(ValueError):
    """A reference to a Secret lies where no single expression reaches it."""


def build_admission_template(crd: dict[str, Any], *, notice: str) -> str:
    """Return the policy and its binding as a template of the chart, with one validation for each field that names a Secret."""
    (version,) = crd["spec"]["versions"]
    references = list_secret_references(version["schema"]["openAPIV3Schema"])
    variables = "".join(_build_variables(path, uses) for path, uses in references)
    validations = "".join(_VALIDATION.format(variable=_name(path), path=path) for path, _ in references)
    head = _HEAD.format(notice=notice, group=crd["spec"]["group"], plural=crd["spec"]["names"]["plural"])
    return f"{head}  variables:\n{variables}  validations:\n{validations}{_TAIL}"


def list_secret_references(schema: dict[str, Any], prefix: str = "") -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Return the path of each reference to a Secret, with the paths of what decides where its content goes."""
    return tuple(_list_references(schema, prefix))


def _list_references(schema: dict[str, Any], prefix: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    properties: dict[str, Any] = schema.get("properties", {})
    for name, child in properties.items():
        path = f"{prefix}.{name}".lstrip(".")
        if _names_secret(name):
            yield path, (f"{prefix}.uri",) if "uri" in properties else ()
            continue
        yield from _list_references(child, path)
        for inner in (child.get("items"), child.get("additionalProperties")):
            if isinstance(inner, dict) and (found := list_secret_references(inner, path)):
                raise UnboundedReferenceError(f"{found[0][0]} lies in a list or a map; write its rule by hand")


def _names_secret(field: str) -> bool:
    return field == "secretRef" or field.endswith("SecretRef")


def _build_variables(path: str, uses: tuple[str, ...]) -> str:
    compared = (f"{path}.name", *uses)
    same = " &&\n        ".join(f"oldObject.?{each}.orValue('') == object.?{each}.orValue('')" for each in compared)
    return _VARIABLES.format(variable=_name(path), path=path, same=same)


def _name(path: str) -> str:
    """Return the variable of a field: spec.checkpoint.secretRef is checkpointSecretRef."""
    first, *rest = path.removeprefix("spec.").split(".")
    return first + "".join(word[0].upper() + word[1:] for word in rest)

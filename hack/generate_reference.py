"""The reference pages, from the CRD's schema, the operator's settings and the trainer's exit codes (pure)."""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any, get_args, get_origin

from finetune_api import contract, names
from finetune_operator.accelerator_classes import AcceleratorClass
from finetune_operator.metrics import DEFINITIONS, PROCESS_DEFINITIONS, list_rows
from finetune_operator.settings import Settings
from finetune_trainer import metrics as trainer_metrics

Schema = dict[str, Any]

_API_HEAD = """# {kind}

`{version}`, kind `{kind}`, short name `{short}`, {scope}.
`kubectl explain {short}.spec` prints the same text.
The API server refuses an object that breaks a bound or a rule, and names the field.
"""

_SCOPES = {"Namespaced": "namespaced", "Cluster": "cluster-scoped"}

_SETTINGS_HEAD = """# Settings of the operator

Each setting is an environment variable.
The chart sets all of them from its values; see [its README](../../charts/finetune-operator/README.md).

| variable | type | default | meaning |
| --- | --- | --- | --- |
"""

_CLASSES_HEAD = """# Accelerator classes of the chart

What each kind of accelerator needs of pods and nodes: the chart's value `accelerators`.
[Add a class](../accelerators/add-a-class.md) says how to change it.
Words in braces stand for fields of `spec.accelerator`; a label whose field a job leaves out is left out.

| class | the pod requests | processes for each | device | backend | labels of the node | taints tolerated | environment |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""

_METRICS_HEAD = """# Metrics

[Monitoring](../tasks/monitoring.md) says how to have them scraped, and what dashboard and alerts the chart brings.
Labels have a fixed set of values: never a name, a uid or a message.
The one exception is the namespace of a job where its use of accelerators is counted.
"""

_METRICS_TABLE = """| metric | type | labels | meaning |
| --- | --- | --- | --- |
"""

_METRICS_OF_OPERATOR = "The operator serves these on port 8080 of its pod."

_METRICS_OF_TRAINER = """Each trainer pod serves these on its port `metrics` (8080), for the first of its processes.
Counters begin at zero in each attempt."""

_EXIT_CODES_HEAD = """# Exit codes of the trainer

The operator reads the exit code of a failed trainer to decide whether to try again.
Every other code is a bug or the machine, and is tried again.

| code | name | meaning | retried |
| --- | --- | --- | --- |
"""


def build_api_page(crd: Schema) -> str:
    """Return the page of the API: one section for each object, with its fields and rules."""
    version = crd["spec"]["versions"][0]
    root = version["schema"]["openAPIV3Schema"]
    kinds = crd["spec"]["names"]
    head = _API_HEAD.format(
        kind=kinds["kind"], version=names.API_VERSION, short=kinds["shortNames"][0], scope=_SCOPES[crd["spec"]["scope"]]
    )
    parts = [name for name in ("spec", "status") if name in root["properties"]]
    objects = (each for name in parts for each in _walk(name, root["properties"][name]))
    sections = (head + _build_rules(root), _build_columns(version["additionalPrinterColumns"], short=kinds["shortNames"][0]))
    return "\n".join((*sections, *(_build_section(path, node) for path, node in objects)))


def build_classes_page(classes: dict[str, AcceleratorClass]) -> str:
    """Return the page of the chart's accelerator classes."""
    return _CLASSES_HEAD + "".join(f"{_build_class_row(name, each)}\n" for name, each in classes.items())


def build_settings_page() -> str:
    """Return the page of the operator's settings."""
    return _SETTINGS_HEAD + "".join(f"{row}\n" for row in _list_settings())


def build_exit_codes_page() -> str:
    """Return the page of the trainer's exit codes."""
    meanings = _read_member_docstrings(contract.ExitCode)
    rows = (f"| {code.value} | `{code.name}` | {meanings[code.name]} | {_say_retried(code)} |\n" for code in contract.ExitCode)
    return _EXIT_CODES_HEAD + "".join(rows)


def build_metrics_page() -> str:
    """Return the page of the metrics of operator and trainer."""
    operator = list_rows((*DEFINITIONS, *PROCESS_DEFINITIONS))
    trainer = [_build_metric_row(each) for each in trainer_metrics.DEFINITIONS]
    return _METRICS_HEAD + "".join(
        f"\n## {name}\n\n{text}\n\n{_METRICS_TABLE}" + "\n".join(rows) + "\n"
        for name, text, rows in (("Operator", _METRICS_OF_OPERATOR, operator), ("Trainer", _METRICS_OF_TRAINER, trainer))
    )


def _build_metric_row(each: trainer_metrics.Definition) -> str:
    labels = f"`{each.labels[0]}`: {', '.join(each.values)}" if each.labels else "-"
    return f"| `{each.name}` | {each.type} | {labels} | {each.help} |"


def _walk(path: str, node: Schema) -> Iterator[tuple[str, Schema]]:
    """Yield every object of the schema with its path, items of lists as PATH[]."""
    yield path, node
    for name, child in node["properties"].items():
        below, inner = (f"{path}.{name}[]", child["items"]) if child["type"] == "array" else (f"{path}.{name}", child)
        if "properties" in inner:
            yield from _walk(below, inner)


def _build_section(path: str, node: Schema) -> str:
    required = node.get("required", ())
    rows = [
        f"| `{name}`{' (required)' if name in required else ''} | {_describe_type(child)} | {_describe_default(child)} "
        f"| {_describe_bounds(child)} | {_escape(child['description'])} |"
        for name, child in node["properties"].items()
    ]
    table = "\n".join(("| field | type | default | allowed | meaning |", "| --- | --- | --- | --- | --- |", *rows))
    return f"## {path}\n\n{_escape(node['description'])}\n\n{table}\n{_build_rules(node)}"


def _build_rules(node: Schema) -> str:
    """Return the rules of an object and of its plain fields, each with its expression."""
    own = node.get("x-kubernetes-validations", [])
    fields = [
        rule
        for child in node["properties"].values()
        if child["type"] != "object"
        for rule in child.get("x-kubernetes-validations", [])
    ]
    lines = [f"- {_escape(rule['message'])}\n  `{rule['rule']}`" for rule in (*own, *fields)]
    return "\nRules:\n\n" + "\n".join(lines) + "\n" if lines else ""


def _build_columns(columns: list[Schema], *, short: str) -> str:
    rows = "\n".join(f"| {each['name']} | {each['description']} | `{each['jsonPath']}` |" for each in columns)
    return f"## Columns of `kubectl get {short}`\n\n| column | meaning | from |\n| --- | --- | --- |\n{rows}\n"


def _describe_type(node: Schema) -> str:
    if node["type"] == "array":
        return f"list of {node['items']['type']}s"
    if "additionalProperties" in node:
        return f"map of {node['additionalProperties']['type']}s"
    return "time" if node.get("format") == "date-time" else str(node["type"])


def _describe_default(node: Schema) -> str:
    if "default" not in node:
        return "-"
    value = node["default"]
    return f"`{str(value).lower() if isinstance(value, bool) else value}`" if value not in ({}, []) else "empty"


def _describe_bounds(node: Schema) -> str:
    parts = []
    if "enum" in node:
        parts.append(", ".join(f"`{value}`" for value in node["enum"]))
    if "minimum" in node:
        parts.append(f"{'over' if node.get('exclusiveMinimum') else 'at least'} {node['minimum']}")
    if "maximum" in node:
        parts.append(f"at most {node['maximum']}")
    if "maxLength" in node:
        parts.append(f"at most {node['maxLength']} characters")
    if "maxItems" in node:
        parts.append(f"at most {node['maxItems']} items")
    return "; ".join(parts) or "-"


def _build_class_row(name: str, each: AcceleratorClass) -> str:
    what = f"`{each.resource}`" if each.resource else f"DeviceClass `{each.device_class}`"
    extra = "".join(f", `{resource}: {amount}`" for resource, amount in each.extra_resources.items())
    labels = ", ".join(f"`{label}`: `{value}`" for label, value in each.node_selector.items()) or "-"
    taints = ", ".join(f"`{taint.key}`" for taint in each.tolerations) or "-"
    variables = ", ".join(f"`{variable}={value}`" for variable, value in each.environment.items()) or "-"
    processes = each.processes_per_accelerator
    return f"| `{name}` | {what}{extra} | {processes} | `{each.device}` | `{each.backend}` | {labels} | {taints} | {variables} |"


def _list_settings() -> Iterator[str]:
    for name, field in Settings.model_fields.items():
        text = _plain(field.get_default(call_default_factory=True))
        default = "required" if field.is_required() else f"`{text}`" if text else "empty"
        yield f"| `FINETUNE_{name.upper()}` | {_name_type(field.annotation)} | {default} | {_escape(field.description or '')} |"


def _plain(value: object) -> str:
    return ",".join(value) if isinstance(value, tuple | dict) else str(value)


def _name_type(annotation: object) -> str:
    choices = get_args(annotation)
    if choices and all(isinstance(choice, str) for choice in choices):
        return ", ".join(f"`{choice}`" for choice in choices)
    if get_origin(annotation) is dict:
        return "JSON"
    words = {"str": "text", "int": "whole number", "float": "number", "Path": "file"}
    return words.get(getattr(annotation, "__name__", ""), "list")


def _read_member_docstrings(kind: type) -> dict[str, str]:
    """Return the docstring below each member of a class; Python itself keeps none."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(tree, ast.ClassDef)
    return {
        member.targets[0].id: " ".join(str(text.value.value).split())
        for member, text in zip(tree.body, tree.body[1:], strict=False)
        if isinstance(member, ast.Assign) and isinstance(member.targets[0], ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }


def _say_retried(code: contract.ExitCode) -> str:
    return "-" if code is contract.ExitCode.COMPLETE else "never" if code in contract.NEVER_RETRIED else "yes"


def _escape(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")

"""Sequences of specs that a user may apply one after the other: each field is set, changed and removed, and all is undone."""

import itertools
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from finetune_api.v1alpha1 import FineTuneJobSpec
from generator import drop_field, generate_spec, has_field, is_required, list_fields, put_field
from pydantic import ValidationError

OPERATIONS = ("set", "change", "remove")
_MAX_TRIES = 2000


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What is applied in turn; the last spec is the first one again."""

    field: str
    operation: str
    specs: tuple[dict[str, Any], ...]

    @property
    def name(self) -> str:
        return f"{self.operation} {self.field}"


def generate_trials(number: int, *, seed: int) -> Iterator[Trial]:
    """Yield trials that go through all operations on all fields."""
    wanted = [(field, operation) for field in list_fields() for operation in OPERATIONS if _is_possible(field, operation)]
    choices = random.Random(seed)
    choices.shuffle(wanted)
    for field, operation in itertools.islice(itertools.cycle(wanted), number):
        yield _generate_trial(field, operation, choices)


def _is_possible(field: str, operation: str) -> bool:
    # There is one task yet.
    return field != "task" and (operation == "change" or not is_required(field))


def _generate_trial(field: str, operation: str, choices: random.Random) -> Trial:
    for _ in range(_MAX_TRIES):
        base = _generate_base(choices)
        first = drop_field(base, field) if operation == "set" else base
        if has_field(first, field) is (operation == "set") or not is_valid(first):
            continue
        second = drop_field(first, field) if operation == "remove" else put_field(first, field, choices)
        if second != first and is_valid(second):
            others = _wander(second, choices)
            return Trial(field=field, operation=operation, specs=(first, second, *others, first))
    raise AssertionError(f"no spec lets {operation} {field}")


def _generate_base(choices: random.Random) -> dict[str, Any]:
    """Return a spec that this operator trains."""
    spec = drop_field(generate_spec(choices), "managedBy")
    return spec | {"suspend": False} if "suspend" in spec else spec


def _wander(spec: dict[str, Any], choices: random.Random) -> Iterator[dict[str, Any]]:
    """Yield up to two more specs, each a change of the one before; some are wrong."""
    for _ in range(choices.randint(0, 2)):
        field = choices.choice(list_fields())
        is_dropped = choices.random() < 0.3 and not is_required(field)
        spec = drop_field(spec, field) if is_dropped else put_field(spec, field, choices)
        yield spec


def is_valid(spec: dict[str, Any]) -> bool:
    """Return whether an API server would take a spec, which looks for duplicates as well."""
    try:
        rules = FineTuneJobSpec.model_validate(spec).run_policy.failure_rules
    except ValidationError:
        return False
    lists = [[each.name for each in rules], *(each.on_exit_codes for each in rules), *(each.on_reasons for each in rules)]
    return all(len(set(each)) == len(each) for each in lists)


def normalize_job(manifest: dict[str, Any], *, job: str, uid: str | None = None) -> dict[str, Any]:
    """Return what a Job says, without what differs between the attempts of two FineTuneJobs of one spec."""
    metadata, spec = manifest["metadata"], manifest["spec"]
    parts = {
        "labels": metadata["labels"],
        "annotations": metadata.get("annotations", {}),
        "spec": {name: value for name, value in spec.items() if name not in ("selector", "suspend")},
    }
    text = normalize_text(json.dumps(parts, sort_keys=True), job=job, uid=uid)
    return dict(json.loads(_ATTEMPT.sub(r"\1N\2", text)))


def normalize_text(text: str, *, job: str, uid: str | None = None) -> str:
    """Return a text without names and uids of its own."""
    text = re.sub(rf"{job}-([0-9a-f]{{8}})-[0-9]+(-[0-9]+-[a-z0-9]{{5}})?", r"JOB-\1", text)
    if uid is not None:
        text = text.replace(uid, "UID").replace(f"{job}-{uid[:8]}", "JOB-UID8").replace(job, "JOB")
        text = re.sub("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "UID", text)
    return re.sub("attempt [0-9]+", "attempt N", text)


def normalize_conditions(conditions: list[dict[str, Any]], *, job: str, uid: str | None = None) -> list[tuple[str, ...]]:
    """Return type, status, reason and message of conditions."""
    lines = ((each["type"], each["status"], each["reason"], each["message"]) for each in conditions)
    return sorted(tuple(normalize_text(part, job=job, uid=uid) for part in line) for line in lines)


# In the label, and in the trainer's configuration, which is JSON in JSON.
_ATTEMPT = re.compile(r'(finetune\.dev/attempt": "|\\"(?:attempt|generation)\\":)[0-9]+("|)')

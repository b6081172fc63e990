"""Whatever a user applies in turn, what counts in the end is the last spec: nothing of the others stays, and nothing is stuck."""

import functools
import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest
from finetune_api.conditions import find_condition, is_true
from finetune_api.contract import compute_run
from finetune_api.v1alpha1 import FineTuneJobSpec
from harness import Operator, Team, wait_until
from sequences import OPERATIONS, Trial, generate_trials, is_valid, normalize_conditions, normalize_job
from world import PUBLISHED, World

_TRIALS = 500
_PARTS = 10
_SEED = 20
_WAIT_SECONDS = 5
_TERMINAL = ("Failed", "InvalidSpec", "ProfileViolated")
# What the current attempt is and asks for; the rest of a status tells of time and of earlier attempts.
_OF_THE_SPEC = {"run", "pod_shape", "micro_batch_divisor"}
_OF_THE_ATTEMPT = {"accelerators", "accelerator_kind", "price_per_accelerator_hour"}


def test_sequences_set_change_and_remove_every_field() -> None:
    seen = {(trial.field, trial.operation) for trial in _list_trials()}
    fields = {field for field, _ in seen}

    assert set(OPERATIONS) == {operation for _, operation in seen}
    assert {"accelerator", "profileRef.name", "checkpoint.secretRef", "runPolicy.failureRules", "output.uri"} <= fields
    assert len(seen) > 100


@pytest.mark.parametrize("part", range(_PARTS))
def test_what_was_applied_in_between_leaves_no_trace(part: int) -> None:
    for number, trial in itertools.islice(enumerate(_list_trials()), part, None, _PARTS):
        _check(trial, number)


@functools.cache
def _list_trials() -> tuple[Trial, ...]:
    return tuple(generate_trials(_TRIALS, seed=_SEED))


def _check(trial: Trial, number: int) -> None:
    first, *others, last = trial.specs
    world, choices = _begin(first), random.Random(number)
    for spec in others:
        _play(world, choices, final=last)
        _apply(world, spec)
    _apply(world, last)
    fresh = _begin(last)
    if is_true(world.status.conditions, "Failed"):
        assert _has_used_its_time(world), f"{trial.name} has no way back: {world.message}"
        return
    # A change of these stops no attempt: it takes effect with the next one.
    for each in (world, fresh):
        _apply(each, last | {"suspend": True})
        _apply(each, last)

    assert _describe(fresh) == _describe(world), trial.name


def _begin(spec: dict[str, Any]) -> World:
    world = World(spec=dict(spec)).put_profile("gold", image="gold:1", environment=[{"name": "A", "value": "1"}])
    return _rest(world)


def _apply(world: World, spec: dict[str, Any]) -> None:
    world.spec = dict(spec)
    world.generation += 1
    _rest(world)


def _rest(world: World) -> World:
    """Go on until nothing more happens by itself, and look that it is told right."""
    world.settle()
    while any(child.deleting for child in world.children.values()):
        world.collect()
    status = world.status
    assert status.observed_generation == world.generation
    assert {world.generation} == {each.observed_generation for each in status.conditions}
    if world.state in _TERMINAL:
        stalled = find_condition(status.conditions, "Stalled")
        assert stalled is not None
        assert is_true(status.conditions, "Stalled")
        assert stalled.reason
        assert stalled.message
    assert len(world.active) <= 1
    return world


def _has_used_its_time(world: World) -> bool:
    """Return whether the deadlines of the spec itself ended the run."""
    policy = world.spec.get("runPolicy", {})
    limit = policy.get("startDeadlineSeconds" if "StartDeadlineExceeded" in world.cause else "activeDeadlineSeconds")
    return limit is not None and limit <= max(world.status.active_seconds, _WAIT_SECONDS)


def _play(world: World, choices: random.Random, *, final: dict[str, Any]) -> None:
    """Let an attempt of a spec wait, run, or end in a way that the last spec has not to do with."""
    if not world.active:
        return
    world.wait(choices.choice((0, _WAIT_SECONDS)))
    if choices.random() < 0.5:
        world.settle()
    if world.active and choices.random() < 0.5:
        world.run().wait(5).settle()
    if not is_valid(world.spec) or _compute_run(world.spec) == _compute_run(final):
        return
    end = choices.choice((None, 0, 1, 64, 137))
    if end is not None and world.active and not world.newest.deleting:
        world.run().exit(end, message=PUBLISHED if end == 0 else None)
    _rest(world)


def _compute_run(spec: dict[str, Any]) -> str:
    return compute_run(FineTuneJobSpec.model_validate(spec))


def _describe(world: World) -> dict[str, Any]:
    """Return what a user sees of the spec in status and Job."""
    status = world.status.model_dump(mode="json", by_alias=True)
    usage = world.status.usage
    job = next((each for each in reversed(world.manifests) if each["metadata"]["name"] in world.children), None)
    return {
        "conditions": normalize_conditions(status["conditions"], job="emoji"),
        "status": world.status.model_dump(include=_OF_THE_SPEC),
        "usage": usage.model_dump(include=_OF_THE_ATTEMPT) if usage and job else None,
        "training_seconds": world.status.training_seconds if job else None,
        "job": job and normalize_job(job, job="emoji"),
    }


@pytest.fixture
def gold(team: Team) -> Iterator[None]:
    """The one profile of those that specs name."""
    path = "/apis/finetune.dev/v1alpha1/finetuneprofiles/gold"
    body = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneProfile", "metadata": {"name": "gold"}}
    team.api.apply(path, body | {"spec": {"image": "gold:1", "environment": [{"name": "A", "value": "1"}]}})
    yield
    team.api.delete(path)


@pytest.mark.apiserver
@pytest.mark.usefixtures("gold")
def test_sequences_leave_no_trace_on_a_real_api_server(team: Team, operator: Operator) -> None:
    operator.start()
    _apply_side_by_side(team, operator, list(generate_trials(40, seed=_SEED)))


@pytest.mark.apiserver
@pytest.mark.faults
@pytest.mark.usefixtures("gold")
@pytest.mark.parametrize("part", range(_PARTS))
def test_all_sequences_leave_no_trace_on_a_real_api_server(team: Team, operator: Operator, part: int) -> None:
    operator.start()
    _apply_side_by_side(team, operator, list(_list_trials()[part::_PARTS]))


def _apply_side_by_side(team: Team, operator: Operator, trials: list[Trial]) -> None:
    """Lead one FineTuneJob through each trial, and compare it with one that was given the last spec alone."""
    choices = random.Random(_SEED)
    pairs = [(f"seq{number:03}x", f"new{number:03}x", trial) for number, trial in enumerate(trials)]
    for step in range(max(len(trial.specs) for trial in trials)):
        names = [name for name, _, trial in pairs if step < len(trial.specs) and _try(team, name, trial.specs[step])]
        _await_answers(team, [name for name in names if choices.random() < 0.8])
    for _, fresh, trial in pairs:
        assert _try(team, fresh, trial.specs[-1]), trial.name
    # A change of the checkpoints takes effect with the next attempt.
    late = [(name, trial.specs[-1]) for name, _, trial in pairs if _changes_checkpoints(trial)]
    for is_suspended in (True, False):
        for name, spec in late:
            assert _try(team, name, spec | {"suspend": is_suspended})
        _await_answers(team, [name for name, _ in late], states=("Suspended", "Failed") if is_suspended else None)
    for name, fresh, trial in pairs:
        wait_until(
            lambda: _look(team, name) == _look(team, fresh),  # noqa: B023
            what=f"{name} is as {fresh}: {trial.name}, {_look(team, name)} and not {_look(team, fresh)}",
        )
    assert 'finetune_reconciles_total{result="error"} 0.0' in operator.scrape()


def _changes_checkpoints(trial: Trial) -> bool:
    return any(each.get("checkpoint") != trial.specs[-1].get("checkpoint") for each in trial.specs)


def _try(team: Team, name: str, spec: dict[str, Any]) -> bool:
    """Apply a spec, and return whether the API server takes it."""
    body = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": name}, "spec": spec}
    path = f"{team.path('finetunejobs', name)}?fieldManager=test&force=true"
    status, answer = team.api.request("PATCH", path, body, type="application/apply-patch+yaml")
    is_refused = status == 422 or "duplicate entries" in answer.get("message", "")
    assert is_refused or status in (200, 201), answer
    return not is_refused


def _await_answers(team: Team, names: list[str], *, states: tuple[str, ...] | None = None) -> None:
    """Wait until each spec is answered in the status, and what is wrong with it told."""

    def check() -> bool:
        jobs = {job["metadata"]["name"]: job for job in team.api.get(team.path("finetunejobs"))["items"]}
        for name in names:
            _check_answer(jobs[name], states)
        return True

    wait_until(check, what=f"{len(names)} specs are answered", seconds=120)


def _check_answer(job: dict[str, Any], states: tuple[str, ...] | None) -> None:
    conditions = {each["type"]: each for each in job["status"]["conditions"]}
    state, stalled = conditions["Ready"]["reason"], conditions["Stalled"]
    generations = {job["status"]["observedGeneration"], *(each["observedGeneration"] for each in conditions.values())}
    assert {job["metadata"]["generation"]} == generations, (job["metadata"]["name"], generations)
    assert (stalled["status"] == "True") is (state in _TERMINAL), conditions
    assert states is None or state in states, (job["metadata"]["name"], state)


def _look(team: Team, name: str) -> dict[str, Any]:
    """Return what a user sees of a FineTuneJob's spec in its status and its Job."""
    job = team.job(name)
    uid, status = job["metadata"]["uid"], job["status"]
    labels = f"?labelSelector=finetune.dev/job-uid={uid}"
    children = team.api.get(team.path("jobs") + labels)["items"]
    assert len(children) <= 1, [each["metadata"]["name"] for each in children]
    services = team.api.get(team.path("services") + f"?labelSelector=finetune.dev/job={name}")["items"]
    return {
        "conditions": normalize_conditions(status["conditions"], job=name, uid=uid),
        "status": {each: status.get(each) for each in ("run", "podShape", "microBatchDivisor")},
        "training_seconds": status.get("trainingSeconds") if children else None,
        "jobs": [normalize_job(each, job=name, uid=uid) for each in children],
        "has_service": bool(services) if any(each["spec"]["completions"] > 1 for each in children) else None,
    }

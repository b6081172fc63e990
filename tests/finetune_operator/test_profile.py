"""Profiles: which one counts, what it gives, what it forbids, and that it touches nothing that runs."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from finetune_api.conditions import find_condition, is_true
from finetune_api.contract import Backend, DeviceType, compute_pod_shape
from finetune_api.profile import AcceleratorKind, FineTuneProfileSpec
from finetune_api.v1alpha1 import FineTuneJobSpec, FineTuneJobStatus
from finetune_operator.manifests.job import build_job
from finetune_operator.manifests.profile import add_profile
from finetune_operator.observed import ProfileView
from finetune_operator.outcome import Outcome
from finetune_operator.policies.accelerator import PodShape, shape_pods
from finetune_operator.policies.profile import (
    apply_profile,
    check_limits,
    choose_training_seconds,
    explain_profile,
    find_profile,
    take_snapshot,
)
from finetune_operator.snapshot import Snapshot, parse_snapshot
from world import SETTINGS, SPEC, World

_PROFILE: dict[str, Any] = {
    "image": "registry.example/trainer:gpu",
    "nodeSelector": {"pool": "gpu", "taken": "profile"},
    "tolerations": [
        {"key": "dedicated", "operator": "Exists", "effect": "NoSchedule"},
        {"key": "gone", "value": "soon", "effect": "NoExecute", "tolerationSeconds": 60},
    ],
    "priorityClassName": "training",
    "volumes": [
        {"name": "cache", "mountPath": "/mnt/cache", "claimName": "cache", "readOnly": False},
        {"name": "shared", "mountPath": "/mnt/shared", "claimName": "data"},
        {"name": "certificates", "mountPath": "/etc/ssl/own", "configMapName": "certificates"},
    ],
    "environment": [{"name": "HF_HOME", "value": "/mnt/cache"}, {"name": "HOME", "value": "/nowhere"}],
    "pricePerAcceleratorHour": "2.49",
}


def _spec(**fields: Any) -> FineTuneJobSpec:
    return FineTuneJobSpec.model_validate(SPEC | fields)


def _view(name: str = "team", *, generation: int = 3, **spec: Any) -> ProfileView:
    parsed = FineTuneProfileSpec.model_validate(spec)
    return ProfileView(name=name, generation=generation, is_default=parsed.is_default, spec=parsed)


def _shape(*, nodes: int = 1, accelerators: int = 0) -> PodShape:
    return PodShape(nodes=nodes, processes_per_node=1, device=DeviceType.CPU, backend=Backend.GLOO, accelerators=accelerators)


@pytest.mark.parametrize(
    ("fields", "profiles", "expected"),
    [
        pytest.param({}, (), None, id="there is none"),
        pytest.param({}, (_view("a"),), None, id="none is the default"),
        pytest.param({}, (_view("b", isDefault=True), _view("a")), "b", id="the default"),
        pytest.param({}, (_view("b", isDefault=True), _view("a", isDefault=True)), "a", id="of two defaults the first by name"),
        pytest.param({"profileRef": {"name": "b"}}, (_view("a", isDefault=True), _view("b")), "b", id="the one that is named"),
        pytest.param({"profileRef": {"name": "c"}}, (_view("a", isDefault=True),), None, id="no default for one that is missing"),
    ],
)
def test_profile_is_the_one_that_is_named_or_the_default(
    fields: dict[str, Any], profiles: tuple[ProfileView, ...], expected: str | None
) -> None:
    found = find_profile(_spec(**fields), profiles)

    assert expected == (found.name if found else None)


@pytest.mark.parametrize(
    ("fields", "profile", "shape", "words"),
    [
        pytest.param({}, {}, _shape(nodes=1024, accelerators=64), (), id="no limits"),
        pytest.param(
            {"accelerator": {"nvidia": {"count": 1}}},
            {"limits": {"accelerators": ["tpu", "cpu"]}},
            _shape(accelerators=1),
            ("spec.accelerator is nvidia, and limits.accelerators are cpu, tpu",),
            id="kind",
        ),
        pytest.param({}, {"limits": {"accelerators": ["cpu"]}}, _shape(), (), id="CPU is a kind"),
        pytest.param(
            {"accelerator": {"deviceClass": {"name": "gpu"}}},
            {"limits": {"accelerators": ["nvidia"]}},
            _shape(accelerators=1),
            ("spec.accelerator is deviceClass",),
            id="kind of two words",
        ),
        pytest.param({}, {"limits": {"maxAccelerators": 8}}, _shape(nodes=2, accelerators=4), (), id="as many as allowed"),
        pytest.param(
            {},
            {"limits": {"maxAccelerators": 7}},
            _shape(nodes=2, accelerators=4),
            ("asks for 8 accelerators, 4 in each of 2 pods, and limits.maxAccelerators is 7",),
            id="too many over all pods",
        ),
        pytest.param({}, {"limits": {"maxAccelerators": 0}}, _shape(nodes=9), (), id="CPU pods are no accelerators"),
        pytest.param({}, {"limits": {"maxNodes": 2}}, _shape(nodes=2), (), id="as many nodes as allowed"),
        pytest.param(
            {}, {"limits": {"maxNodes": 2}}, _shape(nodes=3), ("spec.nodes is 3, and limits.maxNodes is 2",), id="too many nodes"
        ),
        pytest.param(
            {},
            {"allowedUriSchemes": ["pvc"]},
            _shape(),
            ("spec.model.uri has the scheme timm, and allowedUriSchemes are pvc",),
            id="scheme of the model, by default",
        ),
        pytest.param({"model": {"uri": "pvc://m"}}, {"allowedUriSchemes": ["pvc"]}, _shape(), (), id="schemes as allowed"),
        pytest.param(
            {"checkpoint": {"uri": "s3://bucket"}},
            {"allowedUriSchemes": ["timm"]},
            _shape(),
            (
                "spec.dataset.uri has the scheme pvc",
                "spec.output.uri has the scheme pvc",
                "spec.checkpoint.uri has the scheme s3",
            ),
            id="schemes of all other URIs",
        ),
        pytest.param(
            {"nodes": 3},
            {"limits": {"maxNodes": 2}, "allowedUriSchemes": ["pvc"]},
            _shape(nodes=3),
            ("spec.nodes is 3", "spec.model.uri"),
            id="everything at once",
        ),
    ],
)
def test_what_is_beyond_the_limits_is_named(
    fields: dict[str, Any], profile: dict[str, Any], shape: PodShape, words: tuple[str, ...]
) -> None:
    state = check_limits(_spec(**fields), _view(**profile), shape=shape)

    assert ("ProfileViolated" if words else None) == (state.reason if state else None)
    assert state is None or "FineTuneProfile team" in state.message
    assert [word for word in words if state is None or word not in state.message] == []


def test_accelerator_of_the_profile_is_for_specs_without_one() -> None:
    profile = _view(accelerator={"tpu": {"type": "tpu-v6e-slice", "topology": "4x4"}})
    bare, own = _spec(), _spec(accelerator={"nvidia": {"count": 2}})

    assert 4 == apply_profile(bare, profile).num_nodes
    assert own == apply_profile(own, profile)
    assert bare == apply_profile(bare, None)


def test_nodes_that_contradict_the_accelerator_of_the_profile_are_a_violation() -> None:
    profile = _view(accelerator={"tpu": {"type": "tpu-v6e-slice", "topology": "4x4"}})
    wrong, right = (apply_profile(_spec(nodes=nodes), profile) for nodes in (3, 4))
    state = explain_profile(wrong, profile)

    assert state is not None
    assert "spec.nodes is 3, and its accelerator, topology 4x4, has 4 hosts" in state.message
    assert explain_profile(right, profile) is None


@pytest.mark.parametrize(
    ("fields", "profile", "status", "expected"),
    [
        pytest.param({}, {}, {}, None, id="none at all"),
        pytest.param({}, {"budget": {"trainingSeconds": 60}}, {}, 60, id="of the profile"),
        pytest.param({"budget": {"trainingSeconds": 90}}, {"budget": {"trainingSeconds": 60}}, {}, 90, id="of the spec"),
        pytest.param(
            {},
            {"budget": {"trainingSeconds": 60}},
            {"attempt": 1, "trainingSeconds": 30},
            30,
            id="a run keeps what it began with",
        ),
        pytest.param(
            {}, {"budget": {"trainingSeconds": 60}}, {"attempt": 1}, None, id="a run that began without goes on without"
        ),
    ],
)
def test_budget_of_an_attempt(
    fields: dict[str, Any], profile: dict[str, Any], status: dict[str, Any], expected: int | None
) -> None:
    known = FineTuneJobStatus.model_validate(status)

    assert expected == choose_training_seconds(_spec(**fields), _view(**profile), status=known)


def test_snapshot_reads_back() -> None:
    spec = _spec(accelerator={"nvidia": {"count": 4}})
    taken = take_snapshot(spec, _view(pricePerAcceleratorHour="2.49"), shape=_shape(nodes=2, accelerators=4), training_seconds=60)

    assert (8, AcceleratorKind.NVIDIA, "2.49") == (taken.accelerators, taken.accelerator_kind, taken.price_per_accelerator_hour)
    assert ("team", 3, 60) == (taken.profile, taken.profile_generation, taken.training_seconds)
    assert taken == parse_snapshot(taken.build_annotations())
    assert Snapshot() == parse_snapshot(Snapshot().build_annotations()) == parse_snapshot({})


def test_pods_of_a_cpu_job_count_as_accelerators() -> None:
    assert 3 == take_snapshot(_spec(), None, shape=_shape(nodes=3), training_seconds=None).accelerators


@pytest.mark.parametrize("text", ["", "-1", "1.5", "many", "\u0664", "1" * 12])
def test_spoilt_snapshot_has_defaults(text: str) -> None:
    annotations = dict.fromkeys(Snapshot(profile="p", profile_generation=1, training_seconds=1).build_annotations(), text)
    annotations |= {"finetune.dev/profile": "p", "finetune.dev/price-per-accelerator-hour": f"x{text}"}

    assert Snapshot(profile="p") == parse_snapshot(annotations)


def _build(profile: dict[str, Any], **fields: Any) -> dict[str, Any]:
    world = World(spec=SPEC | fields)
    view = _view(**profile)
    spec = apply_profile(_spec(**fields), view)
    shape = shape_pods(spec, SETTINGS.accelerators)
    snapshot = take_snapshot(spec, view, shape=shape, training_seconds=60)
    job = build_job(world.job, spec, attempt=1, shape=shape, training_seconds=60, pod_shape="5e6f7a8b", settings=SETTINGS)
    return add_profile(job, view.spec, snapshot=snapshot)


def test_job_with_a_full_profile_is_the_golden_one(golden: Callable[[str, str], None]) -> None:
    golden("job-profile.yaml", yaml.safe_dump(_build(_PROFILE), sort_keys=False))


def test_example_in_the_docs_becomes_pods() -> None:
    example = Path(__file__).parents[2] / "examples" / "profile.yaml"
    pod = _build(yaml.safe_load(example.read_text(encoding="utf-8"))["spec"])["spec"]["template"]["spec"]
    container = pod["containers"][0]

    assert "1" == container["resources"]["limits"]["nvidia.com/gpu"]
    assert {"pool": "training"}.items() <= pod["nodeSelector"].items()
    assert {"key": "dedicated", "operator": "Equal", "value": "training", "effect": "NoSchedule"} in pod["tolerations"]
    assert "training" == pod["priorityClassName"]
    assert {"name": "HF_HOME", "value": "/mnt/cache/huggingface"} in container["env"]
    assert {"name": "profile-cache", "mountPath": "/mnt/cache"} in container["volumeMounts"]


def test_empty_profile_adds_nothing_but_annotations() -> None:
    job = build_job(World().job, _spec(), attempt=1, shape=_shape(), settings=SETTINGS)
    with_profile = add_profile(job, FineTuneProfileSpec(), snapshot=Snapshot(profile="team"))

    assert job["spec"] == with_profile["spec"]
    assert "annotations" not in job["metadata"], "the input is never changed"
    assert "team" == with_profile["metadata"]["annotations"]["finetune.dev/profile"]


def test_what_the_job_has_already_wins() -> None:
    job = build_job(World().job, _spec(), attempt=1, shape=_shape(), settings=SETTINGS)
    pod = job["spec"]["template"]["spec"]
    own = {"key": "dedicated", "operator": "Exists", "effect": "NoSchedule"}
    pod |= {"nodeSelector": {"taken": "accelerator"}, "tolerations": [own]}
    added = add_profile(job, FineTuneProfileSpec.model_validate(_PROFILE), snapshot=Snapshot())["spec"]["template"]["spec"]

    assert {"pool": "gpu", "taken": "accelerator"} == added["nodeSelector"]
    assert [own, "gone"] == [added["tolerations"][0], added["tolerations"][1]["key"]]
    assert ["/tmp"] == [each["value"] for each in added["containers"][0]["env"] if each["name"] == "HOME"]


def test_claim_of_the_data_is_one_volume_however_often_it_is_mounted() -> None:
    pod = _build(_PROFILE)["spec"]["template"]["spec"]
    claims = [each["persistentVolumeClaim"]["claimName"] for each in pod["volumes"] if "persistentVolumeClaim" in each]
    mounts = {each["mountPath"]: each for each in pod["containers"][0]["volumeMounts"]}

    assert sorted(claims) == ["cache", "data", "models"]
    assert "dataset" == mounts["/mnt/shared"]["name"] == mounts["/mnt/dataset"]["name"]
    assert [None, True, True] == [mounts[path].get("readOnly") for path in ("/mnt/cache", "/mnt/shared", "/etc/ssl/own")]


def _image(world: World) -> str:
    return str(world.manifests[-1]["spec"]["template"]["spec"]["containers"][0]["image"])


def test_job_waits_for_a_profile_that_is_missing() -> None:
    world = World().change(profileRef={"name": "gpu"}).settle()

    assert "ProfileNotFound" == world.state
    assert "there is no FineTuneProfile gpu" in world.message
    assert not world.children
    assert ("Warning", "ProfileNotFound") in world.events
    assert world.reconcile() == Outcome(), "nothing is done until something changes"
    world.put_profile("gpu", image="gpu:1").settle()
    assert ("Pending", "gpu:1", 1) == (world.state, _image(world), world.status.attempt)


def test_profile_that_never_comes_ends_the_job_at_its_start_deadline() -> None:
    world = World().change(profileRef={"name": "gpu"}, runPolicy={"startDeadlineSeconds": 60}).settle().wait(61).settle()

    assert ("Failed", ("StartDeadlineExceeded", "ProfileNotFound")) == (world.state, world.cause)
    world.put_profile("other").change(profileRef={"name": "other"}).settle()
    assert ("Pending", 1) == (world.state, len(world.children))


def test_accelerator_of_the_profile_needs_a_class_as_well() -> None:
    world = World().put_profile(isDefault=True, accelerator={"custom": {"className": "absent"}}).settle()

    assert ("AcceleratorClassNotFound", 0) == (world.state, len(world.children))
    assert "Pending" == world.put_profile(isDefault=True).settle().state


def test_profile_of_a_later_version_is_an_error_of_its_own() -> None:
    world = World().put_profile(isDefault=True, limits={"accelerators": ["quantum"]}).settle()

    assert ("ProfileInvalid", 0) == (world.state, len(world.children))
    assert "FineTuneProfile team cannot be used" in world.message
    assert "spec.limits.accelerators.0" in world.message
    assert "Pending" == world.put_profile(isDefault=True).settle().state


def test_violation_is_stalled_until_the_spec_or_the_profile_changes() -> None:
    world = World().put_profile(isDefault=True, limits={"maxNodes": 1}, allowedUriSchemes=["pvc"]).settle()

    assert ("ProfileViolated", 0) == (world.state, len(world.children))
    assert is_true(world.status.conditions, "Stalled")
    stalled = find_condition(world.status.conditions, "Stalled")
    assert stalled is not None
    assert "ProfileViolated" == stalled.reason
    assert ("Warning", "ProfileViolated") in world.events
    assert world.reconcile() == Outcome(), "it does not spin"
    assert "Pending" == world.change(model={"uri": "pvc://models/base"}).settle().state
    assert not is_true(world.status.conditions, "Stalled")


def test_violation_ends_when_the_profile_is_mended() -> None:
    world = World().put_profile(isDefault=True, allowedUriSchemes=["pvc"]).settle()

    assert "Pending" == world.put_profile(isDefault=True, allowedUriSchemes=["pvc", "timm"]).settle().state


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda world: world.put_profile(isDefault=True, image="new:1"), id="another image"),
        pytest.param(lambda world: world.put_profile(isDefault=True, allowedUriSchemes=["s3"]), id="limits that forbid it"),
        pytest.param(lambda world: world.put_profile(isDefault=True, accelerator={"nvidia": {"count": 8}}), id="an accelerator"),
        pytest.param(lambda world: world.put_profile(isDefault=True, limits={"accelerators": ["new"]}), id="an unknown value"),
        pytest.param(lambda world: world.put_profile(isDefault=False), id="no default any more"),
        pytest.param(lambda world: world.put_profile("a", isDefault=True, image="new:1"), id="another default"),
        pytest.param(lambda world: world.drop_profile(), id="gone"),
    ],
)
def test_attempt_that_runs_is_not_touched(change: Callable[[World], World]) -> None:
    world = World().put_profile(isDefault=True, image="old:1", pricePerAcceleratorHour="3600").settle().run()
    before = world.status
    change(world).settle()

    assert before == world.status
    assert 1 == len(world.active)
    world.wait(5).exit(0)
    assert world.status.usage is not None
    assert (5, "5.0000") == (world.status.usage.accelerator_seconds, world.status.usage.cost)


def test_next_attempt_gets_what_the_profile_is_then() -> None:
    world = World().put_profile(isDefault=True, image="old:1", budget={"trainingSeconds": 600}).settle()
    assert "old:1" == _image(world)
    world.put_profile(isDefault=True, image="new:1", budget={"trainingSeconds": 60}).settle().run().wait(3).disrupt()

    assert ("new:1", 2) == (_image(world), world.status.attempt)
    assert (600, 600) == (world.config.training_seconds, world.status.training_seconds), "but for the budget"
    annotations = world.manifests[-1]["metadata"]["annotations"]
    assert ("team", "2") == (annotations["finetune.dev/profile"], annotations["finetune.dev/profile-generation"])


def test_new_run_begins_with_the_budget_that_the_profile_has_then() -> None:
    world = World().put_profile(isDefault=True, budget={"trainingSeconds": 600}).settle().run()
    world.put_profile(isDefault=True, budget={"trainingSeconds": 60}).change(hyperparameters={"seed": 7}).settle().collect()

    assert (60, 60) == (world.config.training_seconds, world.status.training_seconds)


def test_budget_outlives_an_operator_that_was_killed_before_it_wrote_it_down() -> None:
    world = World().put_profile(isDefault=True, budget={"trainingSeconds": 600})
    world.kill(world.reconcile(), writes=1)
    world.put_profile(isDefault=True, budget={"trainingSeconds": 60}).settle().run().wait(3).disrupt()

    assert (2, 600) == (world.status.attempt, world.config.training_seconds)


def test_pod_shape_is_of_the_spec_alone() -> None:
    world = World().put_profile(isDefault=True, accelerator={"nvidia": {"count": 1}}).settle()

    assert compute_pod_shape(_spec()) == world.status.pod_shape == world.active[0].pod_shape
    assert "nvidia" == world.manifests[-1]["metadata"]["annotations"]["finetune.dev/accelerator-kind"]


def test_other_profile_replaces_the_attempt() -> None:
    world = World().put_profile("a", image="a:1").put_profile("b", image="b:1").change(profileRef={"name": "a"}).settle().run()
    world.change(profileRef={"name": "b"}).settle().collect()

    assert ("b:1", 2) == (_image(world), world.status.attempt)


def test_failed_job_with_another_profile_waits_for_it_and_then_has_all_its_retries() -> None:
    world = World().change(runPolicy={"backoffLimit": 1}).settle()
    for _ in range(2):
        world.run().wait(1).exit(1).wait(60).settle()
    assert "Failed" == world.state
    world.change(profileRef={"name": "gpu"}).settle()

    assert "ProfileNotFound" == world.state
    assert (0, 0) == (world.status.restarts, world.status.restarts_counted_towards_limit)
    assert world.settle().reconcile() == Outcome()
    world.put_profile("gpu").settle()
    assert ("Pending", 3, 1) == (world.state, world.status.attempt, len(world.active))
    world.run().wait(1).exit(1)
    assert ("Retrying", 1) == (world.state, world.status.restarts_counted_towards_limit)


def test_suspended_job_needs_no_profile() -> None:
    world = World().change(profileRef={"name": "gpu"}, suspend=True).settle()

    assert "Suspended" == world.state


def test_defaults_are_chosen_in_any_order() -> None:
    views = (_view("c"), _view("b", isDefault=True), _view("a", isDefault=True))

    assert {"a"} == {found.name for each in itertools.permutations(views) if (found := find_profile(_spec(), each))}

"""Which profile a FineTuneJob has, what it gets by it, and whether it keeps to its limits (pure)."""

from collections.abc import Iterable, Iterator

from finetune_api.accelerator import Accelerator
from finetune_api.profile import AcceleratorKind
from finetune_api.v1alpha1 import FineTuneJobSpec, FineTuneJobStatus

from finetune_operator.observed import ProfileView
from finetune_operator.policies.accelerator import PodShape
from finetune_operator.snapshot import Snapshot
from finetune_operator.state import Phase, State

NOT_FOUND = "ProfileNotFound"
INVALID = "ProfileInvalid"
VIOLATED = "ProfileViolated"


def find_profile(spec: FineTuneJobSpec, profiles: Iterable[ProfileView]) -> ProfileView | None:
    """Return the profile that the spec names, else the default one, if it is there."""
    if spec.profile_ref is None:
        return find_default(profiles)
    return next((each for each in profiles if each.name == spec.profile_ref.name), None)


def find_default(profiles: Iterable[ProfileView]) -> ProfileView | None:
    """Return the default profile; of several, the first by name."""
    return min((each for each in profiles if each.is_default), key=lambda each: each.name, default=None)


def explain_profile(spec: FineTuneJobSpec, profile: ProfileView | None) -> State | None:
    """Return why no attempt can begin with this profile, whose accelerator is in the spec, or None if one can."""
    if profile is None and spec.profile_ref:
        name = spec.profile_ref.name
        return _wait(NOT_FOUND, f"there is no FineTuneProfile {name}; create it or correct spec.profileRef")
    if profile is not None and profile.spec is None:
        error = profile.spec_error or "its spec cannot be read"
        return _wait(INVALID, f"FineTuneProfile {profile.name} cannot be used; ask the administrator of the cluster: {error}")
    return _check_nodes(spec, profile) if profile is not None else None


def apply_profile(spec: FineTuneJobSpec, profile: ProfileView | None) -> FineTuneJobSpec:
    """Return the spec with the profile's accelerator, if it has none of its own."""
    if profile is None or profile.spec is None or not spec.accelerator.is_none:
        return spec
    return spec.model_copy(update={"accelerator": profile.spec.accelerator})


def check_limits(spec: FineTuneJobSpec, profile: ProfileView | None, *, shape: PodShape) -> State | None:
    """Return what a spec, with the profile's accelerator in it, asks for beyond the profile's limits."""
    if profile is None:
        return None
    violations = [*_list_excesses(spec, profile, shape=shape), *_list_foreign_schemes(spec, profile)]
    return _violate(profile, violations) if violations else None


def choose_training_seconds(spec: FineTuneJobSpec, profile: ProfileView | None, *, status: FineTuneJobStatus) -> int | None:
    """Return the budget of the next attempt: a run keeps the one that it began with."""
    if spec.budget.training_seconds is not None:
        return spec.budget.training_seconds
    if status.attempt > 0:
        return status.training_seconds
    return profile.spec.budget.training_seconds if profile and profile.spec else None


def take_snapshot(
    spec: FineTuneJobSpec, profile: ProfileView | None, *, shape: PodShape, training_seconds: int | None
) -> Snapshot:
    """Return what an attempt is begun with, for the accounts and for people."""
    return Snapshot(
        profile=profile.name if profile else None,
        profile_generation=profile.generation if profile else None,
        accelerators=(shape.accelerators or 1) * shape.nodes,
        accelerator_kind=name_kind(spec.accelerator),
        price_per_accelerator_hour=profile.spec.price_per_accelerator_hour if profile and profile.spec else None,
        training_seconds=training_seconds,
    )


def name_kind(accelerator: Accelerator) -> AcceleratorKind:
    """Return the kind of an accelerator: its one member."""
    return AcceleratorKind(next(iter(accelerator.model_dump(by_alias=True, exclude_none=True)), "cpu"))


def _check_nodes(spec: FineTuneJobSpec, profile: ProfileView) -> State | None:
    """Return why the number of nodes does not fit the profile's accelerator; that of a spec's own was checked with the spec."""
    tpu = spec.accelerator.tpu
    if tpu is None or spec.nodes is None or spec.nodes in tpu.hosts:
        return None
    hosts = " or ".join(map(str, tpu.hosts))
    return _violate(profile, [f"spec.nodes is {spec.nodes}, and its accelerator, topology {tpu.topology}, has {hosts} hosts"])


def _list_excesses(spec: FineTuneJobSpec, profile: ProfileView, *, shape: PodShape) -> Iterator[str]:
    assert profile.spec is not None
    limits = profile.spec.limits
    kind = name_kind(spec.accelerator)
    if limits.accelerators and kind not in limits.accelerators:
        yield f"spec.accelerator is {kind}, and limits.accelerators are {', '.join(sorted(limits.accelerators))}"
    total = shape.accelerators * shape.nodes
    if limits.max_accelerators is not None and total > limits.max_accelerators:
        each = f"{shape.accelerators} in each of {shape.nodes} pods"
        yield f"spec.accelerator asks for {total} accelerators, {each}, and limits.maxAccelerators is {limits.max_accelerators}"
    if limits.max_nodes is not None and shape.nodes > limits.max_nodes:
        yield f"spec.nodes is {shape.nodes}, and limits.maxNodes is {limits.max_nodes}"


def _list_foreign_schemes(spec: FineTuneJobSpec, profile: ProfileView) -> Iterator[str]:
    assert profile.spec is not None
    allowed = sorted(profile.spec.allowed_uri_schemes)
    uris = {
        "spec.model.uri": spec.model.uri,
        "spec.dataset.uri": spec.dataset.uri,
        "spec.output.uri": spec.output.uri,
        "spec.checkpoint.uri": spec.checkpoint.uri,
    }
    for name, uri in uris.items():
        scheme = uri.partition("://")[0] if uri else None
        if allowed and scheme is not None and scheme not in allowed:
            yield f"{name} has the scheme {scheme}, and allowedUriSchemes are {', '.join(allowed)}"


def _wait(problem: str, message: str) -> State:
    return State(phase=Phase.PENDING, problem=problem, message=message, scheduled=False)


def _violate(profile: ProfileView, violations: list[str]) -> State:
    found = "; ".join(violations)
    message = f"beyond FineTuneProfile {profile.name}: {found}. Change the spec, or name another profile in spec.profileRef"
    return State(phase=Phase.INVALID, problem=VIOLATED, message=message)

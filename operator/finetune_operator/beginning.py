"""How the next attempt of a run begins, or what hinders it (pure)."""

from typing import Any

from finetune_api import names
from finetune_api.contract import compute_pod_shape
from finetune_api.v1alpha1 import FineTuneJobSpec

from finetune_operator.admission import explain_queueing
from finetune_operator.manifests.claim import build_claim_template
from finetune_operator.manifests.job import build_job
from finetune_operator.manifests.profile import add_profile
from finetune_operator.manifests.service import build_service
from finetune_operator.observed import JobView, ProfileView
from finetune_operator.policies.accelerator import CLASS_NOT_FOUND, PodShape, explain_missing_class, shape_pods
from finetune_operator.policies.pending import explain_creation
from finetune_operator.policies.profile import (
    apply_profile,
    check_limits,
    choose_training_seconds,
    explain_profile,
    find_profile,
    take_snapshot,
)
from finetune_operator.policies.usage import begin_attempt
from finetune_operator.state import Phase, State
from finetune_operator.steps import Context, Step, without_estimate


def start_attempt(context: Context) -> Step:
    """Begin the next attempt with what its profile is at this time, or tell why that cannot be."""
    profile = find_profile(context.spec, context.observed.profiles)
    spec = apply_profile(context.spec, profile)
    if hindrance := explain_profile(spec, profile):
        return _hinder(context, hindrance)
    if missing := explain_missing_class(spec, context.settings.accelerators):
        return _hinder(context, State(phase=Phase.PENDING, problem=CLASS_NOT_FOUND, message=missing, scheduled=False))
    shape = shape_pods(spec, context.settings.accelerators)
    if hindrance := check_limits(spec, profile, shape=shape):
        return _hinder(context, hindrance)
    return _begin(context, spec, profile=profile, shape=shape)


def _begin(context: Context, spec: FineTuneJobSpec, *, profile: ProfileView | None, shape: PodShape) -> Step:
    """Begin the next attempt; the spec has the profile's defaults in it."""
    attempt = context.status.attempt + 1
    training_seconds = choose_training_seconds(spec, profile, status=context.status)
    snapshot = take_snapshot(spec, profile, shape=shape, training_seconds=training_seconds)
    # Of the spec as the user wrote it: a change of the profile must not replace an attempt that runs.
    pod_shape = compute_pod_shape(context.spec)
    manifest = build_job(
        context.job,
        spec,
        attempt=attempt,
        shape=shape,
        micro_batch_divisor=context.status.micro_batch_divisor,
        training_seconds=training_seconds,
        pod_shape=pod_shape,
        settings=context.settings,
    )
    manifest = add_profile(manifest, profile.spec if profile else None, snapshot=snapshot)
    status = begin_attempt(context.status, attempt=attempt, pod_shape=pod_shape, snapshot=snapshot)
    return Step(
        state=explain_queueing(context.job.queue, attempt=attempt) if context.job.queue else explain_creation(),
        status=without_estimate(status),
        absent=_list_absent(context),
        apply=(*_build_helpers(context.job, shape), manifest),
    )


def _build_helpers(job: JobView, shape: PodShape) -> tuple[dict[str, Any], ...]:
    """Return what the pods of a Job need beside it."""
    templates = (build_claim_template(job, shape.devices),) if shape.devices else ()
    return (*templates, build_service(job)) if shape.nodes > 1 else templates


def _list_absent(context: Context) -> tuple[str, ...]:
    """Return the name of the previous attempt's Job if it is not to be seen any more."""
    previous = names.child_name(context.job.name, context.run, context.status.attempt)
    kept = {child.name for child in context.attempts}
    return (previous,) if context.status.attempt and previous not in kept else ()


def _hinder(context: Context, state: State) -> Step:
    """Begin no attempt for a cause that a change of the spec, of a profile or of the operator's settings mends: all wake us."""
    # A run that then fails by its startDeadlineSeconds is revived when the user changes what the pods request.
    return Step(state=state, status=without_estimate(context.update(pod_shape=compute_pod_shape(context.spec)).status))

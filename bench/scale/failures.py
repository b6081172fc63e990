"""Whether FineTuneJobs that fail for ever slow down those that do not."""

from bench.scale.audit import count_writes, find_latencies, read_writes
from bench.scale.client import Client, do_all, do_at_rate, wait_until
from bench.scale.cluster import World
from bench.scale.figures import Figure, find_quantile
from bench.scale.load import apply_finetunejob, jobs, list_states, number
from bench.scale.operators import RunningOperator

POISON = "poison-"
_ALONE, _BESIDE, _FAILING = "alone", "beside", "failing"
# So that none of them ends during the measurement.
_RETRIES = 100
_POLICIES = "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolic"


def measure_failures(world: World, operator: RunningOperator, *, failing: int, healthy: int, per_second: float) -> list[Figure]:
    """Apply healthy FineTuneJobs at a steady rate, alone and then beside many that fail or whose Job is refused."""
    alone = _measure_healthy(world, operator, _ALONE, count=healthy, per_second=per_second)
    poison = max(1, failing // 100)
    _refuse_jobs(world.client, prefix=POISON)
    world.create_namespace(_FAILING)
    names = [*number("fail-", failing), *number(POISON, poison)]
    policy = {"backoffLimit": _RETRIES}
    do_all(lambda name: apply_finetunejob(world.client, _FAILING, name, runPolicy=policy), names)
    wait_until(
        lambda: operator.count_retries() >= 3 * failing,
        what=f"{failing} FineTuneJobs have failed three times each",
        seconds=600 + failing,
        poll_seconds=2,
    )
    beside = _measure_healthy(world, operator, _BESIDE, count=healthy, per_second=per_second)
    wrong = [state for state in list_states(world.client, _FAILING) if state in ("Complete", "Failed", "")]
    if wrong:
        raise RuntimeError(f"{len(wrong)} FineTuneJobs do not fail and retry as they should: {sorted(set(wrong))}")
    writes = [each for each in read_writes(world.cluster_folder, namespace=_FAILING) if each.name.startswith(POISON)]
    return [
        *_describe(_ALONE, alone),
        *_describe(_BESIDE, beside),
        Figure(name="moves", text="p99 moves by", value=100 * (beside[1] / alone[1] - 1), unit="%", digits=1, goal=10),
        Figure(
            name="poison-writes",
            text=f"operator's writes for each of {poison} poison jobs, events left out",
            value=count_writes(writes).total() / poison,
            digits=1,
            is_gated=False,
        ),
    ]


def _measure_healthy(
    world: World, operator: RunningOperator, namespace: str, *, count: int, per_second: float
) -> tuple[float, float]:
    """Return p50 and p99 of the seconds from creation to child Job."""
    world.create_namespace(namespace)
    before = operator.count_states().get("Complete", 0)
    names = number("done-", count)
    do_at_rate(lambda name: apply_finetunejob(world.client, namespace, name), names, per_second=per_second)
    wait_until(
        lambda: operator.count_states().get("Complete", 0) >= before + count,
        what=f"{count} healthy FineTuneJobs are Complete",
        seconds=300 + count,
        poll_seconds=2,
    )
    latencies = list(find_latencies(read_writes(world.cluster_folder, namespace=namespace)).values())
    return find_quantile(latencies, 0.5), find_quantile(latencies, 0.99)


def _describe(name: str, quantiles: tuple[float, float]) -> list[Figure]:
    text = f"creation to child Job, healthy jobs {name}"
    return [
        Figure(name=f"{name}-{label}", text=f"{text}, {label}", value=value, unit="s", digits=3)
        for label, value in zip(("p50", "p99"), quantiles, strict=True)
    ]


def _refuse_jobs(client: Client, *, prefix: str) -> None:
    """Have the API server itself refuse every Job with such a name, as an administrator's policy may."""
    rule = {"apiGroups": ["batch"], "apiVersions": ["v1"], "resources": ["jobs"], "operations": ["CREATE"]}
    policy = {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingAdmissionPolicy",
        "metadata": {"name": "poison"},
        "spec": {
            "failurePolicy": "Fail",
            "matchConstraints": {"resourceRules": [rule]},
            "validations": [{"expression": f"!object.metadata.name.startsWith('{prefix}')", "message": "poison is refused"}],
        },
    }
    binding = {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingAdmissionPolicyBinding",
        "metadata": {"name": "poison"},
        "spec": {"policyName": "poison", "validationActions": ["Deny"]},
    }
    client.apply(f"{_POLICIES}ies/poison", policy)
    client.apply(f"{_POLICIES}ybindings/poison", binding)
    wait_until(lambda: _is_refused(client, f"{prefix}probe"), what="the policy refuses Jobs", seconds=120)


def _is_refused(client: Client, name: str) -> bool:
    """Return whether the policy is in force, which takes the API server a moment."""
    container = {"name": "probe", "image": "probe"}
    template = {"spec": {"restartPolicy": "Never", "containers": [container]}}
    body = {"metadata": {"name": name}, "spec": {"template": template}}
    try:
        client.create(f"{jobs(_ALONE)}?dryRun=All", body)
    except RuntimeError as error:
        return "poison is refused" in str(error)
    return False

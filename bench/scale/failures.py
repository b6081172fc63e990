"""Whether FineTuneJobs that fail for ever slow down those that do not."""

from dataclasses import dataclass

from bench.scale.audit import OPERATOR, Write, count_writes, find_answer_times, find_latencies, read_writes
from bench.scale.client import Client, do_all, do_at_rate, wait_until
from bench.scale.cluster import World
from bench.scale.figures import Figure, find_quantile
from bench.scale.load import apply_finetunejob, jobs, list_states, number
from bench.scale.operators import RunningOperator
from bench.scale.processes import CpuMeter

POISON = "poison-"
_ALONE, _BESIDE, _FAILING = "alone", "beside", "failing"
# So that none of them ends during the measurement.
_RETRIES = 100
_POLICIES = "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolic"


def measure_failures(world: World, operator: RunningOperator, *, failing: int, healthy: int, per_second: float) -> list[Figure]:
    """Apply healthy FineTuneJobs at a steady rate, alone and then beside many that fail or whose Job is refused."""
    # The first jobs of a fresh cluster and operator wait longer, which would hide what the failing ones do.
    _measure_healthy(world, operator, "warm-up", count=min(50, healthy), per_second=per_second)
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
    before = operator.count_retries()
    beside = _measure_healthy(world, operator, _BESIDE, count=healthy, per_second=per_second)
    failures = (operator.count_retries() - before) / beside.seconds
    wrong = [state for state in list_states(world.client, _FAILING) if state in ("Complete", "Failed", "")]
    if wrong:
        raise RuntimeError(f"{len(wrong)} FineTuneJobs do not fail and retry as they should: {sorted(set(wrong))}")
    attempts = operator.count_retries()
    writes = read_writes(world.cluster_folder, namespace=_FAILING)
    poisoned = count_writes(each for each in writes if each.name.startswith(POISON))
    return [
        *_describe(_ALONE, alone),
        *_describe(_BESIDE, beside),
        Figure(
            name="moves",
            text="p99 moves by",
            value=100 * (beside.find_latency(0.99) / alone.find_latency(0.99) - 1),
            unit="%",
            digits=1,
            goal=10,
        ),
        _explain("failures", "failures a second meanwhile", failures, digits=1),
        _explain("poison-writes", f"operator's writes for each of {poison} poison jobs", poisoned.total() / poison, digits=1),
        *(
            _explain(f"writes-{resource}", f"operator's writes for each attempt: {resource}", total / attempts)
            for resource, total in sorted(count_writes(writes).items())
        ),
        _explain("all-writes", "writes for each attempt, all programs", len(writes) / attempts, digits=1),
    ]


@dataclass(frozen=True, kw_only=True)
class _Healthy:
    """What was seen of the healthy jobs."""

    writes: list[Write]
    cpu: dict[str, float]
    """CPU seconds by program, all that belongs to the cluster."""
    seconds: float

    def find_latency(self, share: float) -> float:
        """Return the seconds from creation to child Job below which this share of the jobs lies."""
        return find_quantile(list(find_latencies(self.writes).values()), share)


def _measure_healthy(world: World, operator: RunningOperator, namespace: str, *, count: int, per_second: float) -> _Healthy:
    world.create_namespace(namespace)
    before = operator.count_states().get("Complete", 0)
    meter = CpuMeter(world.read_pids() | {OPERATOR: operator.pid})
    names = number("done-", count)
    do_at_rate(lambda name: apply_finetunejob(world.client, namespace, name), names, per_second=per_second)
    # Until here: what comes after it is no load of the kind that is measured.
    cpu, seconds = meter.read(), meter.seconds
    wait_until(
        lambda: operator.count_states().get("Complete", 0) >= before + count,
        what=f"{count} healthy FineTuneJobs are Complete",
        seconds=300 + count,
        poll_seconds=2,
    )
    return _Healthy(writes=read_writes(world.cluster_folder, namespace=namespace), cpu=cpu, seconds=seconds)


def _describe(name: str, seen: _Healthy) -> list[Figure]:
    """Return how long the healthy jobs waited, and what of that the API server and the machine explain."""
    text = f"creation to child Job, healthy jobs {name}"
    cores = {program: used / seen.seconds for program, used in seen.cpu.items()}
    answers = {"user": ("bench", "finetunejobs"), "job": (OPERATOR, "jobs")}
    return [
        Figure(name=f"{name}-p50", text=f"{text}, p50", value=seen.find_latency(0.5), unit="s", digits=3),
        Figure(name=f"{name}-p99", text=f"{text}, p99", value=seen.find_latency(0.99), unit="s", digits=3),
        *(
            _explain(
                f"{name}-{label}-{quantile:g}",
                f"{name}: the API server's time for {resource} of {agent}, p{100 * quantile:g}",
                find_quantile(find_answer_times(seen.writes, agent=agent, resource=resource), quantile),
                unit="s",
                digits=3,
            )
            for label, (agent, resource) in answers.items()
            for quantile in (0.5, 0.99)
        ),
        _explain(f"{name}-cores", f"{name}: cores, all programs", sum(cores.values())),
        *(_explain(f"{name}-cores-{program}", f"{name}: cores, {program}", used) for program, used in sorted(cores.items())),
    ]


def _explain(name: str, text: str, value: float, *, unit: str = "", digits: int = 2) -> Figure:
    return Figure(name=name, text=text, value=value, unit=unit, digits=digits, is_gated=False)


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

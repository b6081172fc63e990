"""A small model of the cluster around one FineTuneJob, for tests of the decision."""

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from accelerators import CHART_CLASSES, CLASSES
from finetune_api.conditions import find_condition
from finetune_api.contract import TrainerConfig, TrainerReport
from finetune_api.v1alpha1 import (
    CheckpointStatus,
    FineTuneJobSpec,
    FineTuneJobStatus,
    OutputStatus,
    Result,
    ResultMetric,
    TrainerStatus,
)
from finetune_operator.observed import ChildState, ChildView, JobView, Observed, PodRefusal, PodView, ProfileView, ReceivedReport
from finetune_operator.outcome import Outcome
from finetune_operator.reconcile import reconcile, refuse
from finetune_operator.settings import TrainerSettings
from finetune_operator.snapshot import parse_snapshot
from finetune_operator.views import project_profile
from pydantic import ValidationError
from statuses import record

START = datetime(2026, 1, 1, tzinfo=UTC)
SETTINGS = TrainerSettings(
    image="trainer:1",
    report_url="https://operator:10443",
    report_ca="ca",
    accelerators={name: CLASSES[name] for name in CHART_CLASSES},
)
SPEC: dict[str, Any] = {
    "task": "image-classification",
    "dataset": {"uri": "pvc://data"},
    "output": {"uri": "pvc://models/emoji"},
}


def build_report(**fields: Any) -> TrainerReport:
    return TrainerReport.model_validate({"trainer_status": TrainerStatus(progress_percentage=40)} | fields)


PUBLISHED = build_report(
    output=OutputStatus(uri="pvc://models/emoji", digest="sha256:1", bytes=9),
    result=Result(metrics=(ResultMetric(name="test_accuracy", value="0.81", low="0.77", high="0.86"),)),
)


def build_view(**fields: Any) -> JobView:
    """Return a FineTuneJob that was just created."""
    defaults: dict[str, Any] = {
        "namespace": "team",
        "name": "emoji",
        "uid": "u",
        "generation": 1,
        "resource_version": "1",
        "deleting": False,
        "spec": None,
        "spec_error": None,
        "status": FineTuneJobStatus(),
    }
    return JobView(**defaults | fields)


def build_child(**fields: Any) -> ChildView:
    """Return the Job of the first attempt, under way."""
    defaults: dict[str, Any] = {
        "name": "emoji-0a1b2c3d-1",
        "uid": "c",
        "resource_version": "1",
        "run": "0a1b2c3d",
        "attempt": 1,
        "pod_shape": "s",
        "deleting": False,
        "state": ChildState.ACTIVE,
        "reason": "",
        "message": "",
        "created_at": START,
        "finished_at": None,
    }
    return ChildView(**defaults | fields)


def build_pod(**fields: Any) -> PodView:
    """Return a pod of the first attempt that has a node."""
    defaults: dict[str, Any] = {
        "name": "emoji-0a1b2c3d-1-0",
        "uid": "p",
        "resource_version": "1",
        "child": "emoji-0a1b2c3d-1",
        "run": "0a1b2c3d",
        "attempt": 1,
        "phase": "Failed",
        "node": "n1",
        "deleting": False,
        "image": "trainer:1",
        "scheduled": True,
        "unscheduled_reason": None,
        "unscheduled_message": None,
        "waiting_reason": None,
        "waiting_message": None,
        "started_at": None,
        "finished_at": None,
        "exit_code": None,
        "termination_reason": None,
        "termination_message": None,
        "pod_reason": None,
        "pod_message": None,
    }
    return PodView(**defaults | fields)


@dataclass
class World:
    """A FineTuneJob, its children and its pods, as a cluster would change them."""

    spec: dict[str, Any] = field(default_factory=lambda: dict(SPEC))
    status: FineTuneJobStatus = field(default_factory=FineTuneJobStatus)
    generation: int = 1
    labels: dict[str, str] = field(default_factory=dict)
    children: dict[str, ChildView] = field(default_factory=dict)
    pods: dict[str, PodView] = field(default_factory=dict)
    former_pods: dict[str, PodView] = field(default_factory=dict)
    report: ReceivedReport | None = None
    refusal: PodRefusal | None = None
    profiles: dict[str, ProfileView] = field(default_factory=dict)
    now: datetime = START
    events: list[tuple[str, str]] = field(default_factory=list)
    manifests: list[dict[str, Any]] = field(default_factory=list)
    services: list[dict[str, Any]] = field(default_factory=list)

    @property
    def job(self) -> JobView:
        spec, error = None, None
        try:
            spec = FineTuneJobSpec.model_validate(self.spec)
        except ValidationError as problem:
            error = str(problem)
        return build_view(spec=spec, spec_error=error, status=self.status, generation=self.generation, queue_labels=self.labels)

    @property
    def observed(self) -> Observed:
        return Observed(
            children=tuple(self.children.values()),
            pods=tuple(self.pods.values()),
            former_pods=tuple(self.former_pods.values()),
            report=self.report,
            refusal=self.refusal,
            profiles=tuple(self.profiles.values()),
        )

    @property
    def state(self) -> str:
        ready = find_condition(self.status.conditions, "Ready")
        return ready.reason if ready else ""

    @property
    def message(self) -> str:
        ready = find_condition(self.status.conditions, "Ready")
        return ready.message if ready else ""

    @property
    def cause(self) -> tuple[str, str]:
        """Return the reason of Stalled, and that of the last failure."""
        stalled = find_condition(self.status.conditions, "Stalled")
        return (stalled.reason if stalled else "", self.status.failure.reason if self.status.failure else "")

    @property
    def config(self) -> TrainerConfig:
        """Return what the newest attempt was told."""
        return self.configs[-1]

    @property
    def configs(self) -> list[TrainerConfig]:
        """Return what each attempt was told, in order."""
        containers = [each["spec"]["template"]["spec"]["containers"][0] for each in self.manifests]
        return [TrainerConfig.model_validate_json(each["env"][0]["value"]) for each in containers]

    @property
    def newest(self) -> ChildView:
        return max(self.children.values(), key=lambda each: each.attempt)

    @property
    def active(self) -> list[ChildView]:
        return [child for child in self.children.values() if child.state is ChildState.ACTIVE]

    def reconcile(self) -> Outcome:
        record(self.status, generation=self.generation)
        return reconcile(self.job, self.observed, now=self.now, settings=SETTINGS)

    def refuse(self, message: str) -> Outcome:
        """Let the API server refuse the child that the decision wants."""
        (manifest,) = self.reconcile().apply
        subject = f"Job {manifest['metadata']['name']}"
        return refuse(self.job, self.observed, subject=subject, message=message, now=self.now, settings=SETTINGS)

    def settle(self) -> "World":
        """Reconcile and carry out, until nothing is left to do but wait."""
        for _ in range(10):
            outcome = self.reconcile()
            if outcome == replace(Outcome(), requeue_after=outcome.requeue_after, inspect=outcome.inspect):
                return self
            self.carry_out(outcome)
        raise AssertionError("the decision never comes to rest")

    def carry_out(self, outcome: Outcome, *, writes: int = 1000) -> None:
        """Carry out a decision, or only as many of its writes as an operator made before it was killed."""
        done = iter(range(writes))
        for deletion in outcome.delete:
            if next(done, None) is None:
                return
            self.children[deletion.name] = replace(self.children[deletion.name], deleting=True)
        assert not [name for name in outcome.absent if name in self.children]
        for manifest in outcome.apply:
            if next(done, None) is None:
                return
            if manifest["kind"] != "Job":
                self.services.append(manifest)
                continue
            assert not [pod for pod in self.pods.values() if not pod.is_ended], "two trainers would write to one folder"
            self.manifests.append(manifest)
            labels = manifest["metadata"]["labels"]
            name = manifest["metadata"]["name"]
            assert name not in self.children, "a Job is never applied twice"
            self.children[name] = build_child(
                name=name,
                uid=f"uid-{name}-{len(self.manifests)}",
                run=labels["finetune.dev/run"],
                attempt=int(labels["finetune.dev/attempt"]),
                pod_shape=labels["finetune.dev/pod-shape"],
                created_at=self.now,
                nodes=manifest["spec"]["completions"],
                snapshot=parse_snapshot(manifest["metadata"].get("annotations", {})),
                suspended=manifest["spec"].get("suspend", False),
                queue=labels.get("kueue.x-k8s.io/queue-name"),
                queue_request=manifest["metadata"].get("annotations", {}).get("finetune.dev/queue", ""),
            )
        if next(done, None) is None:
            return
        self.status = outcome.status or self.status
        record(self.status, generation=self.generation)
        self.events += [(note.type.value, note.reason) for note in outcome.events]

    def kill(self, outcome: Outcome, *, writes: int) -> "World":
        """Kill the operator after some writes of a decision: all that it remembered of what is gone, is lost."""
        self.carry_out(outcome, writes=writes)
        self.former_pods, self.report, self.refusal = {}, None, None
        return self

    def wait(self, seconds: float) -> "World":
        self.now += timedelta(seconds=seconds)
        return self

    def change(self, **fields: Any) -> "World":
        self.spec = self.spec | fields
        self.generation += 1
        return self

    def put_profile(self, name: str = "team", **spec: Any) -> "World":
        """Create or change a profile."""
        known = self.profiles.get(name)
        metadata = {
            "name": name,
            "uid": f"uid-{name}",
            "resourceVersion": "1",
            "generation": known.generation + 1 if known else 1,
        }
        self.profiles[name] = project_profile({"metadata": metadata, "spec": spec}).content
        return self

    def drop_profile(self, name: str = "team") -> "World":
        self.profiles.pop(name, None)
        return self

    def pod(self, index: int = 0, **fields: Any) -> "World":
        """Show or change a pod of the newest attempt."""
        child = self.newest
        name = f"{child.name}-{index}"
        created = {
            "child": child.name,
            "child_uid": child.uid,
            "run": child.run,
            "attempt": child.attempt,
            "index": index,
            "created_at": self.now,
        }
        known = self.pods.get(name) or build_pod(name=name, uid=f"uid-{name}-{self.now}", phase="Pending", **created)
        self.pods[name] = replace(known, **fields)
        return self

    def admit(self) -> "World":
        """Let the queue admit the newest attempt. As in the store, what its pods were before is forgotten."""
        self.children[self.newest.name] = replace(self.newest, suspended=False)
        self.former_pods = {}
        return self

    def suspend_child(self) -> "World":
        """Let the queue evict the newest attempt, whose pods the Job controller begins to delete."""
        self.children[self.newest.name] = replace(self.newest, suspended=True)
        for pod in [pod for pod in self.pods.values() if pod.child == self.newest.name and not pod.is_ended]:
            self.pods[pod.name] = replace(pod, deleting=True, deleted_at=self.now)
        return self

    def evict(self) -> "World":
        """Let the queue evict the newest attempt, and its pods be gone."""
        self.suspend_child()._stop_pods(self.newest.name)
        return self

    def run(self) -> "World":
        """Let all trainers of the newest attempt run."""
        for index in range(self.newest.nodes):
            self.pod(index, phase="Running", started_at=self.now)
        return self.settle()

    def end(
        self,
        code: int,
        *,
        index: int = 0,
        message: str | TrainerReport | None = None,
        reason: str = "Error",
        **fields: Any,
    ) -> "World":
        """Let a trainer of the newest attempt end, before its Job shows that."""
        text = message.model_dump_json(by_alias=True) if isinstance(message, TrainerReport) else message
        return self.pod(
            index,
            phase="Succeeded" if code == 0 else "Failed",
            exit_code=code,
            finished_at=self.now,
            termination_reason=reason,
            termination_message=text,
            **fields,
        )

    def exit(self, code: int, **fields: Any) -> "World":
        """Let the newest attempt end."""
        return self.exit_unseen(code, **fields).settle()

    def exit_unseen(self, code: int, **fields: Any) -> "World":
        """Let the newest attempt end before the operator has a look: with one trainer, the others end as well."""
        self.end(code, **fields)
        for index in range(self.newest.nodes):
            if index != fields.get("index", 0):
                self.end(0 if code == 0 else 76, index=index)
        self.finish(ChildState.COMPLETE if code == 0 else ChildState.FAILED)
        return self

    def disrupt(self, code: int = 75, *, message: TrainerReport | None = None) -> "World":
        """Evict the first pod of the newest attempt; it is gone before its Job fails, and the others save and leave as well."""
        self.end(code, message=message, deleting=True, disruption_reason="EvictionByEvictionAPI").forget()
        for index in range(1, self.newest.nodes):
            self.end(75, index=index)
        self.finish(ChildState.FAILED)
        return self.settle()

    def forget(self, index: int = 0) -> "World":
        """Remove a pod of the newest attempt; the store keeps its last view."""
        name = f"{self.newest.name}-{index}"
        self.former_pods = {name: self.pods.pop(name)}
        return self

    def finish(self, state: ChildState) -> None:
        name = self.newest.name
        self.children[name] = replace(self.children[name], state=state, finished_at=self.now, reason="BackoffLimitExceeded")

    def finish_failed(self) -> "World":
        """Let the Job of the newest attempt be shown as failed."""
        self.finish(ChildState.FAILED)
        return self

    def collect(self) -> "World":
        """Let the garbage collector finish the deletions that were asked for."""
        for name in [name for name, child in self.children.items() if child.deleting]:
            del self.children[name]
            self._stop_pods(name)
        return self.settle()

    def _stop_pods(self, child: str) -> None:
        """Let the trainers save and leave, as SIGTERM makes them do, and their pods be gone."""
        stopped = [pod for pod in self.pods.values() if pod.child == child]
        for pod in stopped:
            del self.pods[pod.name]
        if stopped:
            self.former_pods = {pod.name: self._stop(pod) for pod in stopped}

    def _stop(self, pod: PodView) -> PodView:
        if pod.started_at is None or pod.is_ended:
            return pod
        return replace(pod, phase="Failed", exit_code=75, finished_at=self.now, deleting=True, deleted_at=self.now)

    def save(self, step: int = 100) -> "World":
        """Let the trainer of the newest attempt save and tell of it."""
        return self.post(progress_percentage=40, checkpoint=self.checkpoint(step)).settle()

    def checkpoint(self, step: int = 100) -> CheckpointStatus:
        return CheckpointStatus(step=step, samples=32 * step, time=self.now, attempt=self.status.attempt)

    def post(self, **fields: Any) -> "World":
        attempt = self.newest
        checkpoint = fields.pop("checkpoint", None)
        report = build_report(trainer_status=TrainerStatus.model_validate(fields), checkpoint=checkpoint)
        self.report = ReceivedReport(run=attempt.run, attempt=attempt.attempt, received_at=self.now, report=report)
        return self

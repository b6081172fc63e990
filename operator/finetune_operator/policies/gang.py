"""The pods of an attempt as one (pure): whether they all run, what they wait for, and which of them tells why they ended.

One failed pod ends an attempt: the trainers of the others lose their peer, and the Job controller deletes what is left. So
most pods of a failed attempt tell of another one's failure, and the cause is what came first.
"""

from dataclasses import dataclass
from datetime import UTC, datetime

from finetune_api.contract import NEVER_RETRIED, ExitCode

from finetune_operator.observed import Observed, PodView
from finetune_operator.policies.failure import NODE_LOST, find_disruption_reason, was_deleted

_FIRST, _LAST = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)
# Reasons of a waiting container that are steps of a normal start; all others are problems.
# https://github.com/kubernetes/kubernetes/blob/v1.34.4/pkg/kubelet/images/types.go and pkg/kubelet/container/sync_result.go
NORMAL_WAITING = frozenset({"ContainerCreating", "PodInitializing"})
# The loss of a node is noticed minutes after it, by these.
_LATE = frozenset({"DeletionByTaintManager", "DeletionByPodGC"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Gang:
    """The pods of an attempt by index, one for each that was seen; a pod that is gone is there as it was seen last."""

    pods: tuple[PodView, ...] = ()
    gone: frozenset[str] = frozenset()
    """The uids of the pods that are gone."""

    @property
    def leader(self) -> PodView | None:
        """Return the first pod, whose trainer reports and publishes."""
        return next((pod for pod in self.pods if pod.index == 0), None)

    @property
    def present(self) -> tuple[PodView, ...]:
        """Return the pods that are there."""
        return tuple(pod for pod in self.pods if pod.uid not in self.gone)

    @property
    def running(self) -> tuple[PodView, ...]:
        """Return the pods whose trainer has started."""
        return tuple(pod for pod in self.pods if pod.started_at is not None and pod.phase != "Pending")

    @property
    def started_at(self) -> datetime | None:
        """Return when the first trainer started: from then on all that the pods hold is in use."""
        return min((pod.started_at for pod in self.pods if pod.started_at), default=None)

    @property
    def finished_at(self) -> datetime | None:
        """Return when the last trainer ended of which that is known."""
        return max((pod.finished_at for pod in self.pods if pod.finished_at), default=None)

    def is_complete(self, nodes: int) -> bool:
        """Return whether all pods run, or ran."""
        return len(self.running) >= nodes

    def has_ended(self, nodes: int) -> bool:
        """Return whether a trainer failed, which ends the others, or all have ended."""
        ended = [pod for pod in self.pods if pod.is_ended]
        return len(ended) >= nodes or any(pod.phase == "Failed" or pod.exit_code for pod in ended)


def build_gang(observed: Observed, *, run: str, attempt: int) -> Gang:
    """Return the pods of an attempt. Of several of one index, the newest counts, and one that ended before one that is there.

    One that is gone and showed no end counts least: when answers of the API server are lost, the Job controller creates a pod
    twice, and removes the newer one.
    """
    by_index: dict[int, tuple[object, ...]] = {}
    gone = {pod.uid for pod in observed.former_pods}
    chosen: dict[int, PodView] = {}
    for pod in (*observed.former_pods, *observed.pods):
        if (pod.run, pod.attempt) != (run, attempt):
            continue
        is_lost = pod.uid in gone and not pod.is_ended
        rank = (not is_lost, pod.created_at or _FIRST, pod.exit_code is not None, pod.uid not in gone, not pod.deleting, pod.name)
        if pod.index not in chosen or rank > by_index[pod.index]:
            by_index[pod.index], chosen[pod.index] = rank, pod
    pods = tuple(chosen[index] for index in sorted(chosen))
    return Gang(pods=pods, gone=frozenset(gone & {pod.uid for pod in pods}))


def find_root(gang: Gang) -> PodView | None:
    """Return the pod that tells why an attempt ended, or None if no pod was seen."""
    return min(gang.pods, key=lambda pod: (*_rank(pod, gang), pod.index), default=None)


def has_cause(gang: Gang) -> bool:
    """Return whether a pod tells of a cause of its own, so that no other one need be waited for."""
    return any(_rank(pod, gang)[0] <= _CAUSE for pod in gang.pods)


def find_hindrance(gang: Gang) -> PodView | None:
    """Return the pod with the worst problem of those that do not run yet."""
    waiting = [pod for pod in gang.pods if pod not in gang.running]
    return min(waiting, key=lambda pod: (_rank_problem(pod), pod.index), default=None)


_VERDICT, _CAUSE, _LOST_PEER, _FOLLOWER, _SUCCESS, _SURVIVOR = range(6)


def _rank(pod: PodView, gang: Gang) -> tuple[int, datetime, int]:
    """Return how well a pod can tell the cause: its tier, when it happened, and what comes first within a second."""
    finished_at = pod.finished_at or _FIRST
    if pod.exit_code is not None and pod.exit_code in NEVER_RETRIED:
        return _VERDICT, finished_at, 0
    if find_disruption_reason(pod):
        return _CAUSE, _find_disruption_time(pod), 0
    if was_deleted(pod):
        tier = _FOLLOWER if any(_came_before(other, pod) for other in gang.pods) else _CAUSE
        return tier, pod.deleted_at or finished_at, 2
    if pod.exit_code == ExitCode.PEER_LOST:
        return _LOST_PEER, finished_at, 0
    if pod.exit_code == 0:
        return _SUCCESS, finished_at, 0
    if pod.exit_code is not None:
        # A signal to one trainer makes all of them save and leave: a pod that was deleted explains that better.
        return _CAUSE, finished_at, 3 if pod.exit_code == ExitCode.PREEMPTED else 1
    if pod.phase == "Failed":
        return _CAUSE, _FIRST, 1
    return (_CAUSE, _LAST, 0) if pod.uid in gang.gone else (_SURVIVOR, _LAST, 0)


def _find_disruption_time(pod: PodView) -> datetime:
    if pod.disruption_reason in _LATE or find_disruption_reason(pod) == NODE_LOST:
        return _FIRST
    return pod.disrupted_at or pod.finished_at or _FIRST


def _came_before(other: PodView, deleted: PodView) -> bool:
    """Return whether a pod failed by itself before another one was deleted, which is what the Job controller does then."""
    if other.deleting or not other.exit_code or other.finished_at is None or deleted.deleted_at is None:
        return False
    # Times are whole seconds. The Job controller needs less than one; a trainer that leaves on a signal follows a deletion.
    is_late = other.finished_at > deleted.deleted_at
    return not is_late and not (other.exit_code == ExitCode.PREEMPTED and other.finished_at == deleted.deleted_at)


def _rank_problem(pod: PodView) -> int:
    if not pod.scheduled:
        return 0 if pod.unscheduled_reason else 3
    return 1 if pod.waiting_reason and pod.waiting_reason not in NORMAL_WAITING else 2

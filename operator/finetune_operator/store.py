"""What was seen of the cluster: slim records by namespace and name, with what belongs to a FineTuneJob found by its key.

An older resourceVersion never overwrites a newer one, so the answers to our own writes are put in as they come, and no
reconcile acts on less than its own last write. It belongs to the event loop; only count_states() may be called from elsewhere.
"""

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from finetune_operator.observed import ChildView, JobView, Observed, PodRefusal, PodView, ProfileView, ReceivedReport
from finetune_operator.policies.profile import find_default
from finetune_operator.views import (
    JobContent,
    Key,
    Kind,
    RawObject,
    Record,
    build_job_view,
    project_child,
    project_job,
    project_pod,
    project_profile,
)

V = TypeVar("V")

# A late answer to a write must not bring back an object whose deletion was seen; after this many others it no longer comes.
_MAX_TOMBSTONES = 16_384
# Last views of deleted pods, by FineTuneJob. One that is forgotten costs a less exact cause of a failure.
_MAX_FORMER = 1024
_MAX_FIRST = 4
_MAX_FORMER_PODS = 16


class Table(Generic[V]):
    """The records of one kind."""

    def __init__(self) -> None:
        self._records: dict[Key, Record[V]] = {}
        self._owned: defaultdict[Key, set[Key]] = defaultdict(set)

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[Record[V]]:
        return iter(self._records.values())

    def find(self, key: Key) -> Record[V] | None:
        """Return the record of this namespace and name, or None."""
        return self._records.get(key)

    def find_owned(self, owner: Key) -> Iterable[Record[V]]:
        """Return the records that belong to a FineTuneJob of this key, in the order of their names."""
        return [self._records[key] for key in sorted(self._owned.get(owner, ()))]

    def put(self, record: Record[V]) -> None:
        """Insert or replace a record."""
        self.pop(record.key)
        self._records[record.key] = record
        self._owned[record.owner].add(record.key)

    def pop(self, key: Key) -> None:
        """Remove a record if it is there."""
        previous = self._records.pop(key, None)
        if previous is not None:
            self._owned[previous.owner].discard(key)
            if not self._owned[previous.owner]:
                del self._owned[previous.owner]


class FormerPods:
    """The last views of deleted pods: a pod that was evicted is gone before its Job shows that it failed."""

    def __init__(self) -> None:
        self._records: OrderedDict[Key, tuple[Record[PodView], ...]] = OrderedDict()

    def find(self, owner: Key, *, owner_uid: str) -> tuple[PodView, ...]:
        """Return the deleted pods of a FineTuneJob's latest attempt."""
        return tuple(each.content for each in self._records.get(owner, ()) if each.owner_uid == owner_uid)

    def put(self, record: Record[PodView]) -> None:
        """Keep the view of a deleted pod in place of those of other attempts."""
        kept = self._records.pop(record.owner, ())
        kept = tuple(each for each in kept if each.content.child == record.content.child and each.uid != record.uid)
        # The first pod knows the checkpoint; of the others, those that went first are likely to know the cause.
        first = [each for each in (*kept, record) if each.content.index == 0][-_MAX_FIRST:]
        others = [each for each in (*kept, record) if each.content.index != 0][:_MAX_FORMER_PODS]
        self._records[record.owner] = (*first, *others)
        while len(self._records) > _MAX_FORMER:
            self._records.popitem(last=False)

    def drop(self, owner: Key) -> None:
        """Forget the pods of a FineTuneJob."""
        self._records.pop(owner, None)


class Store:
    """All that was seen of FineTuneJobs, their Jobs, their pods, the reports of those, and FineTuneProfiles."""

    def __init__(self) -> None:
        self.jobs: Table[JobContent] = Table()
        self.children: Table[ChildView] = Table()
        self.pods: Table[PodView] = Table()
        self.profiles: Table[ProfileView] = Table()
        self._tables: dict[Kind, Table[Any]] = {
            Kind.FINETUNEJOB: self.jobs,
            Kind.JOB: self.children,
            Kind.POD: self.pods,
            Kind.FINETUNEPROFILE: self.profiles,
        }
        self._former_pods = FormerPods()
        self._reports: dict[Key, ReceivedReport] = {}
        self._refusals: dict[Key, PodRefusal] = {}
        self._states: Counter[str] = Counter()
        self._tombstones: OrderedDict[str, int] = OrderedDict()

    def observe(self, kind: Kind, raw: RawObject, *, is_deleted: bool = False) -> tuple[Key, ...]:
        """Take in an object as the API server showed it; return the keys of the FineTuneJobs that it concerns."""
        record = _PROJECTIONS[kind](raw)
        if record is None:
            return ()
        if kind is not Kind.FINETUNEPROFILE:
            self._take_in(kind, record, is_deleted=is_deleted)
            return (record.owner,)
        before = self._find_default()
        is_change = self._take_in(kind, record, is_deleted=is_deleted)
        return self._list_users(record.name, before=before) if is_change else ()

    def read(self, key: Key) -> tuple[JobView, Observed] | None:
        """Return the FineTuneJob and all that belongs to it, or None if it is not there or another manager's."""
        record = self.jobs.find(key)
        if record is None or not record.content.is_ours:
            return None
        # An earlier FineTuneJob of the same name may have left children that the garbage collector has not removed yet.
        observed = Observed(
            children=tuple(each.content for each in self.children.find_owned(key) if each.owner_uid == record.uid),
            pods=tuple(each.content for each in self.pods.find_owned(key) if each.owner_uid == record.uid),
            former_pods=self._former_pods.find(key, owner_uid=record.uid),
            report=self._reports.get(key),
            refusal=self._refusals.get(key),
            profiles=tuple(each.content for each in self.profiles),
        )
        return build_job_view(record), observed

    def find_report(self, key: Key) -> ReceivedReport | None:
        """Return the latest report for a FineTuneJob, or None."""
        return self._reports.get(key)

    def put_report(self, key: Key, report: ReceivedReport) -> None:
        """Keep the latest report for a FineTuneJob."""
        if self.jobs.find(key) is not None:
            self._reports[key] = report

    def put_refusal(self, key: Key, refusal: PodRefusal) -> None:
        """Keep what the latest look at the events of a FineTuneJob's Job has found."""
        if self.jobs.find(key) is not None:
            self._refusals[key] = refusal

    def list_keys(self) -> list[Key]:
        """Return the keys of all FineTuneJobs that are not another manager's."""
        return [record.key for record in self.jobs if record.content.is_ours]

    def versions(self, kind: Kind) -> dict[str, int]:
        """Return the resourceVersion of every object of a kind by its uid."""
        return {record.uid: record.version for record in self._tables[kind]}

    def find(self, kind: Kind, key: Key) -> Record[Any] | None:
        """Return the record of an object, or None."""
        return self._tables[kind].find(key)

    def deletions(self) -> dict[str, int]:
        """Return the resourceVersion from which on an object was gone, of the latest deletions that were seen, by its uid."""
        return dict(self._tombstones)

    def knows(self, kind: Kind, key: Key, *, uid: str, version: int) -> bool:
        """Return whether an object was seen at this resourceVersion or later, its deletion included."""
        record = self._tables[kind].find(key)
        return uid in self._tombstones or (record is not None and record.uid == uid and record.version >= version)

    def purge(self, kind: Kind, uids: Iterable[str]) -> list[Key]:
        """Remove objects whose deletion was missed; return the keys of the FineTuneJobs that this concerns."""
        gone = frozenset(uids)
        records = [record for record in self._tables[kind] if record.uid in gone]
        default = self._find_default()
        for record in records:
            if kind is Kind.POD:
                self._former_pods.put(record)
            self._remove(kind, record.uid, key=record.key, version=record.version + 1)
        if kind is Kind.FINETUNEPROFILE:
            return [key for record in records for key in self._list_users(record.name, before=default)]
        return [record.owner for record in records]

    def count_states(self) -> dict[str, int]:
        """Return the number of FineTuneJobs by the reason of their Ready condition."""
        return dict(self._states)

    def _find_default(self) -> str | None:
        profile = find_default(record.content for record in self.profiles)
        return profile.name if profile else None

    def _list_users(self, profile: str, *, before: str | None) -> tuple[Key, ...]:
        """Return the FineTuneJobs with this profile, those included for which it is, or was before, the default."""
        after = self._find_default()
        users = {profile, None} if before != after or profile == after else {profile}
        return tuple(record.key for record in self.jobs if record.content.is_ours and record.content.profile in users)

    def _take_in(self, kind: Kind, record: Record[Any], *, is_deleted: bool) -> bool:
        """Put or remove a record; return whether it tells anything new."""
        previous = self._tables[kind].find(record.key)
        if is_deleted:
            if kind is Kind.POD:
                self._former_pods.put(record)
            self._remove(kind, record.uid, key=record.key, version=record.version)
            return previous is not None
        if self._is_outdated(record, previous=previous):
            return False
        if kind is Kind.JOB and previous is not None and previous.content.suspended and not record.content.suspended:
            # The attempt is admitted: what its pods before an eviction were says nothing about those that come.
            self._former_pods.drop(record.owner)
        self._put(kind, record)
        return True

    def _put(self, kind: Kind, record: Record[Any]) -> None:
        if kind is Kind.FINETUNEJOB:
            self._count(record.key, -1)
        self._tables[kind].put(record)
        if kind is Kind.FINETUNEJOB:
            self._count(record.key, 1)

    def _is_outdated(self, record: Record[Any], *, previous: Record[Any] | None) -> bool:
        """Return whether something newer was seen. An object that lost its labels counts as deleted, and may come back."""
        is_dead = record.uid in self._tombstones and record.version < self._tombstones[record.uid]
        return is_dead or (previous is not None and record.version <= previous.version)

    def _remove(self, kind: Kind, uid: str, *, key: Key, version: int) -> None:
        self._tombstones[uid] = version
        while len(self._tombstones) > _MAX_TOMBSTONES:
            self._tombstones.popitem(last=False)
        record = self._tables[kind].find(key)
        if record is None or record.uid != uid:
            return
        if kind is Kind.FINETUNEJOB:
            self._count(key, -1)
            self._reports.pop(key, None)
            self._refusals.pop(key, None)
            self._former_pods.drop(key)
        self._tables[kind].pop(key)

    def _count(self, key: Key, change: int) -> None:
        record = self.jobs.find(key)
        if record is not None and record.content.is_ours:
            self._states[record.content.state] += change


_PROJECTIONS: Mapping[Kind, Callable[[RawObject], Record[Any] | None]] = {
    Kind.FINETUNEJOB: project_job,
    Kind.JOB: project_child,
    Kind.POD: project_pod,
    Kind.FINETUNEPROFILE: project_profile,
}

"""Compare what was seen with what the API server has, at the start and from time to time.

Watches lose deletions when they have to list anew, and a watch can end without a word. The audit finds both: it purges what is
gone, and when a change does not arrive for long, it ends the process, as a fresh start is the one sure repair. So it does when
the API server has gone back to an earlier state, whose objects the store would take for outdated.
"""

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

from finetune_operator.errors import ApiError, DeafWatchError, RewoundError
from finetune_operator.metrics import AUDIT_LAGGING, AUDIT_PURGES, AUDITS_DONE, Metrics
from finetune_operator.store import Store
from finetune_operator.views import Key, Kind, Listing

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.05
# So that looking for what is missing costs the loop a fiftieth of its time, however much that is.
_POLL_SECONDS_EACH = 50e-6
_RELIST_SECONDS = 10.0

Versions = dict[tuple[Kind, str], tuple[Key, int]]
"""Key and resourceVersion of objects by kind and uid."""


class Lister(Protocol):
    """Where the truth is listed."""

    async def list_versions(self, kind: Kind, *, namespace: str | None) -> Listing:
        """Return what exists of a kind."""


class Auditor:
    """Compares the store with the API server."""

    def __init__(
        self,
        lister: Lister,
        *,
        store: Store,
        enqueue: Callable[[Key], None],
        namespaces: tuple[str, ...],
        interval_seconds: float,
        deaf_seconds: float,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._lister = lister
        self._store = store
        self._enqueue = enqueue
        self._namespaces = namespaces
        self._interval_seconds = interval_seconds
        self._deaf_seconds = deaf_seconds
        self._metrics = metrics
        self._clock = clock
        self._sleep = sleep
        self._audited_at = clock()

    @property
    def age_seconds(self) -> float:
        """Return the time since the last audit that could be made."""
        return self._clock() - self._audited_at

    async def wait_until_synced(self) -> None:
        """Wait until the store holds everything that the API server has.

        Before that, a missing child would be taken for one that was never created, and each restart would apply it again.
        Raises RewoundError when the API server has less than was seen.
        """
        while True:
            try:
                missing = self._find_lagging(await self._list())
            except ApiError as error:
                logger.warning("cannot list what there is: %s", error)
                await self._sleep(_RELIST_SECONDS)
                continue
            # What is deleted in between never arrives, so after a while the list is made anew.
            if not await self._wait_while_they_come(missing):
                self._audited_at = self._clock()
                return

    async def _wait_while_they_come(self, missing: Versions) -> Versions:
        """Wait until these versions are seen, or no more of them for a while, and return those that are not."""
        while left := await self._wait_for(missing, seconds=_RELIST_SECONDS):
            logger.info("waiting for %d objects to be seen", len(left))
            if len(left) == len(missing):
                return left
            missing = left
        return {}

    async def run(self) -> None:
        """Audit for ever. Raises DeafWatchError when a change does not arrive, and RewoundError when one is undone."""
        while True:
            # Spread, so that many operators do not list at the same time.
            await self._sleep(self._interval_seconds * random.uniform(0.8, 1.2))  # noqa: S311
            try:
                await self.audit()
            except ApiError as error:
                self._metrics.count(AUDITS_DONE, result="error")
                logger.warning("cannot audit: %s", error)

    async def audit(self) -> None:
        """Purge what is gone, check that what changed arrives, and have every FineTuneJob reconciled."""
        deadline = self._clock() + self._deaf_seconds
        listings = await self._list()
        num_purged, lagging = self._purge_all(listings), self._find_lagging(listings)
        while left := await self._wait_for(lagging, seconds=min(_RELIST_SECONDS, deadline - self._clock())):
            is_over = self._clock() >= deadline
            if is_over or len(left) == len(lagging):
                # What is deleted in between, while a watch is away, never arrives.
                listings = await self._list()
                num_purged += self._purge_all(listings)
                existing = {(kind, uid) for kind, listings_of in listings.items() for each in listings_of for uid in each.objects}
                left = {what: version for what, version in left.items() if what in existing}
            if left and is_over:
                raise self._build_deaf_error(left)
            lagging = left
        self._audited_at = self._clock()
        self._metrics.count(AUDITS_DONE, result="repaired" if num_purged else "clean")
        for key in self._store.list_keys():
            self._enqueue(key)

    def _build_deaf_error(self, lagging: Versions) -> DeafWatchError:
        """Return the error that ends the process, counted."""
        self._metrics.count(AUDITS_DONE, result="deaf")
        kinds = ", ".join(sorted({kind.value for kind, _ in lagging}))
        return DeafWatchError(
            f"{len(lagging)} changes of {kinds} did not arrive within {self._deaf_seconds:.0f} s; starting anew"
        )

    async def _list(self) -> dict[Kind, list[Listing]]:
        return {kind: await self._list_kind(kind) for kind in Kind}

    async def _list_kind(self, kind: Kind) -> list[Listing]:
        """List what exists of a kind, which is never older than what was seen before the question."""
        seen, deleted = self._store.versions(kind), self._store.deletions()
        newest = max(seen.values(), default=0)
        listings = [await self._lister.list_versions(kind, namespace=each) for each in kind.list_scopes(self._namespaces)]
        for listing in listings:
            found = listing.objects.items()
            num_undone = sum(version < max(seen.get(uid, 0), deleted.get(uid, 0)) for uid, (_, version) in found)
            if num_undone or listing.version < newest:
                self._metrics.count(AUDITS_DONE, result="rewound")
                raise RewoundError(f"{num_undone} of the {kind.value}" if num_undone else f"the {kind.value}")
        return listings

    def _purge_all(self, listings: Mapping[Kind, list[Listing]]) -> int:
        """Remove what the API server no longer has of any kind, and return how much that was."""
        return sum(self._purge(kind, listings_of) for kind, listings_of in listings.items())

    def _purge(self, kind: Kind, listings: list[Listing]) -> int:
        """Remove what the API server no longer has, and return how much that was."""
        existing = {uid for listing in listings for uid in listing.objects}
        # What is newer than the list was created after it.
        version = min(listing.version for listing in listings)
        gone = [uid for uid, seen in self._store.versions(kind).items() if uid not in existing and seen <= version]
        if gone:
            self._metrics.count(AUDIT_PURGES, len(gone), resource=kind.value)
            logger.warning("missed the deletion of %d of the %s", len(gone), kind.value)
        for key in self._store.purge(kind, gone):
            logger.warning("missed a deletion among the %s of %s/%s", kind.value, *key)
            self._enqueue(key)
        return len(gone)

    def _find_lagging(self, listings: Mapping[Kind, list[Listing]]) -> Versions:
        """Return what the API server has and the store has not seen."""
        return {
            (kind, uid): (key, version)
            for kind, listings_of in listings.items()
            for listing in listings_of
            for uid, (key, version) in listing.objects.items()
            if not self._store.knows(kind, key, uid=uid, version=version)
        }

    async def _wait_for(self, lagging: Versions, *, seconds: float) -> Versions:
        """Wait until these versions are seen, and return those that are not after a while."""
        deadline = self._clock() + seconds
        self._show(lagging)
        while lagging and self._clock() < deadline:
            await self._sleep(_POLL_SECONDS + len(lagging) * _POLL_SECONDS_EACH)
            lagging = {
                (kind, uid): (key, version)
                for (kind, uid), (key, version) in lagging.items()
                if not self._store.knows(kind, key, uid=uid, version=version)
            }
            self._show(lagging)
        return lagging

    def _show(self, lagging: Versions) -> None:
        """Set the metric: a process that is about to end must have said so before."""
        numbers = Counter(kind for kind, _ in lagging)
        for kind in Kind:
            self._metrics.set(AUDIT_LAGGING, numbers[kind], resource=kind.value)

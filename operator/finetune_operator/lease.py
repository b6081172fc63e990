"""Who leads, decided from the Lease as it was seen (pure).

Two operators must never write at the same time, whatever becomes of the Lease. So a leader writes only until `renew_seconds`
after its last renewal, and a candidate takes over only when what it saw has not changed for `lease_seconds`, which is longer.
Both use their own clock, never the times in the Lease, as the clocks of two machines differ. A Lease that is missing, or that
names no holder, is waited out like one that is held: somebody may have deleted or cleared it while its holder still writes. The
mark of a leader that has stopped by itself is an empty holder with a duration of one second, as client-go leaves it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from finetune_api import names

from finetune_operator.views import RawObject

_RELEASED_SECONDS = 1
# A duration in the Lease that others wrote can make nobody wait for longer.
MAX_LEASE_SECONDS = 600


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How long a Lease lasts for others, for its holder, and the time between two tries."""

    lease_seconds: int
    renew_seconds: float
    retry_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """The content of a Lease. Its times tell people and serve as a mark; nothing is computed from them."""

    holder: str
    acquired_at: str
    renewed_at: str
    lease_seconds: int
    transitions: int
    report_url: str = ""

    @property
    def is_released(self) -> bool:
        """Return whether the last holder gave it up and writes no more."""
        return not self.holder and self.lease_seconds == _RELEASED_SECONDS


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """What was seen of the Lease, and since when it has been so by our own clock."""

    claim: Claim | None
    since: float
    raw: RawObject | None = None


class Action(Enum):
    """What follows from a sight of the Lease."""

    WAIT = "wait"
    TAKE = "take"
    RENEW = "renew"
    LOST = "lost"


def decide(sight: Sight, *, hold: Claim | None, valid_until: float | None, now: float, timing: Timing, may_take: bool) -> Action:
    """Return what to do. `hold` is what we claimed last, and `valid_until` is set if we lead: the end of our right to write."""
    if valid_until is not None and now >= valid_until:
        return Action.LOST
    # A claim whose answer got lost is found here by its mark, and is confirmed by one more write.
    if is_same_hold(sight.claim, hold):
        return Action.RENEW
    if valid_until is not None:
        return Action.RENEW if sight.claim is None else Action.LOST
    return Action.TAKE if may_take and now >= find_free_at(sight, timing) else Action.WAIT


def find_free_at(sight: Sight, timing: Timing) -> float:
    """Return the time from which on a Lease that stays as it is may be taken."""
    if sight.claim is not None and sight.claim.is_released:
        return sight.since
    # Its holder may have settings of its own, as during an upgrade.
    theirs = 0 if sight.claim is None else min(sight.claim.lease_seconds, MAX_LEASE_SECONDS)
    return sight.since + max(timing.lease_seconds, theirs)


def observe(sight: Sight | None, raw: RawObject | None, *, now: float) -> Sight:
    """Return the sight after the Lease was read: only another content begins its time anew."""
    claim = None if raw is None else read_claim(raw)
    since = sight.since if sight is not None and sight.claim == claim else now
    return Sight(claim=claim, since=since, raw=raw)


def is_same_hold(claim: Claim | None, hold: Claim | None) -> bool:
    """Return whether a claim is ours: our name alone, which others can write too, does not tell."""
    return claim is not None and hold is not None and (claim.holder, claim.acquired_at) == (hold.holder, hold.acquired_at)


def build_claim(sight: Sight, *, identity: str, report_url: str, time: str, timing: Timing) -> Claim:
    """Return the claim of a new holder."""
    return Claim(
        holder=identity,
        acquired_at=time,
        renewed_at=time,
        lease_seconds=timing.lease_seconds,
        transitions=0 if sight.claim is None else sight.claim.transitions + 1,
        report_url=report_url,
    )


def release(hold: Claim, *, time: str) -> Claim:
    """Return what a holder leaves that writes no more."""
    return replace(hold, holder="", renewed_at=time, lease_seconds=_RELEASED_SECONDS, report_url="")


def read_claim(raw: RawObject) -> Claim:
    """Return the content of a Lease, whoever wrote it."""
    spec: Mapping[str, Any] = raw.get("spec") or {}
    return Claim(
        holder=spec.get("holderIdentity") or "",
        acquired_at=spec.get("acquireTime") or "",
        renewed_at=spec.get("renewTime") or "",
        lease_seconds=spec.get("leaseDurationSeconds") or 0,
        transitions=spec.get("leaseTransitions") or 0,
        report_url=(raw["metadata"].get("annotations") or {}).get(names.ANNOTATION_REPORT_URL, ""),
    )


def build_lease(claim: Claim, *, namespace: str, name: str, base: RawObject | None) -> RawObject:
    """Return a Lease that carries a claim; what else is in the one that it replaces stays, its resourceVersion too."""
    metadata: dict[str, Any] = dict(base["metadata"]) if base is not None else {"namespace": namespace, "name": name}
    metadata["annotations"] = (metadata.get("annotations") or {}) | {names.ANNOTATION_REPORT_URL: claim.report_url}
    spec = {
        "holderIdentity": claim.holder,
        "acquireTime": claim.acquired_at,
        "renewTime": claim.renewed_at,
        "leaseDurationSeconds": claim.lease_seconds,
        "leaseTransitions": claim.transitions,
    }
    return {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": spec}

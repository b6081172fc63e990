"""Leader election by a Lease: look at it, take it, renew it, release it. Who loses it ends, and begins anew as a standby."""

import asyncio
import logging
import random
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Protocol

from finetune_operator.errors import ApiError, ConflictError, LeadershipLostError, NotFoundError
from finetune_operator.gate import WriteGate, read_clock
from finetune_operator.lease import (
    Action,
    Claim,
    Sight,
    Timing,
    build_claim,
    build_lease,
    decide,
    find_free_at,
    is_same_hold,
    observe,
    release,
)
from finetune_operator.views import Key, RawObject

logger = logging.getLogger(__name__)

_MAX_TRIES = 3


class LeaseStore(Protocol):
    """The API server as the election uses it."""

    async def get_lease(self, key: Key) -> RawObject:
        """Return a Lease, or raise NotFoundError."""

    async def create_lease(self, lease: RawObject) -> RawObject:
        """Create a Lease, or raise ConflictError if there is one."""

    async def replace_lease(self, lease: RawObject) -> RawObject:
        """Replace a Lease, or raise ConflictError if it is not the one of this resourceVersion."""

    async def close(self) -> None:
        """Close the connections."""


class Elector:
    """Tries to lead, and then to stay the leader."""

    def __init__(
        self,
        *,
        key: Key,
        identity: str,
        report_url: str,
        timing: Timing,
        gate: WriteGate,
        on_lead: Callable[[], object] = lambda: None,
        clock: Callable[[], float] = read_clock,
    ) -> None:
        self.key = key
        self.identity = identity
        self._report_url = report_url
        self._timing = timing
        self._gate = gate
        self._on_lead = on_lead
        self._clock = clock
        self._sight = Sight(claim=None, since=clock())
        self._hold: Claim | None = None
        self._valid_until: float | None = None
        self.may_lead = False

    @property
    def leader_url(self) -> str | None:
        """Return where another process that leads receives reports."""
        claim = self._sight.claim
        return claim.report_url or None if claim is not None and claim.holder not in ("", self.identity) else None

    @property
    def transitions(self) -> int:
        """Return how often the leader has changed, by the Lease."""
        return 0 if self._sight.claim is None else self._sight.claim.transitions

    @property
    def is_leading(self) -> bool:
        """Return whether the Lease was ours at the last look; only the gate tells whether to write."""
        return self._valid_until is not None

    def find_wait(self) -> float:
        """Return the seconds until the next step."""
        if self.is_leading:
            return self._timing.retry_seconds
        # Spread, so that two candidates do not keep in step.
        seconds = self._timing.retry_seconds * random.uniform(0.75, 1.0)  # noqa: S311
        until_free = find_free_at(self._sight, self._timing) - self._clock()
        return min(seconds, until_free) if until_free > 0 else seconds

    async def step(self, leases: LeaseStore) -> None:
        """Look at the Lease, and take or renew it if that is due. Raises LeadershipLostError when it is no longer ours."""
        self._check_validity()
        try:
            async with asyncio.timeout(self._find_time_limit()):
                await self._step(leases)
        except (ApiError, TimeoutError) as error:
            logger.warning("cannot %s Lease %s/%s: %r", "renew" if self.is_leading else "read or take", *self.key, error)
        self._check_validity()

    async def release(self, leases: LeaseStore) -> None:
        """Give the Lease up, so that another process may lead at once. Nothing is written from here on."""
        self._gate.close()
        if not self.is_leading or self._hold is None:
            return
        self._valid_until = None
        for _ in range(_MAX_TRIES):
            try:
                await self._write(leases, release(self._hold, time=_format_now()))
            except ConflictError:
                await self._look(leases)
                if not is_same_hold(self._sight.claim, self._hold):
                    return
            else:
                logger.info("released Lease %s/%s", *self.key)
                return

    async def _step(self, leases: LeaseStore) -> None:
        if not self.is_leading:
            await self._look(leases)
        for _ in range(_MAX_TRIES):
            claim = self._choose()
            if claim is None:
                return
            # What counts is when the request went out: others may have seen its effect as early as that.
            started_at = self._clock()
            self._hold = claim
            try:
                await self._write(leases, claim)
            except (ConflictError, NotFoundError):
                await self._look(leases)
            else:
                self._confirm(started_at + self._timing.renew_seconds)
                return
        logger.warning("Lease %s/%s changes too fast, or its namespace is missing", *self.key)

    def _choose(self) -> Claim | None:
        """Return what to write into the Lease, if anything."""
        action = decide(
            self._sight,
            hold=self._hold,
            valid_until=self._valid_until,
            now=self._clock(),
            timing=self._timing,
            may_take=self.may_lead,
        )
        if action is Action.LOST:
            self._check_validity()
            holder = self._sight.claim.holder if self._sight.claim is not None else ""
            raise self._lose(f"is no longer ours but {holder or 'nobody'}'s")
        if action is Action.RENEW and self._hold is not None:
            return replace(self._hold, renewed_at=_format_now())
        if action is Action.TAKE:
            return build_claim(
                self._sight, identity=self.identity, report_url=self._report_url, time=_format_now(), timing=self._timing
            )
        return None

    def _check_validity(self) -> None:
        if self._valid_until is not None and self._clock() >= self._valid_until:
            raise self._lose(f"was not renewed for {self._timing.renew_seconds:g} s")

    def _lose(self, reason: str) -> LeadershipLostError:
        self._gate.close()
        self._valid_until = None
        return LeadershipLostError(f"Lease {'/'.join(self.key)} {reason}; beginning anew as a standby")

    def _confirm(self, valid_until: float) -> None:
        is_new = not self.is_leading
        self._valid_until = valid_until
        self._gate.open_until(valid_until)
        if is_new:
            logger.info("leading as %s", self.identity)
            self._on_lead()

    async def _look(self, leases: LeaseStore) -> None:
        before = self._sight.claim
        try:
            raw: RawObject | None = await leases.get_lease(self.key)
        except NotFoundError:
            raw = None
        self._sight = observe(self._sight, raw, now=self._clock())
        claim = self._sight.claim
        if claim is not None and claim.holder and (before is None or claim.holder != before.holder):
            logger.info("%s leads", claim.holder)

    async def _write(self, leases: LeaseStore, claim: Claim) -> None:
        base = self._sight.raw
        lease = build_lease(claim, namespace=self.key[0], name=self.key[1], base=base)
        raw = await (leases.create_lease(lease) if base is None else leases.replace_lease(lease))
        self._sight = observe(self._sight, raw, now=self._clock())

    def _find_time_limit(self) -> float:
        """Return how long a step may take: a stuck request must leave time for another one."""
        limit = self._timing.renew_seconds / 2
        return limit if self._valid_until is None else max(0.0, min(limit, self._valid_until - self._clock()))


def _format_now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")

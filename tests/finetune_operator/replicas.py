"""Several operator processes for one team, and the judgement whether ever two of them wrote."""

import signal
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from harness import Operator, Spawn, Team, build_operator, spawn_operator, wait_until

LEASE = "finetune-operator"
_WRITES = frozenset({"create", "update", "patch", "delete", "deletecollection"})


class Replicas:
    """Operators that elect their leader."""

    def __init__(
        self,
        team: Team,
        *,
        tls: tuple[Path, Path],
        folder: Path,
        lease: tuple[str, str, str],
        number: int = 2,
        spawn: Spawn = spawn_operator,
    ) -> None:
        self._team = team
        self.operators = [
            build_operator(team, tls=tls, folder=folder, name=f"operator-{index}", spawn=spawn, **election(lease))
            for index in range(number)
        ]

    def start(self) -> "Replicas":
        """Start all, and wait until one leads."""
        seed_lease(self._team)
        for operator in self.operators:
            operator.launch()
        for operator in self.operators:
            operator.wait_until_ready()
        self.find_leader()
        return self

    def find_leader(self, *, other_than: Operator | None = None, seconds: float = 180) -> Operator:
        """Wait for a leader, by the Lease and by its own word, and return it."""

        def find() -> Operator | None:
            lease = read_lease(self._team)
            url = lease["spec"]["holderIdentity"] and lease["metadata"].get("annotations", {}).get("finetune.dev/report-url")
            found = next((each for each in self.operators if url and url.endswith(f":{each.report_port}")), None)
            is_leader = found is not None and found is not other_than and found.is_running
            return found if is_leader and found is not None and "finetune_leader 1.0" in found.scrape() else None

        found: Operator = wait_until(find, what="there is a leader", seconds=seconds)
        return found

    def find_both(self) -> tuple[Operator, Operator]:
        """Return the leader, and one that stands by."""
        leader = self.find_leader()
        return leader, next(each for each in self.operators if each is not leader)

    def stop(self) -> None:
        """End all, the stopped ones too."""
        for operator in self.operators:
            if operator.is_running:
                operator.send(signal.SIGCONT)
                operator.stop(signal.SIGKILL)


def election(lease: tuple[str, str, str]) -> dict[str, str]:
    """Return the settings of an election with these seconds: of the Lease, of a renewal, between two tries."""
    keys = ("lease_seconds", "renew_seconds", "lease_retry_seconds")
    return {"leader_election": "true", "pod_ip": "127.0.0.1"} | dict(zip(keys, lease, strict=True))


def seed_lease(team: Team) -> None:
    """Make the Lease as one that a leader has released: who sees none waits, as its holder may still write."""
    spec = {"holderIdentity": "", "leaseDurationSeconds": 1, "leaseTransitions": 0}
    team.api.create(team.path("leases"), {"metadata": {"name": LEASE}, "spec": spec})


def read_lease(team: Team) -> dict[str, Any]:
    return dict(team.api.get(team.path("leases", LEASE)))


def find_intruders(requests: Iterable[dict[str, Any]], team: Team, *, lease_seconds: float) -> list[str]:
    """Return the writes of operators that were not the leader when the API server received them, by its audit log.

    The leader is who took or renewed the Lease last, for as long as nobody else may take it. What people write into the Lease
    moves nobody's right to write: each operator waits long enough after it.
    """
    user = f"system:serviceaccount:{team.namespace}:operator"
    ours = sorted((each for each in requests if each["user"]["username"] == user and each["verb"] in _WRITES), key=_read_time)
    leader, until, found = "", datetime.min.replace(tzinfo=UTC), []
    for each in ours:
        reference, identity = each["objectRef"], each["userAgent"].partition("/")[2]
        if reference["resource"] == "leases":
            if each["responseStatus"].get("code") in (200, 201):
                leader = each["requestObject"]["spec"]["holderIdentity"]
                until = _read_time(each) + timedelta(seconds=lease_seconds)
        elif reference["resource"] != "tokenreviews" and (identity != leader or _read_time(each) > until):
            found.append(f"{each['requestReceivedTimestamp']} {identity} while {leader} led: {each['verb']} {each['requestURI']}")
    return found


def count_writers(requests: Iterable[dict[str, Any]], team: Team) -> int:
    """Return how many processes wrote anything but Leases."""
    user = f"system:serviceaccount:{team.namespace}:operator"
    return len({
        each["userAgent"]
        for each in requests
        if each["user"]["username"] == user and each["verb"] in _WRITES and each["objectRef"]["resource"] != "leases"
    })  # fmt: skip


def _read_time(entry: dict[str, Any]) -> datetime:
    return datetime.fromisoformat(entry["requestReceivedTimestamp"])

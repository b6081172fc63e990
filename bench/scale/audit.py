"""What the API server's audit log says: who wrote what, and when."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

OPERATOR = "finetune-operator"
WRITES = frozenset({"create", "update", "patch", "delete", "deletecollection"})
# Held by the leader, whatever it does.
_ELECTION = "leases"


@dataclass(frozen=True, slots=True, kw_only=True)
class Write:
    """One write that the API server answered."""

    agent: str
    """The first word of the client's User-Agent: its program."""
    resource: str
    """The plural, with the subresource after a slash."""
    namespace: str
    name: str
    verb: str
    code: int
    received_at: datetime
    at: datetime
    """When it was answered."""

    @property
    def seconds(self) -> float:
        """Return how long the API server took."""
        return (self.at - self.received_at).total_seconds()


def read_writes(folder: Path, *, namespace: str = "") -> list[Write]:
    """Return the writes in a namespace, or all, in the order of the log; its rotated parts come first."""
    files = [*sorted(folder.glob("audit-*.log")), folder / "audit.log"]
    return list(parse_writes(_read_lines(files), namespace=namespace))


def parse_writes(lines: Iterable[str], *, namespace: str = "") -> Iterator[Write]:
    """Return the writes of a log's lines."""
    wanted = f'"namespace":"{namespace}"'
    for line in lines:
        # Most lines are reads or another part's; parsing them would take minutes. The last one may be half written.
        if (namespace and wanted not in line) or not line.endswith("}\n"):
            continue
        entry = json.loads(line)
        reference = entry.get("objectRef") or {}
        if entry["verb"] not in WRITES or (namespace and reference.get("namespace") != namespace):
            continue
        yield Write(
            agent=entry.get("userAgent", "").split("/")[0].split(" ")[0],
            resource="/".join(filter(None, (reference.get("resource"), reference.get("subresource")))),
            namespace=reference.get("namespace", ""),
            name=reference.get("name", ""),
            verb=entry["verb"],
            code=int((entry.get("responseStatus") or {}).get("code", 0)),
            received_at=datetime.fromisoformat(entry["requestReceivedTimestamp"]),
            at=datetime.fromisoformat(entry["stageTimestamp"]),
        )


def find_latencies(writes: Iterable[Write], *, user: str = "bench", until: str = "jobs") -> dict[str, float]:
    """Return the seconds from the answer to a user's apply of a FineTuneJob to the answer to the operator's first for it.

    That is the apply of its Job, or with until="finetunejobs/status" that of its status.
    """
    created: dict[str, datetime] = {}
    latencies: dict[str, float] = {}
    for write in writes:
        if write.agent == user and write.resource == "finetunejobs":
            created.setdefault(write.name, write.at)
        elif write.agent == OPERATOR and write.resource == until and write.verb == "patch" and write.code < 300:
            # A Job's name is <job>-<run>-<attempt>.
            owner = write.name.rsplit("-", 2)[0] if until == "jobs" else write.name
            if owner in created:
                latencies.setdefault(owner, (write.at - created[owner]).total_seconds())
    return latencies


def find_answer_times(writes: Iterable[Write], *, agent: str, resource: str) -> list[float]:
    """Return how long the API server took for each write of a program that succeeded, in seconds."""
    return [each.seconds for each in writes if each.agent == agent and each.resource == resource and each.code < 300]


def count_writes(writes: Iterable[Write], *, agent: str = OPERATOR, since: datetime | None = None) -> Counter[str]:
    """Return a program's writes by resource, those of the leader's Lease left out."""
    return Counter(
        write.resource
        for write in writes
        if write.agent == agent and write.resource != _ELECTION and (since is None or write.at >= since)
    )


def _read_lines(files: Iterable[Path]) -> Iterator[str]:
    for file in files:
        with file.open(encoding="utf-8") as lines:
            yield from lines

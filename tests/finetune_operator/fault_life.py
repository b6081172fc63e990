"""The whole life of a FineTuneJob, an operator that is started again whenever it ends, and what both must have led to."""

import contextlib
import http.client
import json
import signal
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from harness import Operator, Team, wait_until

PUBLISHED = json.dumps(
    {
        "trainerStatus": {"progressPercentage": 100},
        "output": {"uri": "pvc://models/emoji", "digest": "sha256:00", "bytes": 7},
    }
)
# Each wait may see the operator start twice, on a machine that has much else to do.
_SECONDS = 240.0
_POLICY = {"backoffLimit": 1}


class Keeper:
    """Starts an operator again whenever its process ends, as a Deployment does."""

    def __init__(self, operator: Operator, *, on_exit: Callable[[], object] = lambda: None) -> None:
        self._operator = operator
        self.on_exit = on_exit
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="keeper", daemon=True)
        self.exits: list[int] = []

    def __enter__(self) -> "Keeper":
        self._operator.launch()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._is_over.set()
        self._thread.join(30)

    def kill(self) -> None:
        """Kill the process at once, without waiting for its end."""
        self._operator.send(signal.SIGKILL)

    def _keep(self) -> None:
        while not self._is_over.wait(0.02):
            if (status := self._operator.exit_status) is not None:
                self.exits.append(status)
                self.on_exit()
                self._operator.launch()


class Chronicle:
    """Counts what comes into being and what goes among the Jobs of a namespace, by a watch of its own."""

    _PLURAL = "jobs"

    def __init__(self, team: Team) -> None:
        self._team = team
        self._version = team.api.get(team.path(self._PLURAL))["metadata"]["resourceVersion"]
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="chronicle", daemon=True)
        self.added: Counter[str] = Counter()
        self.deleted: Counter[str] = Counter()

    def __enter__(self) -> "Chronicle":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Read to the end."""
        self._is_over.set()
        self._thread.join(60)

    def _follow(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._is_over.is_set()
            with contextlib.suppress(OSError, http.client.HTTPException):
                for event in self._watch():
                    self._take_in(event)

    def _take_in(self, event: dict[str, Any]) -> None:
        assert event["type"] != "ERROR", event
        metadata = event["object"]["metadata"]
        self._version = metadata["resourceVersion"]
        counts = {"ADDED": self.added, "DELETED": self.deleted}.get(event["type"])
        if counts is not None:
            counts[metadata["name"]] += 1

    def _watch(self) -> Iterator[dict[str, Any]]:
        api = self._team.api
        address = urlsplit(api.server)
        with contextlib.closing(
            http.client.HTTPSConnection(str(address.hostname), address.port, context=api._tls, timeout=60)
        ) as connection:
            query = f"watch=true&allowWatchBookmarks=true&timeoutSeconds=1&resourceVersion={self._version}"
            connection.request("GET", f"{self._team.path(self._PLURAL)}?{query}")
            answer = connection.getresponse()
            while line := answer.readline():
                yield json.loads(line)


class Witness(Chronicle):
    """Follows the pods of a namespace, and notes FineTuneJobs of which pods of two attempts had not ended at a time."""

    _PLURAL = "pods"

    def __init__(self, team: Team) -> None:
        super().__init__(team)
        self._busy: defaultdict[str, dict[str, str]] = defaultdict(dict)
        self.overlaps: set[str] = set()

    def _take_in(self, event: dict[str, Any]) -> None:
        super()._take_in(event)
        # Whoever takes the labels of a pod does not change whose it is.
        name = event["object"]["metadata"]["name"]
        job, run, attempt, *_ = name.rsplit("-", 4)
        busy = self._busy[job]
        busy.pop(name, None)
        if event["type"] in ("ADDED", "MODIFIED") and event["object"]["status"].get("phase") in ("Pending", "Running"):
            busy[name] = f"{run}-{attempt}"
        if len(set(busy.values())) > 1:
            self.overlaps.add(job)


@dataclass(frozen=True)
class End:
    """What a life has come to, without what differs from one to the next: times, uids, random names."""

    state: str
    conditions: tuple[str, ...]
    """The terminal ones that are true."""
    attempt: int
    restarts: tuple[int, int]
    history: tuple[tuple[int, str, bool], ...]
    output: Any
    added: tuple[tuple[str, int], ...]
    deleted: tuple[tuple[str, int], ...]


# What each life comes to, whatever disturbs the operator.
LIFE = End(
    state="Complete",
    conditions=("Complete",),
    attempt=3,
    restarts=(1, 1),
    history=((1, "TrainerError", True),),
    output={"uri": "pvc://models/emoji", "digest": "sha256:00", "bytes": 7},
    added=(("emoji-RUN-1", 1), ("emoji-RUN-2", 1), ("emoji-RUN-3", 1)),
    deleted=(("emoji-RUN-1", 1), ("emoji-RUN-2", 1), ("emoji-RUN-3", 1)),
)


def live(team: Team, *, after_step: Callable[[str], object] = str) -> End:
    """Lead a FineTuneJob through creation, failure, retry, suspension, resumption, completion and deletion.

    What disturbs it is called with the name of each step when the step is done.
    """
    with Chronicle(team) as chronicle:
        team.apply(runPolicy=_POLICY)
        first = run_attempt(team, 1)
        after_step("running")
        team.end_pod(first, 1, message="Traceback: no")
        run_attempt(team, 2)
        after_step("retried")
        team.apply(suspend=True, runPolicy=_POLICY)
        await_state(team, "Suspended")
        after_step("suspended")
        team.apply(suspend=False, runPolicy=_POLICY)
        third = run_attempt(team, 3)
        after_step("resumed")
        team.end_pod(third, message=PUBLISHED)
        await_state(team, "Complete")
        after_step("complete")
        status = team.status()
        team.api.delete(team.path("finetunejobs", "emoji"))
        wait_until(lambda: not team.children() and not team.pods(), what="all is gone", seconds=_SECONDS, every=0.1)
        after_step("deleted")
        chronicle.close()
    return build_end(status, chronicle)


def run_attempt(team: Team, attempt: int, name: str = "emoji") -> dict[str, Any]:
    """Run the pod of an attempt as soon as there is one, and wait until the status shows it."""

    def find() -> dict[str, Any] | None:
        suffix = f"{name}-{team.status(name)['run']}-{attempt}"
        pods = [pod for pod in team.pods() if pod["metadata"]["labels"].get("job-name") == suffix]
        return pods[0] if len(pods) == 1 else None

    pod: dict[str, Any] = wait_until(find, what=f"there is a pod of attempt {attempt} of {name}", seconds=_SECONDS, every=0.1)
    team.run_pod(pod)
    await_state(team, "Running", name)
    return pod


def await_state(team: Team, state: str, name: str = "emoji") -> None:
    """Wait for a STATE that is derived from the latest spec."""

    def is_there() -> bool:
        job = team.job(name)
        return team.state(name) == state and job["status"]["observedGeneration"] == job["metadata"]["generation"]

    wait_until(is_there, what=f"{name} is {state}", seconds=_SECONDS, every=0.1)


def build_end(status: dict[str, Any], chronicle: Chronicle) -> End:
    """Return what is to be compared."""
    run = status["run"]
    conditions = {each["type"]: each for each in status["conditions"]}
    history = ((each["attempt"], each["reason"], each["counted"]) for each in status.get("restartHistory", ()))
    return End(
        state=conditions["Ready"]["reason"],
        conditions=tuple(each for each in ("Complete", "Failed", "Stalled", "Suspended") if conditions[each]["status"] == "True"),
        attempt=status["attempt"],
        restarts=(status.get("restarts", 0), status.get("restartsCountedTowardsLimit", 0)),
        history=tuple(history),
        output=status.get("output"),
        added=_count(chronicle.added, run=run),
        deleted=_count(chronicle.deleted, run=run),
    )


def _count(counts: Counter[str], *, run: str) -> tuple[tuple[str, int], ...]:
    return tuple(sorted((name.replace(run, "RUN"), number) for name, number in counts.items()))


def read_pid(kubeconfig: Path, program: str) -> int:
    """Return the process id of a program of the control plane that a kubeconfig belongs to."""
    return int(json.loads((kubeconfig.parent / "processes" / f"{program}.json").read_text(encoding="utf-8"))["pid"])

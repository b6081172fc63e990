"""How the processes of a pod end, and which of the endings stands for the pod.

torchrun itself ends with 1 whatever happened. Each process therefore leaves a file with its exit code and its report.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune_api.contract import ExitCode, TrainerReport

from finetune_trainer.durable import write_file


@dataclass(frozen=True)
class Ending:
    """How a process of this pod ended."""

    rank: int
    code: int
    time: float
    report: TrainerReport | None = None


def choose_ending(endings: Sequence[Ending], *, was_told_to_stop: bool) -> Ending:
    """Return the ending that stands for the pod: the first one with a reason of its own.

    Processes that lost a peer, or were stopped because one failed, only follow another; that counts if all of them do.
    """
    followed = (ExitCode.PREEMPTED, ExitCode.PEER_LOST) if was_told_to_stop else (ExitCode.PEER_LOST, ExitCode.PREEMPTED)
    own = [ending for ending in endings if ending.code not in {ExitCode.COMPLETE, *followed}]
    if own:
        return min(own, key=lambda ending: ending.time)
    return next((ending for code in followed for ending in endings if ending.code == code), endings[0])


def write_ending(folder: Path, rank: int, code: int, report: TrainerReport) -> None:
    """Leave the ending of a process to its launcher."""
    content = {"code": code, "time": time.time(), "report": report.model_dump(mode="json")}
    write_file(folder / f"{rank}.json", json.dumps(content).encode())


def read_ending(folder: Path, rank: int) -> Ending | None:
    """Return what a process left, or None if it left nothing."""
    try:
        content = json.loads((folder / f"{rank}.json").read_bytes())
    except FileNotFoundError:
        return None
    return Ending(rank, content["code"], content["time"], TrainerReport.model_validate(content["report"]))

"""Kill a local run at random instants, resume it, and compare its weights bit by bit with those of an unbroken run."""

import hashlib
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.harness import DATA, ROOT, describe_machine, parse_arguments, print_table
from bench.runs import describe_job

NUM_PICTURES = 300
IMAGE_SIZE = 64
MAX_STEPS = 40
INTERVAL_SECONDS = 2
# With the log of every step, which users do not get.
_PROGRAM = (
    "import logging; from finetune_trainer.__main__ import enter; "
    "logging.getLogger('finetune_trainer.finetune').setLevel(logging.DEBUG); enter()"
)
_STEP = re.compile(r"step (\d+) done")
_RESUMED = re.compile(r"fine-tuning goes on after step (\d+)")
_PHASES = (
    ("selecting", "-finetuned"),
    ("fine-tuning", "-plan"),
    ("probe", "-probe"),
)


@dataclass(frozen=True)
class Kill:
    """One kill, and what became of the run."""

    number: signal.Signals
    seed: int
    seconds: float
    """From the start of the process."""
    phase: str
    exit_code: int
    leave_seconds: float
    """From the signal to the end of the process."""
    lost_steps: int
    unsaved_seconds: float
    """From the newest checkpoint to the kill, while the model was fine-tuned."""
    equal: bool


def main() -> None:
    """Make the unbroken run, then kill and resume others, and print the tables."""
    quick = parse_arguments(__doc__).quick
    machine = describe_machine()
    data = DATA / f"emoji-{NUM_PICTURES}"
    command: list[str | Path] = [sys.executable, ROOT / "hack/data/emoji.py", data, "--limit", str(NUM_PICTURES)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    with tempfile.TemporaryDirectory() as folder:
        job = write_job(Path(folder))
        started = time.monotonic()
        process = start(job, data, Path(folder) / "unbroken")
        finish(process, Path(folder) / "unbroken.log")
        whole_seconds = time.monotonic() - started
        wanted = hash_weights(Path(folder) / "unbroken")
        count = 1 if quick else 20
        plan = [(number, seed) for seed in range(count) for number in (signal.SIGTERM, signal.SIGKILL)]
        kills = []
        for number, seed in plan:
            kills.append(kill(job, data, Path(folder) / f"{number.name}-{seed}", number, seed, whole_seconds, wanted))
            print(kills[-1], file=sys.stderr, flush=True)
    print_kills(kills, machine, whole_seconds)
    if not all(item.equal for item in kills):
        sys.exit(1)


def write_job(folder: Path) -> Path:
    """Write the job: a fixed number of steps and no budget, so that its bits do not depend on time."""
    job = describe_job(image_size=IMAGE_SIZE, training_seconds=60, seed=0)
    spec: dict[str, Any] = job["spec"]
    del spec["budget"]
    spec["method"] = {"type": "full"}
    spec["hyperparameters"]["maxSteps"] = MAX_STEPS
    spec["checkpoint"] = {"intervalSeconds": INTERVAL_SECONDS}
    path = folder / "job.yaml"
    path.write_text(json.dumps(job))
    return path


def start(job: Path, data: Path, output: Path) -> "subprocess.Popen[bytes]":
    """Start the trainer; its log goes beside the output."""
    command: list[str | Path] = [sys.executable, "-c", _PROGRAM, "run", job, "--output", output, "--data", data]
    with output.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)


def finish(process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Wait for a run that must succeed."""
    if process.wait() != 0:
        raise RuntimeError(f"the trainer ended with status {process.returncode}:\n{log.read_text()[-2000:]}")


def kill(job: Path, data: Path, output: Path, number: signal.Signals, seed: int, whole_seconds: float, wanted: str) -> Kill:
    """Kill one run at a random instant of its length, resume it, and compare."""
    process, seconds = start_and_kill(job, data, output, number, random.Random(f"{number.name}-{seed}"), whole_seconds)
    log = output.with_suffix(".log")
    sent, instant = time.monotonic(), datetime.now(UTC)
    code = process.wait()
    leave_seconds = time.monotonic() - sent
    done = max((int(step) for step in _STEP.findall(log.read_text())), default=0)
    names, saved = read_checkpoints(output)
    phase = find_phase(names, code)
    before = len(log.read_text())
    finish(start(job, data, output), log)
    resumed = _RESUMED.search(log.read_text()[before:])
    tuning = phase == "fine-tuning"
    return Kill(
        number,
        seed,
        seconds,
        phase,
        code,
        leave_seconds,
        lost_steps=done - (int(resumed[1]) if resumed else 0) if tuning else 0,
        unsaved_seconds=max(0.0, (instant - saved).total_seconds()) if tuning and saved else 0.0,
        equal=hash_weights(output) == wanted,
    )


def start_and_kill(
    job: Path, data: Path, output: Path, number: signal.Signals, chance: random.Random, whole_seconds: float
) -> "tuple[subprocess.Popen[bytes], float]":
    """Return a process that was sent the signal, and after how many seconds; a run that is over before is made anew."""
    while True:
        seconds = chance.uniform(0.5, 0.98 * whole_seconds)
        started = time.monotonic()
        process = start(job, data, output)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
            return process, seconds
        whole_seconds = time.monotonic() - started
        shutil.rmtree(output)
        output.with_suffix(".log").unlink()


def read_checkpoints(output: Path) -> tuple[list[str], datetime | None]:
    """Return the names of the checkpoints, and when the newest one was saved."""
    folders = sorted((output / ".finetune/checkpoints").glob("checkpoint-*"))
    times = [datetime.fromisoformat(json.loads((path / "manifest.json").read_text())["time"]) for path in folders]
    return [path.name for path in folders], max(times, default=None)


def find_phase(names: Sequence[str], code: int) -> str:
    """Return how far the run was, by what it had saved."""
    if code == 0:
        return "over"
    return next((phase for phase, ending in _PHASES if any(name.endswith(ending) for name in names)), "start, data, features")


def hash_weights(output: Path) -> str:
    """Return the SHA-256 of the published weights."""
    return hashlib.sha256((output / "model.safetensors").read_bytes()).hexdigest()


def print_kills(kills: Sequence[Kill], machine: str, whole_seconds: float) -> None:
    """Print one row for each kill, and the sums."""
    rows = [
        [
            f"{item.number.name} {item.seed}",
            f"{item.seconds:.2f} s",
            item.phase,
            item.exit_code,
            f"{item.leave_seconds:.2f} s",
            item.lost_steps,
            f"{item.unsaved_seconds:.1f} s",
            "yes" if item.equal else "NO",
        ]
        for item in kills
    ]
    columns = ["signal, seed", "after", "phase", "exit code", "gone after", "steps lost", "unsaved", "equal bits"]
    print_table(f"Kills of a run of {whole_seconds:.0f} s ({machine})", columns, rows)
    sums = [
        [
            number.name,
            f"{sum(item.equal for item in kills if item.number is number)} of {sum(item.number is number for item in kills)}",
            max((item.lost_steps for item in kills if item.number is number), default=0),
            f"{max((item.unsaved_seconds for item in kills if item.number is number), default=0.0):.1f} s",
            f"{max((item.leave_seconds for item in kills if item.number is number), default=0.0):.2f} s",
        ]
        for number in (signal.SIGTERM, signal.SIGKILL)
    ]
    print_table(
        f"Checkpoints every {INTERVAL_SECONDS} s",
        ["signal", "equal bits", "most steps lost", "longest unsaved", "gone after"],
        sums,
    )


if __name__ == "__main__":
    main()

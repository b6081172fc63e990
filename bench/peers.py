"""What Hugging Face's Trainer loses when it is killed and run again, on pictures, weights and steps like ours.

Installs bench/scripts/hf_trainer.py's own environment. SIGTERM goes to the Python process alone, as the kubelet sends it,
with 30 seconds until SIGKILL; SIGKILL goes to the loader's workers too, as all processes of a container die at once.
"""

import argparse
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from bench.harness import DATA, ROOT, describe_machine, print_table
from bench.peer_process import Moment, Process, Told

UV = ROOT / ".local" / "uv" / "bin" / "uv"
SCRIPT = ROOT / "bench" / "scripts" / "hf_trainer.py"
GRACE_SECONDS = 30.0  # the default of terminationGracePeriodSeconds
RUN_SECONDS = 600.0
STEP_SECONDS = 0.5  # about one step, so that a kill can hit any part of it
METHODS: dict[str, list[str]] = {
    "HF Trainer, augmentation": [],
    "HF Trainer, no augmentation": ["--no-augmentation"],
}
IN_SAVE = "SIGKILL in a save"
PASSIVE = ("env", "OMP_WAIT_POLICY=passive")  # threads that spin slow each other down on a busy machine


@dataclass(frozen=True)
class Difference:
    """The largest differences from the unbroken run's tensors; batch statistics have another scale than weights."""

    weights: float
    statistics: float
    same_bits: bool


@dataclass(frozen=True)
class Kill:
    """One interruption, and what came of the run after it."""

    signal: str
    seconds: float
    before: Told
    """What the run had said when the signal was sent."""
    first: Told
    second: Told | None
    """The run after it; none if the first one did all its steps and ended well in spite of the signal."""
    difference: Difference | None
    """None if there is no model."""

    @property
    def steps_lost(self) -> int | None:
        """Steps that were done and had to be done again; None if the run after it could not begin."""
        if self.second is None:
            return 0
        return None if self.second.start is None else self.first.step - self.second.start

    @property
    def exit_code(self) -> str:
        """The exit code of the killed run, with a remark if it speaks of a success that was none."""
        return "0, unfinished" if self.first.exit_code == 0 and self.second is not None else str(self.first.exit_code)


def main() -> None:
    """Measure and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="2 kills of one method: shows that it runs")
    parser.add_argument("--kills", type=int, default=10, help="kills of each method at random instants, half of them SIGTERM")
    parser.add_argument("--in-training", action="store_true", help="no kill before the first step or after the last one")
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaves the blocks, so that no process stays behind
    machine = describe_machine()
    python, pictures = prepare_environment(), make_pictures()
    methods = dict(list(METHODS.items())[:1]) if arguments.quick else METHODS
    num_kills = 2 if arguments.quick else arguments.kills
    kills: dict[str, list[Kill]] = {}
    versions: dict[str, str] = {}
    for number, (method, options) in enumerate(methods.items()):
        with tempfile.TemporaryDirectory() as scratch:
            trial = Trial([*PASSIVE, python, SCRIPT, *options, pictures], Path(scratch))
            versions = trial.unbroken.versions
            random_kills = trial.run(random.Random(arguments.seed + number), num_kills, in_training=arguments.in_training)
            # A torn checkpoint has nothing to do with augmentation: one method shows it.
            aimed_kills = [] if number or arguments.quick or arguments.in_training else trial.run_in_save(arguments.seed)
            kills[method] = [*random_kills, *aimed_kills]
    title = f"seed {arguments.seed}, {', '.join(f'{name} {version}' for name, version in versions.items())} ({machine})"
    print_summary(f"Kills at random instants, {title}", kills)
    print_kills("Each kill", kills)


def prepare_environment() -> Path:
    """Install what the script needs, and return its Python, so that signals reach the script and not uv."""
    subprocess.run([UV, "sync", "--quiet", "--script", SCRIPT], check=True)
    found = subprocess.run([UV, "python", "find", "--script", SCRIPT], check=True, capture_output=True, text=True)
    return Path(found.stdout.strip())


def make_pictures() -> Path:
    """Return a folder of 300 emoji, made if missing."""
    folder = DATA / "emoji-300"
    program = ROOT / "hack" / "data" / "emoji.py"
    subprocess.run([sys.executable, program, folder, "--limit", "300"], check=True, stdout=subprocess.DEVNULL)
    return folder


class Trial:
    """One method: its unbroken run, and the interrupted ones that are compared with it."""

    def __init__(self, command: list[str | Path], scratch: Path) -> None:
        self.command, self.scratch = command, scratch
        self.unbroken, self.weights = self.run_unbroken("unbroken")
        _, again = self.run_unbroken("again")
        if not compare(self.weights, again).same_bits:
            raise RuntimeError("two unbroken runs differ: no statement about interrupted ones is possible")

    def run_unbroken(self, name: str) -> tuple[Told, dict[str, Tensor]]:
        """Return what a run says that nobody disturbs, and its weights."""
        output = self.scratch / name
        with Process(self.command, output) as process:
            told = process.finish(RUN_SECONDS)
        if told.exit_code != 0:
            raise RuntimeError(f"the unbroken run ended with status {told.exit_code}: {told.error}")
        return told, read_weights(output)

    def run(self, instants: random.Random, num_kills: int, *, in_training: bool) -> list[Kill]:
        """Kill as many runs, SIGTERM and SIGKILL in turn, at instants of the whole run or of its steps."""
        kills: list[Kill] = []
        while len(kills) < num_kills:
            name = ("SIGTERM", "SIGKILL")[len(kills) % 2]
            if in_training:
                step = instants.randrange(1, self.unbroken.step)
                kills += self.interrupt(name, partial(has_done, step=step), delay=instants.uniform(0.0, STEP_SECONDS))
            else:
                kills += self.interrupt(name, partial(is_due, seconds=instants.uniform(0.0, self.unbroken.seconds)))
        return kills

    def run_in_save(self, seed: int) -> list[Kill]:
        """Kill two runs in the middle of a save."""
        steps = random.Random(seed).sample(range(5, self.unbroken.step, 5), 2)
        return [kill for step in steps for kill in self.interrupt(IN_SAVE, partial(is_saving, step=step))]

    def interrupt(self, name: str, moment: Moment, *, delay: float = 0.0) -> list[Kill]:
        """Kill a run at the moment and run the same command again; an empty list if it had ended before."""
        output = self.scratch / "interrupted"
        shutil.rmtree(output, ignore_errors=True)
        with Process(self.command, output) as process:
            if not process.wait_for(moment):
                return []
            time.sleep(delay)
            process.send(signal.SIGTERM if name == "SIGTERM" else signal.SIGKILL)
            seconds, before = process.seconds, process.read()
            first = process.finish(GRACE_SECONDS)
        ended_well = first.exit_code == 0 and first.step == self.unbroken.step
        second = None if ended_well else self.run_again(output)
        has_model = second is None or second.exit_code == 0
        difference = compare(self.weights, read_weights(output)) if has_model else None
        kill = Kill(name, seconds, before, first, second, difference)
        print(" | ".join(str(cell) for cell in describe(kill)), second.error if second else "", flush=True)
        return [kill]

    def run_again(self, output: Path) -> Told:
        """Run the same command on what the killed run left."""
        with Process(self.command, output) as process:
            return process.finish(RUN_SECONDS)


def is_due(process: Process, *, seconds: float) -> bool:
    """Tell whether the process has run so long."""
    return process.seconds >= seconds


def has_done(process: Process, *, step: int) -> bool:
    """Tell whether the process has done the step."""
    return process.read().step >= step


def is_saving(process: Process, *, step: int) -> bool:
    """Tell whether the checkpoint of the step is there, and not its last file."""
    folder = process.output / f"checkpoint-{step}"
    return (folder / "optimizer.pt").exists() and not (folder / "trainer_state.json").exists()


def read_weights(output: Path) -> dict[str, Tensor]:
    """Return the model that the script saved."""
    return safetensors.torch.load_file(output / "model.safetensors")


def compare(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> Difference:
    """Return how far two models with the same tensors are from each other."""
    assert ours.keys() == theirs.keys(), "these are two architectures"
    same_bits = all(
        torch.equal(tensor.flatten().view(torch.uint8), theirs[name].flatten().view(torch.uint8)) for name, tensor in ours.items()
    )
    distances = {name: float((tensor - theirs[name]).abs().max()) for name, tensor in ours.items()}
    trained = {name for name in ours if name.endswith((".weight", ".bias"))}
    return Difference(
        max(distances[name] for name in trained), max(distances[name] for name in distances.keys() - trained), same_bits
    )


def print_summary(title: str, kills: dict[str, list[Kill]]) -> None:
    """Print a row for each method and signal."""
    columns = ["method", "signal", "kills", "finished", "bit-equal weights", "steps lost, median / max", "exit codes"]
    rows = [
        summarise(method, name, [kill for kill in ours if kill.signal == name])
        for method, ours in kills.items()
        for name in dict.fromkeys(kill.signal for kill in ours)
    ]
    print_table(title, columns, rows)


def summarise(method: str, name: str, kills: list[Kill]) -> list[object]:
    """Return the row of one method and signal."""
    lost = [kill.steps_lost for kill in kills if kill.steps_lost is not None]
    codes = Counter(kill.exit_code for kill in kills)
    finished = sum(kill.difference is not None for kill in kills)
    same_bits = sum(kill.difference is not None and kill.difference.same_bits for kill in kills)
    return [
        method,
        name,
        len(kills),
        f"{finished} of {len(kills)}",
        f"{same_bits} of {len(kills)}",
        f"{statistics.median(lost):g} / {max(lost)}" if lost else "all",
        "; ".join(f"{code} ({count} times)" for code, count in sorted(codes.items())),
    ]


def print_kills(title: str, kills: dict[str, list[Kill]]) -> None:
    """Print a row for each kill."""
    columns = ["method", "signal", "after", "phase, step", "exit code", "last step", "resumed from", "lost", "weights"]
    print_table(title, columns, [[method, *describe(kill)] for method, ours in kills.items() for kill in ours])


def describe(kill: Kill) -> list[object]:
    """Return the cells of one kill."""
    if kill.second is None:
        resumed: object = "not needed"
    else:
        resumed = "failed" if kill.second.start is None else kill.second.start
    return [
        kill.signal,
        f"{kill.seconds:.1f} s",
        f"{kill.before.phase}, {kill.before.step}",
        kill.exit_code,
        kill.first.step,
        resumed,
        "all" if kill.steps_lost is None else kill.steps_lost,
        describe_difference(kill.difference),
    ]


def describe_difference(difference: Difference | None) -> str:
    """Return how far the final model is from the unbroken run's."""
    if difference is None:
        return "no model"
    if difference.same_bits:
        return "bit-equal"
    return f"differ by {difference.weights:.1e}, batch statistics by {difference.statistics:.1e}"


if __name__ == "__main__":
    main()

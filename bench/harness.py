"""What the benchmarks share: the pictures, paired timing, and Markdown tables."""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from finetune_api.v1alpha1 import DatasetFormat, Precision
from finetune_trainer.backbone import Backbone, load_backbone
from finetune_trainer.data import list_examples
from finetune_trainer.device import Device, count_cpus, prepare_arithmetic, select_device
from finetune_trainer.pictures import Pictures, load_pictures

ROOT = Path(__file__).parents[1]
DATA = ROOT / ".local" / "data"
MODEL_URI = "timm://tf_efficientnet_lite0"
IMAGE_SIZE = 128


@dataclass(frozen=True)
class Comparison:
    """Medians over rounds in which both sides ran one after the other, so that both saw the same machine."""

    ours: float
    theirs: float
    ratio: float
    """Median of the ratios of the rounds, theirs to ours: above 1 we need less time."""


def parse_arguments(description: str | None) -> argparse.Namespace:
    """Return the arguments that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and pictures: shows that it runs, not how fast it is")
    return parser.parse_args()


def make_pictures(name: str) -> Path:
    """Return the folder of the picture set that hack/data/NAME.py makes, made if missing."""
    folder = DATA / name
    subprocess.run([sys.executable, ROOT / "hack" / "data" / f"{name}.py", folder], check=True, stdout=subprocess.DEVNULL)
    return folder


def read_pictures(folder: Path, scratch: Path) -> Pictures:
    """Return the decoded pictures of an imagefolder."""
    listing = list_examples(folder, DatasetFormat.IMAGEFOLDER)
    return load_pictures(
        listing, image_size=IMAGE_SIZE, num_threads=count_cpus(), scratch=scratch, check=ignore, advance=ignore_progress
    )


def load_model(cache: Path) -> tuple[Backbone, Device]:
    """Return the pretrained backbone on the device, and the device, with the threads that the trainer uses."""
    prepare_arithmetic(count_cpus())
    device = select_device(Precision.AUTO)
    backbone = load_backbone(MODEL_URI, folder=None, image_size=IMAGE_SIZE, cache=cache)
    device.place(backbone.model)
    return backbone, device


def compare(ours: Callable[[], float], theirs: Callable[[], float], *, rounds: int) -> Comparison:
    """Run both sides in turn, the first one alternating, and compare the seconds that they return; one round warms up."""
    ours(), theirs()
    pairs = []
    for number in range(rounds):
        if number % 2:
            second, first = theirs(), ours()
            pairs.append((first, second))
        else:
            pairs.append((ours(), theirs()))
    return Comparison(
        statistics.median(pair[0] for pair in pairs),
        statistics.median(pair[1] for pair in pairs),
        statistics.median(pair[1] / pair[0] for pair in pairs),
    )


def measure(action: Callable[[], object]) -> float:
    """Return the seconds that the action takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a Markdown table with numbers to the right."""
    print(f"\n{title}\n")
    print("| " + " | ".join(columns) + " |")
    print("|" + "|".join([" --- ", *[" ---: "] * (len(columns) - 1)]) + "|")
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |")
    print(flush=True)


def describe_machine() -> str:
    """Return the cores, the instruction set that torch uses, and how busy the machine is: what the figures depend on."""
    load = Path("/proc/loadavg").read_text().split()[0] if Path("/proc/loadavg").exists() else "unknown"
    return f"{count_cpus()} cores, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}, load {load} at the start"


def ignore() -> None:
    """Stand in for the trainer's check whether it must stop."""


def ignore_progress(_progress: object) -> None:
    """Stand in for the trainer's report of progress."""

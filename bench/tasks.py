"""Accuracy and time of whole runs of the trainer with default settings: emoji in 120 and 240 seconds, MNIST in 240."""

from bench.harness import describe_machine, make_pictures, parse_arguments, print_table
from bench.runs import run_trainer

# Picture set, budget in seconds, and the test accuracy that must be reached.
TASKS = (("emoji", 120, 0.78), ("emoji", 240, 0.80), ("mnist", 240, 0.93))
IMAGE_SIZE = 128


def main() -> None:
    """Run the tasks and print the table."""
    quick = parse_arguments(__doc__).quick
    machine = describe_machine()
    rows = []
    for name, seconds, target in TASKS[:1] if quick else TASKS:
        run = run_trainer(make_pictures(name), image_size=IMAGE_SIZE, training_seconds=60 if quick else seconds)
        rows.append(
            [
                name,
                f"{60 if quick else seconds} s",
                f"{run.probe_val_accuracy:.3f} after {run.probe_seconds:.0f} s",
                run.describe("val_accuracy"),
                run.describe("test_accuracy"),
                f"{target:.2f}",
                run.candidate,
                f"{run.total_seconds:.0f} s",
            ]
        )
    columns = ["pictures", "budget", "probe, validation", "validation accuracy", "test accuracy", "goal", "chosen", "whole run"]
    print_table(f"Default settings, 95 % intervals ({machine})", columns, rows)


if __name__ == "__main__":
    main()

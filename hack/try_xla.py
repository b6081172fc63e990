"""Carry out a FineTuneJob on an XLA device, such as XLA's own CPU device where there is no TPU; see docs/tasks/try-xla.md."""

import argparse
import logging
import os
import sys
from pathlib import Path

# Before torch loads, as the trainer does it.
os.environ.setdefault("PJRT_DEVICE", "CPU")  # noqa: TID251
os.environ.setdefault("XLA_ENABLE_PARAM_ALIASING", "0")  # noqa: TID251

from finetune_api.contract import DeviceType, World
from finetune_trainer import local
from finetune_trainer.budget import Budget, read_process_start
from finetune_trainer.progress import Progress
from finetune_trainer.run import run


def main() -> None:
    """Run the job and print its metrics."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--model", type=Path)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    config = local.read_job(options.job, local.Paths(options.output, options.data, options.model))
    config = config.model_copy(update={"world": World(device=DeviceType.XLA)})
    budget = Budget(config.training_seconds, read_process_start())
    report = run(config, budget=budget, check=lambda: None, progress=Progress(budget, (), with_finetune=True))
    assert report.result is not None
    for metric in report.result.metrics:
        print(metric.name, metric.value)


if __name__ == "__main__":
    main()

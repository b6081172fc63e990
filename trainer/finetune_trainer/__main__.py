"""The command line, and the only reader of the environment: a trainer pod without arguments, else `run` and `predict`."""

import signal

if __name__ == "__main__":
    # The kernel drops a signal for process 1 of a container that has no handler yet; one that is blocked waits for it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from finetune_api import names
from finetune_api.contract import ExitCode, FailureReport, TrainerConfig, TrainerReport
from finetune_api.v1alpha1 import MethodType
from pydantic import ValidationError

from finetune_trainer import local
from finetune_trainer.budget import Budget, read_process_start
from finetune_trainer.errors import InvalidSpecError, TrainerError, shorten
from finetune_trainer.progress import Progress, Sink
from finetune_trainer.report import Poster, Receiver, write_termination_message
from finetune_trainer.signals import StopFlag

logger = logging.getLogger("finetune_trainer")

LOG_TAIL_LENGTH = 1000


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO, stream=sys.stderr)
    for talkative in ("httpx", "timm"):
        logging.getLogger(talkative).setLevel(logging.WARNING)
    # Both are read when torch loads. Threads that wait actively take the cores from whatever else runs on the machine;
    # matrix products on CUDA are deterministic with a fixed workspace only.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    options = _build_parser().parse_args(arguments)
    if options.command == "predict":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        return predict(options.model_dir, options.images)
    if options.command == "run":
        return run_locally(options.job, local.Paths(options.output, options.data, options.model), num_workers=options.workers)
    return run_in_pod(options.termination_message_file)


def enter() -> NoReturn:
    """Run the command line and end the process.

    The interpreter would take torch apart first, for seconds on a busy machine, when all is written and the kubelet is waiting.
    """
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_in_pod(termination_message_file: Path) -> int:
    """Carry out the job in the environment and report to the operator."""
    stop = StopFlag()
    with stop.installed():
        return _run_in_pod(termination_message_file, stop)


def _run_in_pod(termination_message_file: Path, stop: StopFlag) -> int:
    url = os.environ.get(names.ENV_REPORT_URL)
    poster = Poster(Receiver(url, os.environ.get(names.ENV_REPORT_CA), os.environ.get(names.ENV_REPORT_TOKEN))) if url else None
    sinks = [poster.offer] if poster else []
    started = read_process_start()
    try:
        config = _parse_config(os.environ.get(names.ENV_TRAINER_CONFIG))
    except InvalidSpecError as error:
        code, report = _fail(error, Progress(Budget(None, started), sinks, with_finetune=True))
    else:
        stop.grace_seconds = config.grace_seconds
        budget = Budget(config.training_seconds, started)
        code, report = _carry_out(config, _follow(config, budget, sinks), budget=budget, stop=stop)
    write_termination_message(termination_message_file, report)
    if poster:
        poster.close()
    return code


def run_locally(job: Path, paths: local.Paths, *, num_workers: int | None) -> int:
    """Carry out the job of a YAML file with a progress bar."""
    stop = StopFlag()
    with stop.installed((signal.SIGTERM, signal.SIGINT)):
        return _run_locally(job, paths, stop, num_workers=num_workers)


def _run_locally(job: Path, paths: local.Paths, stop: StopFlag, *, num_workers: int | None) -> int:
    try:
        config = local.read_job(job, paths)
    except InvalidSpecError as error:
        print(f"{error.reason}: {error.message}", file=sys.stderr)
        return error.exit_code
    with local.Bar() as bar:
        budget = Budget(config.training_seconds, read_process_start())
        progress = _follow(config, budget, [bar.show])
        code, report = _carry_out(config, progress, budget=budget, stop=stop, num_workers=num_workers)
    if report.failure:
        print(f"{report.failure.reason}: {report.failure.message}", file=sys.stderr)
    if report.result:
        for metric in report.result.metrics:
            interval = f"  [{metric.low}, {metric.high}]" if metric.low else ""
            print(f"{metric.name:<16} {metric.value}{interval}")
        for warning in report.result.warnings:
            print(f"warning: {warning}")
        print(f"{report.result.candidate} published in {config.output_path}")
    return code


def predict(model_dir: Path, images: Sequence[Path]) -> int:
    """Print the most probable labels of each picture."""
    from finetune_trainer.predict import load_model, predict_probabilities  # noqa: PLC0415  torch takes seconds to import

    try:
        model = load_model(model_dir)
        for path, p_K in zip(images, predict_probabilities(model, images), strict=True):
            top = p_K.argsort(descending=True)[:3].tolist()
            print(f"{path}: " + ", ".join(f"{model.labels[k]} {float(p_K[k]):.4f}" for k in top))
    except TrainerError as error:
        print(f"{error.reason}: {error.message}", file=sys.stderr)
        return error.exit_code
    return ExitCode.COMPLETE


def _carry_out(
    config: TrainerConfig, progress: Progress, *, budget: Budget, stop: StopFlag, num_workers: int | None = None
) -> tuple[int, TrainerReport]:
    """Run the job; whatever happens becomes an exit code and a last report."""
    try:
        from finetune_trainer.run import run  # noqa: PLC0415  torch takes seconds to import

        return ExitCode.COMPLETE, run(config, budget=budget, check=stop.check, progress=progress, num_workers=num_workers)
    except TrainerError as error:
        return _fail(error, progress)
    except Exception as error:  # noqa: BLE001  the edge of the process: a bug is reported like any other end
        traceback.print_exc()
        failure = FailureReport(reason="InternalError", message=shorten(f"{type(error).__name__}: {error}"))
        return ExitCode.INTERNAL_ERROR, progress.fail(failure, log_tail=traceback.format_exc()[-LOG_TAIL_LENGTH:])


def _follow(config: TrainerConfig, budget: Budget, sinks: Sequence[Sink]) -> Progress:
    return Progress(budget, sinks, with_finetune=config.method is not MethodType.PROBE)


def _fail(error: TrainerError, progress: Progress) -> tuple[int, TrainerReport]:
    logger.error("%s: %s", error.reason, error.message)
    return error.exit_code, progress.fail(error.to_report())


def _parse_config(text: str | None) -> TrainerConfig:
    if not text:
        raise InvalidSpecError(
            "InvalidSpec",
            f"{names.ENV_TRAINER_CONFIG} is not set; without a cluster use: finetune-trainer run JOB.yaml --output DIR",
        )
    try:
        return TrainerConfig.model_validate_json(text)
    except ValidationError as error:
        raise InvalidSpecError("InvalidSpec", f"{names.ENV_TRAINER_CONFIG}: {local.describe(error)}") from error


def _parse_count(text: str) -> int:
    count = int(text)
    if count < 0:
        raise argparse.ArgumentTypeError(f"{count} is negative; give 0 or more")
    return count


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="finetune-trainer", description="Fine-tune a pretrained image model.")
    parser.add_argument(
        "--termination-message-file",
        type=Path,
        default=Path(names.TERMINATION_MESSAGE_FILE),
        help="where the last report goes, if the file exists (default: %(default)s)",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", help="without a command: run as the trainer of a pod")
    run = commands.add_parser("run", help="carry out a FineTuneJob on this machine")
    run.add_argument("job", type=Path, metavar="JOB.yaml")
    run.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the model, in place of output.uri")
    run.add_argument("--data", type=Path, metavar="DIR", help="folder of the data, in place of dataset.uri")
    run.add_argument("--model", type=Path, metavar="DIR", help="folder of the pretrained model, in place of model.uri")
    run.add_argument(
        "--workers",
        type=_parse_count,
        metavar="N",
        help="threads that draw batches ahead (default: 2 with a GPU, else 0); same result",
    )
    predict_parser = commands.add_parser("predict", help="print labels with probabilities for pictures")
    predict_parser.add_argument("model_dir", type=Path, metavar="MODEL_DIR")
    predict_parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    return parser


if __name__ == "__main__":
    enter()

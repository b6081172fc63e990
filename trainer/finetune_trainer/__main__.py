"""The command line, and the only reader of the environment: a trainer pod without arguments, else `run` and `predict`."""

import signal

if __name__ == "__main__":
    # The kernel drops a signal for process 1 of a container that has no handler yet; one that is blocked waits for it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

import argparse
import logging
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from finetune_api import names
from finetune_api.contract import Backend, DeviceType, ExitCode, FailureReport, TrainerConfig, TrainerReport
from finetune_api.v1alpha1 import MethodType
from pydantic import ValidationError

from finetune_trainer import local
from finetune_trainer.budget import Budget, read_process_start
from finetune_trainer.ending import Ending, write_ending
from finetune_trainer.errors import InvalidSpecError, TrainerError, shorten
from finetune_trainer.metrics import Totals, serve
from finetune_trainer.progress import Progress, Sink
from finetune_trainer.redact import build_redact, redact_output
from finetune_trainer.report import Poster, Receiver, write_termination_message
from finetune_trainer.seat import Seat, choose_slice, list_slices, read_seat, share_cpus
from finetune_trainer.signals import StopFlag

logger = logging.getLogger("finetune_trainer")

LOG_TAIL_LENGTH = 1000


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    options = _build_parser().parse_args(arguments)
    seat = read_seat(os.environ) if options.ending_folder else None
    _prepare_logging(seat)
    # Both are read when torch loads. Threads that wait actively take the cores from whatever else runs on the machine;
    # matrix products on CUDA are deterministic with a fixed workspace only.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # With it, XLA reuses the memory of weights that copies of them still need (torch_xla 2.9).
    os.environ.setdefault("XLA_ENABLE_PARAM_ALIASING", "0")
    if options.command == "predict":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        return predict(options.model_dir, options.images)
    if options.command == "run":
        return run_locally(options.job, local.Paths(options.output, options.data, options.model), num_workers=options.workers)
    if seat:
        return run_in_seat(seat, options.ending_folder)
    return run_in_pod(options.termination_message_file)


def enter() -> NoReturn:
    """Run the command line and end the process.

    The interpreter would take torch apart first, for seconds on a busy machine, when all is written and the kubelet is waiting.
    """
    redact_output(build_redact(os.environ))
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_in_pod(termination_message_file: Path) -> int:
    """Carry out the job in the environment, in this process or in several that it starts, and report to the operator."""
    config: TrainerConfig | InvalidSpecError
    try:
        config = _parse_config(os.environ.get(names.ENV_TRAINER_CONFIG))
    except InvalidSpecError as error:
        config = error
    if isinstance(config, TrainerConfig) and config.world.size > 1:
        return _launch(config, termination_message_file)
    return _run_and_report(config, lambda _code, report: write_termination_message(termination_message_file, report))


def run_in_seat(seat: Seat, ending_folder: Path) -> int:
    """Carry out the job in the environment as one of its processes, and leave its ending to the launcher; rank 0 reports."""
    config = _parse_config(os.environ.get(names.ENV_TRAINER_CONFIG))
    serves_metrics = seat.local_rank == 0
    if config.world.device is DeviceType.CUDA and (mig_slice := choose_slice(_list_slices(config), local_rank=seat.local_rank)):
        # CUDA reads it when torch first asks for devices, of which there is one then.
        os.environ["CUDA_VISIBLE_DEVICES"] = mig_slice
        seat = replace(seat, local_rank=0)
    return _run_and_report(
        config,
        lambda code, report: write_ending(ending_folder, seat.rank, code, report),
        seat=seat,
        serves_metrics=serves_metrics,
    )


def _launch(config: TrainerConfig, termination_message_file: Path) -> int:
    """Start the processes of this pod and wait for them; what stands for all of them is the pod's last word."""
    progress = _follow(config, Budget(config.training_seconds, read_process_start()), ())
    try:
        from finetune_trainer.device import count_cpus  # noqa: PLC0415  torch takes seconds to import
        from finetune_trainer.launch import launch  # noqa: PLC0415  as above

        threads = share_cpus(count_cpus(), processes_per_node=config.world.processes_per_node)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        if config.world.nodes == 1:
            # Names of pods need not resolve.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        ending = launch(config, node_rank=int(os.environ.get("JOB_COMPLETION_INDEX", "0")))
        code, report = ending.code, ending.report or progress.fail(_describe_silence(ending))
    except TrainerError as error:
        code, report = _fail(error, progress)
    except Exception as error:  # noqa: BLE001  the edge of the process: a bug is reported like any other end
        code, report = _fail_by_bug(error, progress)
    write_termination_message(termination_message_file, report)
    return code


def _describe_silence(ending: Ending) -> FailureReport:
    if ending.code == ExitCode.PREEMPTED:
        return FailureReport(reason="Preempted", message="the pod was stopped before its processes could say anything")
    message = f"process {ending.rank} of the job ended with exit code {ending.code} and said nothing; its log may tell why"
    return FailureReport(reason="Killed" if ending.code > 128 else "TrainerError", message=message)


def _list_slices(config: TrainerConfig) -> tuple[str, ...]:
    """Return the MIG slices of the pod; gloo is the backend where there are some, as NCCL needs whole GPUs."""
    slices = list_slices(os.environ.get("NVIDIA_VISIBLE_DEVICES", ""))
    if slices or config.world.backend is not Backend.GLOO:
        return slices
    try:
        return list_slices(subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True, timeout=60).stdout)
    except (OSError, subprocess.SubprocessError):
        return ()


def _run_and_report(
    config: TrainerConfig | InvalidSpecError,
    keep: Callable[[int, TrainerReport], None],
    *,
    seat: Seat | None = None,
    serves_metrics: bool = True,
) -> int:
    """Carry out the job and report to the operator; `keep` receives the last report."""
    stop = StopFlag()
    with stop.installed():
        url = os.environ.get(names.ENV_REPORT_URL) if seat is None or seat.rank == 0 else None
        receiver = Receiver(url, os.environ.get(names.ENV_REPORT_CA), os.environ.get(names.ENV_REPORT_TOKEN)) if url else None
        poster = Poster(receiver) if receiver else None
        sinks = [poster.offer] if poster else []
        totals = Totals()
        _serve_metrics(totals, os.environ.get(names.ENV_METRICS_PORT), serves=serves_metrics)
        started = read_process_start()
        if isinstance(config, InvalidSpecError):
            code, report = _fail(
                config, Progress(Budget(None, started), sinks, with_finetune=True, redact=build_redact(os.environ))
            )
        else:
            stop.grace_seconds = config.grace_seconds
            budget = Budget(config.training_seconds, started)
            code, report = _carry_out(config, _follow(config, budget, sinks, totals), budget=budget, stop=stop, seat=seat)
        keep(code, report)
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
    config: TrainerConfig,
    progress: Progress,
    *,
    budget: Budget,
    stop: StopFlag,
    num_workers: int | None = None,
    seat: Seat | None = None,
) -> tuple[int, TrainerReport]:
    """Run the job; whatever happens becomes an exit code and a last report."""
    try:
        from finetune_trainer.run import run  # noqa: PLC0415  torch takes seconds to import

        report = run(config, budget=budget, check=stop.check, progress=progress, num_workers=num_workers, seat=seat)
    except TrainerError as error:
        return _fail(error, progress)
    except Exception as error:  # noqa: BLE001  the edge of the process: a bug is reported like any other end
        return _fail_by_bug(error, progress)
    return ExitCode.COMPLETE, report


def _follow(config: TrainerConfig, budget: Budget, sinks: Sequence[Sink], totals: Totals | None = None) -> Progress:
    redact = build_redact(os.environ)
    return Progress(budget, sinks, with_finetune=config.method is not MethodType.PROBE, redact=redact, totals=totals)


def _serve_metrics(totals: Totals, port: str | None, *, serves: bool) -> None:
    """Serve metrics where the operator says so; the processes of a pod share its ports, so the first of them does it."""
    if serves and port and port.isdecimal():
        serve(totals, port=int(port))


def _fail(error: TrainerError, progress: Progress) -> tuple[int, TrainerReport]:
    logger.error("%s: %s", error.reason, error.message)
    return error.exit_code, progress.fail(error.to_report(progress.redact))


def _fail_by_bug(error: Exception, progress: Progress) -> tuple[int, TrainerReport]:
    traceback.print_exception(error)
    failure = FailureReport(reason="InternalError", message=shorten(progress.redact(f"{type(error).__name__}: {error}")))
    log_tail = progress.redact("".join(traceback.format_exception(error)))[-LOG_TAIL_LENGTH:]
    return ExitCode.INTERNAL_ERROR, progress.fail(failure, log_tail=log_tail)


def _prepare_logging(seat: Seat | None) -> None:
    """Log what happens; of several processes, rank 0 alone logs what goes well."""
    place = f"rank {seat.rank} " if seat else ""
    level = logging.INFO if seat is None or seat.rank == 0 else logging.WARNING
    logging.basicConfig(format=f"%(asctime)s {place}%(levelname)s %(message)s", level=level, stream=sys.stderr)
    for talkative in ("httpx", "timm"):
        logging.getLogger(talkative).setLevel(logging.WARNING)


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
    # One of several processes of a pod, as launch.py starts it.
    parser.add_argument("--ending-folder", type=Path, help=argparse.SUPPRESS)
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

"""Start the processes of a pod with torchrun's agent, once all pods of the job are there, and say how they ended."""

import logging
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Never

from finetune_api.contract import Backend, ExitCode, TrainerConfig, World
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # exported without a word
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from finetune_trainer.ending import Ending, choose_ending, read_ending
from finetune_trainer.errors import PeerLostError, PreemptedError

logger = logging.getLogger(__name__)

# Pods start when their node has pulled the image and mounted the volumes, which takes minutes on a new node.
RENDEZVOUS_SECONDS = 900.0
# Between the SIGKILL of the processes by the agent and that of the pod; the processes leave by force a little earlier.
_SECONDS_BEFORE_KILL = 3.0
_SECONDS_BETWEEN_LOOKS = 0.2
_MONITOR_SECONDS = 0.1
# torchrun's agent waits 30 s between the SIGTERM after a failure and SIGKILL.
_AGENT_PATIENCE_SECONDS = 20
_STORE_TIMEOUT = timedelta(seconds=30)
_GO = "go"


def launch(config: TrainerConfig, *, node_rank: int) -> Ending:
    """Run the trainer once for each process of this pod, and return the ending that counts.

    SIGTERM is passed on to the processes, which save and leave; before there are any, it raises PreemptedError.
    """
    world = config.world
    failures: Mapping[int, ProcessFailure] = {}
    was_told_to_stop = False
    with tempfile.TemporaryDirectory(prefix="finetune-") as name:
        folder = Path(name)
        _raise_on_sigterm()
        store, host = gather(world, node_rank=node_rank, job=_name(config))
        try:
            logger.info(
                "starting %d of %d processes in pod %d of %d", world.processes_per_node, world.size, node_rank, world.nodes
            )
            command = ("-m", "finetune_trainer", "--ending-folder", name)
            elastic_launch(_configure(config, node_rank, host=host, port=store.port, logs=folder), sys.executable)(*command)
        except ChildFailedError as error:
            failures = error.failures
        except SignalException:
            was_told_to_stop = True
        first = node_rank * world.processes_per_node
        ranks = range(first, first + world.processes_per_node)
        endings = [read_ending(folder, rank) or _infer_ending(rank, failures, world.backend) for rank in ranks]
    return choose_ending(endings, was_told_to_stop=was_told_to_stop)


def gather(world: World, *, node_rank: int, job: str) -> tuple[TCPStore, str]:
    """Return the store where all pods of the job have come together, and its host.

    torchrun's own rendezvous waits in C++, where no signal is noticed and a name that does not resolve yet is an error. So the
    pods wait here, and its rendezvous takes no time.
    """
    deadline = time.monotonic() + RENDEZVOUS_SECONDS
    if node_rank == 0:
        # Within one pod nobody else needs to know the port.
        port = world.rendezvous_port if world.nodes > 1 else 0
        store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, multi_tenant=True)
        notices = PrefixStore(job, store)
        present = [f"node-{number}" for number in range(1, world.nodes)]
        _wait_until(lambda: all(notices.check([name]) for name in present), deadline, "other pods of the job")
        notices.set(_GO, "1")
        return store, "127.0.0.1"
    host = world.rendezvous_host or "127.0.0.1"
    _wait_until(
        lambda: _is_listening(host, world.rendezvous_port), deadline, f"{host}:{world.rendezvous_port}, the first pod of the job"
    )
    store = TCPStore(host, world.rendezvous_port, is_master=False, wait_for_workers=False, timeout=_STORE_TIMEOUT)
    notices = PrefixStore(job, store)
    notices.set(f"node-{node_rank}", "1")
    _wait_until(lambda: notices.check([_GO]), deadline, "other pods of the job")
    return store, host


def _wait_until(is_true: Callable[[], bool], deadline: float, awaited: str) -> None:
    while not is_true():
        if time.monotonic() > deadline:
            raise PeerLostError("PeersMissing", f"{awaited} did not come within {RENDEZVOUS_SECONDS:.0f} s; its state tells why")
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _is_listening(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=2.0):
            return True
    except OSError:
        return False


def _configure(config: TrainerConfig, node_rank: int, *, host: str, port: int, logs: Path) -> LaunchConfig:
    world = config.world
    return LaunchConfig(
        min_nodes=world.nodes,
        max_nodes=world.nodes,
        nproc_per_node=world.processes_per_node,
        run_id=_name(config),
        role="trainer",
        rdzv_backend="static",
        rdzv_endpoint=f"{host}:{port}",
        rdzv_configs={"rank": node_rank, "timeout": int(RENDEZVOUS_SECONDS)},
        # A pod that fails fails the attempt, and the operator starts the next one.
        max_restarts=0,
        monitor_interval=_MONITOR_SECONDS,
        logs_specs=DefaultLogsSpecs(log_dir=str(logs)),
        shutdown_timeout=max(1, int(config.grace_seconds - _SECONDS_BEFORE_KILL)),
    )


def _infer_ending(rank: int, failures: Mapping[int, ProcessFailure], backend: Backend) -> Ending:
    """Return the ending of a process that left no file, by the signal that ended it, in the way of a shell."""
    failure = failures.get(rank)
    if failure is None or failure.exitcode == -signal.SIGTERM:
        return Ending(rank, ExitCode.PREEMPTED, time.time())
    # The agent kills what does not leave long after another process failed, and NCCL aborts a process whose peers are gone.
    waited = failure.timestamp - min(each.timestamp for each in failures.values())
    is_killed = failure.exitcode == -signal.SIGKILL and waited >= _AGENT_PATIENCE_SECONDS
    if is_killed or (failure.exitcode == -signal.SIGABRT and backend is Backend.NCCL):
        return Ending(rank, ExitCode.PEER_LOST, failure.timestamp)
    return Ending(rank, 128 - failure.exitcode if failure.exitcode < 0 else failure.exitcode, failure.timestamp)


def _name(config: TrainerConfig) -> str:
    return f"{config.name}-{config.run}-{config.attempt}"


def _raise_on_sigterm() -> None:
    """Raise PreemptedError on SIGTERM, until torchrun's agent puts its own handler into place.

    The main thread goes on blocking the signal, and its children inherit that, so that none is lost before they are ready for
    it. A thread that does not block it receives it, and Python runs the handler in the main thread.
    """

    def leave(_number: int, _frame: FrameType | None) -> Never:
        raise PreemptedError("Preempted", "stopped by SIGTERM before the training began")

    def receive() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        threading.Event().wait()

    signal.signal(signal.SIGTERM, leave)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=receive, name="signals", daemon=True).start()

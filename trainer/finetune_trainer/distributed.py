"""The processes of a job and what they tell each other: beside launch.py, the one file that knows torch.distributed.

A job of one process has a group of one, whose exchanges give back what they are given. Nothing is ever pickled: what crosses
between processes is tensors, JSON, and safetensors.
"""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from finetune_api.contract import Backend, World
from torch import Tensor, nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # exported without a word
from torch.distributed.distributed_c10d import PrefixStore, Store

from finetune_trainer.errors import PeerLostError, PreemptedError
from finetune_trainer.seat import Seat

# The longest that a healthy process keeps the others waiting is a save or a publication by rank 0 on slow storage. A peer that
# dies is noticed at once, by its connections; the time-out is for a machine that falls silent.
COLLECTIVE_TIMEOUT = timedelta(minutes=5)
_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_TO_FOLLOW = 60.0
# Small exchanges are between CPUs even where gradients are exchanged between accelerators: reading a number that is on an
# accelerator would wait for all that was queued there.
_BACKENDS = {
    Backend.GLOO: "gloo",
    Backend.NCCL: "cpu:gloo,cuda:nccl",
    Backend.XLA: "cpu:gloo,xla:xla",
    Backend.HCCL: "cpu:gloo,hpu:hccl",
}
# What gloo, NCCL and the store say when a connection ends.
_LOST_WORDS = (
    "connection closed", "connection reset", "connection was", "broken pipe", "timed out", "timeout", "failed to recv",
    "remote process exited", "nccl communicator was aborted", "socket", "read error", "write error", "connection refused",
)  # fmt: skip
_STOP, _LEFT = "stop", "left"


@dataclass(frozen=True)
class Board:
    """Short notices that every process can read at any time, kept by the launcher of the first pod."""

    store: Store

    def announce(self, name: str) -> None:
        """Put up a notice."""
        self.store.set(name, "1")

    def has(self, name: str) -> bool:
        """Return whether somebody put up a notice."""
        return bool(self.store.check([name]))


@dataclass
class Clock:
    """Adds up the time that exchanges take."""

    seconds: float = 0.0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Add the time of the body."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self.seconds += time.monotonic() - begun


@dataclass(frozen=True)
class Group:
    """The processes of the job, as one of them sees them."""

    rank: int = 0
    size: int = 1
    board: Board | None = None
    clock: Clock = field(default_factory=Clock, compare=False)

    @property
    def is_main(self) -> bool:
        """Return whether this process decides, saves, publishes and reports."""
        return self.rank == 0

    def agree(self, values: Sequence[float]) -> tuple[float, ...]:
        """Return the largest of each value over all processes."""
        if self.size == 1:
            return tuple(values)
        largest = torch.tensor(values, dtype=torch.float64)
        with self.clock.running():
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        return tuple(largest.tolist())

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over all processes."""
        if self.size > 1:
            tensor = tensor.clone()
            with self.clock.running():
                dist.all_reduce(tensor)
        return tensor

    def gather(self, rows_ND: Tensor, counts: Sequence[int]) -> Tensor:
        """Return the rows of all processes in the order of their ranks; `counts` says how many each has."""
        if self.size == 1:
            return rows_ND
        padded = rows_ND.new_zeros((max(counts), *rows_ND.shape[1:]))
        padded[: len(rows_ND)] = rows_ND
        gathered = [torch.empty_like(padded) for _ in counts]
        with self.clock.running():
            dist.all_gather(gathered, padded)
        return torch.cat([rows[:count] for rows, count in zip(gathered, counts, strict=True)])

    def broadcast(self, content: bytes) -> bytes:
        """Return the content that rank 0 gives."""
        if self.size == 1:
            return content
        length = torch.tensor([len(content)])
        with self.clock.running():
            dist.broadcast(length, src=0)
        buffer = torch.empty(int(length), dtype=torch.uint8)
        if not len(buffer):
            return b""
        if self.is_main:
            buffer.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        with self.clock.running():
            dist.broadcast(buffer, src=0)
        return buffer.numpy().tobytes()

    def broadcast_json(self, content: Any) -> Any:  # noqa: ANN401  JSON data
        """Return the JSON data that rank 0 gives."""
        return content if self.size == 1 else json.loads(self.broadcast(json.dumps(content).encode()))

    def broadcast_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors that rank 0 gives, on the CPU."""
        if self.size == 1:
            return dict(tensors)
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()} if self.is_main else {}
        return safetensors.torch.load(self.broadcast(safetensors.torch.save(plain)))

    def announce(self, name: str) -> None:
        """Put up a notice for the other processes."""
        if self.board is not None:
            self.board.announce(name)

    def wait_for(self, name: str, check: Callable[[], None]) -> None:
        """Wait for a notice for as long as it takes, and call `check` meanwhile."""
        while self.board is not None and not self.board.has(name):
            check()
            time.sleep(_SECONDS_BETWEEN_LOOKS / 10)

    def barrier(self) -> None:
        """Wait for all processes."""
        self.agree((0.0,))

    def wrap(self, model: nn.Module, sample: Tensor) -> nn.Module:
        """Return the model with gradients that are averaged over all processes; it must take the sample as its input."""
        if self.size == 1:
            return model
        _exclude_unused(model, sample)
        # The processes compute the same buffers by themselves.
        return nn.parallel.DistributedDataParallel(model, forward_sync_buffers=False)

    def exchanging(self, model: nn.Module, *, is_last: bool) -> contextlib.AbstractContextManager[None]:
        """Return the context of one of several passes of a wrapped model, whose gradients are exchanged in the last one."""
        if is_last or not isinstance(model, nn.parallel.DistributedDataParallel):
            return contextlib.nullcontext()
        return model.no_sync()


ALONE = Group()


def _exclude_unused(model: nn.Module, sample: Tensor) -> None:
    """Take weights that have no effect on the output, as some backbones have, from those whose gradients are waited for."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    gradients = torch.autograd.grad(model(sample).sum(), weights, allow_unused=True)
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.requires_grad = gradient is not None


def join(seat: Seat, world: World) -> Group:
    """Return the group once all processes are there."""
    try:
        stores = [TCPStore(seat.store_host, seat.store_port, is_master=False, wait_for_workers=False) for _ in range(2)]
        dist.init_process_group(
            _BACKENDS[world.backend],
            store=PrefixStore("group", stores[0]),
            rank=seat.rank,
            world_size=world.size,
            timeout=COLLECTIVE_TIMEOUT,
        )
    except RuntimeError as error:
        raise _peer_lost() from error
    return Group(seat.rank, world.size, Board(PrefixStore("board", stores[1])))


@dataclass
class StopNotice:
    """Whether the job is asked to stop: any process may be told so, rank 0 leaves first, and the others follow.

    So nobody is missing where rank 0 still needs them to come to a state that is worth saving.
    """

    group: Group
    check_own: Callable[[], None]
    _seen: set[str] = field(default_factory=set, init=False)
    _looked: float = field(default=-math.inf, init=False)

    def check_here(self) -> None:
        """Raise PreemptedError if this process knows that the job is to stop."""
        try:
            self.check_own()
        except PreemptedError:
            if self.group.board is not None and _STOP not in self._seen:
                self.group.board.announce(_STOP)
                self._seen.add(_STOP)
            raise
        if self._has(_STOP):
            raise _stopped_elsewhere()

    def check(self) -> None:
        """Raise PreemptedError if rank 0 is to leave, or has left: for work that each process does by itself."""
        try:
            self.check_here()
        except PreemptedError:
            if self.group.is_main:
                raise
        if not self.group.is_main and self._has(_LEFT):
            raise _stopped_elsewhere()

    def check_together(self) -> None:
        """Raise PreemptedError in all processes if one knows that the job is to stop; all must ask at the same place."""
        if self.group.size == 1:
            self.check_here()
            return
        stop: PreemptedError | None = None
        try:
            self.check_here()
        except PreemptedError as error:
            stop = error
        if self.group.agree((float(stop is not None),))[0]:
            raise stop or _stopped_elsewhere()

    def leave(self) -> None:
        """Say that rank 0 leaves, or wait until it does."""
        board = self.group.board
        if board is None:
            return
        with contextlib.suppress(RuntimeError):
            if self.group.is_main:
                board.announce(_LEFT)
                return
            deadline = time.monotonic() + _SECONDS_TO_FOLLOW
            while not board.has(_LEFT) and time.monotonic() < deadline:
                time.sleep(_SECONDS_BETWEEN_LOOKS / 10)

    def explain(self, error: RuntimeError) -> Exception:
        """Return what a failed exchange means: the error itself, unless a peer has ended or left."""
        if self.group.size == 1 or not is_connection_lost(error):
            return error
        with contextlib.suppress(RuntimeError):
            if self.group.board is not None and self.group.board.has(_LEFT):
                return _stopped_elsewhere()
        return _peer_lost()

    def _has(self, name: str) -> bool:
        """Return whether a notice was seen; to look costs time, so it is done now and then."""
        board, now = self.group.board, time.monotonic()
        if board is not None and now - self._looked >= _SECONDS_BETWEEN_LOOKS:
            self._looked = now
            self._seen.update(each for each in (_STOP, _LEFT) if board.has(each))
        return name in self._seen


def is_connection_lost(error: RuntimeError) -> bool:
    """Return whether an exchange failed because a peer is gone or silent."""
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in _LOST_WORDS)


def _peer_lost() -> PeerLostError:
    return PeerLostError("PeerLost", "a trainer process of another pod ended; its pod tells why")


def _stopped_elsewhere() -> PreemptedError:
    return PreemptedError("Preempted", "another process of the job was asked to stop; a restart goes on from what is saved")

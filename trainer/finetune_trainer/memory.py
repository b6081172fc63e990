"""Split batches among processes, and into more parts whenever one does not fit into the memory."""

import gc
import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from finetune_trainer.distributed import ALONE, Group
from finetune_trainer.errors import OutOfMemoryError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
# What the allocators of torch say on the CPU, where they raise a plain RuntimeError.
_ALLOCATOR_WORDS = ("can't allocate memory", "not enough memory", "out of memory")


class MicroBatches:
    """Into how many parts a batch is split; doubled when memory runs out, for the rest of the job.

    Processes that work together cannot change it on their own: each would wait for exchanges that the others do not come to.
    """

    def __init__(self, parts: int = 1, *, report: Callable[[str], None] = logger.warning, group: Group = ALONE) -> None:
        self.parts = parts
        self.report = report
        self.group = group

    def run(self, action: Callable[[int], Result], *, batch_size: int) -> Result:
        """Return what `action` gives for the number of parts, with twice as many until it fits."""
        while True:
            try:
                return action(min(self.parts, batch_size))
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                message = str(error).partition("\n")[0]
            # Outside of the handler, because the traceback holds on to the tensors of the failed attempt.
            self._split(batch_size, message)

    def map(self, function: Callable[[Tensor], Tensor], batch: Tensor, *, share: int) -> Tensor:
        """Return the rows that `function` gives for the batch: each process computes those of `share` examples, part by part."""
        assert len(batch) <= share * self.group.size, "every example must belong to a process"
        counts = [len(batch[start : start + share]) for start in range(0, share * self.group.size, share)]
        own = batch[self.group.rank * share :][:share]
        # The rows of one example tell a process that has none what rows look like.
        shown = own if len(own) else batch[:1]
        rows = self.run(lambda parts: torch.cat([function(part) for part in shown.chunk(parts)]), batch_size=len(shown))
        return self.group.gather(rows[: len(own)], counts)

    def _split(self, batch_size: int, message: str) -> None:
        if self.group.size > 1:
            raise OutOfMemoryError(
                "OutOfMemory",
                f"memory ran out with each batch in {self.parts} parts ({message}); a retry uses twice as many, and more "
                "resources.memory makes it faster",
            )
        if self.parts >= batch_size:
            raise OutOfMemoryError(
                "OutOfMemory",
                f"the memory does not even take one picture at a time ({message}); give more resources.memory, or a smaller "
                "hyperparameters.imageSize",
            )
        self.parts *= 2
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.report(f"memory ran out, so each batch was computed in {self.parts} parts from then on")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the error says that memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _ALLOCATOR_WORDS)

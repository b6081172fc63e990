"""Live with little memory: split batches into more parts whenever one does not fit."""

import gc
import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from finetune_trainer.errors import OutOfMemoryError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
# What the allocators of torch say on the CPU, where they raise a plain RuntimeError.
_ALLOCATOR_WORDS = ("can't allocate memory", "not enough memory", "out of memory")


class MicroBatches:
    """Into how many parts a batch is split; doubled when memory runs out, for the rest of the job."""

    def __init__(self, parts: int = 1, *, report: Callable[[str], None] = logger.warning) -> None:
        self.parts = parts
        self.report = report

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

    def _split(self, batch_size: int, message: str) -> None:
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

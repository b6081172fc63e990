"""The checkpoints as each process of a job sees them: rank 0 alone reads and writes, and tells the others what it found."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from finetune_trainer.checkpoint import Checkpoint, Checkpoints
from finetune_trainer.distributed import Group


class SharedCheckpoints:
    """The checkpoints of a run; only `load` is an exchange, so all processes must call it at the same place."""

    def __init__(self, own: Checkpoints | None, group: Group) -> None:
        assert (own is not None) == group.is_main, "rank 0 has the checkpoints"
        self._own = own
        self._group = group

    @property
    def warnings(self) -> tuple[str, ...]:
        """Return what was reported about the run, in this attempt and in those before."""
        return self._own.warnings if self._own else ()

    def warn(self, text: str) -> None:
        """Report something in the log and in the result."""
        if self._own:
            self._own.warn(text)

    def is_due(self) -> bool:
        """Return whether the interval since the last checkpoint is over."""
        return self._own is not None and self._own.is_due()

    def confirm(self) -> None:
        """Raise PreemptedError if another trainer has taken over."""
        if self._own:
            self._own.confirm()

    def save(
        self,
        stage: str,
        *,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        step: int | None = None,
        samples: int | None = None,
    ) -> None:
        """Save a checkpoint."""
        if self._own:
            self._own.save(stage, tensors=tensors, state=state, step=step, samples=samples)

    def note_progress(self) -> None:
        """Report that something was kept beside the checkpoints, before the first step."""
        if self._own:
            self._own.note_progress()

    def load(self, stage: str) -> Checkpoint | None:
        """Return the newest good checkpoint of a stage, the same in all processes."""
        found = self._own.load(stage) if self._own else None
        if self._group.size == 1:
            return found
        header = self._group.broadcast_json(None if found is None else {"name": found.name, "state": found.state})
        if header is None:
            return None
        tensors = self._group.broadcast_tensors(found.tensors if found else {})
        return Checkpoint(header["name"], tensors, header["state"])

    def clear(self) -> None:
        """Remove all checkpoints, once what they lead to is published."""
        if self._own:
            self._own.clear()

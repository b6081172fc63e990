"""The fence around a checkpoint folder: whoever claimed it last may write, and every earlier trainer leaves."""

import errno
import json
import secrets
from dataclasses import asdict, dataclass

from finetune_trainer.errors import InvalidSpecError, PreemptedError, StorageError
from finetune_trainer.storage import Storage

FENCE_FILE = "fence.json"
# A retry would meet the same folder with the same rights; a full disk or a network may be better by then.
_LASTING = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR})


@dataclass(frozen=True)
class Claim:
    """Who may write: an attempt of a run, in one process."""

    run: str
    attempt: int
    token: str
    uid: str = ""
    generation: int = 0

    def is_later_than(self, other: "Claim") -> bool:
        """Return whether this is a later attempt of the same run. That of a FineTuneJob that was deleted is none."""
        is_same = (self.run, self.uid) == (other.run, other.uid)
        return is_same and (self.generation, self.attempt) > (other.generation, other.attempt)


class Fence:
    """Says whether this trainer still is the one that may write."""

    def __init__(self, storage: Storage, *, run: str, attempt: int, uid: str = "", generation: int = 0) -> None:
        self._storage = storage
        self._claim = Claim(run, attempt, secrets.token_hex(8), uid, generation)

    def raise_up(self, location: str) -> None:
        """Claim the folder; leave it to a later attempt of the same run."""
        try:
            held = self._read()
            if held is not None and held.is_later_than(self._claim):
                raise _superseded(self._claim, held)
            self._storage.write(FENCE_FILE, json.dumps(asdict(self._claim)).encode())
            self._storage.clean()
        except OSError as error:
            if error.errno in _LASTING or isinstance(error, FileNotFoundError | PermissionError):
                raise InvalidSpecError(
                    "CheckpointsNotWritable",
                    f"spec.checkpoint.uri: {location} cannot be written ({error.strerror or error}); give a volume or a bucket "
                    "that exists and that this job may write to",
                ) from error
            raise StorageError("CheckpointStoreUnavailable", f"checkpoints in {location}: {error}") from error

    def confirm(self) -> None:
        """Raise PreemptedError if somebody else claimed the folder since."""
        held = self._read()
        if held != self._claim:
            raise _superseded(self._claim, held)

    def _read(self) -> Claim | None:
        try:
            return Claim(**json.loads(self._storage.read(FENCE_FILE)))
        except (FileNotFoundError, ValueError, TypeError):
            return None


def _superseded(own: Claim, held: Claim | None) -> PreemptedError:
    other = f"attempt {held.attempt} of run {held.run}" if held else "nobody, as the claim was removed"
    return PreemptedError(
        "Superseded", f"the checkpoint folder belongs to {other}; attempt {own.attempt} of run {own.run} writes nothing more"
    )

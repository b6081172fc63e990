"""Checkpoints: folders that are either whole and verified or of no use. A job goes on from the newest one of each stage.

A checkpoint holds tensors.safetensors, state.json and manifest.json with sizes and SHA-256 of both, written last. Trouble with a
checkpoint never stops the training: it is reported, and what was saved before stays.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import safetensors.torch
from finetune_api.v1alpha1 import CheckpointStatus
from pydantic import BaseModel
from safetensors import SafetensorError
from torch import Tensor

from finetune_trainer.errors import StorageError
from finetune_trainer.fence import Fence
from finetune_trainer.identity import find_differences
from finetune_trainer.progress import Progress
from finetune_trainer.storage import Storage

logger = logging.getLogger(__name__)

TENSORS_FILE, STATE_FILE, MANIFEST_FILE = "tensors.safetensors", "state.json", "manifest.json"
PREFIX = "checkpoint-"
ASIDE = "broken-"


class FileEntry(BaseModel):
    """What a file must be like."""

    bytes: int
    sha256: str


class Manifest(BaseModel):
    """What a checkpoint is, and what it must hold."""

    stage: str
    run: str
    attempt: int
    identity: dict[str, str]
    step: int
    samples: int
    time: datetime
    elapsed_seconds: float
    threads: int
    warnings: tuple[str, ...]
    """What was reported about the run so far."""
    files: dict[str, FileEntry]
    digest: str = ""
    """SHA-256 of the manifest without this field."""

    def compute_digest(self) -> str:
        """Return the digest that belongs to the other fields."""
        return hashlib.sha256(self.model_dump_json(exclude={"digest"}).encode()).hexdigest()


@dataclass(frozen=True)
class Checkpoint:
    """What a stage left behind."""

    name: str
    tensors: dict[str, Tensor]
    state: dict[str, Any]


@dataclass(frozen=True)
class Writer:
    """Who saves, and how much is kept."""

    run: str
    attempt: int
    keep: int
    interval_seconds: float
    threads: int
    elapsed_seconds: Callable[[], float]


class Checkpoints:
    """The checkpoints of one run in a storage."""

    def __init__(
        self, storage: Storage, fence: Fence, writer: Writer, *, identity: Mapping[str, str], progress: Progress
    ) -> None:
        self._storage = storage
        self._fence = fence
        self._writer = writer
        self._identity = dict(identity)
        self._progress = progress
        self._saved = time.monotonic()
        self._num_broken = self._num_failed = 0
        self._warnings: list[str] = []
        self._step = self._samples = 0
        self._refuse_other_settings()

    @property
    def warnings(self) -> tuple[str, ...]:
        """Return what was reported about the run, in this attempt and in those before."""
        return tuple(self._warnings)

    def warn(self, text: str) -> None:
        """Report something in the log and in the result."""
        if text not in self._warnings:
            logger.warning("%s", text)
            self._warnings.append(text)

    def is_due(self) -> bool:
        """Return whether the interval since the last checkpoint is over."""
        return time.monotonic() - self._saved >= self._writer.interval_seconds

    def confirm(self) -> None:
        """Raise PreemptedError if another trainer has taken over."""
        try:
            self._fence.confirm()
        except OSError as error:
            raise StorageError("CheckpointStoreUnavailable", f"the claim on the checkpoints cannot be read: {error}") from error

    def save(
        self,
        stage: str,
        *,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        step: int | None = None,
        samples: int | None = None,
    ) -> bool:
        """Save a checkpoint, then remove those that are no longer needed; return whether it is durable.

        Stages that take no steps leave the counts as they are.
        """
        step, samples = self._step if step is None else step, self._samples if samples is None else samples
        totals, begun = self._progress.totals, time.monotonic()
        contents = {
            TENSORS_FILE: safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}),
            STATE_FILE: json.dumps(dict(state)).encode(),
        }
        manifest = self._describe(stage, contents, step=step, samples=samples)
        self._saved = time.monotonic()
        try:
            self._fence.confirm()
            name = f"{PREFIX}{self._next_number():06d}-{stage}"
            files = {**contents, MANIFEST_FILE: manifest.model_dump_json().encode()}
            self._storage.write_folder(name, files, confirm=self._fence.confirm)
        except OSError as error:
            self._num_failed += 1
            totals.checkpoints_failed += 1
            self._progress.note(failed_checkpoints=self._num_failed)
            self.warn(f"a checkpoint could not be saved ({error.strerror or error}); earlier ones stay, and the training goes on")
            return False
        finally:
            totals.checkpoint_seconds += time.monotonic() - begun
        logger.info("saved %s", name)
        totals.checkpoints_saved += 1
        totals.checkpoint_bytes += sum(map(len, files.values()))
        self._announce(manifest)
        for name in self._list(stage)[self._writer.keep :]:
            self._remove(name)
        return True

    def note_progress(self) -> None:
        """Report that something was kept beside the checkpoints, before the first step."""
        self._progress.keep(CheckpointStatus(step=0, samples=0, time=datetime.now(UTC), attempt=self._writer.attempt))

    def load(self, stage: str) -> Checkpoint | None:
        """Return the newest checkpoint of a stage that verifies and has this identity; broken ones are set aside."""
        for name in self._list(stage, must=True):
            try:
                manifest = self._read_manifest(name)
                if find_differences(manifest.identity, self._identity):
                    continue
                contents = {file: self._read_verified(name, file, entry) for file, entry in manifest.files.items()}
                found = Checkpoint(name, safetensors.torch.load(contents[TENSORS_FILE]), json.loads(contents[STATE_FILE]))
            except (ValueError, KeyError, SafetensorError, FileNotFoundError) as error:
                self._set_aside(name, error)
            except OSError as error:
                self._pass_over(name, error)
            else:
                self._adopt(name, manifest)
                return found
        return None

    def clear(self) -> None:
        """Remove all checkpoints, once what they lead to is published."""
        for name in self._list_folders():
            if name.startswith((PREFIX, ASIDE)):
                self._remove(name)

    def _refuse_other_settings(self) -> None:
        """Say why the newest checkpoint is not resumed from, if it comes from other settings."""
        for name in self._list(must=True):
            try:
                manifest = self._read_manifest(name)
            except (ValueError, OSError):
                continue
            if differences := find_differences(manifest.identity, self._identity):
                self.warn(f"not resuming from {name}: {'; '.join(differences)}")
            return

    def _describe(self, stage: str, contents: Mapping[str, bytes], *, step: int, samples: int) -> Manifest:
        manifest = Manifest(
            stage=stage,
            run=self._writer.run,
            attempt=self._writer.attempt,
            identity=self._identity,
            step=step,
            samples=samples,
            time=datetime.now(UTC),
            elapsed_seconds=self._writer.elapsed_seconds(),
            threads=self._writer.threads,
            warnings=self.warnings,
            files={
                name: FileEntry(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
                for name, content in contents.items()
            },
        )
        return manifest.model_copy(update={"digest": manifest.compute_digest()})

    def _announce(self, manifest: Manifest) -> None:
        self._step, self._samples = manifest.step, manifest.samples
        self._progress.keep(
            CheckpointStatus(step=manifest.step, samples=manifest.samples, time=manifest.time, attempt=manifest.attempt)
        )

    def _adopt(self, name: str, manifest: Manifest) -> None:
        logger.info("going on from %s", name)
        if manifest.run == self._writer.run:
            self._warnings.extend(text for text in manifest.warnings if text not in self._warnings)
        self._announce(manifest)

    def _list(self, stage: str | None = None, *, must: bool = False) -> list[str]:
        """Return the checkpoints of a stage, or of all, the newest first."""
        names = [name for name in self._list_folders(must=must) if name.startswith(PREFIX)]
        return sorted((name for name in names if stage is None or _read_stage(name) == stage), key=_read_number, reverse=True)

    def _list_folders(self, *, must: bool = False) -> list[str]:
        """Return the folders; only who wants to read one must know of them, who tidies up need not."""
        try:
            return self._storage.list_folders()
        except OSError as error:
            if must:
                raise StorageError("CheckpointStoreUnavailable", f"the checkpoints cannot be listed: {error}") from error
            logger.warning("the checkpoints cannot be listed: %s", error)
            return []

    def _next_number(self) -> int:
        return 1 + max(map(_read_number, self._storage.list_folders()), default=0)

    def _read_manifest(self, name: str) -> Manifest:
        return read_manifest(self._storage, name)

    def _read_verified(self, name: str, file: str, entry: FileEntry) -> bytes:
        content = self._storage.read(f"{name}/{file}")
        if len(content) != entry.bytes or hashlib.sha256(content).hexdigest() != entry.sha256:
            raise ValueError(f"{file} differs from the manifest")
        return content

    def _set_aside(self, name: str, error: Exception) -> None:
        """Give a broken checkpoint a name under which nobody looks for it, and report it."""
        self._num_broken += 1
        self._progress.note(broken_checkpoints=self._num_broken)
        self.warn(f"{name} is broken and was set aside as {ASIDE}{name}: {_describe(error)}")
        try:
            self._storage.rename_folder(name, f"{ASIDE}{name}")
        except OSError as trouble:
            logger.warning("%s could not be renamed: %s", name, trouble)

    def _pass_over(self, name: str, error: OSError) -> None:
        if self._storage.is_remote:
            raise StorageError("CheckpointStoreUnavailable", f"{name} cannot be read: {error}") from error
        self._set_aside(name, error)

    def _remove(self, name: str) -> None:
        try:
            self._storage.remove_folder(name)
        except OSError as error:
            logger.warning("%s could not be removed: %s", name, error)


def read_manifest(storage: Storage, name: str) -> Manifest:
    """Return the manifest of a checkpoint; raise ValueError if it is not as it was written."""
    manifest = Manifest.model_validate_json(storage.read(f"{name}/{MANIFEST_FILE}"))
    if manifest.digest != manifest.compute_digest():
        raise ValueError(f"{MANIFEST_FILE} is not as it was written")
    return manifest


def read_elapsed_seconds(storage: Storage, *, run: str) -> float:
    """Return the time that earlier attempts of the run had used up when they last saved."""
    try:
        names = sorted(storage.list_folders(), key=_read_number, reverse=True)
    except OSError as error:
        raise StorageError("CheckpointStoreUnavailable", f"the checkpoints cannot be listed: {error}") from error
    for name in names:
        try:
            manifest = read_manifest(storage, name)
        except (ValueError, OSError):
            continue
        if manifest.run == run:
            return manifest.elapsed_seconds
    return 0.0


def _describe(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "a file is missing"
    return str(error).partition("\n")[0] or type(error).__name__


def _read_number(name: str) -> int:
    digits = name.removeprefix(ASIDE).removeprefix(PREFIX).partition("-")[0]
    return int(digits) if digits.isdigit() else 0


def _read_stage(name: str) -> str:
    return name.removeprefix(PREFIX).partition("-")[2]

"""Checkpoints: folders that are either whole and verified or ignored; one at the end of each stage.

A checkpoint holds tensors.safetensors, state.json and manifest.json with the SHA-256 of both, written last. It gets its name
by a rename after everything is on the disk.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from finetune_trainer.durable import sync_folder, write_file

logger = logging.getLogger(__name__)

_TENSORS, _STATE, _MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
_PREFIX = "checkpoint-"


@dataclass(frozen=True)
class Checkpoint:
    """What a stage left behind."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save_checkpoint(
    folder: Path, stage: str, *, identity: Mapping[str, str], tensors: Mapping[str, Tensor], state: Mapping[str, Any]
) -> None:
    """Write the checkpoint of a stage; `identity` says what it depends on and must match when it is read."""
    number = 1 + max((_read_number(path) for path in folder.glob(f"{_PREFIX}*")), default=0)
    temporary = folder / f".tmp-{number:06d}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    contents = {
        _TENSORS: safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}),
        _STATE: json.dumps(dict(state)).encode(),
    }
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    for name, content in contents.items():
        write_file(temporary / name, content)
    manifest = {"stage": stage, "identity": dict(identity), "sha256": digests}
    write_file(temporary / _MANIFEST, json.dumps(manifest).encode())
    temporary.rename(folder / f"{_PREFIX}{number:06d}-{stage}")
    sync_folder(folder)


def load_checkpoint(folder: Path, stage: str, *, identity: Mapping[str, str]) -> Checkpoint | None:
    """Return the newest valid checkpoint of a stage with this identity; broken ones are skipped with a warning."""
    for path in sorted(folder.glob(f"{_PREFIX}*-{stage}"), key=_read_number, reverse=True):
        try:
            manifest = json.loads((path / _MANIFEST).read_bytes())
            if manifest["identity"] != dict(identity):
                logger.info("not using %s: it belongs to other data, settings or weights", path)
                continue
            contents = {name: (path / name).read_bytes() for name in (_TENSORS, _STATE)}
            broken = [
                name for name, content in contents.items() if hashlib.sha256(content).hexdigest() != manifest["sha256"][name]
            ]
            if broken:
                raise ValueError(f"{', '.join(broken)} differ from the manifest")
            return Checkpoint(safetensors.torch.load(contents[_TENSORS]), json.loads(contents[_STATE]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("skipping the broken checkpoint %s: %s", path, error)
    return None


def remove_checkpoints(folder: Path) -> None:
    """Remove all checkpoints, once what they lead to is published."""
    for path in (*folder.glob(f"{_PREFIX}*"), *folder.glob(".tmp-*")):
        shutil.rmtree(path, ignore_errors=True)


def _read_number(path: Path) -> int:
    digits = path.name.removeprefix(_PREFIX).partition("-")[0]
    return int(digits) if digits.isdigit() else 0

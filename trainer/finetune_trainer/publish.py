"""Publish the model: weights, configuration, metrics, card and manifest appear together, and COMPLETE is written last."""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from finetune_api.v1alpha1 import OutputStatus, Result

from finetune_trainer.backbone import CONFIG_FILE, WEIGHTS_FILE
from finetune_trainer.durable import sync_folder, write_file
from finetune_trainer.learner import Weights

METRICS_FILE = "metrics.json"
SPLITS_FILE = "splits.csv"
CARD_FILE = "README.md"
MANIFEST_FILE = "manifest.json"
COMPLETE_FILE = "COMPLETE"


@dataclass(frozen=True)
class Artefact:
    """All that is published."""

    weights: Weights
    config: dict[str, Any]
    metrics: dict[str, Any]
    splits: str
    """Which picture served for what: the table that data sets of format csv have."""
    card: str
    provenance: dict[str, Any]
    """Goes into the manifest: the run, hashes of data and model, versions."""


@dataclass(frozen=True)
class Published:
    """A complete artefact in a folder."""

    output: OutputStatus
    result: Result


def publish(folder: Path, artefact: Artefact, *, uri: str) -> OutputStatus:
    """Write the artefact into `folder`, replacing an earlier one, so that COMPLETE never stands beside a mixture."""
    contents = _render(artefact)
    staging = folder / ".staging"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    for name, content in contents.items():
        write_file(staging / name, content)
    (folder / COMPLETE_FILE).unlink(missing_ok=True)
    sync_folder(folder)
    for name in contents:
        (staging / name).replace(folder / name)
    sync_folder(folder)
    staging.rmdir()
    digest = _digest(contents[MANIFEST_FILE])
    write_file(folder / COMPLETE_FILE, f"{digest}\n".encode())
    return OutputStatus(uri=uri, digest=digest, bytes=sum(map(len, contents.values())))


def read_published(folder: Path, *, run: str, uri: str) -> Published | None:
    """Return the complete artefact of this run in `folder`, or None."""
    try:
        manifest_bytes = (folder / MANIFEST_FILE).read_bytes()
        complete = (folder / COMPLETE_FILE).read_text().strip()
        manifest = json.loads(manifest_bytes)
        if complete != _digest(manifest_bytes) or manifest["run"] != run:
            return None
        if any((folder / name).stat().st_size != entry["bytes"] for name, entry in manifest["files"].items()):
            return None
        metrics = json.loads((folder / METRICS_FILE).read_text())
        size = len(manifest_bytes) + sum(entry["bytes"] for entry in manifest["files"].values())
        return Published(OutputStatus(uri=uri, digest=complete, bytes=size), Result.model_validate(metrics["result"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _render(artefact: Artefact) -> dict[str, bytes]:
    """Return the files by name, the manifest last."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in artefact.weights.items()}
    contents = {
        WEIGHTS_FILE: safetensors.torch.save(weights, metadata={"format": "pt"}),
        CONFIG_FILE: _to_json(artefact.config),
        METRICS_FILE: _to_json(artefact.metrics),
        SPLITS_FILE: artefact.splits.encode(),
        CARD_FILE: artefact.card.encode(),
    }
    files = {name: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)} for name, content in contents.items()}
    return {**contents, MANIFEST_FILE: _to_json({**artefact.provenance, "files": files})}


def _to_json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _digest(manifest: bytes) -> str:
    return f"sha256:{hashlib.sha256(manifest).hexdigest()}"

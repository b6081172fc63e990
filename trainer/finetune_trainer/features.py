"""Features of the frozen backbone, computed once per picture and kept on disk.

The cache is a folder per backbone and preprocessing with shards that are only ever added; a shard holds the SHA-256 of the
pictures' contents beside their features, so renamed or re-split data is found again.
"""

import errno
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from finetune_trainer.backbone import Backbone
from finetune_trainer.device import Device
from finetune_trainer.distributed import Group
from finetune_trainer.durable import write_file
from finetune_trainer.errors import PreemptedError
from finetune_trainer.memory import MicroBatches

logger = logging.getLogger(__name__)

BATCH_SIZE = 32
PICTURES_PER_SHARD = 2048


@dataclass(frozen=True)
class Features:
    """The features of some pictures, in the order they were asked for."""

    f_ND: Tensor
    num_cached: int
    compute_seconds: float
    num_computed: int


def compute_features(
    backbone: Backbone,
    pixels_NHWC: Tensor,
    index_N: Tensor,
    digests: Sequence[str],
    *,
    device: Device,
    cache: Path,
    check: Callable[[], None],
    advance: Callable[[float], None],
    interval_seconds: float = math.inf,
    memory: MicroBatches | None = None,
    kept: Callable[[], None] = lambda: None,
) -> Features:
    """Return the features of the pictures at `index_N`, whose contents have these digests; what is not cached is computed.

    What was computed goes into the cache at least every `interval_seconds`, which `kept` is told.
    """
    folder = cache / compute_key(backbone, device=device)
    memory = memory or MicroBatches()
    known = _read_cache(folder, memory.group)
    num_cached = sum(digest in known for digest in digests)
    missing = {digest: int(index) for digest, index in zip(digests, index_N, strict=True) if digest not in known}
    started = written = time.perf_counter()

    def extract(index_b: Tensor) -> Tensor:
        pixels_bHWC = pixels_NHWC[index_b.to(pixels_NHWC.device)].to(device.name)
        with torch.no_grad(), device.autocast():
            x_bCHW = backbone.architecture.preprocessing.normalise(pixels_bHWC.permute(0, 3, 1, 2))
            return backbone.extract(x_bCHW).float().cpu()

    fresh: dict[str, Tensor] = {}
    try:
        for names in _batched(list(missing), BATCH_SIZE * memory.group.size):
            check()
            index_B = torch.tensor([missing[name] for name in names])
            fresh |= zip(names, memory.map(extract, index_B, share=BATCH_SIZE), strict=True)
            advance(len(known.keys() | fresh.keys()) / max(1, len(set(digests))))
            if len(fresh) >= PICTURES_PER_SHARD or time.perf_counter() - written >= interval_seconds:
                known |= _write_shard(folder, fresh, memory)
                fresh, written = {}, time.perf_counter()
                kept()
    except PreemptedError:
        _write_shard(folder, fresh, memory)
        kept()
        raise
    compute_seconds = time.perf_counter() - started
    known |= _write_shard(folder, fresh, memory)
    f_ND = torch.stack([known[digest] for digest in digests])
    return Features(f_ND, num_cached, compute_seconds, len(missing))


def compute_key(backbone: Backbone, *, device: Device) -> str:
    """Return the name of the cache: a hash over all that a feature depends on besides the picture."""
    identity = {
        **backbone.architecture.describe(),
        "weights": backbone.digest,
        "precision": device.precision,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _batched(names: Sequence[str], size: int) -> list[Sequence[str]]:
    return [names[start : start + size] for start in range(0, len(names), size)]


def _read_cache(folder: Path, group: Group) -> dict[str, Tensor]:
    """Return what rank 0 finds in the cache, so that all processes compute the same rest."""
    known = _read_shards(folder) if group.is_main else {}
    return known if group.size == 1 else _unpack(group.broadcast_tensors(_pack(known)))


def _read_shards(folder: Path) -> dict[str, Tensor]:
    known: dict[str, Tensor] = {}
    for path in sorted(folder.glob("[!.]*.safetensors")):
        try:
            known |= _unpack(safetensors.torch.load_file(path))
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            logger.warning("skipping the features in %s: %s", path, error)
    return known


def _write_shard(folder: Path, features: dict[str, Tensor], memory: MicroBatches) -> dict[str, Tensor]:
    """Add the features to the cache and return them; a full disk only means that a restart computes them again."""
    if not features or not memory.group.is_main:
        return features
    content = safetensors.torch.save(_pack(features))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / f"{hashlib.sha256(content).hexdigest()[:16]}.safetensors", content)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        memory.report(f"features could not be kept on disk ({error.strerror}); a restart would compute them again")
    return features


def _pack(features: dict[str, Tensor]) -> dict[str, Tensor]:
    rows = [np.frombuffer(bytes.fromhex(digest), dtype=np.uint8) for digest in features]
    return {"digests": torch.from_numpy(np.stack(rows)), "features": torch.stack(list(features.values()))} if features else {}


def _unpack(shard: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not shard:
        return {}
    names = [bytes(row).hex() for row in shard["digests"].numpy()]
    return dict(zip(names, shard["features"], strict=True))

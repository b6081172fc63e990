"""Read pictures once: hash, decode, and resize each into one array of 8-bit RGB that all later stages share."""

import hashlib
import io
import struct
import tempfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from finetune_trainer.data import Listing

# A larger array goes to a file that the kernel can page out, so that the memory of a pod does not bound the data.
LARGEST_ARRAY_BYTES = 1 << 30
# What Pillow's decoders raise on broken files.
DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, OverflowError, struct.error, zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip
_WHITE = (255, 255, 255, 255)
# X-ray detectors store 12 bits in 16-bit files; scaled by 65535 those pictures would be black.
_GREY_DEPTHS = (255, 4095, 65535)


@dataclass(frozen=True)
class Pictures:
    """The pictures of a listing, in its order."""

    pixels_NHWC: NDArray[np.uint8]
    digests: tuple[str | None, ...]
    """SHA-256 of each file's content; None if it cannot be read."""
    faults: dict[int, str]
    """Why the pictures at these positions cannot be used."""


def load_pictures(
    listing: Listing,
    *,
    image_size: int,
    num_threads: int,
    scratch: Path,
    check: Callable[[], None],
    advance: Callable[[float], None],
) -> Pictures:
    """Return all pictures as squares of `image_size` pixels; those that cannot be read stay black and are listed."""
    paths = [listing.folder / example.path for example in listing.examples]
    pixels_NHWC = _allocate((len(paths), image_size, image_size, 3), scratch)
    digests: list[str | None] = [None] * len(paths)
    faults: dict[int, str] = {}

    def load(index: int) -> None:
        try:
            content = paths[index].read_bytes()
            digests[index] = hashlib.sha256(content).hexdigest()
            pixels_NHWC[index] = decode_picture(content, image_size=image_size)
        except DECODE_ERRORS as error:
            faults[index] = _describe_fault(error)

    with ThreadPoolExecutor(num_threads) as threads:
        for start in range(0, len(paths), 64):
            check()
            list(threads.map(load, range(start, min(start + 64, len(paths)))))
            advance(min(1.0, (start + 64) / len(paths)))
    return Pictures(pixels_NHWC, tuple(digests), dict(sorted(faults.items())))


def decode_picture(content: bytes, *, image_size: int) -> NDArray[np.uint8]:
    """Return the encoded picture as a square of 8-bit RGB: upright, on white where transparent, squeezed to fit."""
    with Image.open(io.BytesIO(content)) as picture:
        # A JPEG is decoded at a fraction of its size when that is still twice what is needed.
        picture.draft(None, (2 * image_size, 2 * image_size))
        upright = ImageOps.exif_transpose(picture)
    square = convert_to_rgb(upright).resize((image_size, image_size), Image.Resampling.BICUBIC, reducing_gap=3.0)
    return np.asarray(square)


def convert_to_rgb(picture: Image.Image) -> Image.Image:
    """Return the picture in RGB, whatever its mode: transparency becomes white, deep grey is scaled to 8 bits."""
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        return _scale_grey(picture).convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        opaque = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", opaque.size, _WHITE), opaque).convert("RGB")
    return picture.convert("RGB")


def _scale_grey(picture: Image.Image) -> Image.Image:
    grey = np.nan_to_num(np.asarray(picture, dtype=np.float64))
    peak = float(grey.max(initial=0.0))
    if picture.mode == "F":
        # Floating point pictures are stored from 0 to 1, or to the depth of what they were made from.
        depth = next((depth for depth in (1.0, *_GREY_DEPTHS) if peak <= depth), peak)
    else:
        depth = next((depth for depth in _GREY_DEPTHS[1:] if peak <= depth), peak)
    return Image.fromarray(np.clip(np.rint(grey * (255.0 / depth)), 0, 255).astype(np.uint8))


def _allocate(shape: Sequence[int], scratch: Path) -> NDArray[np.uint8]:
    if np.prod(shape, dtype=np.int64) <= LARGEST_ARRAY_BYTES:
        return np.zeros(shape, dtype=np.uint8)
    # The file has no name, so nothing is left behind whatever becomes of the process.
    with tempfile.TemporaryFile(dir=scratch) as file:
        return np.memmap(file, dtype=np.uint8, mode="w+", shape=tuple(shape))


def _describe_fault(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    # Pillow names the in-memory buffer, which tells a reader nothing.
    return "not a picture" if isinstance(error, UnidentifiedImageError) else str(error) or type(error).__name__

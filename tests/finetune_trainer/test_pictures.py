import io
from typing import Any

import numpy as np
import pytest
from finetune_trainer.pictures import decode_picture
from PIL import Image

RED, WHITE = (255, 0, 0), (255, 255, 255)


def encode(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def deep_grey(value: int, mode: str = "I;16") -> Image.Image:
    dtype = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
    return Image.fromarray(np.full((16, 16), value, dtype=dtype))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param(encode(Image.new("RGB", (16, 16), RED)), RED, id="RGB"),
        pytest.param(encode(Image.new("RGBA", (16, 16), (255, 0, 0, 0))), WHITE, id="transparent"),
        pytest.param(encode(Image.new("RGBA", (16, 16), (255, 0, 0, 255))), RED, id="opaque"),
        pytest.param(encode(Image.new("RGBA", (16, 16), (0, 0, 0, 128))), (127, 127, 127), id="half transparent"),
        pytest.param(encode(Image.new("LA", (16, 16), (0, 0))), WHITE, id="transparent grey"),
        pytest.param(encode(Image.new("P", (16, 16), 0), transparency=0), WHITE, id="transparent palette"),
        pytest.param(encode(Image.new("RGB", (16, 16), RED), transparency=RED), WHITE, id="transparent colour"),
        pytest.param(encode(Image.new("L", (16, 16), 77)), (77, 77, 77), id="grey"),
        pytest.param(encode(Image.new("1", (16, 16), 1)), WHITE, id="black and white"),
        pytest.param(encode(deep_grey(65535)), WHITE, id="16-bit grey"),
        pytest.param(encode(deep_grey(32768)), (128, 128, 128), id="16-bit grey, half"),
        pytest.param(encode(deep_grey(2048)), (128, 128, 128), id="12 bits in 16"),
        pytest.param(encode(deep_grey(32768, "I"), "TIFF"), (128, 128, 128), id="32-bit integers"),
        pytest.param(encode(deep_grey(1, "F"), "TIFF"), WHITE, id="floating point"),
        pytest.param(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "TIFF"), RED, id="CMYK"),
        pytest.param(encode(Image.new("RGB", (16, 16), RED), "GIF"), RED, id="GIF"),
        pytest.param(encode(Image.new("RGB", (16, 16), RED), "WEBP", lossless=True), RED, id="WebP"),
    ],
)
def test_every_mode_becomes_rgb(content: bytes, expected: tuple[int, int, int]) -> None:
    pixels = decode_picture(content, image_size=8)

    assert pixels.shape == (8, 8, 3)
    assert np.abs(pixels.astype(int) - expected).max() <= 2


def test_orientation_of_the_camera_is_applied() -> None:
    picture = Image.new("RGB", (40, 20), WHITE)
    picture.paste(RED, (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the left of the file is the top of the picture

    pixels = decode_picture(encode(picture, "JPEG", exif=exif, quality=95), image_size=8)

    assert pixels[0].mean(0) == pytest.approx(RED, abs=25)
    assert pixels[-1].mean(0) == pytest.approx(WHITE, abs=25)


def test_large_jpeg_is_decoded_alike() -> None:
    generator = np.random.default_rng(0)
    smooth = Image.fromarray(generator.integers(0, 255, (6, 6, 3), dtype=np.uint8)).resize((1024, 1024), Image.Resampling.BICUBIC)

    reduced = decode_picture(encode(smooth, "JPEG", quality=95), image_size=32)
    full = decode_picture(encode(smooth, "PNG"), image_size=32)

    assert np.abs(reduced.astype(int) - full).max() <= 8

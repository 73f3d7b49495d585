import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.data.decode import DecodeError, DecodeFault, decode_rgb


def encode(picture: Image.Image, kind: str, **options: Any) -> bytes:
    content = io.BytesIO()
    picture.save(content, kind, **options)
    return content.getvalue()


def pixel(content: bytes, at: tuple[int, int] = (2, 2)) -> tuple[int, ...]:
    picture = decode_rgb(content)
    assert picture.mode == "RGB"
    value = picture.getpixel(at)
    assert isinstance(value, tuple)
    return value


PALETTE = Image.new("P", (4, 4), 1)
PALETTE.putpalette([9, 9, 9, 10, 200, 30])
SIXTEEN = Image.fromarray(np.full((4, 4), 200 * 257, np.uint16))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (encode(Image.new("L", (4, 4), 77), "PNG"), (77, 77, 77)),
        (encode(Image.new("1", (4, 4), 1), "PNG"), (255, 255, 255)),
        (encode(PALETTE, "PNG"), (10, 200, 30)),
        (encode(PALETTE, "PNG", transparency=1), (255, 255, 255)),
        (encode(SIXTEEN, "PNG"), (200, 200, 200)),
        (encode(Image.new("RGBA", (4, 4), (255, 0, 0, 0)), "PNG"), (255, 255, 255)),
        (encode(Image.new("RGBA", (4, 4), (0, 0, 0, 128)), "PNG"), (127, 127, 127)),
        (encode(Image.new("LA", (4, 4), (0, 255)), "PNG"), (0, 0, 0)),
        (encode(Image.new("RGB", (4, 4), (1, 2, 3)), "PNG", transparency=(1, 2, 3)), (255, 255, 255)),
        (encode(Image.new("RGBA", (4, 4), (0, 0, 255, 255)), "WEBP", lossless=True), (0, 0, 255)),
    ],
    ids=["grey", "one-bit", "palette", "palette-transparent", "16-bit", "clear", "half", "grey-alpha", "key", "webp"],
)
def test_odd_pictures_become_the_rgb_they_show(content: bytes, expected: tuple[int, int, int]):
    assert pixel(content) == expected


def test_cmyk_becomes_rgb():
    content = encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG")
    red, green, blue = pixel(content)
    assert red > 200
    assert green < 60
    assert blue < 60


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_taken(kind: str):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    content = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    red, _, blue = pixel(content)
    assert (red > 240, blue < 15) == (True, True)


def test_a_picture_is_turned_upright_as_its_exif_says():
    picture = Image.new("RGB", (20, 10), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_rgb(encode(picture, "JPEG", exif=exif)).size == (10, 20)


RED = encode(Image.new("RGB", (64, 64), "red"), "PNG")


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", DecodeFault.EMPTY_IMAGE),
        (b"<html>404</html>", DecodeFault.NOT_AN_IMAGE),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", DecodeFault.NOT_AN_IMAGE),
        (RED[: len(RED) // 2], DecodeFault.BROKEN_IMAGE),
        (encode(Image.effect_noise((64, 64), 50), "JPEG")[:900], DecodeFault.BROKEN_IMAGE),
        (encode(Image.new("1", (9000, 9000)), "PNG"), DecodeFault.TOO_MANY_PIXELS),
        (encode(Image.new("1", (20000, 20000)), "PNG"), DecodeFault.TOO_MANY_PIXELS),
    ],
    ids=["empty", "html", "eps", "cut-png", "cut-jpeg", "large", "bomb"],
)
def test_what_is_no_usable_picture_is_refused_with_a_reason(content: bytes, fault: DecodeFault):
    with pytest.raises(DecodeError) as error:
        decode_rgb(content)
    assert error.value.fault is fault

import io
import struct
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.data.decode import DecodeError, DecodeFault, decode_rgb, readable_formats
from pipeline.data.square import central_square


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


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
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


# --- orientation -----------------------------------------------------------------------------------------------------

UPRIGHT = Image.new("RGB", (64, 32))
UPRIGHT.paste((255, 0, 0), (0, 0, 32, 16))
UPRIGHT.paste((0, 255, 0), (32, 0, 64, 16))
UPRIGHT.paste((0, 0, 255), (0, 16, 32, 32))
"""Another colour in each quarter, and no square: each of the eight orientations looks different."""

STORED = {
    1: UPRIGHT,
    2: UPRIGHT.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    3: UPRIGHT.transpose(Image.Transpose.ROTATE_180),
    4: UPRIGHT.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
    5: UPRIGHT.transpose(Image.Transpose.TRANSPOSE),
    6: UPRIGHT.transpose(Image.Transpose.ROTATE_90),
    7: UPRIGHT.transpose(Image.Transpose.TRANSVERSE),
    8: UPRIGHT.transpose(Image.Transpose.ROTATE_270),
}
"""The pixels that a camera stores under each orientation of one and the same scene."""


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def xmp_of(orientation: int) -> bytes:
    return (
        b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="%d"/></rdf:RDF></x:xmpmeta>'
        % orientation
    )


def segment(marker: int, content: bytes) -> bytes:
    return b"\xff" + bytes([marker]) + (len(content) + 2).to_bytes(2, "big") + content


def behind(bytes_before: int, jpeg: bytes) -> bytes:
    """The JPEG with APP2 segments of so many bytes before all others."""
    rest, before = bytes_before, b""
    while rest > 0:
        before += segment(0xE2, b"\0" * min(rest, 60_000))
        rest -= 60_000
    return jpeg[:2] + before + jpeg[2:]


def before_the_scan(jpeg: bytes, added: bytes) -> bytes:
    """The JPEG with a segment behind its tables and its frame header."""
    scan = jpeg.index(b"\xff\xda")
    return jpeg[:scan] + added + jpeg[scan:]


def turned(way: str, orientation: int) -> bytes:
    """A file whose pixels are stored as the orientation says, which is stated in one way or another."""
    stored, exif, xmp = STORED[orientation], exif_of(orientation), xmp_of(orientation)
    options: dict[str, Any] = {"quality": 100}
    if way == "JPEG":
        return encode(stored, "JPEG", exif=exif, **options)
    if way == "JPEG, EXIF behind 200 kB":
        return behind(200_000, encode(stored, "JPEG", exif=exif, **options))
    if way == "JPEG, EXIF last":
        return before_the_scan(encode(stored, "JPEG", **options), segment(0xE1, exif.tobytes()))
    if way == "JPEG, XMP alone":
        return encode(stored, "JPEG", xmp=xmp, **options)
    if way == "JPEG, XMP behind 200 kB":
        return behind(200_000, encode(stored, "JPEG", xmp=xmp, **options))
    if way == "JPEG, EXIF and XMP":
        return encode(stored, "JPEG", exif=exif, xmp=xmp, **options)
    if way == "PNG":
        return encode(stored, "PNG", exif=exif)
    if way == "WEBP":
        return encode(stored, "WEBP", exif=exif, lossless=True)
    if way == "WEBP, XMP alone":
        return encode(stored, "WEBP", xmp=xmp, lossless=True)
    if way == "TIFF":
        return encode(stored, "TIFF", exif=exif)
    if way == "TIFF, compressed":
        return encode(stored, "TIFF", exif=exif, compression="tiff_adobe_deflate")
    if way == "TIFF, pages":
        return encode(stored, "TIFF", exif=exif, save_all=True, append_images=[Image.new("RGB", (8, 8))])
    if way == "TIFF, TIFF and XMP":
        return encode(stored, "TIFF", tiffinfo={0x0112: orientation, 700: xmp})
    if way == "AVIF":
        return encode(stored, "AVIF", exif=exif, quality=100)
    assert way == "AVIF, AVIF and XMP"
    return encode(stored, "AVIF", exif=exif, xmp=xmp, quality=100)


WAYS = (
    "JPEG",
    "JPEG, EXIF behind 200 kB",
    "JPEG, EXIF last",
    "JPEG, XMP alone",
    "JPEG, XMP behind 200 kB",
    "JPEG, EXIF and XMP",
    "PNG",
    "WEBP",
    "WEBP, XMP alone",
    "TIFF",
    "TIFF, compressed",
    "TIFF, pages",
    "TIFF, TIFF and XMP",
    "AVIF",
    "AVIF, AVIF and XMP",
)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("way", WAYS)
def test_a_picture_is_turned_upright_once_wherever_its_orientation_stands(way: str, orientation: int):
    assert way.partition(",")[0] in readable_formats()
    content = turned(way, orientation)
    assert decode_rgb(content).size == UPRIGHT.size
    difference = np.asarray(decode_rgb(content)).astype(int) - np.asarray(UPRIGHT)
    assert abs(difference).mean() < 10
    square = central_square(content, 32).astype(int) - central_square(encode(UPRIGHT, "PNG"), 32)
    assert abs(square).mean() < 10


# --- TIFF, AVIF ------------------------------------------------------------------------------------------------------


def grey(value: float, kind: type[np.generic]) -> bytes:
    return encode(Image.fromarray(np.full((4, 4), value, kind)), "TIFF")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (encode(Image.new("RGB", (4, 4), (9, 100, 200)), "TIFF", compression="tiff_lzw"), (9, 100, 200)),
        (encode(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF"), (255, 0, 0)),
        (encode(Image.new("RGBA", (4, 4), (255, 0, 0, 0)), "TIFF"), (255, 255, 255)),
        (encode(Image.new("1", (4, 4), 1), "TIFF", compression="group4"), (255, 255, 255)),
        (grey(200 * 257, np.uint16), (200, 200, 200)),
        (encode(SIXTEEN, "TIFF", tiffinfo={262: 0}), (55, 55, 55)),
        (grey(200, np.int32), (200, 200, 200)),
        (grey(200 * 257, np.int32), (200, 200, 200)),
        (grey(0.5, np.float32), (128, 128, 128)),
        (grey(1.02, np.float32), (255, 255, 255)),
        (grey(200.0, np.float32), (200, 200, 200)),
        (grey(-0.1, np.float32), (0, 0, 0)),
        (grey(float("nan"), np.float32), (0, 0, 0)),
    ],
    ids=[
        "lzw",
        "CMYK",
        "clear",
        "fax",
        "16-bit",
        "16-bit, white is zero",
        "32-bit of 8",
        "32-bit of 16",
        "fraction",
        "a little above white",
        "float of 8 bits",
        "below black",
        "no number",
    ],
)
def test_odd_tiffs_become_the_rgb_they_show(content: bytes, expected: tuple[int, int, int]):
    assert pixel(content) == expected


def by_hand(value: int, sample_format: int) -> bytes:
    """A grey TIFF of 32 bits and 4 x 4 pixels, which Pillow writes signed alone."""
    pixels = value.to_bytes(4, "little", signed=value < 0) * 16
    tags = {256: 4, 257: 4, 258: 32, 259: 1, 262: 1, 273: 8, 277: 1, 278: 4, 279: len(pixels), 339: sample_format}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, content) for tag, content in tags.items())
    header = struct.pack("<2sHI", b"II", 42, 8 + len(pixels))
    return header + pixels + struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)


def test_whole_numbers_of_32_bits_are_read_with_the_sign_that_the_file_gives_them():
    assert pixel(by_hand(3_000_000_000, 1)) == (178, 178, 178)
    assert pixel(by_hand(-5, 2)) == (0, 0, 0)


def test_one_infinite_pixel_leaves_the_others_as_bright_as_they_are():
    values = np.full((4, 4), 0.5, np.float32)
    values[0] = np.inf, -np.inf, np.nan, 1.0
    content = encode(Image.fromarray(values), "TIFF")
    assert [pixel(content, (x, 0))[0] for x in range(4)] == [255, 0, 0, 255]
    assert pixel(content) == (128, 128, 128)


@pytest.mark.skipif("AVIF" not in readable_formats(), reason="this build of Pillow cannot")
def test_an_avif_is_read_and_a_broken_one_named():
    content = encode(Image.effect_noise((64, 64), 50).convert("RGB"), "AVIF")
    assert decode_rgb(content).size == (64, 64)
    assert pixel(encode(Image.new("RGBA", (16, 16), (0, 0, 0, 128)), "AVIF", quality=100))[0] in range(124, 131)
    for kept, fault in ((300, DecodeFault.NOT_AN_IMAGE), (len(content) - 20, DecodeFault.BROKEN_IMAGE)):
        with pytest.raises(DecodeError) as error:
            decode_rgb(content[:kept])
        assert error.value.fault is fault


def test_a_pillow_without_a_plugin_or_its_codec_reads_the_other_formats(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "PIL.AvifImagePlugin", None)
    monkeypatch.setattr("PIL.WebPImagePlugin.SUPPORTED", False)
    readable_formats.cache_clear()
    try:
        assert readable_formats() == ("JPEG", "PNG", "GIF", "BMP", "TIFF")
        assert pixel(RED) == (255, 0, 0)
    finally:
        readable_formats.cache_clear()

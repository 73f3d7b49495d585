import io

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.decode import DecodeError, DecodeFault, decode_rgb
from pipeline.data.square import central_square, resized_square


def noise(width: int, height: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def photo(size: int) -> Image.Image:
    """A picture with the spectrum of photographs: amplitudes fall as 1/f."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size)[None]) + 1 / size
    waves = np.fft.ifft2(np.fft.fft2(rng.standard_normal((3, size, size))) / frequency).real
    low, high = waves.min(), waves.max()
    return Image.fromarray(((waves - low) / (high - low) * 255).astype(np.uint8).transpose(1, 2, 0))


def encode(picture: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    content = io.BytesIO()
    picture.save(content, kind, **options)
    return content.getvalue()


def by_pillow(content: bytes, size: int) -> NDArray[np.uint8]:
    """The central square of the whole decoded picture, reduced by Pillow."""
    picture = decode_rgb(content)
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    cropped = picture.crop((left, top, left + side, top + side))
    return np.asarray(cropped.resize((size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)


def psnr(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    return float(10 * np.log10(255**2 / np.mean((one.astype(float) - other) ** 2)))


@pytest.mark.parametrize("width_height", [(90, 30), (30, 90), (5, 8), (31, 64)])
def test_the_square_is_pillow_s_of_the_centre(width_height: tuple[int, int]):
    pixels = noise(*width_height)
    result = resized_square(pixels, 10)
    assert result.shape == (3, 10, 10)
    assert result.dtype == np.uint8
    expected = by_pillow(encode(Image.fromarray(pixels), "PNG"), 10)
    assert abs(result.astype(int) - expected).max() <= 1


def test_reducing_averages_and_does_not_alias():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    result = resized_square(stripes, 16)[:, 2:-2, 2:-2]
    assert abs(result.astype(int) - 127).max() <= 3


def test_a_picture_of_the_right_size_is_not_touched():
    pixels = noise(16, 16)
    np.testing.assert_array_equal(resized_square(pixels, 16), pixels.transpose(2, 0, 1))


def test_a_picture_of_one_by_five_thousand_is_cropped_first():
    assert central_square(encode(Image.new("RGB", (1, 5000), "red")), 64).shape == (3, 64, 64)


@pytest.mark.parametrize(("size", "target"), [(256, 224), (256, 64), (512, 224), (512, 64), (700, 64)])
def test_decoding_at_a_smaller_scale_is_within_40_decibels_of_a_whole_decode(size: int, target: int):
    content = encode(photo(size), quality=90)
    assert psnr(central_square(content, target), by_pillow(content, target)) > 40


@pytest.mark.parametrize(
    "content",
    [
        encode(photo(64).convert("L")),
        encode(photo(64).convert("CMYK")),
        encode(photo(64), keep_rgb=True),
        encode(photo(64), progressive=True),
        encode(photo(64), subsampling=0),
        encode(photo(64), "PNG"),
        encode(photo(64), "WEBP", lossless=True),
    ],
    ids=["grey", "CMYK", "RGB", "progressive", "4:4:4", "png", "webp"],
)
def test_every_kind_of_picture_is_as_pillow_sees_it(content: bytes):
    assert abs(central_square(content, 64).astype(int) - by_pillow(content, 64)).max() <= 4


def test_a_jpeg_is_turned_upright_as_its_exif_says():
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encode(photo(64), exif=exif)
    assert abs(central_square(content, 64).astype(int) - by_pillow(content, 64)).max() <= 4


def test_a_jpeg_without_an_orientation_is_read_the_quick_way_whatever_its_segments_hold(
    monkeypatch: pytest.MonkeyPatch,
):
    def refuse(image: bytes) -> Image.Image:
        raise AssertionError(f"{len(image)} bytes were given to Pillow")

    monkeypatch.setattr("pipeline.data.square.decode_rgb", refuse)
    profile = b"Exif\0\0" * 20_000
    xmp = b"<x:xmpmeta><dc:title>Exif</dc:title></x:xmpmeta>"
    assert central_square(encode(photo(64), icc_profile=profile, xmp=xmp, comment=b"tiff:Orientation"), 64).any()


@pytest.mark.parametrize("odd", [b"\xff", b"\0\0", b"\xff\0"], ids=["fill byte", "junk", "escaped byte"])
def test_an_orientation_behind_bytes_that_are_no_segment_is_found(odd: bytes):
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encode(photo(64), exif=exif)
    first = 4 + content[5]  # the end of the first segment, which is a short one
    result = central_square(content[:first] + odd + content[first:], 64)
    assert abs(result.astype(int) - by_pillow(content, 64)).max() <= 4


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (encode(photo(64))[:900], DecodeFault.BROKEN_IMAGE),
        (encode(photo(64))[:100], DecodeFault.NOT_AN_IMAGE),
        (encode(Image.new("L", (9000, 9000))), DecodeFault.TOO_MANY_PIXELS),
        (b"\xff\xd8\xff", DecodeFault.NOT_AN_IMAGE),
    ],
    ids=["cut", "cut in the header", "large", "nothing but a start"],
)
def test_a_jpeg_that_cannot_be_used_is_refused_with_a_reason(content: bytes, fault: DecodeFault):
    with pytest.raises(DecodeError) as error:
        central_square(content, 64)
    assert error.value.fault is fault

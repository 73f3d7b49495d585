"""From the bytes of a picture to uint8 RGB; odd kinds of picture end as RGB or as a named fault. Imports no torch."""

import importlib
import io
from collections.abc import Mapping
from enum import StrEnum
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

MAX_PIXELS = 2**26
"""Pictures of more pixels (8192 x 8192) are taken for decompression bombs."""

_PLUGINS = {
    "JPEG": "JpegImagePlugin",
    "PNG": "PngImagePlugin",
    "WEBP": "WebPImagePlugin",
    "GIF": "GifImagePlugin",
    "BMP": "BmpImagePlugin",
    "AVIF": "AvifImagePlugin",
    "TIFF": "TiffImagePlugin",
}
"""Formats that Pillow decodes in its own process, by their plugins: some of the others start programs."""

_BRIGHTEST_FRACTION = 2.0
"""Floats up to this are fractions of white; resampling leaves some a little above 1. Greater ones count to 255."""

_WHITE_IS_ZERO = 0


class DecodeFault(StrEnum):
    """Why a sample cannot be used."""

    EMPTY_IMAGE = "empty_image"
    NOT_AN_IMAGE = "not_an_image"
    BROKEN_IMAGE = "broken_image"
    TOO_MANY_PIXELS = "too_many_pixels"
    EMPTY_CAPTION = "empty_caption"
    CAPTION_NOT_UTF8 = "caption_not_utf8"
    SHORT_READ = "short_read"
    MISSING_CAPTION = "missing_caption"
    CHANGED = "changed_since_indexed"


class DecodeError(Exception):
    """A sample that cannot be used, with its reason."""

    def __init__(self, fault: DecodeFault, detail: str = "") -> None:
        super().__init__(f"{fault}: {detail}" if detail else str(fault))
        self.fault = fault


def decode_rgb(image: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a picture to mode RGB: upright by its EXIF (or XMP) orientation, transparency on white, the first frame or
    page of several. Pictures of more than 8 bits become 8-bit ones of the same brightness.

    Raises:
        DecodeError: no picture, a broken one, or more than `max_pixels` pixels.
    """
    if not image:
        raise DecodeError(DecodeFault.EMPTY_IMAGE)
    try:
        picture = Image.open(io.BytesIO(image), formats=readable_formats())
    except Image.DecompressionBombError as error:
        raise DecodeError(DecodeFault.TOO_MANY_PIXELS, str(error)) from error
    except UnidentifiedImageError as error:  # its own words are of the object that held the bytes
        raise DecodeError(DecodeFault.NOT_AN_IMAGE) from error
    except Exception as error:
        raise DecodeError(DecodeFault.NOT_AN_IMAGE, str(error)) from error
    if picture.width * picture.height > max_pixels:
        raise DecodeError(
            DecodeFault.TOO_MANY_PIXELS, f"{picture.width} x {picture.height}, at most {max_pixels} pixels"
        )
    return rgb_of(picture)


def rgb_of(picture: Image.Image) -> Image.Image:
    """A picture of Pillow's as `decode_rgb` gives it. Raises `DecodeError` for a broken one, and one without pixels."""
    if not picture.width * picture.height:
        raise DecodeError(DecodeFault.EMPTY_IMAGE)
    try:
        tags = _tiff_tags(picture)
        picture.load()
        return _to_rgb(_upright(picture), tags)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever their parsers meet
        raise DecodeError(DecodeFault.BROKEN_IMAGE, str(error)) from error


@cache
def readable_formats() -> tuple[str, ...]:
    """What this build of Pillow reads of JPEG, PNG, WebP, GIF, BMP, AVIF and TIFF: not every one has every codec."""
    return tuple(name for name, plugin in _PLUGINS.items() if _is_readable(name, plugin))


def _is_readable(name: str, plugin: str) -> bool:
    try:
        module: Any = importlib.import_module(f"PIL.{plugin}")
    except ImportError:
        return False
    if hasattr(module, "DEFAULT_MAX_THREADS"):
        # AVIF's: one thread for each core costs more than it saves, and loaders decode in several processes as it is.
        module.DEFAULT_MAX_THREADS = 1
    return getattr(module, "SUPPORTED", True) and name in Image.OPEN


def _upright(picture: Image.Image) -> Image.Image:
    """The picture turned as its metadata say. Pillow's TIFF plugin has done so in `load`, and AVIF's decoder leaves it:
    both keep no orientation that was applied, so that nothing is turned twice.
    """
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # a broken EXIF block says nothing of the pixels
        return picture


def _tiff_tags(picture: Image.Image) -> Mapping[int, Any]:
    """What a TIFF says of its numbers; nothing of other formats."""
    if not isinstance(picture, TiffImagePlugin.TiffImageFile):
        return {}
    asked = (TiffImagePlugin.SAMPLEFORMAT, TiffImagePlugin.PHOTOMETRIC_INTERPRETATION)
    return {tag: picture.tag_v2[tag] for tag in asked if tag in picture.tag_v2}


def _to_rgb(picture: Image.Image, tiff_tags: Mapping[int, Any]) -> Image.Image:
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        return _from_wide(picture, tiff_tags)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        canvas = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        return Image.alpha_composite(canvas, picture).convert("RGB")
    return picture.convert("RGB")


def _from_wide(picture: Image.Image, tiff_tags: Mapping[int, Any]) -> Image.Image:
    """Grey of more than 8 bits, which Pillow's own conversion would clip at 255."""
    values = np.asarray(picture)
    if picture.mode == "F":
        brightness = _from_float(values)
    else:
        is_unsigned = tiff_tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,)) == (1,)
        # Mode `I` is signed in Pillow, whatever it read.
        brightness = _from_whole(values.view(np.uint32) if values.dtype == np.int32 and is_unsigned else values)
    if tiff_tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == _WHITE_IS_ZERO:
        brightness = 255 - brightness  # which Pillow does for 8 bits alone
    return Image.fromarray(brightness.round().clip(0, 255).astype(np.uint8), "L").convert("RGB")


def _from_float(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Floats as [0, 255]. What is no number is black, and does not tell how bright the others are."""
    greatest = values.max(initial=0, where=np.isfinite(values))
    return np.nan_to_num(values * np.float32(255 if greatest <= _BRIGHTEST_FRACTION else 1), nan=0.0)


def _from_whole(values: NDArray[np.integer]) -> NDArray[np.float32]:
    """Whole numbers as [0, 255]. Those of 32 bits do not say how many of them the file used: the greatest tells."""
    is_16_bit = values.dtype.itemsize == 2
    greatest = 2**16 - 1 if is_16_bit else int(values.max(initial=0))
    white = next(white for white in (2**8 - 1, 2**16 - 1, 2**32 - 1) if greatest <= white)
    return (values * (255 / white)).astype(np.float32)

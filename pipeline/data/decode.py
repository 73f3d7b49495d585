"""From the bytes of a picture to uint8 RGB; odd kinds of picture end as RGB or as a named fault. Imports no torch."""

import io
from enum import StrEnum

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 2**26
"""Pictures of more pixels (8192 x 8192) are taken for decompression bombs."""

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""Plugins that decode in Pillow's own code: some of the others start programs."""


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
    """Decode a picture to mode RGB: upright by its EXIF orientation, transparency on white, the first frame of several.

    Raises:
        DecodeError: no picture, a broken one, or more than `max_pixels` pixels.
    """
    if not image:
        raise DecodeError(DecodeFault.EMPTY_IMAGE)
    try:
        picture = Image.open(io.BytesIO(image), formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise DecodeError(DecodeFault.TOO_MANY_PIXELS, str(error)) from error
    except Exception as error:
        raise DecodeError(DecodeFault.NOT_AN_IMAGE, str(error)) from error
    if picture.width * picture.height > max_pixels:
        raise DecodeError(
            DecodeFault.TOO_MANY_PIXELS, f"{picture.width} x {picture.height}, at most {max_pixels} pixels"
        )
    try:
        picture.load()
        return _to_rgb(_upright(picture))
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever their parsers meet
        raise DecodeError(DecodeFault.BROKEN_IMAGE, str(error)) from error


def _upright(picture: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # a broken EXIF block says nothing of the pixels
        return picture


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        return _from_wide(picture)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        canvas = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        return Image.alpha_composite(canvas, picture).convert("RGB")
    return picture.convert("RGB")


def _from_wide(picture: Image.Image) -> Image.Image:
    """Grey of more than 8 bits, which Pillow's own conversion would clip at 255."""
    values = np.asarray(picture).astype(np.float32)
    if picture.mode.startswith("I;16") or values.max(initial=0) > 255:
        values = values / 257
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8), "L").convert("RGB")

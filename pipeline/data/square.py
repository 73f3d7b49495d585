"""From the bytes of a picture to its central square, uint8 [3, S, S]: what the loader spends its time on."""

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from pipeline.data.decode import MAX_PIXELS, decode_rgb

_OVERSAMPLING = 2
"""A JPEG is decoded at the smallest scale with this many times the pixels per side: 48 dB from a whole decode."""

_JPEG = b"\xff\xd8\xff"
_APP1 = 0xE1
_START_OF_SCAN = 0xDA
_WITHOUT_LENGTH = frozenset([0x00, 0x01, *range(0xD0, 0xDA), 0xFF])
"""Markers that no segment follows; before the scan none of them belongs into a JPEG."""

_EXIF = b"Exif\0"
_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_XMP_ORIENTATION = b"tiff:Orientation"
_PLAIN_COLOURS = ("YCbCr", "Gray")


def central_square(image: bytes, size: int) -> NDArray[np.uint8]:
    """Decode a picture and reduce or enlarge its central square, antialiased (bicubic), to uint8 [3, size, size].

    The crop comes first: a picture of 1 x 5000 never becomes one of 64 x 320,000.

    Raises:
        DecodeError: as `decode_rgb`.
    """
    pixels = _plain_jpeg(image, size)
    return resized_square(np.array(decode_rgb(image)) if pixels is None else pixels, size)


def resized_square(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """The central square of uint8 [H, W, 3] as uint8 [3, size, size]."""
    height, width, _ = pixels.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    cropped = torch.from_numpy(pixels[top : top + side, left : left + side]).permute(2, 0, 1)
    if side != size:
        # On uint8 with the channels last this is vectorised, and within one level of Pillow's.
        cropped = F.interpolate(cropped[None], (size, size), mode="bicubic", antialias=True)[0]
    return cropped.contiguous().numpy()


def _plain_jpeg(image: bytes, size: int) -> NDArray[np.uint8] | None:
    """The pixels of a whole JPEG without peculiarities, [H, W, 3]; None for what Pillow has to look at."""
    if not image.startswith(_JPEG) or _may_be_turned(image):
        return None
    least = _OVERSAMPLING * size
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(image)
        if colours not in _PLAIN_COLOURS or int(height) * int(width) > MAX_PIXELS:
            return None
        return simplejpeg.decode_jpeg(image, "RGB", min_height=least, min_width=least, min_factor=2)
    except ValueError:
        return None


def _may_be_turned(image: bytes) -> bool:
    """Whether a segment of a JPEG can state an orientation, or the segments cannot be followed up to the scan.

    Cameras write EXIF first; tools that add colour profiles or previews push it behind any number of bytes.
    """
    position = 2
    while position + 4 <= len(image):
        marker = image[position + 1]
        if image[position] != 0xFF or marker in _WITHOUT_LENGTH:
            return True
        if marker == _START_OF_SCAN:
            return False
        content, end = position + 4, position + 2 + (image[position + 2] << 8 | image[position + 3])
        if marker == _APP1 and (
            image.startswith(_EXIF, content)
            or (image.startswith(_XMP, content) and image.find(_XMP_ORIENTATION, content, end) >= 0)
        ):
            return True
        position = end
    return True

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
_EXIF = b"Exif\0"
_HEADER_BYTES = 2**16
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
    if not image.startswith(_JPEG) or _EXIF in image[:_HEADER_BYTES]:
        return None
    least = _OVERSAMPLING * size
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(image)
        if colours not in _PLAIN_COLOURS or int(height) * int(width) > MAX_PIXELS:
            return None
        return simplejpeg.decode_jpeg(image, "RGB", min_height=least, min_width=least, min_factor=2)
    except ValueError:
        return None

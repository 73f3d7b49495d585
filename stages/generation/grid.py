"""Pictures side by side, captioned."""

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

CELL = 128
MARGIN = 8
FONT_SIZE = 11
LINE = 14
CHARACTERS_PER_LINE = 22
CAPTION_LINES = 4


def to_pil(image: Tensor) -> Image.Image:
    """A picture float [3, H, W] in [-1, 1] -> RGB, 8 bits."""
    scaled = ((image.detach().float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0)
    return Image.fromarray(np.ascontiguousarray(scaled.cpu().numpy()))


def captioned_grid(pictures: Sequence[Sequence[Image.Image]], captions: Sequence[str], columns: int) -> Image.Image:
    """A grid of cells; each holds one or more pictures of a caption side by side, and the caption below.

    Small pictures are enlarged without smoothing, so that every pixel of a 16-pixel sample can be seen.
    """
    per_cell = max(len(each) for each in pictures)
    width = per_cell * CELL + (per_cell - 1) * 2 + MARGIN
    height = CELL + CAPTION_LINES * LINE + MARGIN
    rows = -(-len(pictures) // columns)
    grid = Image.new("RGB", (columns * width + MARGIN, rows * height + MARGIN), "white")
    draw = ImageDraw.Draw(grid)
    font = ImageFont.load_default(FONT_SIZE)
    for number, (cell, caption) in enumerate(zip(pictures, captions, strict=True)):
        left = MARGIN + number % columns * width
        top = MARGIN + number // columns * height
        for position, picture in enumerate(cell):
            enlarged = picture.resize((CELL, CELL), Image.Resampling.NEAREST)
            grid.paste(enlarged, (left + position * (CELL + 2), top))
        lines = textwrap.wrap(caption, CHARACTERS_PER_LINE * per_cell)[:CAPTION_LINES]
        draw.multiline_text((left, top + CELL + 2), "\n".join(lines), fill="black", font=font, spacing=2)
    return grid

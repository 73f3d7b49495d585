"""Pictures side by side, captioned."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pipeline.picture_grid import GridLayout, save_grid

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


@dataclass(frozen=True)
class CaptionedGrid:
    """A grid as a picture, and what is where in it."""

    image: Image.Image
    layout: GridLayout

    def save(self, path: Path) -> None:
        """Write a PNG that describes itself."""
        save_grid(self.image, self.layout, path)


def captioned_grid(
    pictures: Sequence[Sequence[Image.Image]],
    captions: Sequence[str],
    columns: int,
    *,
    names: Sequence[str],
    seeds: Sequence[int] = (),
) -> CaptionedGrid:
    """A grid of cells; each holds a caption's pictures side by side, one for each of `names`, and the caption below.

    `seeds` are those of what was drawn for each caption. Small pictures are enlarged without smoothing, so that every
    pixel of a 16-pixel sample can be seen.
    """
    per_cell = max(len(each) for each in pictures)
    width = per_cell * CELL + (per_cell - 1) * 2 + MARGIN
    height = CELL + CAPTION_LINES * LINE + MARGIN
    rows = -(-len(pictures) // columns)
    grid = Image.new("RGB", (columns * width + MARGIN, rows * height + MARGIN), "white")
    draw = ImageDraw.Draw(grid)
    font = ImageFont.load_default(FONT_SIZE)
    boxes = []
    for number, (cell, caption) in enumerate(zip(pictures, captions, strict=True)):
        left = MARGIN + number % columns * width
        top = MARGIN + number // columns * height
        lefts = [left + position * (CELL + 2) for position in range(len(cell))]
        boxes.append(tuple((place, top, place + CELL, top + CELL) for place in lefts))
        for picture, place in zip(cell, lefts, strict=True):
            grid.paste(picture.resize((CELL, CELL), Image.Resampling.NEAREST), (place, top))
        lines = textwrap.wrap(caption, CHARACTERS_PER_LINE * per_cell)[:CAPTION_LINES]
        draw.multiline_text((left, top + CELL + 2), "\n".join(lines), fill="black", font=font, spacing=2)
    layout = GridLayout(
        captions=tuple(captions),
        seeds=tuple(seeds),
        pictures=tuple(names),
        sizes=tuple(picture.width for picture in pictures[0]),
        boxes=tuple(boxes),
    )
    return CaptionedGrid(grid, layout)

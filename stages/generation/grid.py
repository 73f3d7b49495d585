"""Pictures side by side, captioned."""

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pipeline.picture_grid import GridLayout
from pipeline.training.module import SampleGrid

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


def captioned_grid(
    pictures: Mapping[str, Sequence[Image.Image] | Tensor],
    captions: Sequence[str],
    seeds: Sequence[int],
    *,
    columns: int,
) -> SampleGrid:
    """A grid of cells; each holds a caption's pictures side by side, one under each name, and the caption below.

    `seeds` are those of what was drawn for each caption. Small pictures are enlarged without smoothing, so that every
    pixel of a 16-pixel sample can be seen.
    """
    cells = [
        [to_pil(picture) if isinstance(picture, Tensor) else picture for picture in cell]
        for cell in zip(*pictures.values(), strict=True)
    ]
    per_cell = len(pictures)
    width = per_cell * CELL + (per_cell - 1) * 2 + MARGIN
    height = CELL + CAPTION_LINES * LINE + MARGIN
    rows = -(-len(cells) // columns)
    grid = Image.new("RGB", (columns * width + MARGIN, rows * height + MARGIN), "white")
    draw = ImageDraw.Draw(grid)
    font = ImageFont.load_default(FONT_SIZE)
    boxes = []
    for number, (cell, caption) in enumerate(zip(cells, captions, strict=True)):
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
        pictures=tuple(pictures),
        sizes=tuple(picture.width for picture in cells[0]),
        boxes=tuple(boxes),
    )
    return SampleGrid(grid, tuple(captions), layout)

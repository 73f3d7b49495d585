"""Grids of pictures that describe themselves: captions, seeds and places of the cells, in a text chunk of the PNG."""

from pathlib import Path

from PIL import Image, PngImagePlugin
from pydantic import Field, ValidationError

from pipeline.config import Settings

CHUNK = "unclip-grid"


class GridLayout(Settings):
    """What is where in a grid of N captions with C pictures each.

    `pictures` are the C names (`real`, `sample`), `sizes` their true widths in pixels, of which the grid may show
    enlarged ones. `seeds` are those of what was drawn for each caption, empty where none are known. `boxes[n][c]` is
    (left, top, right, bottom) in the grid's pixels.
    """

    captions: tuple[str, ...]
    seeds: tuple[int, ...] = Field(default=())
    pictures: tuple[str, ...]
    sizes: tuple[int, ...]
    boxes: tuple[tuple[tuple[int, int, int, int], ...], ...]

    def fits(self, width: int, height: int) -> bool:
        """Whether every part speaks of the same cells, and all of these lie inside a grid of that size."""
        count = len(self.captions)
        are_even = len(self.boxes) == count and len(self.seeds) in (0, count)
        are_complete = all(len(cell) == len(self.pictures) == len(self.sizes) for cell in self.boxes)
        are_inside = all(
            0 <= left < right <= width and 0 <= top < bottom <= height
            for cell in self.boxes
            for left, top, right, bottom in cell
        )
        return are_even and are_complete and are_inside and all(size > 0 for size in self.sizes)


def save_grid(image: Image.Image, layout: GridLayout | None, path: Path) -> None:
    """Write a PNG that carries its layout, where one is known."""
    texts = PngImagePlugin.PngInfo()
    if layout is not None:
        texts.add_itxt(CHUNK, layout.model_dump_json(), zip=True)
    image.save(path, "PNG", pnginfo=texts)


def read_layout(image: Image.Image) -> GridLayout | None:
    """The layout that an open PNG carries; None without one, or with one that does not fit the picture."""
    text = getattr(image, "text", {}).get(CHUNK)
    if text is None:
        return None
    try:
        layout = GridLayout.model_validate_json(text)
    except ValidationError:
        return None
    return layout if layout.fits(*image.size) else None

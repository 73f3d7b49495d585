"""Sample grids of compared runs, cut into cells and put side by side under the same captions."""

import base64
import io
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pipeline.picture_grid import GridLayout, read_layout
from pipeline.report.records import Comparison, StageReport
from pipeline.workflow.sealed import opened

SAMPLES = "samples"
PICTURES_OF_A_PAGE = 2400
FEWEST_CAPTIONS = 4
_LOSSLESS_UP_TO = 32
_QUALITY = 88


@dataclass(frozen=True)
class Picture:
    """One picture as a data URI, under its name in the grid (`real`, `sample`)."""

    name: str
    uri: str
    is_enlarged: bool


@dataclass(frozen=True)
class CaptionRow:
    """A caption with the pictures that all compared grids have alike, and each grid's own (empty where it has none).

    `seeds` are each grid's seed; `seed` is theirs where it is the same.
    """

    caption: str
    seed: int | None
    alike: tuple[Picture, ...]
    own: tuple[tuple[Picture, ...], ...]
    seeds: tuple[int | None, ...]


@dataclass(frozen=True)
class PictureTable:
    """The grids of one stage. `heads` names the runs behind each; `whole` are grids that do not say what is where."""

    stage: str
    heads: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]
    rows: tuple[CaptionRow, ...]
    captions_left_out: int
    whole: tuple[tuple[tuple[str, ...], Picture], ...]


_Cells = dict[tuple[str, int], tuple[int | None, tuple[Picture, ...]]]
"""(caption, its how-manieth) -> seed and pictures."""


@dataclass(frozen=True)
class _Grid:
    users: tuple[str, ...]
    note: str
    cells: _Cells


def picture_tables(comparison: Comparison) -> list[PictureTable]:
    """One for each stage that drew samples; the latest grid of every distinct artifact or stage in progress."""
    sources = {name: _grids_of(comparison, name) for name in reversed(comparison.stage_names)}
    count = sum(len(found) for found in sources.values())
    per_grid = max(FEWEST_CAPTIONS, PICTURES_OF_A_PAGE // (2 * max(1, count)))
    most_first = sorted(sources.items(), key=lambda source: -len(source[1]))
    return [_table(comparison, name, found, per_grid) for name, found in most_first if found]


def latest_grid(stage: StageReport) -> Path | None:
    """The newest PNG that a stage published, or drew in progress."""
    found = stage.artifact.pictures() if stage.artifact else sorted((stage.work / SAMPLES).glob("*.png"))
    return found[-1] if found else None


def _grids_of(comparison: Comparison, name: str) -> list[tuple[StageReport, Path]]:
    stages = (stage for stage in comparison.distinct_stages if stage.name == name)
    return [(stage, path) for stage in stages if (path := latest_grid(stage)) is not None]


def _table(comparison: Comparison, name: str, sources: list[tuple[StageReport, Path]], captions: int) -> PictureTable:
    grids: list[_Grid] = []
    whole: list[tuple[tuple[str, ...], Picture]] = []
    left_out = 0
    for stage, path in sources:
        users = comparison.users[stage.fingerprint]
        try:
            with opened(path) as file, Image.open(file) as image:
                layout = read_layout(image)
                if layout is None:
                    whole.append((users, _encoded("", image.convert("RGB"), is_enlarged=False)))
                    continue
                left_out = max(left_out, len(layout.captions) - captions)
                note = "" if stage.is_finished else f"{stage.state.value} at {stage.samples_seen:,} samples"
                grids.append(_Grid(users, note, _cut(image.convert("RGB"), layout, captions)))
        except Exception:  # Pillow raises all sorts for a picture that is being written, or is none
            continue
    rows = [_row(key, grids) for key in dict.fromkeys(key for grid in grids for key in grid.cells)]
    heads, notes = tuple(grid.users for grid in grids), tuple(grid.note for grid in grids)
    return PictureTable(name, heads, notes, tuple(rows), max(0, left_out), tuple(whole))


def _cut(image: Image.Image, layout: GridLayout, captions: int) -> _Cells:
    """The cells of a grid, with pictures at their true size where the grid shows them enlarged."""
    cells: _Cells = {}
    repeated: Counter[str] = Counter()
    for number, caption in enumerate(layout.captions[:captions]):
        pictures = []
        for name, size, box in zip(layout.pictures, layout.sizes, layout.boxes[number], strict=True):
            shown = image.crop(box)
            true_size = min(size, shown.width)
            small = shown.resize((true_size, true_size * shown.height // shown.width), Image.Resampling.NEAREST)
            pictures.append(_encoded(name, small, is_enlarged=true_size < shown.width))
        seed = layout.seeds[number] if layout.seeds else None
        cells[caption, repeated[caption]] = seed, tuple(pictures)
        repeated[caption] += 1
    return cells


def _row(key: tuple[str, int], grids: list[_Grid]) -> CaptionRow:
    cells = [grid.cells.get(key, (None, ())) for grid in grids]
    seeds = {seed for seed, pictures in cells if pictures}
    first = next(pictures for _, pictures in cells if pictures)
    alike = {
        picture
        for picture in first
        if len(grids) > 1 and all(not pictures or picture in pictures for _, pictures in cells)
    }
    return CaptionRow(
        caption=key[0],
        seed=next(iter(seeds)) if len(seeds) == 1 else None,
        alike=tuple(picture for picture in first if picture in alike),
        own=tuple(tuple(each for each in pictures if each not in alike) for _, pictures in cells),
        seeds=tuple(seed for seed, _ in cells),
    )


def _encoded(name: str, image: Image.Image, *, is_enlarged: bool) -> Picture:
    content = io.BytesIO()
    is_small = image.width <= _LOSSLESS_UP_TO
    image.save(content, "WEBP", lossless=is_small, quality=_QUALITY, method=0 if is_small else 2)
    uri = f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode('ascii')}"
    return Picture(name, uri, is_enlarged)

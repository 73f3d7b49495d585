import base64
import io
from pathlib import Path

import pytest
from PIL import Image

from pipeline.picture_grid import GridLayout, read_layout, save_grid
from pipeline.report.pictures import Picture, picture_tables
from tests.support import small_world
from tests.support.small_world import compared


def decoded(picture: Picture) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(picture.uri.partition(",")[2]))).convert("RGB")


def test_cells_of_runs_stand_side_by_side_under_their_caption_and_seed(outputs: Path):
    (table,) = picture_tables(compared(outputs, "trial", "again", "killed"))
    assert table.heads == (("trial.0",), ("trial.1", "again"), ("trial.2",), ("killed",))
    assert table.notes[3] == "stopped at 120 samples"
    assert [row.caption for row in table.rows] == list(small_world.CAPTIONS)
    assert [row.seed for row in table.rows] == list(small_world.SEEDS)
    for number, row in enumerate(table.rows):
        (real,) = row.alike
        assert decoded(real).tobytes() == small_world.cell(0, "real", number).tobytes()
        for weight, (sample,) in zip((0.0, 0.1, 0.3, 0.8), row.own, strict=True):
            assert sample.name == "sample"
            assert decoded(sample).tobytes() == small_world.cell(weight, "sample", number).tobytes()


def test_a_grid_that_does_not_describe_itself_is_shown_whole(outputs: Path):
    stage = compared(outputs, "paused").runs[0].stage("painter")
    assert stage is not None
    path = stage.work / "samples" / "samples-000000999999.png"
    Image.new("RGB", (20, 10)).save(path)
    try:
        (table,) = picture_tables(compared(outputs, "paused"))
    finally:
        path.unlink()
    assert table.rows == ()
    ((users, picture),) = table.whole
    assert users == ("paused",)
    assert decoded(picture).size == (20, 10)


@pytest.mark.parametrize("box", [(0, 0, 99, 8), (4, 0, 4, 8), (-1, 0, 4, 8)])
def test_a_layout_that_points_outside_its_picture_is_not_believed(tmp_path: Path, box: tuple[int, int, int, int]):
    layout = GridLayout(captions=("a",), seeds=(), pictures=("p",), sizes=(8,), boxes=((box,),))
    save_grid(Image.new("RGB", (8, 8)), layout, tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as image:
        assert read_layout(image) is None


def test_a_layout_survives_the_file(tmp_path: Path):
    layout = GridLayout(
        captions=("ein Ring — 指輪",), seeds=(-5,), pictures=("p",), sizes=(8,), boxes=(((0, 0, 8, 8),),)
    )
    save_grid(Image.new("RGB", (8, 8)), layout, tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as image:
        assert read_layout(image) == layout

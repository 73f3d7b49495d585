"""Numbers that are none, and files that are broken, unwritable or of another shape."""

import csv
import io
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.cli import main
from pipeline.report.page import page
from pipeline.report.sweep import SweepView, effects
from pipeline.report.table import columns, table_csv, table_json
from pipeline.workflow.progress import read_failure, read_progress
from pipeline.workflow.runs import RECORD
from pipeline.workflow.sealed import read_json, warn
from tests.support import small_world
from tests.support.small_world import compared


@pytest.fixture(scope="module")
def diverged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of four, of which one ended with nan and one with infinity."""
    outputs = tmp_path_factory.mktemp("diverged")
    for number, weight in enumerate((0.1, 0.2, 0.3, 0.4)):
        overrides = [f"stage.painter.weight={weight}"]
        small_world.run(outputs, f"d.{number}", group="d", overrides=overrides, weight=weight)
    for run, value in ((0, math.nan), (1, math.inf)):
        painter = compared(outputs, f"d.{run}").runs[0].stage("painter")
        assert painter is not None
        path = painter.directory / "manifest.json"
        manifest = read_json(path)
        manifest["metrics"] |= {"error": value, "accuracy": -value, "accuracy_low": value}
        path.write_text(json.dumps(manifest))
    return outputs


def test_the_best_is_among_the_finite_and_what_is_none_is_shown_by_name(diverged: Path):
    comparison = compared(diverged, "sweep:d")
    cells = {column.key: column.cells for column in columns(comparison)}
    assert [cell.is_best for cell in cells["painter.error"]] == [False, False, True, False]
    assert [cell.is_best for cell in cells["painter.accuracy"]] == [False, False, False, True]
    assert [cell.text for cell in cells["painter.error"]][:2] == ["nan", "inf"]


def test_a_damaged_picture_is_said_wherever_it_would_be_shown(
    diverged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    outputs, report, card = tmp_path / "outputs", tmp_path / "r.html", tmp_path / "card.md"
    shutil.copytree(diverged, outputs)
    painter = compared(outputs, "d.2").runs[0].stage("painter")
    assert painter is not None
    picture = painter.directory / "samples.png"
    content = picture.read_bytes()
    picture.write_bytes(content[:-20] + bytes([content[-20] ^ 1]) + content[-19:])
    line = f"{picture} does not have the digest in its manifest"
    for command, written in (("status", None), ("compare", report), ("card", card)):
        warn.cache_clear()
        to = ["--output", str(written)] if written else []
        assert main([command, "d.2", *to, "--outputs", str(outputs)]) == 0
        shown = capsys.readouterr()
        assert f"{line}; it is not shown" in shown.err
        assert command == "card" or "damaged" in shown.out
    assert line in report.read_text()
    assert "data:image/webp" not in report.read_text()
    assert ".png" not in card.read_text()


def test_json_has_null_for_what_is_no_number(diverged: Path):
    def refuse(word: str) -> None:
        pytest.fail(f"{word} is no JSON")

    content = json.loads(table_json(compared(diverged, "sweep:d")), parse_constant=refuse)
    painters = [run["stages"]["painter"]["metrics"]["error"] for run in content["runs"]]
    assert painters[:2] == [None, None]
    assert painters[2] == 1.3 / 40
    rows = list(csv.DictReader(io.StringIO(table_csv(compared(diverged, "sweep:d")))))
    assert [row["painter.error"] for row in rows][:2] == ["nan", "inf"]


def test_effects_leave_out_what_is_no_number(diverged: Path):
    (weight,) = effects(compared(diverged, "sweep:d"), "painter.error")
    assert [(level.label, level.mean, level.count) for level in weight.levels] == [
        ("0.1", None, "0 of 1"),
        ("0.2", None, "0 of 1"),
        ("0.3", 1.3 / 40, "1"),
        ("0.4", 1.4 / 40, "1"),
    ]


def test_a_page_of_a_diverged_sweep_is_written_and_sorts_what_is_none_last(diverged: Path, tmp_path: Path, capsys):
    file = tmp_path / "report.html"
    for metric in ("painter.error", "painter.mood"):
        options = ["--metric", metric, "--outputs", str(diverged), "--output", str(file)]
        assert main(["compare", "sweep:d", *options]) == 0
    comparison = compared(diverged, "sweep:d")
    html = page(comparison, SweepView(comparison, "painter.error"))
    assert 'data-value="">nan' in html
    assert "NaN" not in html.split('id="data">')[1].split("</script>")[0]
    assert main(["card", "d.0", "--outputs", str(diverged)]) == 0
    assert "| painter | error | nan |" in (diverged / "runs" / "d.0" / "README.md").read_text()


@pytest.fixture
def littered(outputs: Path) -> Iterator[Path]:
    """The outputs with two runs beside whose records are none."""
    for name, content in (("cut", b'{"name": "cu'), ("other", b"[1, 2]")):
        (outputs / "runs" / name).mkdir()
        (outputs / "runs" / name / RECORD).write_bytes(content)
    yield outputs
    for name in ("cut", "other"):
        (outputs / "runs" / name / RECORD).unlink()
        (outputs / "runs" / name).rmdir()


@pytest.mark.parametrize("asked", ["sweep:trial", "*"])
def test_a_broken_record_in_passing_is_left_out_with_a_note(littered: Path, capsys, asked: str):
    assert main(["compare", asked, "--json", "--outputs", str(littered)]) == 0
    shown = capsys.readouterr()
    assert {"trial.0", "trial.1", "trial.2"} <= {run["name"] for run in json.loads(shown.out)["runs"]}
    notes = shown.err.splitlines()
    assert len(notes) == 2
    assert all(note.startswith("left out: ") for note in notes)
    assert any("cut/run.json cannot be read" in note for note in notes)


@pytest.mark.parametrize("asked", ["cut", "other", "c?t"])
def test_a_broken_record_that_is_asked_for_is_one_line(littered: Path, capsys, asked: str):
    assert main(["compare", asked, "--outputs", str(littered)]) == 2
    said = capsys.readouterr().err
    assert RECORD in said
    assert len(said.splitlines()) == 1


FULL = "/dev/full"  # takes no byte
LONG = f"{'x' * 300}.html"  # longer than a file's name may be


@pytest.mark.parametrize(("command", "file"), [("compare", FULL), ("compare", LONG), ("card", LONG)])
def test_a_file_that_cannot_be_written_is_one_line(outputs: Path, capsys, command: str, file: str):
    assert main([command, "again", "--outputs", str(outputs), "--output", file]) == 2
    said = capsys.readouterr().err
    assert f"--output {file} cannot be written" in said
    assert len(said.splitlines()) == 1


def test_a_card_that_cannot_be_written_is_one_line(outputs: Path, capsys):
    (outputs / "runs" / "killed" / "README.md").mkdir()
    assert main(["card", "killed", "--outputs", str(outputs)]) == 2
    said = capsys.readouterr().err
    assert "the card of killed cannot be written" in said
    assert "give --output" in said
    assert len(said.splitlines()) == 1
    (outputs / "runs" / "killed" / "README.md").rmdir()


@pytest.mark.parametrize(
    "content", ["{}", "[]", "null", "3", '{"phase": "dreaming"}', '{"phase": "working", "samples_seen": "many"}', "{"]
)
def test_progress_and_failure_of_another_shape_are_none(tmp_path: Path, content: str):
    (tmp_path / "progress.json").write_text(content)
    (tmp_path / "failure.json").write_text(content)
    assert read_progress(tmp_path) is None
    assert read_failure(tmp_path) is None


def test_a_run_whose_progress_is_of_another_shape_is_compared(outputs: Path, capsys):
    painter = compared(outputs, "paused").runs[0].stage("painter")
    assert painter is not None
    path = painter.work / "progress.json"
    before = path.read_text()
    path.write_text("{}")
    try:
        assert main(["compare", "paused", "--outputs", str(outputs)]) == 0
    finally:
        path.write_text(before)

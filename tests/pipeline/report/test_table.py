import csv
import io
import json
from pathlib import Path

import pytest

from pipeline.cli import main
from pipeline.report.differences import differing_settings
from pipeline.report.records import Comparison
from pipeline.report.table import Column, columns, table_csv, table_json, totals
from tests.support import small_world
from tests.support.small_world import compared


def column(comparison: Comparison, key: str) -> Column:
    return next(each for each in columns(comparison) if each.key == key)


def best(comparison: Comparison, key: str) -> list[str]:
    cells = column(comparison, key).cells
    return [run.name for run, cell in zip(comparison.runs, cells, strict=True) if cell.is_best]


def test_the_best_is_marked_where_the_stage_says_which_way_is_better(trial: Comparison):
    assert best(trial, "painter.error") == ["trial.0"]
    assert best(trial, "painter.accuracy") == ["trial.2"]
    assert best(trial, "critic.score") == ["trial.2"]


def test_nothing_is_marked_where_the_direction_is_unknown_or_all_are_alike(outputs: Path, trial: Comparison):
    assert best(trial, "painter.mood") == []
    assert best(trial, "prepare.time_s") == []
    assert best(compared(outputs, "trial.1", "again"), "painter.error") == []


def test_what_is_not_finished_is_never_the_best(outputs: Path):
    comparison = compared(outputs, "trial.0", "trial.1", "paused", "broken")
    assert best(comparison, "painter.error") == ["trial.0"]
    assert column(comparison, "painter.error").cells[2].value == 1.7 / 20


def test_ends_of_an_interval_are_no_columns_of_their_own(trial: Comparison):
    keys = [each.key for each in columns(trial) if each.stage == "painter"]
    metrics = ["error", "accuracy", "mood"]
    assert keys == [f"painter.{name}" for name in ("state", "time_s", "device_hours", "samples_seen", *metrics)]
    cell = column(trial, "painter.accuracy").cells[0]
    assert (cell.value, cell.low, cell.high) == (0.5, 0.4, 0.6)


def test_a_shared_stage_is_counted_once_in_the_total(outputs: Path):
    comparison = compared(outputs, "trial.1", "again")
    everything = totals(comparison.distinct_stages, comparison)
    (first, second) = (totals(run.stages, comparison) for run in comparison.runs)
    assert first.duration_s == second.duration_s == everything.duration_s > 0
    assert everything.device_hours == pytest.approx(everything.duration_s / 3600)
    assert everything.shared_stages == 3
    assert column(comparison, "painter.time_s").cells[0].shared_with == ("again",)


def test_only_settings_that_differ_are_shown(outputs: Path):
    found = differing_settings([run.record for run in compared(outputs, "trial.0", "trial.2").runs])
    assert found == {"stage.painter.weight": ["0.0", "0.3"]}
    with_absent = differing_settings([run.record for run in compared(outputs, "trial.0", "paused").runs])
    assert with_absent["stage.painter.stops_at"] == ["—", "25"]


def test_csv_has_every_column_and_full_precision(trial: Comparison):
    rows = list(csv.DictReader(io.StringIO(table_csv(trial))))
    assert [row["run"] for row in rows] == ["trial.0", "trial.1", "trial.2"]
    assert [row["stage.painter.weight"] for row in rows] == ["0.0", "0.1", "0.3"]
    assert float(rows[1]["painter.error"]) == 1.1 / 40
    assert {each.key for each in columns(trial)} <= rows[0].keys()


def test_csv_has_both_ends_of_every_interval(outputs: Path):
    rows = list(csv.DictReader(io.StringIO(table_csv(compared(outputs, "trial.1", "paused")))))
    ends = [(row["painter.accuracy_low"], row["painter.accuracy"], row["painter.accuracy_high"]) for row in rows]
    assert [float(end) for end in ends[0]] == pytest.approx([0.45, 0.55, 0.65])
    assert ends[1] == ("", "", "")
    assert "painter.error_low" not in rows[0]


@pytest.mark.parametrize("form", [["--csv"], ["--json"], ["--output", "report.html"], []])
def test_an_unknown_column_is_refused_in_every_form(
    outputs: Path, tmp_path: Path, capsys, monkeypatch, form: list[str]
):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", "again", "paused", "--metric", "painter.joy", *form, "--outputs", str(outputs)]) == 2
    shown = capsys.readouterr()
    assert "'painter.joy' is no column of these runs" in shown.err
    assert shown.out == ""
    assert not list(tmp_path.iterdir())


def test_the_terminal_says_what_it_cuts_and_which_settings_it_hides(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    long = "a note that is longer than a column"
    small_world.run(tmp_path, "one", weight=0.1, note=long, seed=1)
    small_world.run(tmp_path, "two", weight=0.2, note=f"{long} too", seed=2, strictness=0.5, stops_at=3)
    assert main(["compare", "one", "two", "--outputs", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "a note that is …" in shown
    assert "a note that is l" not in shown
    assert "2 more settings differ: --output, --csv or --json" in shown


def test_json_tells_each_stage_with_its_fingerprint_and_cost(outputs: Path):
    content = json.loads(table_json(compared(outputs, "trial.1", "again", "broken")))
    painter = content["runs"][0]["stages"]["painter"]
    assert painter["shared_with"] == ["again"]
    assert painter["metrics"]["error"] == 1.1 / 40
    assert content["runs"][2]["state"] == "failed"
    assert content["runs"][2]["stages"]["painter"]["detail"].startswith("settings: the paint ran out")
    assert content["better"]["painter.error"] == "low"


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_terminal_table_fits_its_width_and_says_what_it_leaves_out(outputs, capsys, monkeypatch, width: int):
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(["compare", "trial", "broken", "--outputs", str(outputs)]) == 0
    shown = capsys.readouterr().out
    boxed = [line for line in shown.splitlines() if line.startswith(("│", "┃", "┏"))]
    assert boxed
    assert max(map(len, boxed)) <= width
    assert "trial.2" in shown
    assert "more column" in shown
    assert "broken: painter failed: settings: the paint ran out" in shown


def test_asked_for_columns_are_shown_and_unknown_ones_listed(outputs, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["compare", "trial", "--metric", "painter.mood", "--outputs", str(outputs)]) == 0
    assert "mood" in capsys.readouterr().out
    assert main(["compare", "trial", "--metric", "painter.joy", "--outputs", str(outputs)]) == 2
    assert "'painter.joy' is no column of these runs; there are prepare.state" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_refused(outputs, capsys):
    assert main(["compare", "trial", "--output", "/no/such/report.html", "--outputs", str(outputs)]) == 2
    assert "--output /no/such/report.html cannot be written" in capsys.readouterr().err

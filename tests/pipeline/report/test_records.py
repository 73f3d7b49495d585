import itertools
import json
import time
from pathlib import Path

import pytest

from pipeline.report.records import RunReport, State
from pipeline.report.rows import sampled_rows
from pipeline.workflow.progress import read_progress
from pipeline.workflow.sealed import read_json
from tests.support.small_world import compared


def run_of(outputs: Path, name: str) -> RunReport:
    (run,) = compared(outputs, name).runs
    return run


def test_finished_killed_interrupted_and_failed_runs_are_told_apart(outputs: Path):
    names = ("trial.0", "killed", "paused", "broken")
    states = [run_of(outputs, name).state for name in names]
    assert states == [State.FINISHED, State.STOPPED, State.INTERRUPTED, State.FAILED]


def test_a_stage_in_progress_has_what_it_logged_so_far(outputs: Path):
    painter = run_of(outputs, "paused").stage("painter")
    assert painter is not None
    assert painter.samples_seen == 25 * 8
    assert painter.duration_s == 25 * 90.0
    progress = read_progress(painter.work)
    assert progress is not None
    assert painter.device_hours == progress.device_s / 3600 > 0
    assert painter.metrics == {"error": 1.7 / 20}
    critic = run_of(outputs, "paused").stage("critic")
    assert critic is not None
    assert (critic.state, critic.duration_s, critic.metrics) == (State.WAITING, None, {})


def test_a_row_that_a_kill_cut_short_is_left_out(outputs: Path):
    painter = run_of(outputs, "killed").stage("painter")
    assert painter is not None
    assert painter.rows_path.read_text().endswith('"train/err')
    assert [row["samples_seen"] for row in sampled_rows(painter.rows_path, 1000).rows][-1] == 15 * 8


def test_rows_that_are_none_are_left_out(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('[1]\n{"loss": 1}\n{"samples_seen": 3, "loss": NaN}\nnull\n')
    assert [row["samples_seen"] for row in sampled_rows(path, 1000).rows] == [3]
    assert sampled_rows(tmp_path / "nothing", 1000).rows == ()


def test_a_stage_that_runs_share_is_read_once_and_names_its_users(outputs: Path):
    comparison = compared(outputs, "trial", "again")
    again, first = comparison.runs[3], comparison.runs[1]
    assert again.stage("painter") is first.stage("painter")
    painter = again.stage("painter")
    assert painter is not None
    assert comparison.shared_with(again, painter) == ["trial.1"]
    assert comparison.is_common("prepare")
    assert not comparison.is_common("painter")
    assert comparison.count_distinct("painter") == 3


def test_a_stage_that_was_heard_of_just_now_is_running(outputs: Path):
    painter = run_of(outputs, "killed").stage("painter")
    assert painter is not None
    path = painter.work / "progress.json"
    before = path.read_text()
    path.write_text(json.dumps(read_json(path) | {"updated_at": time.time()}))
    try:
        assert run_of(outputs, "killed").state is State.RUNNING
    finally:
        path.write_text(before)


def test_of_a_long_record_rows_are_taken_evenly_with_its_ends_and_all_its_validations(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    with path.open("w") as file:
        for step in range(20_000):
            row = {"samples_seen": step, "train/loss": 1 / (1 + step)}
            if step % 1000 == 999:
                row = {"samples_seen": step, "validation/loss": 2.0}
            file.write(json.dumps(row) + "\n")
        file.write('{"samples_seen": 20000, "train/lo')
    sampled = sampled_rows(path, 200)
    places = [row["samples_seen"] for row in sampled.rows]
    assert not sampled.is_whole
    assert 200 <= len(places) <= 250
    assert places == sorted(set(places))
    assert (places[0], places[-1]) == (0, 19_999)
    assert {row["samples_seen"] for row in sampled.rows if "validation/loss" in row} == set(range(999, 20_000, 1000))
    assert max(after - before for before, after in itertools.pairwise(places)) < 200
    assert sampled_rows(path, 20_001).is_whole
    assert len(sampled_rows(path, 20_001).rows) == 20_000


@pytest.mark.parametrize("limit", [1000, 100])
def test_of_a_stage_that_went_on_at_a_checkpoint_the_rows_that_stand_are_read_and_no_pictures(
    tmp_path: Path, limit: int
):
    picture = {"samples_seen": 99, "picture": "samples", "file": "samples/1.png", "captions": ["red"]}
    entries = [{"samples_seen": step, "train/loss": 1.0} for step in range(600)]
    entries[100:100] = [picture]
    again = [{"samples_seen": step, "train/loss": 2.0} for step in range(300, 400)]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(f"{json.dumps(entry)}\n" for entry in (*entries, {"resumes_at": 299}, *again))
    )
    found = sampled_rows(tmp_path / "metrics.jsonl", limit).rows
    assert len(found) > 50
    assert {row["train/loss"] for row in found if row["samples_seen"] < 300} == {1.0}
    assert {row["train/loss"] for row in found if row["samples_seen"] >= 300} == {2.0}
    assert found[-1]["samples_seen"] == 399
    assert all(set(row) == {"samples_seen", "train/loss"} for row in found)

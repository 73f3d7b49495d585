import json
from pathlib import Path

import pytest

from pipeline.workflow.record import Replay, append, entries, read_standing, resume, write_rows

ROWS = [{"samples_seen": 8 * (step + 1), "train/loss": 1.0 / (step + 1)} for step in range(6)]
PICTURE = {"samples_seen": 24, "picture": "samples", "file": "samples/24.png", "captions": ["red", "blue"]}


def lines(path: Path) -> list[dict[str, object]]:
    return list(entries(path.read_bytes().splitlines(), path))


def test_what_is_appended_is_read_back_in_its_order(tmp_path: Path):
    for entry in (*ROWS[:3], PICTURE, ROWS[3]):
        append(tmp_path, entry)
    assert read_standing(tmp_path) == [*ROWS[:3], PICTURE, ROWS[3]]
    assert list(Replay(tmp_path).new()) == list(enumerate([*ROWS[:3], PICTURE, ROWS[3]]))


def test_a_stage_without_a_record_has_no_entries(tmp_path: Path):
    resume(tmp_path, 8)
    write_rows(tmp_path, tmp_path / "artifact")
    assert read_standing(tmp_path) == list(Replay(tmp_path).new()) == list(tmp_path.iterdir()) == []


def test_a_resume_supersedes_what_is_past_its_checkpoint_and_what_is_logged_again_stands(tmp_path: Path):
    for row in ROWS[:5]:
        append(tmp_path, row)
    resume(tmp_path, 24)
    assert read_standing(tmp_path) == ROWS[:3]
    again = [{**row, "train/loss": 9.0} for row in ROWS[3:]]
    for row in again:
        append(tmp_path, row)
    assert read_standing(tmp_path) == [*ROWS[:3], *again]
    assert lines(tmp_path / "metrics.jsonl") == [*ROWS[:5], {"resumes_at": 24}, *again]


def test_a_resume_at_the_end_of_the_record_leaves_no_trace(tmp_path: Path):
    for row in ROWS[:3]:
        append(tmp_path, row)
    resume(tmp_path, 24)
    assert lines(tmp_path / "metrics.jsonl") == ROWS[:3]


@pytest.mark.parametrize("torn", [b'{"samples_seen": 32, "tra', b'{"samples_seen": 32}', bytes(4096)])
def test_a_torn_line_is_not_read_and_is_cut_off_at_a_resume(tmp_path: Path, torn: bytes):
    """A power cut leaves zeros."""
    for row in ROWS[:3]:
        append(tmp_path, row)
    record = tmp_path / "metrics.jsonl"
    whole = record.read_bytes()
    record.write_bytes(whole + torn)
    assert read_standing(tmp_path) == ROWS[:3]
    assert [entry for _, entry in Replay(tmp_path).new()] == ROWS[:3]
    resume(tmp_path, 24)
    assert record.read_bytes() == whole


def test_an_entry_has_one_step_for_ever_however_often_it_is_logged_again(tmp_path: Path):
    following, seen = Replay(tmp_path), []
    for start in (0, 2, 1):
        resume(tmp_path, 8 * start)
        for row in ROWS[start:4]:
            append(tmp_path, {**row, "system/elapsed_s": float(start)})
            seen += following.new()
        append(tmp_path, PICTURE)
    seen += following.new()
    append(tmp_path, ROWS[4])
    seen += following.new()
    assert seen == list(Replay(tmp_path).new())
    assert [step for step, _ in seen] == list(range(6))
    assert [entry["samples_seen"] for _, entry in seen] == [8, 16, 24, 32, 24, 40]
    assert following.count == 6


def test_a_row_with_other_columns_is_another_entry_and_one_with_other_measurements_is_not(tmp_path: Path):
    for entry in (ROWS[0], {"samples_seen": 8, "validation/loss": 1.0}, {**ROWS[0], "system/mfu": 0.5}):
        append(tmp_path, entry)
    assert [entry for _, entry in Replay(tmp_path).new()] == [ROWS[0], {"samples_seen": 8, "validation/loss": 1.0}]


def test_beside_an_artifact_are_the_rows_that_stand_and_nothing_else(tmp_path: Path):
    (tmp_path / "artifact").mkdir()
    for entry in (*ROWS[:3], PICTURE, ROWS[3]):
        append(tmp_path, entry)
    resume(tmp_path, 16)
    append(tmp_path, ROWS[2])
    write_rows(tmp_path, tmp_path / "artifact")
    assert lines(tmp_path / "artifact" / "metrics.jsonl") == ROWS[:3]


def test_a_record_that_an_earlier_version_wrote_is_read(tmp_path: Path):
    """It had rows alone, and was cut at a resume."""
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    assert read_standing(tmp_path) == ROWS
    resume(tmp_path, 24)
    assert read_standing(tmp_path) == ROWS[:3]

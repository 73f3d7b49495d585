import re
from pathlib import Path

from pipeline.report.curves import curves, thinned
from tests.support.small_world import compared


def test_curves_of_a_shared_stage_are_read_once_with_samples_and_hours(outputs: Path):
    found = [curve for curve in curves(compared(outputs, "trial.1", "again")) if curve.metric == "train/error"]
    (curve,) = found
    assert curve.samples == tuple(range(8, 328, 8))
    assert curve.hours is not None
    assert (curve.hours[0], curve.hours[-1]) == (0.025, 1.0)
    assert curve.values[0] == 1.1


def test_a_record_without_elapsed_time_has_no_hours_and_keeps_its_old_names(outputs: Path):
    painter = compared(outputs, "paused").runs[0].stage("painter")
    assert painter is not None
    rows = painter.rows_path.read_text()
    old = re.sub(', "crc32": "[0-9a-f]{8}"', "", rows)
    old = old.replace("system/elapsed_s", "ignored").replace("system/samples_per_s", "samples_per_s")
    painter.rows_path.write_text(old)
    try:
        found = {curve.metric: curve for curve in curves(compared(outputs, "paused"))}
    finally:
        painter.rows_path.write_text(rows)
    assert found["train/error"].hours is None
    assert "system/samples_per_s" in found
    assert "samples_per_s" not in found


def test_a_thinned_curve_keeps_its_ends_and_its_spikes():
    values = [0.5] * 5000
    values[0], values[-1] = 0.6, 0.4
    values[1234], values[4321] = 9.0, -9.0
    places = thinned(values, 100)
    assert len(places) <= 100
    assert (places[0], places[-1]) == (0, 4999)
    assert {1234, 4321} <= set(places)
    assert list(places) == sorted(set(places))

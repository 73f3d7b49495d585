"""What a stage's progress says, over its starts."""

from pathlib import Path
from threading import Event

import pytest

from pipeline.training import context
from pipeline.training.context import ProgressWriter
from pipeline.workflow.ownership import Ownership, acquire
from pipeline.workflow.progress import Phase, Progress, read_progress, write_progress


@pytest.mark.parametrize("phase", [Phase.INTERRUPTED, Phase.WORKING, Phase.FAILED])
def test_what_a_stage_costs_is_added_up_over_starts_on_other_numbers_of_devices(tmp_path: Path, phase: Phase):
    ten_hours_on_eight = Progress(phase, started_at=0.0, updated_at=36_000.0, devices=8, earlier_device_s=100.0)
    write_progress(tmp_path, ten_hours_on_eight)
    now = ProgressWriter(tmp_path, Ownership(), devices=1)
    assert now.earlier_device_s == pytest.approx(8 * 36_000.0 + 100.0)


def test_a_training_from_the_beginning_costs_nothing_of_the_one_that_was_published(tmp_path: Path):
    write_progress(tmp_path, Progress(Phase.PUBLISHING, started_at=0.0, updated_at=36_000.0, devices=8))
    assert ProgressWriter(tmp_path, Ownership(), devices=1).earlier_device_s == 0.0


def test_progress_is_written_at_once_with_a_new_phase_and_otherwise_from_time_to_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(context, "SECONDS_BETWEEN_WRITES", 3600.0)
    ownership = acquire(tmp_path, 90.0, Event())
    progress = ProgressWriter(tmp_path, ownership, devices=1)
    written = list[tuple[Phase, int]]()
    for phase, samples_seen in ((Phase.WORKING, 1), (Phase.WORKING, 2), (Phase.PUBLISHING, 3), (Phase.PUBLISHING, 4)):
        progress.update(phase=phase, samples_seen=samples_seen)
        now = read_progress(tmp_path)
        assert now is not None
        written.append((now.phase, now.samples_seen))
    ownership.release()
    assert written == [(Phase.WORKING, 1), (Phase.WORKING, 1), (Phase.PUBLISHING, 3), (Phase.PUBLISHING, 3)]

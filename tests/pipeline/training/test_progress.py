"""What a stage's progress says, over its starts."""

from pathlib import Path

import pytest

from pipeline.training.context import ProgressWriter
from pipeline.workflow.ownership import Ownership
from pipeline.workflow.progress import Phase, Progress, write_progress


@pytest.mark.parametrize("phase", [Phase.INTERRUPTED, Phase.WORKING, Phase.FAILED])
def test_what_a_stage_costs_is_added_up_over_starts_on_other_numbers_of_devices(tmp_path: Path, phase: Phase):
    ten_hours_on_eight = Progress(phase, started_at=0.0, updated_at=36_000.0, devices=8, earlier_device_s=100.0)
    write_progress(tmp_path, ten_hours_on_eight)
    now = ProgressWriter(tmp_path, Ownership(), devices=1)
    assert now.earlier_device_s == pytest.approx(8 * 36_000.0 + 100.0)


def test_a_training_from_the_beginning_costs_nothing_of_the_one_that_was_published(tmp_path: Path):
    write_progress(tmp_path, Progress(Phase.PUBLISHING, started_at=0.0, updated_at=36_000.0, devices=8))
    assert ProgressWriter(tmp_path, Ownership(), devices=1).earlier_device_s == 0.0

"""Every stage that trains is stopped in the middle, and ends with the bits of one that was not."""

import json
import shutil
from pathlib import Path

import pytest

from pipeline.workflow.progress import Outcome, latest_checkpoint_samples
from pipeline.workflow.record import without_measured
from tests.support.tiny_runs import plan_stages, rows_of, run_and_stop, run_stage_of, run_until

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 30
SLOW = ("prior", "decoder", "upsampler", "judge", "judge_clip")
TRAINED = ("clip", *SLOW)
LONGER = [
    "trainer.checkpoint_every_samples=8",
    "trainer.log_every_steps=4",
    "trainer.loader_workers=1",
    "stage.upsampler.global_batch_size=8",
    "stage.judge.global_batch_size=8",
    *(f"stage.{stage}.max_samples={8 * STEPS}" for stage in TRAINED),
]


@pytest.mark.parametrize("stage", ["clip", *(pytest.param(stage, marks=pytest.mark.slow) for stage in SLOW)])
def test_a_stage_that_was_stopped_ends_with_the_same_files_and_rows(outputs: Path, tmp_path: Path, stage: str):
    whole = run_until(outputs, stage, *LONGER)
    shutil.copytree(outputs / "artifacts", tmp_path / "artifacts", ignore=shutil.ignore_patterns(stage))
    frozen = plan_stages(tmp_path, *LONGER)[stage]
    a_third = 8 * STEPS // 3
    outcome = run_and_stop(frozen, when=lambda: (latest_checkpoint_samples(frozen.work) or 0) >= a_third)
    assert outcome is Outcome.INTERRUPTED
    stopped_at = latest_checkpoint_samples(frozen.work)
    assert stopped_at is not None
    assert stopped_at < 8 * STEPS
    assert run_stage_of(frozen) is Outcome.FINISHED
    resumed = frozen.store.find(stage, frozen.fingerprint)
    assert resumed is not None
    digests = [
        {file.path: file.sha256 for file in artifact.manifest.files if file.path != "metrics.jsonl"}
        for artifact in (whole, resumed)
    ]
    assert digests[0] == digests[1]
    rows = [[without_measured(row) for row in rows_of(artifact)] for artifact in (whole, resumed)]
    assert json.dumps(rows[0]) == json.dumps(rows[1])

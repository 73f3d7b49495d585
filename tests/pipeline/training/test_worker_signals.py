"""A worker's process that is told to stop, or stalls."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline.training.stage import run_stage
from pipeline.workflow.checkpoint import latest_checkpoint
from pipeline.workflow.frozen import FrozenStage, write_frozen
from pipeline.workflow.progress import Outcome, Phase, read_progress
from tests.support import ROOT, tiny
from tests.support.tiny import finished, frozen, rows, run

SIGNALS = (*(pytest.param(each, marks=pytest.mark.slow) for each in (signal.SIGINT, signal.SIGTERM)), signal.SIGUSR1)


def worker(stage: FrozenStage) -> subprocess.Popen[str]:
    """The stage in a process of its own, with this directory's `tiny` in its path."""
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.training.worker", str(write_frozen(stage).path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
    )


def wait_for_samples(stage: FrozenStage) -> None:
    limit = time.monotonic() + 300
    while time.monotonic() < limit:
        progress = read_progress(stage.work)
        if progress is not None and progress.samples_seen:
            return
        time.sleep(0.05)
    raise AssertionError("training did not begin in five minutes")


@pytest.mark.parametrize("number", SIGNALS, ids=lambda each: each.name)
def test_a_signal_makes_the_worker_checkpoint_and_end_with_a_status_of_its_own(tmp_path: Path, number: signal.Signals):
    stage = frozen(tmp_path, max_samples=8_000_000)
    run_stage(tiny.data_of(stage), threading.Event())
    process = worker(stage)
    wait_for_samples(stage)
    process.send_signal(number)
    assert process.wait(timeout=180) == 75
    kept = latest_checkpoint(stage.work)
    assert kept is not None
    progress = read_progress(stage.work)
    assert progress is not None
    assert (progress.phase, progress.samples_seen) == (Phase.INTERRUPTED, kept.samples_seen)


def test_a_second_ctrl_c_ends_the_worker_at_once(tmp_path: Path):
    stage = frozen(tmp_path, max_samples=8_000_000, step_s=300.0)
    run_stage(tiny.data_of(stage), threading.Event())
    process = worker(stage)
    limit = time.monotonic() + 300
    while not (stage.work / "in-step").exists():
        assert time.monotonic() < limit
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130


@pytest.mark.slow
def test_a_stalled_worker_that_wakes_up_leaves_its_successor_s_artifact_alone(tmp_path: Path):
    stage = frozen(tmp_path, max_samples=8 * 60, step_s=0.05, lease_s=2.0)
    run_stage(tiny.data_of(stage), threading.Event())
    stalled = worker(stage)
    wait_for_samples(stage)
    stalled.send_signal(signal.SIGSTOP)
    assert run(stage) is Outcome.FINISHED
    published = finished(stage)
    stalled.send_signal(signal.SIGCONT)
    assert stalled.wait(timeout=180) == 75
    assert finished(stage) == published
    published.opened()
    assert [row["samples_seen"] for row in rows(stage) if "train/loss" in row] == list(range(8, 8 * 60 + 1, 8))
    assert not list((tmp_path / "artifacts" / "learner").glob(".building-*"))

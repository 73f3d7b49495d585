"""Stages that are tracked."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.config import TrackedArtifacts, TrackingMode, TrackingSettings
from pipeline.training.context import StageContext
from pipeline.workflow.frozen import FrozenStage, write_frozen
from pipeline.workflow.progress import SECONDS_UNTIL_SILENT, Outcome, read_progress, write_progress
from tests.support import ROOT
from tests.support.tiny import SCRIPT, frozen, run

KEY = "0123456789abcdef" * 2 + "01234567"
UNREACHABLE = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": KEY}
ALL = list(range(8, 81, 8))
"""`samples_seen` of all rows of a stage that is tracked."""


def tracked(
    outputs: Path,
    mode: TrackingMode = TrackingMode.OFFLINE,
    *,
    artifacts: TrackedArtifacts = TrackedArtifacts.REFERENCE,
    tensorboard: bool = False,
    **settings: Any,
) -> FrozenStage:
    """The stage, frozen to its file as well."""
    tracking = TrackingSettings(mode=mode, project="trial", entity=None, artifacts=artifacts, tensorboard=tensorboard)
    names = {"tracking": tracking, "run": "sweep.1", "group": "sweep", "overrides": ["stage.learner.dropout=0.0"]}
    stage = frozen(outputs, **settings).model_copy(update=names)
    write_frozen(stage)
    return stage


def at_40(happens: Callable[[StageContext], None]) -> None:
    SCRIPT.at_samples, SCRIPT.happens = 40, happens


def stop(context: StageContext) -> None:
    context.interruption.set()


def crash(_context: object) -> None:
    raise RuntimeError("the power went")


def again(stage: FrozenStage) -> Outcome:
    SCRIPT.at_samples = None
    return run(stage)


def start(stage: FrozenStage, **environment: str) -> subprocess.Popen[bytes]:
    """The stage in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.training.worker", str(write_frozen(stage).path)],
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
            **environment,
        },
    )


def is_long_ago(stage: FrozenStage) -> None:
    """Have the stage's process be silent for as long as one that is dead."""
    progress = read_progress(stage.work)
    assert progress is not None
    write_progress(stage.work, replace(progress, updated_at=time.time() - 2 * SECONDS_UNTIL_SILENT))


def wait_until(is_so: Callable[[], bool]) -> None:
    limit = time.monotonic() + 180
    while not is_so():
        assert time.monotonic() < limit, "it took too long"
        time.sleep(0.02)


def no_secret_below(directory: Path) -> None:
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert any(path.name == "wandb.json" for path in files)
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []

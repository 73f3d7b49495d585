"""Stages that are tracked, and what W&B's own reader finds of them on disk."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.config import TrackedArtifacts, TrackingMode, TrackingSettings
from pipeline.tracking.wandb_record import fragments
from pipeline.workflow.frozen import FrozenStage, write_frozen
from tests.support import ROOT
from tests.support.tiny import frozen

KEY = "0123456789abcdef" * 2 + "01234567"
UNREACHABLE = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": KEY}


def tracked(
    outputs: Path,
    mode: TrackingMode = TrackingMode.OFFLINE,
    *,
    artifacts: TrackedArtifacts = TrackedArtifacts.REFERENCE,
    tensorboard: bool = False,
    **settings: Any,
) -> FrozenStage:
    tracking = TrackingSettings(mode=mode, project="trial", entity=None, artifacts=artifacts, tensorboard=tensorboard)
    names = {"tracking": tracking, "run": "sweep.1", "group": "sweep", "overrides": ["stage.learner.dropout=0.0"]}
    return frozen(outputs, **settings).model_copy(update=names)


def records(log: Path, kind: str) -> list[dict[str, Any]]:
    """What W&B's own reader finds in a log."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [record[kind] for record in map(json.loads, lines) if record["type"] == kind]


def history(stage: FrozenStage) -> list[dict[str, Any]]:
    return [record["item"] for log in fragments(stage.work) for record in records(log, "history")]


def config(log: Path) -> dict[str, Any]:
    return records(log, "run")[0]["config"]["update"]


def axis(stage: FrozenStage, name: str) -> list[int]:
    return [row["samples_seen"] for row in history(stage) if name in row]


def crash(_context: object) -> None:
    raise RuntimeError("the power went")


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


def wait_until(is_so: Callable[[], bool]) -> None:
    limit = time.monotonic() + 180
    while not is_so():
        assert time.monotonic() < limit, "it took too long"
        time.sleep(0.02)


def no_secret_below(directory: Path) -> None:
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []

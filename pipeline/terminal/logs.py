"""A stage's log on the terminal."""

import time
from collections import deque
from difflib import get_close_matches
from pathlib import Path

from pipeline.errors import UserError
from pipeline.workflow.artifacts import ArtifactStore
from pipeline.workflow.progress import LOG
from pipeline.workflow.runs import RunRecord

_SECONDS_BETWEEN_LOOKS = 0.5


def stage_log(outputs: Path, record: RunRecord, stage: str) -> Path:
    """Where the log of a run's stage is. Raises `UserError` for an unknown stage, and where nothing is logged yet."""
    fingerprint = record.fingerprint_of(stage)
    if fingerprint is None:
        names = [each.name for each in record.stages]
        close = get_close_matches(stage, names, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UserError(f"run {record.name} has no stage {stage!r}; {hint}its stages are {', '.join(names)}")
    log = ArtifactStore(outputs).work(stage, fingerprint) / LOG
    if not log.exists():
        raise UserError(f"stage {stage} of run {record.name} has no log yet; it has not started: see `unclip status`")
    return log


def show_log(log: Path, lines: int, follow: bool) -> None:
    """Print a log, or its last `lines`; with `follow` go on as it grows."""
    with log.open(encoding="utf-8", errors="replace") as file:
        for line in deque(file, maxlen=lines) if lines else file:
            print(line, end="")
        while follow:
            line = file.readline()
            if line:
                print(line, end="", flush=True)
            else:
                time.sleep(_SECONDS_BETWEEN_LOOKS)

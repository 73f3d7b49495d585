"""Checkpoints of a stage in progress: whole or not there, with a digest, the last few kept."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from pytorch_lightning import Trainer

from pipeline.training.context import StageContext
from pipeline.workflow.artifacts import file_sha256, sync_directory, write_json_atomically
from pipeline.workflow.progress import CHECKPOINTS


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's record: where it is, `samples_seen`, its SHA-256 (hex), and the time spent so far in seconds."""

    path: Path
    samples_seen: int
    sha256: str
    elapsed_s: float


def save_checkpoint(trainer: Trainer, context: StageContext, samples_seen: int, elapsed_s: float, keep: int) -> None:
    """Write a checkpoint beside, flush it to disk and rename it; its record follows, and the oldest go.

    All processes call this; the first one writes the record.
    """
    directory = context.work / CHECKPOINTS
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / f"samples-{samples_seen:012}.ckpt"
    temporary = target.with_suffix(f".tmp-{context.attempt}")
    try:
        trainer.save_checkpoint(temporary)
        if not trainer.is_global_zero:
            return
        _remove_unfinished(directory, context.attempt)
        _sync_file(temporary)
        record = {"samples_seen": samples_seen, "sha256": file_sha256(temporary), "elapsed_s": round(elapsed_s, 3)}
        context.require_ownership()
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    write_json_atomically(target.with_suffix(".json"), record)
    sync_directory(directory)
    for stale in sorted(directory.glob("samples-*.json"))[:-keep]:
        stale.with_suffix(".ckpt").unlink(missing_ok=True)
        stale.unlink()


def latest_checkpoint(work: Path) -> Checkpoint | None:
    """The newest checkpoint that is what its record says; a torn one is passed over with a warning in the log."""
    for record_path in sorted((work / CHECKPOINTS).glob("samples-*.json"), reverse=True):
        path = record_path.with_suffix(".ckpt")
        try:
            checkpoint = Checkpoint(path=path, **json.loads(record_path.read_text()))
            if file_sha256(path) == checkpoint.sha256:
                return checkpoint
        except (json.JSONDecodeError, TypeError, FileNotFoundError):
            pass
        print(f"warning: checkpoint {path} is damaged and passed over; the one before it is used", flush=True)
    return None


def _remove_unfinished(directory: Path, attempt: int) -> None:
    """Remove what earlier attempts were writing when they ended."""
    for left in directory.glob("samples-*.tmp-*"):
        if int(left.suffix.rpartition("-")[2]) < attempt:
            left.unlink(missing_ok=True)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())

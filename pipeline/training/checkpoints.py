"""Checkpoints of a stage in progress. Each is complete or absent, and has a digest. The last few are kept."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from pytorch_lightning import Trainer

from pipeline.training.context import StageContext
from pipeline.training.strategies.portable import PortableStrategy
from pipeline.workflow.artifacts import file_sha256, sync_directory, write_json_atomically
from pipeline.workflow.progress import CHECKPOINTS

SUFFIX = ".ckpt"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's record: its directory, `samples_seen`, the SHA-256 (hex) of its files, seconds spent so far."""

    path: Path
    samples_seen: int
    files: Mapping[str, str]
    elapsed_s: float

    @property
    def writers(self) -> int:
        """How many processes wrote it."""
        return len({name.partition(".")[0] for name in self.files if name.startswith("fragments-")})

    def is_whole(self) -> bool:
        """Whether every file has the digest in the record."""
        return all(file_sha256(self.path / name) == digest for name, digest in self.files.items())


def save_checkpoint(trainer: Trainer, context: StageContext, samples_seen: int, elapsed_s: float, keep: int) -> None:
    """Write a checkpoint under a temporary name, flush it to disk, rename it, then write its record.

    All processes call this, and each writes its part. The first process does the rest and removes the oldest
    checkpoints.
    """
    directory = context.work / CHECKPOINTS
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / f"samples-{samples_seen:012}{SUFFIX}"
    temporary = target.with_suffix(f".tmp-{context.ownership.attempt}")
    if trainer.is_global_zero:
        shutil.rmtree(temporary, ignore_errors=True)
    try:
        trainer.save_checkpoint(temporary, weights_only=False)
        if not trainer.is_global_zero:
            return
        _remove_unfinished(directory, context.ownership.attempt)
        sync_directory(temporary)
        files = cast(PortableStrategy, trainer.strategy).saved_files
        record = {"samples_seen": samples_seen, "files": dict(files), "elapsed_s": round(elapsed_s, 3)}
        context.ownership.require()
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
    finally:
        if trainer.is_global_zero:
            shutil.rmtree(temporary, ignore_errors=True)
    write_json_atomically(target.with_suffix(".json"), record)
    sync_directory(directory)
    for stale in sorted(directory.glob("samples-*.json"))[:-keep]:
        stale.unlink()
        shutil.rmtree(stale.with_suffix(SUFFIX), ignore_errors=True)


def latest_checkpoint(work: Path) -> Checkpoint | None:
    """The newest checkpoint whose files match its record. A damaged one is skipped, with a warning in the log."""
    for record_path in sorted((work / CHECKPOINTS).glob("samples-*.json"), reverse=True):
        path = record_path.with_suffix(SUFFIX)
        try:
            checkpoint = Checkpoint(path=path, **json.loads(record_path.read_text()))
            if checkpoint.is_whole():
                return checkpoint
        except (json.JSONDecodeError, TypeError, AttributeError, OSError):
            pass
        print(f"warning: checkpoint {path} is damaged and passed over; the one before it is used", flush=True)
    return None


def _remove_unfinished(directory: Path, attempt: int) -> None:
    """Remove what earlier attempts were writing when they ended."""
    for left in directory.glob("samples-*.tmp-*"):
        if int(left.suffix.rpartition("-")[2]) < attempt:
            shutil.rmtree(left, ignore_errors=True)

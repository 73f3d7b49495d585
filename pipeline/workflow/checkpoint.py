"""Checkpoints as they lie on disk: a directory, and beside it a record with the digests of its files."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from pydantic import Field, ValidationError

from pipeline.config import NotNegative, NotNegativeFloat, Settings
from pipeline.workflow.digests import sha256_of
from pipeline.workflow.progress import CHECKPOINT_SUFFIX as SUFFIX
from pipeline.workflow.progress import checkpoint_records, samples_of
from pipeline.workflow.record import METRICS, size_of_rows
from pipeline.workflow.sealed import DamagedRecordError, read_json, warn


class Checkpoint(Settings):
    """A checkpoint's record: its directory, `samples_seen`, the SHA-256 (hex) of its files, seconds spent so far.

    `rows_bytes` is how long the stage's record of rows was by then; it only grows. `sizes` are the files' bytes, for
    those who look without reading them (`pipeline.workflow.progress`).
    """

    path: Path
    samples_seen: NotNegative
    files: dict[str, str] = Field(min_length=1)
    elapsed_s: NotNegativeFloat
    rows_bytes: NotNegative = 0  # newer than records that lack it
    sizes: dict[str, NotNegative] = Field(default_factory=dict)  # so are these

    @property
    def writers(self) -> int:
        """How many processes wrote it."""
        return len({name.partition(".")[0] for name in self.files if name.startswith("fragments-")})

    def is_whole(self) -> bool:
        """Whether every file has the digest in the record."""
        try:
            found = sha256_of([self.path / name for name in self.files])
        except (OSError, ValueError):  # a file that is not there, or a name that can be none
            return False
        return found == list(self.files.values())


def checkpoints(work: Path) -> Iterator[tuple[Path, Checkpoint | None]]:
    """The directories of all checkpoints, the newest first, with None for one that is damaged."""
    for record_path in reversed(checkpoint_records(work)):
        path = record_path.with_suffix(SUFFIX)
        try:
            checkpoint = Checkpoint.model_validate({**read_json(record_path), "path": path})
        except (DamagedRecordError, ValidationError, OSError):
            yield path, None
        else:
            is_its_own = checkpoint.samples_seen == samples_of(record_path)
            yield path, checkpoint if is_its_own and checkpoint.is_whole() else None


def latest_checkpoint(work: Path) -> Checkpoint | None:
    """The newest checkpoint whose files match its record. A damaged one is skipped, with a warning in the log."""
    damaged = []
    for path, checkpoint in checkpoints(work):
        if checkpoint is not None:
            _warn_of_damaged(damaged, checkpoint)
            if size_of_rows(work) < checkpoint.rows_bytes:
                warn(f"{work / METRICS} lost rows from before {checkpoint.samples_seen:,} samples; the others are kept")
            return checkpoint
        damaged.append(path)
    _warn_of_damaged(damaged, None)
    return None


def said_of_damaged(path: Path, instead: Checkpoint | None, *, is_finished: bool = False) -> str:
    """That a checkpoint is damaged, and what is used in its place; of a finished stage nothing is."""
    used = "none before it is whole, and the stage begins anew" if instead is None else "the one before it is used"
    return f"{path} is damaged and passed over; {'its stage is finished, and needs none' if is_finished else used}"


def _warn_of_damaged(paths: Iterable[Path], instead: Checkpoint | None) -> None:
    for path in paths:
        warn(f"checkpoint {said_of_damaged(path, instead)}")

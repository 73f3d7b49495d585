"""Checkpoints of a stage in progress. Each is complete or absent, and has a digest. The last few are kept."""

import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from pytorch_lightning import Trainer

from pipeline.training.context import StageContext
from pipeline.training.ranks import gather_objects
from pipeline.training.strategies.part import CheckpointPart
from pipeline.training.strategies.portable import PortableStrategy
from pipeline.workflow.checkpoint import SUFFIX, latest_checkpoint
from pipeline.workflow.progress import CHECKPOINTS
from pipeline.workflow.publish import sync
from pipeline.workflow.record import size_of_rows
from pipeline.workflow.sealed import write_json_atomically

_MARGIN = 1.1

T = TypeVar("T")


class CheckpointWriter:
    """Saves checkpoints while training goes on, one at a time, as far as the host has memory for a copy of the state.

    A checkpoint is taken at a step: all processes copy their parts, and a thread in each writes its own under a
    temporary name and flushes it to disk. It is made at a later step, at which all of them have: the first process
    renames it, writes its record and removes the oldest ones.
    """

    def __init__(self, context: StageContext, keep: int) -> None:
        """`keep` is how many checkpoints stay."""
        self._context = context
        self._keep = keep
        self._write: _Write | None = None

    @property
    def is_busy(self) -> bool:
        """Whether this process's part is being written now."""
        return self._write is not None and self._write.is_running

    def begin(self, trainer: Trainer, samples_seen: int, elapsed_s: float) -> None:
        """Take a checkpoint and begin to write it, after the one before; all processes call this."""
        self.finish()
        target = self._context.work / CHECKPOINTS / f"samples-{samples_seen:012}{SUFFIX}"
        attempt = self._context.ownership.attempt
        trainer.save_checkpoint(target.with_suffix(f".tmp-{attempt}"), weights_only=False)
        part = cast(PortableStrategy, trainer.strategy).take_part()
        error = None
        if trainer.is_global_zero:
            try:
                _remove_unfinished(target.parent, attempt)
                _make_room(self._context.work)
                shutil.rmtree(part.directory, ignore_errors=True)
                part.directory.mkdir(parents=True)
            except OSError as caught:
                error = caught
        _gather_or_fail((), error, part.directory)
        record = {
            "samples_seen": samples_seen,
            "elapsed_s": round(elapsed_s, 3),
            "rows_bytes": size_of_rows(self._context.work),
        }
        self._write = _Write(part, target, record)

    def finish(self) -> None:
        """Wait until all parts are written and make the checkpoint, if there is one to make; all processes call this.

        Raises `OSError` on a process that could not write its part, and `RuntimeError` on the others.
        """
        write, self._write = self._write, None
        if write is None:
            return
        try:
            digests, error = write.wait()
            parts = _gather_or_fail(digests, error, write.directory)
            files = {name: digest for part in parts for name, digest in part.items()}
            if self._context.is_first_process:
                self._make(write, files)
        finally:
            self._remove(write)

    def give_up(self) -> None:
        """Leave a checkpoint that is not made yet. After this, this process writes nothing more of it."""
        write, self._write = self._write, None
        if write is not None:
            write.cancel()
            self._remove(write)

    def _make(self, write: "_Write", files: Mapping[str, str]) -> None:
        target = write.target
        sync(write.directory)
        self._context.ownership.require()
        if target.exists():
            shutil.rmtree(target)
        write.directory.rename(target)
        sizes = {name: (target / name).stat().st_size for name in files}
        write_json_atomically(target.with_suffix(".json"), {**write.record, "files": files, "sizes": sizes})
        sync(target.parent)
        for stale in sorted(target.parent.glob("samples-*.json"))[: -self._keep]:
            _remove_checkpoint(stale)

    def _remove(self, write: "_Write") -> None:
        if self._context.is_first_process:
            shutil.rmtree(write.directory, ignore_errors=True)


class _Write:
    """A part on its way to disk: in a thread, or at once where training would change it meanwhile."""

    def __init__(self, part: CheckpointPart, target: Path, record: Mapping[str, Any]) -> None:
        self.directory = part.directory
        self.target = target
        self.record = record
        self._cancelled = threading.Event()
        self._digests: dict[str, str] = {}
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(part,), name="checkpoint", daemon=True)
        self._thread.start()
        if not part.is_copied:
            self._thread.join()

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def wait(self) -> tuple[dict[str, str], Exception | None]:
        """The digests of what was written, and what went wrong."""
        self._thread.join()
        return self._digests, self._error

    def cancel(self) -> None:
        self._cancelled.set()
        self._thread.join()

    def _run(self, part: CheckpointPart) -> None:
        try:
            self._digests = part.write(self._cancelled)
        except Exception as error:  # a thread's own would be lost: `finish` raises it at a step, on all processes
            self._error = error


def _gather_or_fail(own: T, error: Exception | None, directory: Path) -> list[T]:
    """What every process has. If one of them had an error, that one raises it, and the others a `RuntimeError`."""
    found = gather_objects((own, None if error is None else str(error)))
    if error is not None:
        raise error
    for rank, (_, failure) in enumerate(found):
        if failure is not None:
            raise RuntimeError(f"process {rank} could not write its part of {directory}: {failure}")
    return [each for each, _ in found]


def _remove_unfinished(directory: Path, attempt: int) -> None:
    """Remove what earlier attempts were writing when they ended."""
    for left in directory.glob("samples-*.tmp-*"):
        if int(left.suffix.rpartition("-")[2]) < attempt:
            shutil.rmtree(left, ignore_errors=True)


def _make_room(work: Path) -> None:
    """Where the disk has no room for another checkpoint, keep the newest whole one alone, while the next is written."""
    records = sorted((work / CHECKPOINTS).glob("samples-*.json"))
    if len(records) < 2:
        return
    size = sum(file.stat().st_size for file in records[-1].with_suffix(SUFFIX).iterdir())
    if shutil.disk_usage(work).free > _MARGIN * size:
        return
    kept = latest_checkpoint(work)
    for record in records:
        if kept is not None and record.with_suffix(SUFFIX) != kept.path:
            _remove_checkpoint(record)


def _remove_checkpoint(record: Path) -> None:
    record.unlink()
    shutil.rmtree(record.with_suffix(SUFFIX), ignore_errors=True)

"""What is made of a stage's record: Weights & Biases and TensorBoard."""

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from pipeline.config import TrackingMode
from pipeline.errors import StageInterrupted
from pipeline.tracking.sending import Sending
from pipeline.tracking.tensorboard import TensorBoard
from pipeline.tracking.wandb_record import WandbRecord, begun, read_record, write_record
from pipeline.tracking.wandb_run import Ending
from pipeline.workflow.frozen import FrozenStage
from pipeline.workflow.ownership import Ownership, StageLost
from pipeline.workflow.record import AXIS, PICTURE, append, read_standing, resume


class Tracker(AbstractContextManager["Tracker"]):
    """Adds one stage's rows and pictures to its record, on the axis `samples_seen`.

    A process that does not own the stage adds nothing. What the record holds past `resumes_at` is superseded, since it
    is logged again. Where tracking is online, W&B is sent the record as it grows.
    """

    def __init__(self, frozen: FrozenStage, ownership: Ownership, resumes_at: int) -> None:
        self._frozen = frozen
        self._ownership = ownership
        self._resumes_at = resumes_at
        self._sending: Sending | None = None
        self._tensorboard: TensorBoard | None = None

    def __enter__(self) -> "Tracker":
        if self._ownership.writes:
            tracking, work = self._frozen.tracking, self._frozen.work
            resume(work, self._resumes_at)
            if tracking.tensorboard:
                self._tensorboard = TensorBoard(work, read_standing(work))
            if tracking.mode is not TrackingMode.NONE and read_record(work) is None:
                write_record(work, begun(self._frozen))
            if tracking.mode is TrackingMode.ONLINE:
                self._sending = Sending(self._frozen)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._sending is None:
            return
        if kind is not None and (not self._ownership.writes or issubclass(kind, StageLost)):
            self._sending.abandon()  # the run is another process's now
        else:
            self._sending.finish(_ending(kind))

    @property
    def wandb_record(self) -> WandbRecord | None:
        """The W&B run of this stage, if it ever had one."""
        return read_record(self._frozen.work)

    def log(self, samples_seen: int, metrics: Mapping[str, float]) -> None:
        """Add one row."""
        self._add({AXIS: samples_seen, **metrics})

    def log_picture(self, samples_seen: int, name: str, picture: Path, captions: Sequence[str]) -> None:
        """Add a picture that is on disk, captioned. One outside the work directory is copied into it."""
        work = self._frozen.work
        if self._ownership.writes and not picture.is_relative_to(work):
            # An artifact's directory has another name once it is published, and may be removed.
            kept = work / "pictures" / f"{name.replace('/', '-')}-{samples_seen:012}{picture.suffix}"
            kept.parent.mkdir(exist_ok=True)
            picture = shutil.copyfile(picture, kept)
        self._add({AXIS: samples_seen, PICTURE: name, "file": os.path.relpath(picture, work), "captions": [*captions]})

    def _add(self, entry: dict[str, Any]) -> None:
        if not self._ownership.writes:
            return
        append(self._frozen.work, entry)
        if self._sending is not None:
            self._sending.keep_up()
        if self._tensorboard is not None:
            self._tensorboard.add(entry)


def _ending(kind: type[BaseException] | None) -> Ending:
    if kind is None:
        return Ending.FINISHED
    return Ending.INTERRUPTED if issubclass(kind, StageInterrupted) else Ending.FAILED

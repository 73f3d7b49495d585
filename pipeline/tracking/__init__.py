"""Where a stage's rows and pictures go: its own record (`metrics.jsonl`), Weights & Biases, and TensorBoard."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from pipeline.config import TrackingMode
from pipeline.errors import StageInterrupted
from pipeline.tracking.own_record import append, cut_back
from pipeline.tracking.settle import send_entries, send_lacking
from pipeline.tracking.tensorboard import TensorBoard
from pipeline.tracking.wandb_record import WandbRecord, read_record
from pipeline.tracking.wandb_run import Ending, WandbRun
from pipeline.workflow.artifacts import Artifact
from pipeline.workflow.frozen import FrozenStage
from pipeline.workflow.ownership import Ownership, StageLost
from pipeline.workflow.record import AXIS, METRICS, PICTURES


class Tracker(AbstractContextManager["Tracker"]):
    """Logs one stage's rows, pictures and summary on the axis `samples_seen`.

    A process that does not own the stage logs nothing. What the own record holds past `resumes_at` is dropped, since it
    will be logged again; what of it W&B has already is not sent there twice.
    """

    def __init__(self, frozen: FrozenStage, ownership: Ownership | None, resumes_at: int) -> None:
        self._frozen = frozen
        self._ownership = ownership
        self._resumes_at = resumes_at
        self._wandb: WandbRun | None = None
        self._tensorboard: TensorBoard | None = None

    def __enter__(self) -> "Tracker":
        if self._is_owner:
            cut_back(self._frozen.work, self._resumes_at)
            if self._frozen.tracking.tensorboard:
                self._tensorboard = TensorBoard(self._frozen.work, first_samples=self._resumes_at + 1)
            if self._frozen.tracking.mode is not TrackingMode.NONE:
                self._wandb = WandbRun.begun(self._frozen)
                # What a kill took before it was on disk or uploaded, or was logged before W&B was on.
                send_entries(self._wandb, self._frozen.work)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is None:
            return
        ending = Ending.FINISHED if kind is None else self._ending(kind)
        if ending is not Ending.LOST and self._wandb.is_cut_off:
            print("W&B's process was ended by a signal; its run is opened once more", flush=True)
            self._wandb.abandon()
            self._wandb = WandbRun.begun(self._frozen)
            send_lacking(self._wandb, self._frozen)
        self._wandb.finish(ending)

    @property
    def wandb_record(self) -> WandbRecord | None:
        """The W&B run of this stage, if it ever had one."""
        return read_record(self._frozen.work)

    @property
    def _is_owner(self) -> bool:
        return self._ownership is not None and not self._ownership.is_lost

    def log(self, samples_seen: int, metrics: Mapping[str, float]) -> None:
        """Add one row."""
        if not self._is_owner:
            return
        row = {AXIS: samples_seen, **metrics}
        append(self._frozen.work, METRICS, row)
        if self._wandb is not None:
            self._wandb.log(row)
        if self._tensorboard is not None:
            self._tensorboard.log(row)

    def log_picture(self, samples_seen: int, name: str, picture: Path, captions: Sequence[str]) -> None:
        """Add a picture that is on disk, captioned."""
        if not self._is_owner:
            return
        entry = {AXIS: samples_seen, "name": name, "file": str(picture.absolute()), "captions": list(captions)}
        append(self._frozen.work, PICTURES, entry)
        if self._wandb is not None:
            self._wandb.log_picture(samples_seen, name, picture, captions)
        if self._tensorboard is not None:
            self._tensorboard.log_picture(samples_seen, name, picture, captions)

    def summarise(self, metrics: Mapping[str, float]) -> None:
        """Set the final metrics."""
        if self._wandb is not None:
            self._wandb.summarise(metrics)

    def log_artifact(self, artifact: Artifact) -> None:
        """Name what the stage published as the output of its W&B run."""
        if self._wandb is not None:
            self._wandb.log_artifact(artifact)

    def _ending(self, kind: type[BaseException]) -> Ending:
        if not self._is_owner or issubclass(kind, StageLost):
            return Ending.LOST
        return Ending.INTERRUPTED if issubclass(kind, StageInterrupted) else Ending.FAILED

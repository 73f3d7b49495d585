"""Where a stage's rows and pictures go: its own record (`metrics.jsonl`), Weights & Biases, and TensorBoard."""

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from pipeline.config import TrackingMode
from pipeline.errors import StageInterrupted
from pipeline.training.tracking.tensorboard import TensorBoard
from pipeline.training.tracking.wandb_record import WandbRecord, read_record
from pipeline.training.tracking.wandb_run import Ending, WandbRun
from pipeline.workflow.artifacts import Artifact
from pipeline.workflow.frozen import FrozenStage
from pipeline.workflow.metrics import AXIS, METRICS, PICTURES
from pipeline.workflow.ownership import Ownership


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
            rows = self._forget_what_comes_again(METRICS)
            pictures = self._forget_what_comes_again(PICTURES)
            if self._frozen.tracking.tensorboard:
                self._tensorboard = TensorBoard(self._frozen.work, first_samples=self._resumes_at + 1)
            if self._frozen.tracking.mode is not TrackingMode.NONE:
                self._wandb = WandbRun(self._frozen)
                self._send_what_it_lacks(self._wandb, rows, pictures)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish(_ending(kind))

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
        self._record(METRICS, row)
        if self._wandb is not None:
            self._wandb.log(row)
        if self._tensorboard is not None:
            self._tensorboard.log(row)

    def log_picture(self, samples_seen: int, name: str, picture: Path, captions: Sequence[str]) -> None:
        """Add a picture that is on disk, captioned."""
        if not self._is_owner:
            return
        entry = {AXIS: samples_seen, "name": name, "file": str(picture.absolute()), "captions": list(captions)}
        self._record(PICTURES, entry)
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

    def _record(self, name: str, entry: Mapping[str, Any]) -> None:
        with (self._frozen.work / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def _forget_what_comes_again(self, name: str) -> list[dict[str, Any]]:
        """Cut an own record back to the checkpoint that training resumes from; the entries that stay."""
        path = self._frozen.work / name
        if not path.exists():
            return []
        entries = [row for line in path.read_text(encoding="utf-8").splitlines() if (row := _read_row(line))]
        kept = [entry for entry in entries if entry[AXIS] <= self._resumes_at]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(f"{json.dumps(entry)}\n" for entry in kept), encoding="utf-8")
        temporary.replace(path)
        return kept

    @staticmethod
    def _send_what_it_lacks(run: WandbRun, rows: list[dict[str, Any]], pictures: list[dict[str, Any]]) -> None:
        """What a kill took before it was on disk, or was logged before W&B was on; in the order of the axis."""
        for entry in sorted([*rows, *pictures], key=lambda entry: entry[AXIS]):
            if "captions" not in entry:
                run.log(entry)
            elif Path(entry["file"]).exists():
                run.log_picture(entry[AXIS], entry["name"], Path(entry["file"]), entry["captions"])


def _read_row(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None  # the row that a kill cut short


def _ending(kind: type[BaseException] | None) -> Ending:
    if kind is None:
        return Ending.FINISHED
    return Ending.INTERRUPTED if issubclass(kind, StageInterrupted) else Ending.FAILED

"""The one door to Weights & Biases, beside the project's own record of the same rows (`metrics.jsonl`)."""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.config import TrackingMode
from pipeline.workflow.frozen import FrozenStage
from pipeline.workflow.metrics import AXIS, METRICS
from pipeline.workflow.ownership import Ownership


class Tracker(AbstractContextManager["Tracker"]):
    """Logs one stage's rows, pictures and summary on the axis `samples_seen`.

    A process that does not own the stage logs nothing. W&B writes below the stage's work directory and asks for no
    account unless `tracking=wandb`.
    """

    def __init__(self, frozen: FrozenStage, ownership: Ownership | None) -> None:
        self._frozen = frozen
        self._path = frozen.work / METRICS
        self._ownership = ownership
        self._run: Any = None

    def __enter__(self) -> "Tracker":
        if self._is_owner and self._frozen.tracking.mode is not TrackingMode.NONE:
            self._run = _start_wandb(self._frozen)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._run is not None:
            self._run.finish(exit_code=0 if kind is None else 1)

    @property
    def _is_owner(self) -> bool:
        return self._ownership is not None and not self._ownership.is_lost

    def log(self, samples_seen: int, metrics: Mapping[str, float]) -> None:
        """Add one row."""
        if not self._is_owner:
            return
        row = {AXIS: samples_seen, **metrics}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self._run is not None:
            self._run.log(row)

    def log_picture(self, samples_seen: int, name: str, picture: Path, captions: Sequence[str]) -> None:
        """Add a picture that is on disk, captioned."""
        if self._run is None:
            return
        import wandb

        with Image.open(picture) as image:
            self._run.log({AXIS: samples_seen, name: wandb.Image(image, caption="\n".join(captions))})

    def summarise(self, metrics: Mapping[str, float]) -> None:
        """Set the final metrics."""
        if self._run is not None:
            self._run.summary.update(dict(metrics))

    def forget_after(self, samples_seen: int) -> None:
        """Drop the own rows past a checkpoint that training resumes from, since they will be logged again."""
        if not self._is_owner or not self._path.exists():
            return
        rows = [line for line in self._path.read_text().splitlines() if _is_row_until(line, samples_seen)]
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(f"{row}\n" for row in rows))
        temporary.replace(self._path)


def _is_row_until(line: str, samples_seen: int) -> bool:
    try:
        return json.loads(line)[AXIS] <= samples_seen
    except json.JSONDecodeError:
        return False  # the row that a kill cut short


def _start_wandb(frozen: FrozenStage) -> Any:
    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")
    run = wandb.init(
        project=frozen.tracking.project,
        entity=frozen.tracking.entity,
        group=frozen.group,
        job_type=frozen.kind,
        name=f"{frozen.run}/{frozen.stage}",
        mode="online" if frozen.tracking.mode is TrackingMode.ONLINE else "offline",
        dir=str(frozen.work),
        config=frozen.model_dump(mode="json"),
        settings=wandb.Settings(console="off", disable_git=True, save_code=False, silent=True),
        reinit="finish_previous",
    )
    run.define_metric(AXIS)
    run.define_metric("*", step_metric=AXIS)
    return run

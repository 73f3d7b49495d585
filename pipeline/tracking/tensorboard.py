"""A stage's record as TensorBoard's event files, below the work directory."""

import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.errors import UserError
from pipeline.workflow.record import AXIS, PICTURE, Entry
from pipeline.workflow.sealed import opened

DIRECTORY = "tensorboard"


class TensorBoard:
    """Writes event files anew from the entries that stand when a stage starts, and goes on with those that follow."""

    def __init__(self, work: Path, standing: Iterable[Entry]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                "tracking.tensorboard=true needs the package tensorboard, which is not installed; "
                "install it with `pip install -e '.[tensorboard]'`, or set tracking.tensorboard=false"
            ) from error
        self._work = work
        shutil.rmtree(work / DIRECTORY, ignore_errors=True)
        # A reader that is open drops what it has read of the earlier files.
        self._writer = SummaryWriter(work / DIRECTORY, purge_step=0)
        for entry in standing:
            self._add(entry)
        self._writer.flush()

    def add(self, entry: Entry) -> None:
        """Add a row or a picture."""
        self._add(entry)
        self._writer.flush()

    def _add(self, entry: Entry) -> None:
        step = entry[AXIS]
        if PICTURE not in entry:
            for name, value in entry.items():
                if name != AXIS:
                    self._writer.add_scalar(name, value, step)
            return
        name, file = entry[PICTURE], self._work / entry["file"]
        if file.exists():
            # Pillow raises all sorts for what is no picture.
            with suppress(Exception), opened(file) as content, Image.open(content) as image:
                self._writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
            self._writer.add_text(f"{name}/captions", "\n".join(f"- {each}" for each in entry["captions"]), step)

    def close(self) -> None:
        """Flush what is not on disk yet."""
        self._writer.close()

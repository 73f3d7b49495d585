"""The same rows and pictures as TensorBoard's event files, below the work directory."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.errors import UserError
from pipeline.workflow.record import AXIS

DIRECTORY = "tensorboard"


class TensorBoard:
    """Writes event files. Steps from `first_samples` on, left by an earlier start, are purged by who reads them."""

    def __init__(self, work: Path, first_samples: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                "tracking.tensorboard=true needs the package tensorboard, which is not installed; "
                "install it with `pip install -e '.[tensorboard]'`, or set tracking.tensorboard=false"
            ) from error
        self._writer = SummaryWriter(work / DIRECTORY, purge_step=first_samples)

    def log(self, row: Mapping[str, float]) -> None:
        """Add one row."""
        for name, value in row.items():
            if name != AXIS:
                self._writer.add_scalar(name, value, int(row[AXIS]))
        self._writer.flush()

    def log_picture(self, samples_seen: int, name: str, picture: Path, captions: Sequence[str]) -> None:
        """Add a picture that is on disk, and its captions as a list beside it."""
        with Image.open(picture) as image:
            pixels = np.asarray(image.convert("RGB"))
        self._writer.add_image(name, pixels, samples_seen, dataformats="HWC")
        self._writer.add_text(f"{name}/captions", "\n".join(f"- {caption}" for caption in captions), samples_seen)
        self._writer.flush()

    def close(self) -> None:
        """Flush what is not on disk yet."""
        self._writer.close()

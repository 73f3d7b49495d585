"""Fréchet distance in DINOv2 (arXiv 2306.04675)."""

from typing import TYPE_CHECKING, ClassVar

from pipeline.workflow.declaration import Better
from stages.evaluate.metric import DINOV2, Distance

if TYPE_CHECKING:
    from torch import Tensor


class FdDinov2(Distance):
    """Of all made pictures from the real ones of their captions."""

    usual_encoder: ClassVar = DINOV2
    better: ClassVar = dict.fromkeys(("fd_dinov2", "*/fd_dinov2"), Better.LOW)

    def between(self, made: "Tensor", real: "Tensor") -> dict[str, float]:
        """`fd_dinov2`."""
        from stages.evaluate.distances import frechet_distance

        return {"fd_dinov2": frechet_distance(made, real)}


METRIC = FdDinov2

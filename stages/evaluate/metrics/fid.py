"""Fréchet Inception distance (arXiv 1706.08500)."""

from typing import TYPE_CHECKING, ClassVar

from pipeline.workflow.declaration import Better
from stages.evaluate.metric import INCEPTION, Distance

if TYPE_CHECKING:
    from torch import Tensor


class Fid(Distance):
    """Of all made pictures from the real ones of their captions."""

    usual_encoder: ClassVar = INCEPTION
    better: ClassVar = dict.fromkeys(("fid", "*/fid"), Better.LOW)

    def between(self, made: "Tensor", real: "Tensor") -> dict[str, float]:
        """`fid`."""
        from stages.evaluate.distances import frechet_distance

        return {"fid": frechet_distance(made, real)}


METRIC = Fid

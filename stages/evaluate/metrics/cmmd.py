"""CMMD: the maximum mean discrepancy of CLIP embeddings (arXiv 2401.09603)."""

from typing import TYPE_CHECKING, ClassVar

from pipeline.workflow.declaration import Better
from stages.evaluate.metric import OPEN_CLIP, Distance

if TYPE_CHECKING:
    from torch import Tensor


class Cmmd(Distance):
    """Of all made pictures from the real ones of their captions."""

    usual_encoder: ClassVar = OPEN_CLIP
    better: ClassVar = dict.fromkeys(("cmmd", "*/cmmd"), Better.LOW)

    def between(self, made: "Tensor", real: "Tensor") -> dict[str, float]:
        """`cmmd`."""
        from stages.evaluate.distances import rbf_distance

        return {"cmmd": rbf_distance(made, real)}


METRIC = Cmmd

"""Kernel Inception distance (arXiv 1801.01401)."""

from typing import TYPE_CHECKING, ClassVar

from pipeline.workflow.declaration import Better
from stages.evaluate.metric import INCEPTION, Distance

if TYPE_CHECKING:
    from torch import Tensor


class Kid(Distance):
    """Of all made pictures from the real ones of their captions; not in thousandths."""

    usual_encoder: ClassVar = INCEPTION
    better: ClassVar = dict.fromkeys(("kid", "*/kid"), Better.LOW)

    def between(self, made: "Tensor", real: "Tensor") -> dict[str, float]:
        """`kid`."""
        from stages.evaluate.distances import kernel_distance

        return {"kid": kernel_distance(made, real)}


METRIC = Kid

"""Improved precision and recall (arXiv 1904.06991)."""

from typing import TYPE_CHECKING, ClassVar

from pipeline.workflow.declaration import Better
from stages.evaluate.metric import INCEPTION, Distance, Features

if TYPE_CHECKING:
    from torch import Tensor


class PrecisionRecall(Distance):
    """How many made pictures look real, and how much of what is real is made; k = 3."""

    usual_encoder: ClassVar = INCEPTION
    better: ClassVar = dict.fromkeys(("precision", "recall", "*/precision", "*/recall"), Better.HIGH)

    def of(self, features: Features) -> dict[str, float]:
        """Shares, and so are the ends of their intervals."""
        return {name: min(1.0, max(0.0, value)) for name, value in super().of(features).items()}

    def between(self, made: "Tensor", real: "Tensor") -> dict[str, float]:
        """`precision` and `recall`."""
        from stages.evaluate.distances import precision_and_recall

        return dict(zip(("precision", "recall"), precision_and_recall(made, real), strict=True))


METRIC = PrecisionRecall

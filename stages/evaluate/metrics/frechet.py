"""Fréchet distance of made pictures from real ones, in a CLIP that nothing was fitted to."""

from typing import ClassVar

from pipeline.workflow.declaration import Better
from stages.evaluate.metric import JUDGE_CLIP, FeatureMetric, Features


class FrechetDistance(FeatureMetric):
    """Of half of the made pictures from the other half's real ones, and of the real halves.

    Halves, so that both distances are of equally many pictures and none is of a caption with itself.
    """

    usual_encoder: ClassVar = JUDGE_CLIP
    better: ClassVar = {"*/frechet": Better.LOW}

    def __init__(self, encoder: str | None = None) -> None:
        super().__init__(encoder)
        self.prefix = f"{self.encoder}/"

    def of(self, features: Features) -> dict[str, float]:
        """None of fewer than four pictures."""
        from stages.evaluate.distances import frechet_distance

        made, real = features.made, features.real
        if len(real) < 4:
            return {}
        return {
            "frechet": frechet_distance(made[::2], real[1::2]),
            "frechet_of_real": frechet_distance(real[::2], real[1::2]),
        }


METRIC = FrechetDistance

"""CLIP score (arXiv 2104.08718): how near pictures are to their captions in a CLIP of others."""

from typing import ClassVar

from pipeline.workflow.declaration import Better
from stages.evaluate.metric import OPEN_CLIP, FeatureMetric, Features


class ClipScore(FeatureMetric):
    """100 times the mean cosine, of made and of real pictures, as torchmetrics has it."""

    usual_encoder: ClassVar = OPEN_CLIP
    better: ClassVar = dict.fromkeys(("clip_score", "*/clip_score"), Better.HIGH)

    def of(self, features: Features) -> dict[str, float]:
        """None in an encoder that knows no captions."""
        from torch.nn.functional import cosine_similarity

        from stages.evaluate.estimate import mean

        if features.text is None:
            return {}
        pictures = {"clip_score": features.made, "clip_score_of_real": features.real}
        cosines = {name: cosine_similarity(each, features.text) for name, each in pictures.items()}
        return {key: value for name, each in cosines.items() for key, value in mean(100 * each).named(name).items()}


METRIC = ClipScore

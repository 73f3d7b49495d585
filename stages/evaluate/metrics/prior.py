"""How near the prior's image embeddings are to what they stand for."""

from typing import ClassVar

from pipeline.workflow.declaration import Better
from stages.evaluate.metric import Embeds, Metric


class PriorCosines(Metric):
    """Mean cosines of the prior's embeddings to the true image's, another image's, the caption's."""

    better: ClassVar = {"prior/to_image": Better.HIGH}

    def results(self, embeds: Embeds) -> dict[str, float]:
        """None without a prior."""
        from torch.nn.functional import cosine_similarity

        if embeds.sampled is None:
            return {}
        real, text = embeds.in_clip[""].real, embeds.in_clip[""].text
        return {
            "prior/to_image": float(cosine_similarity(embeds.sampled, real).mean()),
            "prior/to_other_image": float(cosine_similarity(embeds.sampled, real.roll(1, 0)).mean()),
            "prior/to_caption": float(cosine_similarity(embeds.sampled, text).mean()),
            "prior/caption_to_image": float((text * real).sum(1).mean()),
        }


METRIC = PriorCosines

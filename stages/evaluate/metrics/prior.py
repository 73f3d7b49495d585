"""How near the prior's image embeddings are to what they stand for."""

from typing import ClassVar

from pipeline.workflow.declaration import Better
from stages.evaluate.metric import CLIP, Embeds, Metric


class PriorCosines(Metric):
    """Mean cosines of the prior's embeddings to the true image's, another image's, the caption's."""

    better: ClassVar = {"prior/to_image": Better.HIGH}

    def results(self, embeds: Embeds) -> dict[str, float]:
        """None without a prior."""
        from torch.nn.functional import cosine_similarity

        from stages.evaluate.estimate import mean

        if embeds.sampled is None:
            return {}
        own = embeds.by_encoder[CLIP]
        assert own.text is not None, "a CLIP has captions"
        cosines = {
            "prior/to_image": cosine_similarity(embeds.sampled, own.real),
            "prior/to_other_image": cosine_similarity(embeds.sampled, own.real.roll(1, 0)),
            "prior/to_caption": cosine_similarity(embeds.sampled, own.text),
            "prior/caption_to_image": (own.text * own.real).sum(1),
        }
        return {key: value for name, each in cosines.items() for key, value in mean(each).named(name).items()}


METRIC = PriorCosines

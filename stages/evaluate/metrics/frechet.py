"""Fréchet distance of made pictures from real ones, in a CLIP that nothing was fitted to."""

from typing import TYPE_CHECKING, ClassVar

from pipeline.workflow.declaration import Better
from stages.evaluate.metric import Embeds, Metric

if TYPE_CHECKING:
    from torch import Tensor


class FrechetDistance(Metric):
    """Of half of the made pictures from the other half's real ones, and of the real halves.

    Halves, so that both distances are of equally many pictures and none is of a caption with itself.
    """

    better: ClassVar = {"judge_clip/frechet": Better.LOW}

    def results(self, embeds: Embeds) -> dict[str, float]:
        """None without the other CLIP, and none of fewer than four pictures."""
        found = embeds.in_clip.get("judge_clip/")
        if found is None or len(found.real) < 4:
            return {}
        return {
            "judge_clip/frechet": frechet_distance(found.made[::2], found.real[1::2]),
            "judge_clip/frechet_of_real": frechet_distance(found.real[::2], found.real[1::2]),
        }


def frechet_distance(embed: "Tensor", reference_embed: "Tensor") -> float:
    """Fréchet distance of embeddings float [N, E] from a reference float [M, E], N and M at least 2 (arXiv 1706.08500).

    It depends on how many there are: compare only values of equal N and M.
    """
    from torch import nn
    from torchmetrics.image.fid import FrechetInceptionDistance

    # In the place of torchmetrics' network: what it is given are features already.
    features = nn.Identity()
    features.num_features = embed.shape[1]  # pyright: ignore[reportArgumentType]
    distance = FrechetInceptionDistance(feature=features)
    distance.update(reference_embed.double().cpu(), real=True)
    distance.update(embed.double().cpu(), real=False)
    return float(distance.compute())


METRIC = FrechetDistance

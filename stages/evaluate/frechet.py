"""Fréchet distance of embeddings."""

from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance


class _FeaturesGiven(nn.Identity):
    """In the place of torchmetrics' network: what it is given are features already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def frechet_distance(embed: Tensor, reference_embed: Tensor) -> float:
    """Fréchet distance of embeddings float [N, E] from a reference float [M, E], N and M at least 2 (arXiv 1706.08500).

    It depends on how many there are: compare only values of equal N and M.
    """
    distance = FrechetInceptionDistance(feature=_FeaturesGiven(embed.shape[1]))
    distance.update(reference_embed.double().cpu(), real=True)
    distance.update(embed.double().cpu(), real=False)
    return float(distance.compute())

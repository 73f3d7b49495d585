"""Figures that tell how good a network is."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

RECALL_AT = (1, 5, 10)


def retrieval_recall(image_embed: Tensor, text_embed: Tensor, pool: int) -> dict[str, float]:
    """Recall at 1, 5 and 10 of retrieval in both directions, averaged; in [0, 1].

    `image_embed` and `text_embed` float [N, E] are L2-normalised and belong together by row. Once among consecutive
    pools of `pool` rows (the last, smaller one is left out if there are others), as `R@1/64`, and once among all N, as
    `R@1/all`. Equal captions count as misses of each other.
    """
    samples = len(image_embed)
    size = min(pool, samples)
    pools = samples // size
    shape = (pools, size, -1)
    pooled_ranks = _ranks(image_embed[: pools * size].reshape(shape), text_embed[: pools * size].reshape(shape))
    all_ranks = _ranks(image_embed[None], text_embed[None])
    recall = {f"R@{at}/{size}": _share_below(pooled_ranks, at) for at in RECALL_AT}
    return recall | {f"R@{at}/all": _share_below(all_ranks, at) for at in RECALL_AT}


def _ranks(image_embed: Tensor, text_embed: Tensor) -> Tensor:
    """How many wrong candidates are at least as similar as the right one; [P, N, E] twice -> int64 [2, P, N]."""
    similarity = text_embed @ image_embed.transpose(1, 2)
    right = similarity.diagonal(dim1=1, dim2=2)
    text_to_image = (similarity >= right[:, :, None]).sum(2) - 1
    image_to_text = (similarity >= right[:, None, :]).sum(1) - 1
    return torch.stack([text_to_image, image_to_text])


def _share_below(ranks: Tensor, at: int) -> float:
    return float((ranks < at).float().mean())


def peak_signal_to_noise(image: Tensor, truth: Tensor) -> float:
    """Mean PSNR in dB of pictures float [B, 3, H, W] in [-1, 1] against their truth."""
    mean_square = (image.clamp(-1, 1) - truth).float().square().flatten(1).mean(1).clamp(min=1e-10)
    return float((10 * torch.log10(4.0 / mean_square)).mean())


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


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % confidence interval."""

    value: float
    low: float
    high: float


_Z_95 = 1.959964
"""The 97.5 % quantile of the standard normal distribution."""


def proportion(right: Tensor) -> Estimate:
    """The share of true values in bool [N], with Wilson's score interval (which holds near 0 and 1 too)."""
    samples, share = len(right), float(right.float().mean())
    spread = _Z_95**2 / samples
    centre = (share + spread / 2) / (1 + spread)
    half = _Z_95 * ((share * (1 - share) + spread / 4) / samples) ** 0.5 / (1 + spread)
    return Estimate(share, max(0.0, centre - half), min(1.0, centre + half))


def mean_of_shares(right: Tensor) -> Estimate:
    """The mean of bool [N, A], with the normal interval over the N rows, within which values depend on each other."""
    of_row = right.float().mean(1)
    half = float(of_row.std() / len(of_row) ** 0.5) * _Z_95
    value = float(of_row.mean())
    return Estimate(value, max(0.0, value - half), min(1.0, value + half))

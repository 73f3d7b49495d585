"""CLIP embeddings whose directions all have the same variance."""

import torch
from torch import Tensor, nn

MIN_EIGENVALUE_SHARE = 1e-3
"""Directions with less variance than this share of the largest are amplified as if they had it."""


class Decorrelation(nn.Module):
    """ZCA whitening, (z - mean) matrix; the identity until it was fitted.

    The variance of a CLIP's embeddings differs by orders of magnitude between directions, and what is in the small ones
    (the demo's: where things are, and what tells a circle from a square) is learned late or never by a network that
    takes the embeddings as they are.
    """

    mean: Tensor
    matrix: Tensor

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(embed_dim))
        self.register_buffer("matrix", torch.eye(embed_dim))

    @torch.no_grad()
    def fit(self, embeds: Tensor) -> None:
        """Take the statistics of embeddings float [N, E]; the mean variance of a dimension stays what it was."""
        embeds = embeds.double()
        variance, directions = torch.linalg.eigh(torch.cov(embeds.T))
        variance = variance.clamp(min=MIN_EIGENVALUE_SHARE * float(variance.max()))
        scale = (variance.mean() / variance).sqrt()
        self.mean.copy_(embeds.mean(0))
        self.matrix.copy_(directions @ torch.diag(scale) @ directions.T)

    def forward(self, embed: Tensor) -> Tensor:
        """Embeddings [..., E] as CLIP's projection gives them -> decorrelated."""
        return (embed - self.mean) @ self.matrix

    def inverse(self, embed: Tensor) -> Tensor:
        """Decorrelated embeddings [..., E] -> as CLIP's projection gives them."""
        return embed @ torch.linalg.inv(self.matrix.double()).to(embed) + self.mean

    @torch.no_grad()
    def folded_into(self, linear: nn.Linear) -> nn.Linear:
        """The layer that does on plain embeddings what `linear` does on decorrelated ones."""
        folded = nn.Linear(linear.in_features, linear.out_features)
        weight = linear.weight.double() @ self.matrix.double().T
        folded.weight.copy_(weight)
        folded.bias.copy_(linear.bias.double() - weight @ self.mean.double())
        return folded

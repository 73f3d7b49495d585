"""How far the distribution of made pictures is from that of real ones, by their features in any encoder.

Features are float [N, F] of the made and [M, F] of the real, N and M at least 2. All depend on how many there are, but
for the kernel distance, which is unbiased: compare only values of equal numbers.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

_ROWS_AT_ONCE = 1024
RBF_SIGMA = 10.0
RBF_SCALE = 1000.0
NEIGHBOURS = 3

Kernel = Callable[[Tensor, Tensor], Tensor]
"""(float [N, F], float [M, F]) -> float [N, M]."""


def frechet_distance(made: Tensor, real: Tensor) -> float:
    """Fréchet distance of the normal distributions with the features' means and covariances (arXiv 1706.08500)."""
    # In the place of torchmetrics' network: what it is given are features already.
    features = nn.Identity()
    features.num_features = made.shape[1]  # pyright: ignore[reportArgumentType]
    distance = FrechetInceptionDistance(feature=features)
    distance.update(real.double().cpu(), real=True)
    distance.update(made.double().cpu(), real=False)
    return float(distance.compute())


def kernel_distance(made: Tensor, real: Tensor) -> float:
    """KID: the unbiased estimate of MMD^2 with the kernel (x.y / F + 1)^3 (arXiv 1801.01401), over all pairs at once.

    The usual mean over random subsets has the same expectation and more spread. It may fall below 0.
    """
    made, real = made.double(), real.double()

    def kernel(one: Tensor, other: Tensor) -> Tensor:
        return (one @ other.T / one.shape[1] + 1.0) ** 3

    def within(features: Tensor) -> float:
        count = len(features)
        own = float(((features.square().sum(1) / features.shape[1] + 1.0) ** 3).sum())
        return (_mean_kernel(features, features, kernel) * count**2 - own) / (count * (count - 1))

    return within(made) + within(real) - 2 * _mean_kernel(made, real, kernel)


def rbf_distance(made: Tensor, real: Tensor) -> float:
    """CMMD: 1000 MMD^2 with the kernel exp(-|x - y|^2 / (2 sigma^2)), sigma = 10, of embeddings of length 1, in the
    form that counts each one's pair with itself, as the paper's own code does (arXiv 2401.09603, section 4)."""

    def kernel(one: Tensor, other: Tensor) -> Tensor:
        return torch.exp(-torch.cdist(one, other).square() / (2 * RBF_SIGMA**2))

    made, real = (nn.functional.normalize(each.double(), dim=1) for each in (made, real))
    terms = [_mean_kernel(*pair, kernel) for pair in ((made, made), (real, real), (made, real))]
    return RBF_SCALE * (terms[0] + terms[1] - 2 * terms[2])


def precision_and_recall(made: Tensor, real: Tensor, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """The share of made pictures within the manifold of the real ones, and the other way round (arXiv 1904.06991).

    A manifold is the balls around its samples that reach to each one's `neighbours`-th neighbour.
    """
    return _share_within(made, real, neighbours), _share_within(real, made, neighbours)


def _share_within(features: Tensor, manifold: Tensor, neighbours: int) -> float:
    features, manifold = features.double(), manifold.double()
    # The nearest one of all is the sample itself.
    nearest = min(neighbours + 1, len(manifold))
    radius = torch.cat([torch.cdist(rows, manifold).kthvalue(nearest).values for rows in manifold.split(_ROWS_AT_ONCE)])
    inside = [(torch.cdist(rows, manifold) <= radius).any(1) for rows in features.split(_ROWS_AT_ONCE)]
    return float(torch.cat(inside).double().mean())


def _mean_kernel(one: Tensor, other: Tensor, kernel: Kernel) -> float:
    return float(sum(kernel(rows, other).sum() for rows in one.split(_ROWS_AT_ONCE))) / (len(one) * len(other))

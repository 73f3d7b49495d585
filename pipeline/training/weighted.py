"""Means over some of the samples, which losses are logged as: a sum and a weight that add up like any other loss.

Over micro-batches, steps and ranks both are averaged, and divided only where a number is wanted: no step waits for the
device, and each sample counts once, however the samples of a kind are spread.
"""

from collections.abc import Mapping

from torch import Tensor

_WEIGHT = "/weight"


def weighted(name: str, total: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """A loss whose mean is the mean of `total` over that of `weight`, scalars, as entries of a batch's losses."""
    return {name: total, f"{name}{_WEIGHT}": weight}


def weighted_means(means: Mapping[str, float]) -> dict[str, float]:
    """The means of losses with those that have a weight divided by it; without those of which there was no sample."""
    found = {}
    for name, value in means.items():
        weight = means.get(f"{name}{_WEIGHT}", 1.0)
        if not name.endswith(_WEIGHT) and weight > 0:
            found[name] = value / weight
    return found

"""Estimates with their 95 % confidence intervals.

All are of per-sample values or of rows of features, so that parts of them, from batches or from several processes, are
joined before anything is computed: each sample counts once, and no mean is taken of means.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

GROUPS = 10
"""Into so many groups the jackknife deals the samples."""

_Z_95 = 1.959964
"""The 97.5 % quantile of the standard normal distribution."""

_T_95 = 2.262157
"""The same of Student's t distribution with `GROUPS` - 1 degrees of freedom."""


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % confidence interval; the ends are nan where too few samples tell nothing of it."""

    value: float
    low: float
    high: float

    def named(self, name: str) -> dict[str, float]:
        """As metrics are reported: `name`, and `name_low` and `name_high` where they are known."""
        ends = {f"{name}_low": self.low, f"{name}_high": self.high}
        return {name: self.value} | ({} if math.isnan(self.low) else ends)


def proportion(right: Tensor) -> Estimate:
    """The share of true values in bool [N], with Wilson's score interval (which holds near 0 and 1 too)."""
    samples, share = len(right), float(right.float().mean())
    spread = _Z_95**2 / samples
    centre = (share + spread / 2) / (1 + spread)
    half = _Z_95 * ((share * (1 - share) + spread / 4) / samples) ** 0.5 / (1 + spread)
    return Estimate(share, max(0.0, centre - half), min(1.0, centre + half))


def mean(values: Tensor) -> Estimate:
    """The mean of float [N], with the normal interval."""
    values = values.double()
    half = float(values.std() / len(values) ** 0.5) * _Z_95 if len(values) > 1 else math.nan
    value = float(values.mean())
    return Estimate(value, value - half, value + half)


def mean_of_shares(right: Tensor) -> Estimate:
    """The mean of bool [N, A], with the normal interval over the N rows, within which values depend on each other."""
    found = mean(right.double().mean(1))
    return Estimate(found.value, max(0.0, found.low), min(1.0, found.high))


def jackknife(statistic: Callable[[Tensor], Mapping[str, float]], samples: int) -> dict[str, Estimate]:
    """What `statistic` says of the rows 0 to `samples` - 1 that it is given, int64 [N], with the intervals of the
    delete-a-group jackknife: it is computed again without each of `GROUPS` groups.

    Unlike a bootstrap it shows no sample twice: near duplicates would add to a distance between distributions. It tells
    of the spread over samples and not of the bias that a distance has for their number.
    """
    rows = torch.arange(samples)
    whole = statistic(rows)
    if samples < 2 * GROUPS:
        return {name: Estimate(value, math.nan, math.nan) for name, value in whole.items()}
    parts = [statistic(rows[rows % GROUPS != group]) for group in range(GROUPS)]
    found = {}
    for name, value in whole.items():
        of_parts = torch.tensor([part[name] for part in parts], dtype=torch.float64)
        half = _T_95 * float((of_parts.var(correction=0) * (GROUPS - 1)).sqrt())
        found[name] = Estimate(value, value - half, value + half)
    return found

"""Attribute accuracy: how often a judge reads off a picture what its caption asked for."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.dataset import CaptionedImages
from pipeline.data.splits import Split
from stages.judge.labels import CLASSES, labels

MEAN = "mean"
ALL_RIGHT = "all_right"
SPLIT_OF_GROUP = {"seen": Split.VALIDATION, "unseen": Split.UNSEEN}
"""Held-out pictures by whether training showed their pair of colour and shape."""


def judged_rows(images: CaptionedImages, samples: int) -> dict[str, NDArray[np.int64]]:
    """The first `samples` rows of each group that can be judged: one object, of which the caption says everything."""
    found: dict[str, list[int]] = {group: [] for group in SPLIT_OF_GROUP}
    for group, split in SPLIT_OF_GROUP.items():
        for row in images.data.samples_in(split):
            if len(found[group]) == samples:
                break
            if labels(images.data.attributes(int(row))) is not None:
                found[group].append(int(row))
    return {group: np.array(rows, np.int64) for group, rows in found.items() if rows}


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


class AttributeAccuracy:
    """Collects which attributes were right, by group of pictures, such as "seen/final"."""

    def __init__(self) -> None:
        self._right: dict[str, list[Tensor]] = {}

    def add(self, group: str, right: Tensor) -> None:
        """Add a batch's bool [B, A], in the order of `CLASSES`."""
        self._right.setdefault(group, []).append(right)

    def estimates(self) -> dict[str, dict[str, Estimate]]:
        """For each group: the mean over the attributes, all of them right at once, and each attribute."""
        return {group: _estimates(torch.cat(found)) for group, found in self._right.items()}

    def metrics(self) -> dict[str, float]:
        """`<group>/<attribute>`, and `_low` and `_high` of their 95 % intervals."""
        flat: dict[str, float] = {}
        for group, estimates in self.estimates().items():
            for name, estimate in estimates.items():
                flat[f"{group}/{name}"] = estimate.value
                flat[f"{group}/{name}_low"], flat[f"{group}/{name}_high"] = estimate.low, estimate.high
        return flat

    def table(self) -> str:
        """A Markdown table in per cent, with the intervals."""
        columns = [MEAN, ALL_RIGHT, *(attribute.value for attribute in CLASSES)]
        lines = [
            f"| pictures | {' | '.join(name.replace('_', ' ') for name in columns)} |",
            f"|---{'|---' * len(columns)}|",
        ]
        for group, estimates in self.estimates().items():
            found = [estimates[name] for name in columns]
            cells = [f"{100 * each.value:.1f} ({100 * each.low:.0f}-{100 * each.high:.0f})" for each in found]
            lines.append(f"| {group} ({len(torch.cat(self._right[group]))}) | {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"


def _estimates(right: Tensor) -> dict[str, Estimate]:
    return {
        MEAN: mean_of_shares(right),
        ALL_RIGHT: proportion(right.all(1)),
        **{attribute.value: proportion(right[:, place]) for place, attribute in enumerate(CLASSES)},
    }

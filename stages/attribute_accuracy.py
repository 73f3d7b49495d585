"""Attribute accuracy: how often a judge reads off a picture what its caption asked for."""

import torch
from torch import Tensor

from stages.metrics import Estimate, mean_of_shares, proportion
from stages.sources.scene_labels import CLASSES

MEAN = "mean"
ALL_RIGHT = "all_right"


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
            cells = [_in_per_cent(estimates[name]) for name in columns]
            lines.append(f"| {group} ({len(torch.cat(self._right[group]))}) | {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"


def _estimates(right: Tensor) -> dict[str, Estimate]:
    return {
        MEAN: mean_of_shares(right),
        ALL_RIGHT: proportion(right.all(1)),
        **{attribute.value: proportion(right[:, place]) for place, attribute in enumerate(CLASSES)},
    }


def _in_per_cent(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.1f} ({100 * estimate.low:.0f}-{100 * estimate.high:.0f})"

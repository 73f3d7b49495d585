"""Attribute accuracy: how often a judge reads off a picture what its caption asked for."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.dataset import CaptionedImages
from pipeline.data.splits import Split
from stages.evaluate.estimate import Estimate, mean_of_shares, proportion
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
        """`<group>/<attribute>`, and `_low` and `_high` of their 95 % intervals; means of made pictures first."""
        flat: dict[str, float] = {}
        for group, estimates in self.estimates().items():
            for name, estimate in estimates.items():
                flat |= estimate.named(f"{group}/{name}")
        most_telling = [
            f"{group}/{MEAN}" for made in ("final", "base") for group in self._right if group.endswith(f"/{made}")
        ]
        return {name: flat[name] for name in most_telling} | flat

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

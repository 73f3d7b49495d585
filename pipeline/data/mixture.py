"""How often an epoch shows the samples of each source. Imports no torch.

Where a weight is above 1 an epoch is shown in rounds, in each of which every source has its part.

A source of weight w shows each of its samples w times an epoch on average: it goes on in every epoch where it left off
in the one before, so that after E epochs each was shown floor(E w) or ceil(E w) times. A showing is numbered by its
*pass* over the source, from which everything is drawn that is random in it; where w is 1 the pass is the epoch.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.mixing import purpose_key, sample_seed


@dataclass(frozen=True)
class Mixture:
    """The source of each shard, and the weight of each source."""

    source_of_shard: tuple[int, ...]
    weights: tuple[Fraction, ...]

    @property
    def rounds(self) -> int:
        """How many rounds an epoch is shown in, so that none shows a sample twice."""
        return max(1, -int(-max(self.weights) // 1))

    @classmethod
    def even(cls, shards: int) -> "Mixture":
        """One source that an epoch shows once."""
        return cls((0,) * shards, (Fraction(1),))

    @classmethod
    def of_json(cls, content: Mapping[str, Any]) -> "Mixture":
        """What `as_json` wrote. Raises KeyError, TypeError or ValueError for anything else."""
        return cls(tuple(map(int, content["source_of_shard"])), tuple(map(Fraction, content["weights"])))

    def as_json(self) -> dict[str, Any]:
        """The mixture as JSON values."""
        return {"source_of_shard": list(self.source_of_shard), "weights": list(map(str, self.weights))}


@dataclass(frozen=True, eq=False)
class Pieces:
    """Parts of shards, P of them: rows `first` to `last` - 1 of a shard, shown in a pass. All int64 [P]."""

    shard: NDArray[np.int64]
    number_of_pass: NDArray[np.int64]
    first: NDArray[np.int64]
    last: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.shard)

    def __getitem__(self, places: Any) -> "Pieces":
        return Pieces(self.shard[places], self.number_of_pass[places], self.first[places], self.last[places])

    @property
    def counts(self) -> NDArray[np.int64]:
        """The samples of each piece."""
        return self.last - self.first


class WeightedSource:
    """The samples of one source: `counts` of them in each of `shards` (any numbers that name the shards)."""

    def __init__(self, shards: NDArray[np.int64], counts: NDArray[np.int64], weight: Fraction, seed: int) -> None:
        if weight.denominator != 1:
            # An epoch shows a part of the shards: not always those that are named first.
            order = np.argsort(sample_seed(seed ^ purpose_key("source order"), 0, shards), kind="stable")
            shards, counts = shards[order], counts[order]
        self._shards, self._counts, self._weight = shards, counts, weight
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        self._samples = int(self._starts[-1])

    def shown_before(self, epoch: int) -> int:
        """How many samples all epochs before this one show."""
        return self._samples * epoch * self._weight.numerator // self._weight.denominator

    def pieces(self, epoch: int) -> Iterator[Pieces]:
        """What an epoch shows, pass by pass."""
        first, last = self.shown_before(epoch), self.shown_before(epoch + 1)
        position = first
        while position < last:
            number, start = divmod(position, self._samples)
            stop = min(self._samples, start + last - position)
            begin = int(np.searchsorted(self._starts, start, side="right")) - 1
            end = int(np.searchsorted(self._starts, stop, side="left"))
            starts, counts = self._starts[begin:end], self._counts[begin:end]
            yield Pieces(
                shard=self._shards[begin:end],
                number_of_pass=np.full(end - begin, number, np.int64),
                first=np.maximum(start - starts, 0),
                last=np.minimum(stop - starts, counts),
            )
            position += stop - start


def joined(parts: Sequence[Pieces]) -> Pieces:
    """Pieces one after the other."""
    fields = ("shard", "number_of_pass", "first", "last")
    return Pieces(*(np.concatenate([np.empty(0, np.int64), *(getattr(part, f) for part in parts)]) for f in fields))

"""The data order: a pure function of (seed, epoch, sample), the same for any number of ranks. Imports no torch.

Shards are shuffled and dealt into blocks; samples are shuffled inside their block. So a block's shards are read once
per epoch, one block after the other, and the order of two blocks is kept in memory, whatever the number of samples.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.mixing import sample_seed

SHARDS_PER_BLOCK = 32
"""How many shards are mixed with each other: large enough to mix well, small enough to keep on a local disk."""

_KEPT_BLOCKS = 2


@dataclass(frozen=True, eq=False)
class EpochBlocks:
    """How one epoch is cut: block b has the shards `shards[b]` and begins at `starts[b]`, an offset in the epoch."""

    shards: list[NDArray[np.int64]]  # places in `ShardedSamples.shards`
    starts: NDArray[np.int64]  # [B + 1]


class ShardedSamples:
    """The samples of an order, by the shard that they lie in. N samples, S shards with any."""

    def __init__(self, sample_ids: NDArray[np.int64], shard_of_sample: NDArray[np.int32]) -> None:
        """`sample_ids` int64 [N] ascend, and so do their shards; `shard_of_sample` is indexed by the sample's id."""
        self.sample_ids = sample_ids
        self.shards, self._first = np.unique(shard_of_sample[sample_ids], return_index=True)
        self.counts = np.diff(np.append(self._first, len(sample_ids)))

    def __len__(self) -> int:
        return len(self.sample_ids)

    def blocks(self, seed: int, epoch: int, shards_per_block: int) -> EpochBlocks:
        """Shuffle the shards of an epoch and deal them into blocks."""
        # Shards and samples draw from separate streams: shards take the negative ids.
        draw = sample_seed(seed, epoch, -1 - self.shards.astype(np.int64))
        shuffled = np.lexsort((self.shards, draw))
        shards = [shuffled[first : first + shards_per_block] for first in range(0, len(shuffled), shards_per_block)]
        return EpochBlocks(shards, np.cumsum([0, *(int(self.counts[block].sum()) for block in shards)]))

    def shuffled(self, seed: int, epoch: int, block: NDArray[np.int64]) -> NDArray[np.int64]:
        """Order the samples of a block's shards (places in `shards`), int64."""
        parts = [self.sample_ids[self._first[shard] : self._first[shard] + self.counts[shard]] for shard in block]
        samples = np.concatenate(parts)
        return samples[np.lexsort((samples, sample_seed(seed, epoch, samples)))]


class GlobalBatches:
    """The endless stream of epochs, cut into global batches of G samples.

    Position p of the stream is offset p % N of epoch p // N. Global batch k holds the positions [k G, (k + 1) G) and
    may straddle epochs. Any batch is found at once: nothing before it is read.
    """

    def __init__(
        self,
        sample_ids: NDArray[np.int64],
        shard_of_sample: NDArray[np.int32],
        seed: int,
        global_batch_size: int,
        shards_per_block: int = SHARDS_PER_BLOCK,
    ) -> None:
        if len(sample_ids) == 0:
            raise ValueError("an order needs at least one sample")
        self._samples = ShardedSamples(sample_ids, shard_of_sample)
        self._seed = seed
        self._global_batch_size = global_batch_size
        self._shards_per_block = shards_per_block
        self._epochs: OrderedDict[int, EpochBlocks] = OrderedDict()
        self._orders: OrderedDict[tuple[int, int], NDArray[np.int64]] = OrderedDict()

    def batch(self, k: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The epoch and the sample of each of the G places of global batch k, int64 [G] each."""
        size, per_epoch = self._global_batch_size, len(self._samples)
        position = np.arange(k * size, (k + 1) * size, dtype=np.int64)
        epoch, offset = position // per_epoch, position % per_epoch
        sample = np.empty(size, np.int64)
        for number in range(int(epoch[0]), int(epoch[-1]) + 1):
            here = np.flatnonzero(epoch == number)
            starts = self._blocks(number).starts
            block = np.searchsorted(starts, offset[here], side="right") - 1
            for which in range(int(block[0]), int(block[-1]) + 1):
                places = here[block == which]
                sample[places] = self._order(number, which)[offset[places] - starts[which]]
        return epoch, sample

    def shards_after(self, k: int) -> tuple[list[int], list[int]]:
        """The shards (numbers in the index) of the block where global batch k begins, and those of the next block."""
        position = k * self._global_batch_size
        epoch, offset = divmod(position, len(self._samples))
        blocks = self._blocks(epoch)
        which = int(np.searchsorted(blocks.starts, offset, side="right")) - 1
        here = self._numbers(blocks.shards[which])
        if which + 1 < len(blocks.shards):
            return here, self._numbers(blocks.shards[which + 1])
        return here, self._numbers(self._blocks(epoch + 1).shards[0])

    def _numbers(self, block: NDArray[np.int64]) -> list[int]:
        return self._samples.shards[block].tolist()

    def _blocks(self, epoch: int) -> EpochBlocks:
        if epoch not in self._epochs:
            self._epochs[epoch] = self._samples.blocks(self._seed, epoch, self._shards_per_block)
            _drop_oldest(self._epochs, 2)
        return self._epochs[epoch]

    def _order(self, epoch: int, block: int) -> NDArray[np.int64]:
        key = (epoch, block)
        if key not in self._orders:
            self._orders[key] = self._samples.shuffled(self._seed, epoch, self._blocks(epoch).shards[block])
            _drop_oldest(self._orders, _KEPT_BLOCKS)
        return self._orders[key]


def _drop_oldest(kept: OrderedDict[Any, Any], count: int) -> None:
    while len(kept) > count:
        kept.popitem(last=False)

"""The data order: a pure function of (seed, epoch, sample), the same for any number of ranks. Imports no torch."""

import numpy as np
from numpy.typing import NDArray

from pipeline.data.mixing import sample_seed

SHARDS_PER_BLOCK = 32
"""How many shards are mixed with each other: large enough to mix well, small enough to keep on a local disk."""


def epoch_order(
    sample_ids: NDArray[np.int64],
    shard_of_sample: NDArray[np.int32],
    seed: int,
    epoch: int,
    shards_per_block: int = SHARDS_PER_BLOCK,
) -> NDArray[np.int64]:
    """Order one epoch: each of `sample_ids` exactly once, int64 [N].

    Shards are shuffled and dealt into blocks; samples are shuffled inside their block. So a block's shards are read
    once per epoch, one block after the other. `shard_of_sample` is indexed by the sample's id (its row in the index).
    """
    shards, shard_number = np.unique(shard_of_sample[sample_ids], return_inverse=True)
    # Shards and samples draw from separate streams: shards take the negative ids.
    shard_draw = sample_seed(seed, epoch, -1 - shards.astype(np.int64))
    block_of_shard = np.empty(len(shards), np.int64)
    block_of_shard[np.lexsort((shards, shard_draw))] = np.arange(len(shards)) // shards_per_block
    draw = sample_seed(seed, epoch, sample_ids)
    return sample_ids[np.lexsort((sample_ids, draw, block_of_shard[shard_number]))]


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
        self._sample_ids = sample_ids
        self._shard_of_sample = shard_of_sample
        self._seed = seed
        self._global_batch_size = global_batch_size
        self._shards_per_block = shards_per_block
        self._orders: dict[int, NDArray[np.int64]] = {}

    def batch(self, k: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The epoch and the sample of each of the G places of global batch k, int64 [G] each."""
        size, per_epoch = self._global_batch_size, len(self._sample_ids)
        position = np.arange(k * size, (k + 1) * size, dtype=np.int64)
        epoch, offset = position // per_epoch, position % per_epoch
        sample = np.empty(size, np.int64)
        for number in range(int(epoch[0]), int(epoch[-1]) + 1):
            here = epoch == number
            sample[here] = self._order(number)[offset[here]]
        return epoch, sample

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._orders:
            # A batch can straddle two epochs; the one before those is not needed again.
            self._orders = {known: order for known, order in self._orders.items() if known == epoch - 1}
            self._orders[epoch] = epoch_order(
                self._sample_ids, self._shard_of_sample, self._seed, epoch, self._shards_per_block
            )
        return self._orders[epoch]

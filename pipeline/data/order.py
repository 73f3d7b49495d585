"""The data order: a pure function of (seed, epoch, sample), the same for any number of ranks. Imports no torch.

Shards are shuffled and dealt into blocks; samples are shuffled inside their block. So a block's shards are read once
per epoch, one block after the other, and the order of two blocks is kept in memory, whatever the number of samples.
"""

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.data.mixing import sample_seed
from pipeline.data.mixture import Mixture, Pieces, WeightedSource, joined
from pipeline.data.shards import SHARDS_PER_BLOCK

_KEPT_BLOCKS = 2
_KEPT_EPOCHS = 2


class Shown(NamedTuple):
    """Samples in the order in which they are shown, and the pass of each showing: int64 [N] each."""

    number_of_pass: NDArray[np.int64]
    sample: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class EpochBlocks:
    """How one epoch is cut: block b has the pieces `pieces[b]` and begins at `starts[b]`, an offset in the epoch."""

    pieces: list[Pieces]  # of places in `ShardedSamples.shards`
    starts: NDArray[np.int64]  # [B + 1]


class ShardedSamples:
    """The samples of an order, by the shard that they lie in. N samples, S shards with any."""

    def __init__(
        self, sample_ids: NDArray[np.int64], shard_of_sample: NDArray[np.int32], mixture: Mixture | None, seed: int
    ) -> None:
        """`sample_ids` int64 [N] ascend, and so do their shards; `shard_of_sample` is indexed by the sample's id."""
        self.sample_ids = sample_ids
        self.shards, self._first = np.unique(shard_of_sample[sample_ids], return_index=True)
        self._seed = seed
        counts = np.diff(np.append(self._first, len(sample_ids)))
        mixture = mixture or Mixture.even(int(self.shards[-1]) + 1)
        source_of_shard = np.array(mixture.source_of_shard)[self.shards]
        places = [np.flatnonzero(source_of_shard == source) for source in range(len(mixture.weights))]
        self._sources = [
            WeightedSource(of_source, counts[of_source], weight / mixture.rounds, seed)
            for of_source, weight in zip(places, mixture.weights, strict=True)
            if len(of_source)
        ]

    def start(self, epoch: int) -> int:
        """How many samples all epochs before this one show."""
        return sum(source.shown_before(epoch) for source in self._sources)

    def blocks(self, epoch: int, shards_per_block: int) -> EpochBlocks:
        """Shuffle the shards of an epoch and deal them into blocks."""
        pieces = joined([each for source in self._sources for each in source.pieces(epoch)])
        # Shards and samples draw from separate streams: shards take the negative ids.
        numbers = self.shards[pieces.shard].astype(np.int64)
        draw = sample_seed(self._seed, pieces.number_of_pass, -1 - numbers)
        shuffled = pieces[np.lexsort((pieces.number_of_pass, numbers, draw))]
        blocks = [shuffled[first : first + shards_per_block] for first in range(0, len(shuffled), shards_per_block)]
        return EpochBlocks(blocks, np.cumsum([0, *(int(block.counts.sum()) for block in blocks)]))

    def shuffled(self, block: Pieces) -> Shown:
        """Order the samples of a block."""
        samples = np.concatenate(
            [
                self.sample_ids[self._first[shard] + first : self._first[shard] + last]
                for shard, first, last in zip(block.shard, block.first, block.last, strict=True)
            ]
        )
        passes = np.repeat(block.number_of_pass, block.counts)
        order = np.lexsort((samples, sample_seed(self._seed, passes, samples)))
        return Shown(passes[order], samples[order])


class GlobalBatches:
    """The endless stream of epochs, cut into global batches of G samples.

    Global batch k holds the positions [k G, (k + 1) G) of the stream and may straddle epochs. Any batch is found at
    once: nothing before it is read.

    No batch holds a sample twice, if an epoch has two batches or more: in the batch that straddles two epochs, those of
    the first are passed over, and shown right after it. (Of a mixture, an epoch here is one of its rounds.)
    """

    def __init__(
        self,
        sample_ids: NDArray[np.int64],
        shard_of_sample: NDArray[np.int32],
        seed: int,
        global_batch_size: int,
        shards_per_block: int = SHARDS_PER_BLOCK,
        mixture: Mixture | None = None,
    ) -> None:
        if len(sample_ids) == 0:
            raise ValueError("an order needs at least one sample")
        self._samples = ShardedSamples(sample_ids, shard_of_sample, mixture, seed)
        self._global_batch_size = global_batch_size
        self._blocks = lru_cache(_KEPT_EPOCHS)(partial(self._samples.blocks, shards_per_block=shards_per_block))
        self._order = lru_cache(_KEPT_BLOCKS)(self._shuffled_block)
        self._head = lru_cache(_KEPT_EPOCHS)(self._distinct_head)

    def batch(self, k: int) -> Shown:
        """The pass and the sample of each of the G places of global batch k."""
        position, end = k * self._global_batch_size, (k + 1) * self._global_batch_size
        epoch = self._epoch_at(position)
        parts: list[Shown] = []
        while position < end:
            start, stop = self._samples.start(epoch), self._samples.start(epoch + 1)
            if position < stop:
                parts.append(self._shown(epoch, position - start, min(end, stop) - start))
                position = min(end, stop)
            epoch += 1
        return _concatenated(parts)

    def shards_after(self, k: int) -> tuple[list[int], list[int]]:
        """The shards (numbers in the index) of the block where global batch k begins, and those of the next block."""
        position = k * self._global_batch_size
        epoch = self._epoch_at(position)
        blocks = self._blocks(epoch)
        which = int(np.searchsorted(blocks.starts, position - self._samples.start(epoch), side="right")) - 1
        here = self._numbers(blocks.pieces[which])
        if which + 1 < len(blocks.pieces):
            return here, self._numbers(blocks.pieces[which + 1])
        following = next(later for number in range(epoch + 1, epoch + 2**31) if (later := self._blocks(number).pieces))
        return here, self._numbers(following[0])

    def _epoch_at(self, position: int) -> int:
        """The epoch in which a position of the stream lies."""
        low, high = 0, 1
        while self._samples.start(high) <= position:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._samples.start(middle) <= position else (low, middle)
        return low

    def _shown(self, epoch: int, first: int, last: int) -> Shown:
        head = self._head(epoch)
        in_head = len(head.sample)
        begins = Shown(head.number_of_pass[first:last], head.sample[first:last])
        return begins if last <= in_head else _concatenated([begins, self._shuffled(epoch, max(first, in_head), last)])

    def _distinct_head(self, epoch: int) -> Shown:
        """How an epoch begins where its first batch is also the last one of the epoch before; else nothing."""
        size = self._global_batch_size
        start = self._samples.start(epoch)
        before, length = start - self._samples.start(epoch - 1), self._samples.start(epoch + 1) - start
        shown_before = start % size
        # In shorter epochs the head of one would reach its own tail.
        if epoch == 0 or shown_before == 0 or min(before, length) < 2 * size:
            return Shown(np.empty(0, np.int64), np.empty(0, np.int64))
        head = self._shuffled(epoch, 0, size)
        is_repeated = np.isin(head.sample, self._shuffled(epoch - 1, before - shown_before, before).sample)
        first = np.flatnonzero(~is_repeated)[: size - shown_before]
        order = np.concatenate([first, np.setdiff1d(np.arange(size), first)])
        return Shown(head.number_of_pass[order], head.sample[order])

    def _shuffled(self, epoch: int, first: int, last: int) -> Shown:
        """The places [first, last) of an epoch as its blocks order them."""
        starts = self._blocks(epoch).starts
        from_block, to_block = np.searchsorted(starts, [first, last - 1], side="right") - 1
        parts = []
        for which in range(int(from_block), int(to_block) + 1):
            order = self._order(epoch, which)
            places = slice(max(0, first - int(starts[which])), last - int(starts[which]))
            parts.append(Shown(order.number_of_pass[places], order.sample[places]))
        return _concatenated(parts)

    def _numbers(self, block: Pieces) -> list[int]:
        return list(dict.fromkeys(self._samples.shards[block.shard].tolist()))

    def _shuffled_block(self, epoch: int, block: int) -> Shown:
        return self._samples.shuffled(self._blocks(epoch).pieces[block])


def epoch_samples(
    sample_ids: NDArray[np.int64], shard_of_sample: NDArray[np.int32], mixture: Mixture | None = None
) -> int:
    """How many samples an epoch shows, or a round of one (see `Mixture.rounds`): none twice."""
    return ShardedSamples(sample_ids, shard_of_sample, mixture, 0).start(1) if len(sample_ids) else 0


def _concatenated(parts: list[Shown]) -> Shown:
    if len(parts) == 1:
        return parts[0]
    return Shown(*(np.concatenate(each) for each in zip(*parts, strict=True)))

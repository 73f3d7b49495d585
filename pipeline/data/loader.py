"""Loaders that begin at any global batch at once, and leave torch's global random state alone."""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Sampler

from pipeline.data.batch import ImageBatch
from pipeline.data.dataset import CaptionedImages, SampleRequest
from pipeline.data.mixing import sample_seed, uniform
from pipeline.data.order import GlobalBatches
from pipeline.data.prefetch import ShardPrefetch
from pipeline.data.splits import Split
from pipeline.errors import UserError

_CAPTION_DRAW = "caption of several"
"""The purpose of the draw that chooses a caption."""


class RankBatches(Sampler[list[SampleRequest]]):
    """One rank's micro-batches of the global batches `first_batch`, ..., `batches` - 1.

    Of each global batch a rank takes one contiguous slice, cut into micro-batches (the last one of a slice may be
    shorter).

    The length counts the micro-batches of the whole run, from global batch 0 on: Lightning adds the batches that a
    checkpoint has seen to those it fetches, and compares the sum with the length.
    """

    def __init__(
        self,
        order: GlobalBatches,
        *,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        first_batch: int,
        batches: int,
        prefetch: ShardPrefetch | None = None,
    ) -> None:
        if global_batch_size % world_size:
            raise UserError(
                f"global_batch_size {global_batch_size} is not divisible by {world_size} devices; "
                f"use {_multiples(global_batch_size, world_size)}"
            )
        self._order = order
        self._seed = seed
        self._share = global_batch_size // world_size
        self._micro_batch_size = min(micro_batch_size, self._share)
        self._rank = rank
        self._first_batch = first_batch
        self._batches = batches
        self._prefetch = prefetch

    def __len__(self) -> int:
        return self._batches * -(-self._share // self._micro_batch_size)

    def __iter__(self) -> Iterator[list[SampleRequest]]:
        try:
            yield from self._micro_batches()
        finally:
            if self._prefetch is not None:
                self._prefetch.stop()

    def _micro_batches(self) -> Iterator[list[SampleRequest]]:
        mine = slice(self._rank * self._share, (self._rank + 1) * self._share)
        for k in range(self._first_batch, self._batches):
            if self._prefetch is not None:
                here, following = self._order.shards_after(k)
                self._prefetch.want([*here, *following])
            shown = self._order.batch(k)
            sample, seeds = shown.sample[mine], sample_seed(self._seed, shown.number_of_pass, shown.sample)[mine]
            draws = uniform(seeds, _CAPTION_DRAW)
            requests = list(map(SampleRequest, sample.tolist(), seeds.tolist(), draws.tolist()))
            for start in range(0, self._share, self._micro_batch_size):
                yield requests[start : start + self._micro_batch_size]


def training_loader(
    images: CaptionedImages,
    *,
    split: Split = Split.TRAIN,
    seed: int,
    global_batch_size: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
    first_batch: int,
    batches: int,
    workers: int,
    pin_memory: bool = False,
) -> DataLoader[ImageBatch]:
    """One rank's part of the training stream, from global batch `first_batch` to `batches` - 1 (of the whole run).

    Global batch k holds the same samples and the same sample seeds whatever the ranks, micro-batches and workers.
    Ask for pinned memory only where batches go to a GPU: it opens a context on the process's current one.

    Raises:
        UserError: the split has no samples, or devices cannot share the global batch.
    """
    rows = images.data.samples_in(split)
    if len(rows) == 0:
        raise UserError(f"the split {split} has no samples; change data.validation_fraction or add samples")
    prefetch = ShardPrefetch(images.data.reader)
    batch_sampler = RankBatches(
        GlobalBatches(rows, images.data.index.shard, seed, global_batch_size, mixture=images.data.mixture),
        seed=seed,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        rank=rank,
        world_size=world_size,
        first_batch=first_batch,
        batches=batches,
        prefetch=prefetch if prefetch.is_needed else None,
    )
    return _loader(images, batch_sampler, workers, pin_memory)


def evaluation_loader(
    images: CaptionedImages,
    *,
    split: Split | None,
    batch_size: int,
    limit: int | None = None,
    seed: int = 0,
    workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader[ImageBatch]:
    """The first `limit` samples of a split (of every split where None), in the order of the index.

    They draw as in epoch 0, and of several captions the main one is taken.

    The last batch may be short; an empty split gives no batch. Of pinned memory see `training_loader`.
    """
    rows = images.data.samples_in(split)[:limit]
    return rows_loader(images, [rows], batch_size=batch_size, seed=seed, workers=workers, pin_memory=pin_memory)


class _BatchesOfParts(Sampler[list[SampleRequest]]):
    def __init__(self, parts: Sequence[NDArray[np.int64]], batch_size: int, seed: int) -> None:
        self._parts = parts
        self._batch_size = batch_size
        self._seed = seed

    def __len__(self) -> int:
        return sum(-(-len(rows) // self._batch_size) for rows in self._parts)

    def __iter__(self) -> Iterator[list[SampleRequest]]:
        for part in self._parts:
            for start in range(0, len(part), self._batch_size):
                rows = part[start : start + self._batch_size]
                yield list(map(SampleRequest, rows.tolist(), sample_seed(self._seed, 0, rows).tolist()))


def rows_loader(
    images: CaptionedImages,
    parts: Sequence[NDArray[np.int64]],
    *,
    batch_size: int,
    seed: int = 0,
    workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader[ImageBatch]:
    """Rows of the index in their order; they draw as in epoch 0. No batch reaches over the end of a part."""
    batches = _BatchesOfParts(parts, batch_size, seed)
    return _loader(images, batches, min(workers, len(batches)), pin_memory)


def _loader(
    images: CaptionedImages,
    batch_sampler: Sampler[list[SampleRequest]],
    workers: int,
    pin_memory: bool,
) -> DataLoader[ImageBatch]:
    return DataLoader(
        images,
        batch_sampler=batch_sampler,
        num_workers=workers,
        collate_fn=cast(Any, _as_it_is),  # typed for lists of samples, while the data set gives whole batches
        pin_memory=pin_memory,
        # Without one of its own, a loader draws the seed of its workers from torch's global generator.
        generator=torch.Generator().manual_seed(0),
    )


def _as_it_is(batch: ImageBatch) -> ImageBatch:
    return batch


def _multiples(value: int, step: int) -> str:
    below, above = value // step * step, -(-value // step) * step
    return f"{below} or {above}" if below else str(above)

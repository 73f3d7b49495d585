"""Loaders that begin at any global batch at once, and leave torch's global random state alone."""

from collections.abc import Iterator
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
) -> DataLoader[ImageBatch]:
    """One rank's part of the training stream, from global batch `first_batch` to `batches` - 1 (of the whole run).

    Global batch k holds the same samples and the same sample seeds whatever the ranks, micro-batches and workers.

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
    return _loader(images, batch_sampler, workers, pin_memory=torch.cuda.is_available())


def evaluation_loader(
    images: CaptionedImages,
    *,
    split: Split | None,
    batch_size: int,
    first: int = 0,
    limit: int | None = None,
    seed: int = 0,
    workers: int = 0,
) -> DataLoader[ImageBatch]:
    """`limit` samples of a split (of every split where None) from its `first` on, in the order of the index.

    They draw as in epoch 0, and of several captions the main one is taken.

    The last batch may be short; an empty split gives no batch.
    """
    return rows_loader(
        images, images.data.samples_in(split)[first:][:limit], batch_size=batch_size, seed=seed, workers=workers
    )


def rows_loader(
    images: CaptionedImages, rows: NDArray[np.int64], *, batch_size: int, seed: int = 0, workers: int = 0
) -> DataLoader[ImageBatch]:
    """These rows of the index in their order; they draw as in epoch 0. The last batch may be short."""
    seeds = sample_seed(seed, 0, rows)
    requests = list(map(SampleRequest, rows.tolist(), seeds.tolist()))
    batches = [requests[start : start + batch_size] for start in range(0, len(requests), batch_size)]
    # Pinning opens a context on the current GPU, which is the first one for every process until training has begun.
    return _loader(images, batches, workers, pin_memory=False)


def _loader(
    images: CaptionedImages,
    batch_sampler: Sampler[list[SampleRequest]] | list[list[SampleRequest]],
    workers: int,
    *,
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

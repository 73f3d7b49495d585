"""Captioned pictures by row: read, decoded, squared; kept in memory where they fit."""

import mmap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from pipeline.data.batch import ImageBatch
from pipeline.data.captions import MAIN_CAPTION
from pipeline.data.decode import DecodeError, DecodeFault
from pipeline.data.draws import SampleDraws
from pipeline.data.mixing import purpose_key, sample_seed
from pipeline.data.place import ShardPlace
from pipeline.data.prepared import read_prepared
from pipeline.data.splits import Split
from pipeline.data.square import central_square
from pipeline.errors import UserError

_FAULTS = tuple(DecodeFault)
_UNKNOWN, _GOOD, _FIRST_FAULT = 0, 1, 2
_MAX_REPLACEMENTS = 64

Tokenizer = Callable[[Sequence[str]], Tensor]
"""B captions -> their token ids, int64 [B, L] on the CPU. It can be pickled, and keeps no state that changes them."""


@dataclass(frozen=True)
class MadeAhead:
    """What a stage has its loader make beside the pictures: in the loader's workers, so that no step waits for it.

    `normals` are the shapes of normal draws by purpose, which `ImageBatch.draws` then has ready.
    """

    tokenizer: Tokenizer | None = None
    normals: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


_PICTURES_ALONE = MadeAhead()


@dataclass(frozen=True)
class SampleRequest:
    """What the order asks the data set for: a row of the index, and the seed of its draws in this pass.

    `caption_draw` in [0, 1) chooses among several captions.
    """

    sample: int
    sample_seed: int
    caption_draw: float = MAIN_CAPTION


class CaptionedImages(Dataset[ImageBatch]):
    """The samples of a data artifact as pictures of one size, [3, S, S] uint8 RGB, with their captions.

    A sample that cannot be decoded is replaced by another one of its split, which follows from its row alone: every
    epoch, rank and restart sees the same replacement, and `ImageBatch.sample` names the row that is shown.

    With `cache_mib` > 0, decoded pictures are kept in memory if all of them fit in it; forked loader workers fill and
    read one and the same cache.
    """

    def __init__(
        self,
        directory: Path,
        image_size: int,
        cache_mib: int = 0,
        place: ShardPlace | None = None,
        ahead: MadeAhead = _PICTURES_ALONE,
    ) -> None:
        """`place` is where the shards are that do not lie in the artifact at `directory`."""
        self.data = read_prepared(directory, place)
        self.image_size = image_size
        self._ahead = ahead
        shape = (len(self.data.index), 3, image_size, image_size)
        # What is known of each sample: 0 nothing, 1 it is good, 2 + n it has the n-th fault.
        self._status = _shared_zeros((len(self.data.index),))
        self._pictures = _shared_zeros(shape) if int(np.prod(shape)) <= cache_mib * 2**20 else None
        self._replacement: dict[int, int] = {}
        self._rows_of_split: dict[Split, NDArray[np.int64]] = {}

    def __len__(self) -> int:
        return len(self.data.index)

    def __getitem__(self, request: SampleRequest) -> ImageBatch:
        return self.__getitems__([request])

    def __getitems__(self, requests: Sequence[SampleRequest]) -> ImageBatch:
        """Read a batch; the DataLoader calls this where it is given a batch sampler."""
        shape = (len(requests), 3, self.image_size, self.image_size)
        image = _batch_memory(shape)
        rows, captions = [], []
        faults: Counter[DecodeFault] = Counter()
        for place, request in zip(image.numpy(), requests, strict=True):
            row = self._show(request, place, captions)
            rows.append(row)
            if row != request.sample:
                faults[self._fault_of(request.sample)] += 1
        seeds = torch.tensor([request.sample_seed for request in requests], dtype=torch.int64)
        draws, tokenizer = SampleDraws(seeds), self._ahead.tokenizer
        return ImageBatch(
            image=image,
            caption=tuple(captions),
            sample=torch.tensor(rows, dtype=torch.int64),
            sample_seed=seeds,
            faults=dict(faults),
            tokens=None if tokenizer is None else tokenizer(captions),
            normals={purpose: draws.normal(purpose, shape) for purpose, shape in self._ahead.normals.items()},
        )

    def faulty_by_shard(self) -> dict[str, int]:
        """Samples found unusable so far, by the name of their shard; those that forked loader workers found too."""
        index = self.data.index
        shards, counts = np.unique(index.shard[self._status >= _FIRST_FAULT], return_counts=True)
        return {index.shards[shard].name: int(count) for shard, count in zip(shards, counts, strict=True)}

    def __getstate__(self) -> dict[str, Any]:
        # A spawned worker gets no cache: shared memory is inherited, not sent.
        return {**self.__dict__, "_status": self._status.copy(), "_pictures": None}

    def _show(self, request: SampleRequest, place: NDArray[np.uint8], captions: list[str]) -> int:
        """Put the sample's picture in its place and append its caption; give the row that is shown."""
        sample = request.sample
        row = self._replacement.get(sample, sample)
        for attempt in range(_MAX_REPLACEMENTS):
            try:
                caption = self._read(row, place, request.caption_draw)
            except DecodeError as error:
                self._status[row] = _FIRST_FAULT + _FAULTS.index(error.fault)
                row = self._candidate(sample, attempt)
                continue
            if row != sample:
                self._replacement[sample] = row
            captions.append(caption)
            return row
        index = self.data.index
        raise UserError(
            f"{index.shards[index.shard[sample]].name}: sample {index.key(sample)} and {_MAX_REPLACEMENTS} others of "
            f"its split cannot be decoded; replace that shard and run `{self.data.reader.remedy}`"
        )

    def _fault_of(self, row: int) -> DecodeFault:
        return _FAULTS[self._status[row] - _FIRST_FAULT]

    def _read(self, row: int, place: NDArray[np.uint8], caption_draw: float) -> str:
        status = self._status[row]
        if status >= _FIRST_FAULT:
            raise DecodeError(self._fault_of(row))
        caption = self.data.caption(row, caption_draw)
        if self._pictures is not None and status == _GOOD:
            place[:] = self._pictures[row]
            return caption
        place[:] = central_square(self.data.reader.image(row), self.image_size)
        if self._pictures is not None:
            self._pictures[row] = place
        # Set after the picture is in the cache: another process may read both.
        self._status[row] = _GOOD
        return caption

    def _candidate(self, sample: int, attempt: int) -> int:
        """A row of the sample's split: of its own shard at first, so that no further shard has to be read."""
        split = self.data.split(sample)
        if split not in self._rows_of_split:
            self._rows_of_split[split] = self.data.samples_in(split)
        rows = self._rows_of_split[split]
        if attempt < _MAX_REPLACEMENTS // 2:
            shard = int(self.data.index.shard[sample])
            first, last = np.searchsorted(rows, np.searchsorted(self.data.index.shard, [shard, shard + 1]))
            rows = rows[first:last]
        draw = sample_seed(purpose_key("replacement"), attempt, np.array([sample]))
        return int(rows[int(draw.view(np.uint64)[0] % np.uint64(len(rows)))])


def _batch_memory(shape: tuple[int, ...]) -> Tensor:
    """An uninitialised uint8 batch; in a loader worker in shared memory, so that sending it copies nothing."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    size = int(np.prod(shape))
    return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(size)).view(shape)


def _shared_zeros(shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Zeros in anonymous memory that forked processes share; pages that are never touched take no memory."""
    size = int(np.prod(shape))
    return np.frombuffer(mmap.mmap(-1, max(size, 1)), np.uint8, count=size).reshape(shape)

"""From made samples to a data artifact: shards, their index, and the splits."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.data.index import ShardIndex
from pipeline.data.indexing import index_shards, without_times
from pipeline.data.prepared import SHARDS, write_prepared
from pipeline.data.splits import Split
from pipeline.data.write import SourceSample, write_shards


def make_prepared(
    directory: Path, samples: Iterable[tuple[SourceSample, Split]], shard_samples: int
) -> tuple[ShardIndex, NDArray[np.uint8]]:
    """Write samples with their splits so that `read_prepared(directory)` opens them; the index and the splits."""
    splits: list[int] = []

    def noting_splits() -> Iterator[SourceSample]:
        for sample, split in samples:
            splits.append(split.code)
            yield sample

    shards = write_shards(directory / SHARDS, noting_splits(), shard_samples)
    names = [shard.name for shard in shards]
    index = without_times(index_shards(names, directory / SHARDS))
    codes = np.array(splits, np.uint8)
    write_prepared(directory, index=index, splits=codes)
    return index, codes

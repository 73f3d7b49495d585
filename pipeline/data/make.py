"""From made samples to a data artifact: shards, their index, and the splits."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.data.captions import TEXT, CaptionSources
from pipeline.data.index import ShardIndex
from pipeline.data.indexing import index_shards, without_times
from pipeline.data.prepared import SHARDS, write_prepared
from pipeline.data.splits import Split
from pipeline.data.write import write_packed


def make_prepared(
    directory: Path,
    samples: Iterable[tuple[bytes, Split]],
    shard_samples: int,
    captions: CaptionSources = TEXT,
    processes: int = 1,
    look: Callable[[], None] = lambda: None,
) -> tuple[ShardIndex, NDArray[np.uint8]]:
    """Write packed samples with their splits so that `read_prepared(directory)` opens them; the index and the splits.

    So many processes index them. `look` is called often meanwhile, and may raise to stop the work.
    """
    splits: list[int] = []

    def noting_splits() -> Iterator[bytes]:
        for packed, split in samples:
            splits.append(split.code)
            yield packed

    shards = write_packed(directory / SHARDS, noting_splits(), shard_samples)
    names = [shard.name for shard in shards]
    index = without_times(index_shards(names, directory / SHARDS, processes, look))
    codes = np.array(splits, np.uint8)
    write_prepared(directory, index=index, splits=codes, captions=captions)
    return index, codes

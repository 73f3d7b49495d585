"""The user's own shards, as img2dataset writes them, indexed by `unclip shards index`. Imports no torch."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.data.index import ShardIndex, read_index
from pipeline.data.order import SHARDS_PER_BLOCK
from pipeline.data.reader import SampleReader
from pipeline.data.shards import expand_shards, index_directory, is_url, shard_names
from pipeline.data.summary import IndexSummary, check_shard_sizes, read_summary
from pipeline.errors import UserError
from stages.settings import WebDatasetSettings
from stages.sources.split_keys import SAMPLE_KEY, split_by

LICENCE = "The pictures and captions of data=webdataset are the user's own."
LICENCE_ID = "other"


def summary(settings: WebDatasetSettings, cache_dir: Path) -> IndexSummary:
    """What the index says of the shards that `data.shards` names: quick, and enough to plan with.

    Raises:
        UserError: a shard does not exist, was not indexed, or changed since.
    """
    shards = expand_shards(settings.shards, allow_shell_urls=settings.allow_shell_urls)
    directory = index_directory(shards, cache_dir)
    chosen = read_summary(directory).select(shard_names(shards, directory), str(directory))
    check_shard_sizes(chosen, directory)
    return chosen


def cache_bytes(settings: WebDatasetSettings, index: ShardIndex) -> int | None:
    """The limit of the cache of remote shards, if there is one.

    Raises:
        UserError: it would not hold the block that is read and the one that is fetched meanwhile.
    """
    if settings.cache_gib is None:
        return None
    limit = int(settings.cache_gib * 2**30)
    largest = sorted((shard.bytes for shard in index.shards if is_url(shard.name)), reverse=True)
    needed = sum(largest[: 2 * SHARDS_PER_BLOCK])
    if limit < needed:
        raise UserError(
            f"data.cache_gib={settings.cache_gib} does not hold two blocks of {SHARDS_PER_BLOCK} remote shards; "
            f"give {needed / 2**30:.3g} or more"
        )
    return limit


def take_in(settings: WebDatasetSettings, cache_dir: Path) -> tuple[ShardIndex, NDArray[np.uint8], Path]:
    """Take in indexed shards: their index, the split of each row (codes of Split, uint8 [N]), and the shards' root.

    The split is by the sample's key, or by the field of its JSON that `data.split_key` names.

    Raises:
        UserError: as `summary`; or a sample lacks the field.
    """
    shards = expand_shards(settings.shards, allow_shell_urls=settings.allow_shell_urls)
    directory = index_directory(shards, cache_dir)
    names = shard_names(shards, directory)
    read_summary(directory).select(names, str(directory))
    index = read_index(directory).select(names, str(directory))
    reader = SampleReader(index, directory, cache_dir, cache_bytes(settings, index))
    splits = np.empty(len(index), np.uint8)
    for row in range(len(index)):
        attributes = None if settings.split_key == SAMPLE_KEY else reader.attributes(row)
        splits[row] = split_by(settings, index.key(row), attributes).code
    return index, splits, directory

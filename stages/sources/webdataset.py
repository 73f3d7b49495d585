"""The user's own shards, as img2dataset writes them, indexed by `unclip shards index`. Imports no torch."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.data.index import ShardIndex, read_index
from pipeline.data.reader import SampleReader
from pipeline.data.shards import expand_shards, index_directory, shard_names
from pipeline.data.summary import IndexSummary, check_shard_sizes, read_summary
from stages.settings import WebDatasetSettings
from stages.sources.split_keys import SAMPLE_KEY, split_by

LICENCE = "The pictures and captions of data=webdataset are the user's own."


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
    reader = SampleReader(index, directory, cache_dir)
    splits = np.empty(len(index), np.uint8)
    for row in range(len(index)):
        attributes = None if settings.split_key == SAMPLE_KEY else reader.attributes(row)
        splits[row] = split_by(settings, index.key(row), attributes).code
    return index, splits, directory

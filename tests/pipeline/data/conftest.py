from pathlib import Path

import numpy as np
import pytest

from pipeline.data.indexing import index_shards, without_times
from pipeline.data.place import ShardPlace
from pipeline.data.prepared import write_prepared
from pipeline.data.write import write_shards
from tests.support.pictures import source_sample
from tests.support.shards import split_of


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A data artifact of 50 one-coloured pictures in 5 shards; sample i's red is i."""
    directory = tmp_path / "artifact"
    shards = write_shards(directory / "shards", map(source_sample, range(50)), 10)
    index = index_shards([shard.name for shard in shards], directory / "shards")
    splits = np.array([split_of(index.key(i), 0.2).code for i in range(len(index))], np.uint8)
    write_prepared(directory, index=without_times(index), splits=splits)
    return directory


@pytest.fixture
def place(tmp_path: Path) -> ShardPlace:
    """Four shards of five samples in one directory."""
    write_shards(tmp_path / "shards", map(source_sample, range(20)), 5)
    return ShardPlace(shards=(str(tmp_path / "shards"),), cache_dir=tmp_path / "outputs" / "cache")

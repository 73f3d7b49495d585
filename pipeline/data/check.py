"""Reads shards from end to end and says what in them cannot be used."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipeline.data.decode import DecodeError, decode_rgb
from pipeline.data.index import ShardIndex, SizeCheck, read_index
from pipeline.data.reader import SampleReader
from pipeline.data.remote import local_shard
from pipeline.data.shards import index_directory, is_url, shard_names
from pipeline.data.walk import walk_shard
from pipeline.errors import UserError

CHANGED = "changed_since_indexed"
UNREADABLE = "unreadable_shard"


@dataclass(frozen=True)
class ShardReport:
    """What one shard is like: `faults` counts samples by the reason why they cannot be used (1 for a whole shard)."""

    name: str
    samples: int
    faults: Mapping[str, int]


def check_shards(
    shards: Sequence[str], cache_dir: Path, cache_bytes: int | None, workers: int
) -> Iterator[ShardReport]:
    """Walk, read and decode every sample of indexed shards (as `expand_shards` lists them), `workers` shards at once.

    Raises:
        UserError: there is no index, or it lacks a shard.
    """
    directory = index_directory(shards, cache_dir)
    names = shard_names(shards, directory)
    index = read_index(directory, size_check=SizeCheck.SKIP).select(names, str(directory))
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(
            partial(_check_shard, directory, cache_dir, cache_bytes), map(index.only, range(len(names)))
        )


def _check_shard(directory: Path, cache_dir: Path, cache_bytes: int | None, index: ShardIndex) -> ShardReport:
    (entry,) = index.shards
    name = entry.name
    faults: Counter[str] = Counter(entry.left_out)
    try:
        walked = walk_shard(local_shard(name, cache_dir, cache_bytes) if is_url(name) else directory / name, name)
    except (UserError, OSError):
        return ShardReport(name, entry.samples, {UNREADABLE: 1})
    if walked.shards[0].digest != entry.digest:
        return ShardReport(name, entry.samples, {CHANGED: 1})
    reader = SampleReader(index, directory, cache_dir, cache_bytes)
    for row in range(len(index)):
        try:
            reader.caption(row)
            decode_rgb(reader.image(row))
        except DecodeError as error:
            faults[error.fault.value] += 1
    return ShardReport(name, entry.samples, dict(faults))

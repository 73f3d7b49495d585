"""Reads shards from end to end and says what in them cannot be used."""

from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

from pipeline.data.captions import CaptionSources
from pipeline.data.decode import DecodeError, decode_rgb
from pipeline.data.index import ShardIndex
from pipeline.data.location import open_index
from pipeline.data.place import ShardPlace
from pipeline.data.reader import SampleReader
from pipeline.data.remote import local_shard
from pipeline.data.summary import SizeCheck
from pipeline.data.walk import is_the_same, walk_shard
from pipeline.errors import UserError

CHANGED = "changed_since_indexed"
UNREADABLE = "unreadable_shard"


@dataclass(frozen=True)
class ShardReport:
    """What one shard is like: `faults` counts samples by the reason why they cannot be used (1 for a whole shard)."""

    name: str
    samples: int
    faults: Mapping[str, int]


def check_shards(place: ShardPlace, captions: CaptionSources, workers: int) -> Iterator[ShardReport]:
    """Walk, read and decode every sample of indexed shards, `workers` shards at once.

    Raises:
        UserError: there is no index, or it lacks a shard.
    """
    index = open_index(place, size_check=SizeCheck.SKIP)
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(partial(_check_shard, place, captions), map(index.only, range(len(index.shards))))


def _check_shard(place: ShardPlace, captions: CaptionSources, index: ShardIndex) -> ShardReport:
    (entry,) = index.shards
    faults: Counter[str] = Counter(entry.left_out)
    path = local_shard(entry.name, place.cache_dir, place.cache_bytes)
    try:
        walked = walk_shard(path, entry.name)
    except (UserError, OSError):
        return ShardReport(entry.name, entry.samples, {UNREADABLE: 1})
    if not is_the_same(walked.shards[0], entry):
        return ShardReport(entry.name, entry.samples, {CHANGED: 1})
    reader = SampleReader(index.renamed([str(path)]), path.parent, place.cache_dir, captions=captions)
    for row in range(len(index)):
        try:
            reader.caption(row)
            decode_rgb(reader.image(row))
        except DecodeError as error:
            faults[error.fault.value] += 1
        except UserError:
            faults[CHANGED] += 1
    reader.close()
    return ShardReport(entry.name, entry.samples, dict(faults))

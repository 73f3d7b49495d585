"""Shards and their indices, as tests make them."""

from collections.abc import Sequence
from pathlib import Path

from pipeline.data.index import ShardIndex
from pipeline.data.indexing import index_place
from pipeline.data.place import ShardPlace
from pipeline.data.splits import Split, split_at, split_position
from pipeline.errors import UserError


def update_index(shards: Sequence[str], cache_dir: Path) -> tuple[Path, ShardIndex]:
    """Index shards of one directory in this process: where the index is, and the part of it that describes them."""
    place = ShardPlace(shards=tuple(shards), cache_dir=cache_dir, allow_shell_urls=True)
    (indexed,) = index_place(place, workers=0)
    if indexed.refused:
        raise UserError(indexed.refused[0])
    assert indexed.index is not None
    return indexed.directory, indexed.index


def the_index(place: ShardPlace, workers: int = 0, *, again: bool = False) -> ShardIndex:
    (indexed,) = index_place(place, workers, again=again)
    assert indexed.index is not None
    assert indexed.refused == ()
    return indexed.index


def split_of(split_key: str, validation_fraction: float) -> Split:
    """The side of a sample by the hash of its split key, as a source puts it there."""
    return split_at(split_position(split_key), validation_fraction)

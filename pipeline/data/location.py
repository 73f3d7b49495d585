"""Finds the index of shards, and whether it still fits them. Imports no torch.

Shards of one directory have one index, which lies beside them where it can. It names them by their file names, so that
directory and index can move together.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.data.place import ShardPlace
from pipeline.data.shards import index_in_cache, is_url, shard_names, shard_parent
from pipeline.data.summary import SUMMARY_FILE, IndexSummary, ShardEntry, SizeCheck, read_summary
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.data.index import ShardIndex

READ_AGAIN_BYTES = 4 * 2**30
"""So much is read again to see that shards whose time changed hold what was indexed; more is left to the user."""

_SAID_FROM_BYTES = 2**28


@dataclass(frozen=True)
class ShardGroup:
    """The shards of one directory or with one beginning of their URLs. `candidates` are where their index may be."""

    parent: str
    shards: tuple[str, ...]
    candidates: tuple[Path, ...]
    is_whole: bool  # all tars of the directory, however many there are

    @property
    def names(self) -> tuple[str, ...]:
        """What the index calls them: the file's name in the directory, or the URL."""
        return tuple(shard_names(self.shards, self.root))

    def is_of_these(self, directory: Path, summary: IndexSummary) -> bool:
        """Whether an index in `directory` was made of shards in this place, and not of others with the same names."""
        return directory == self.root or summary.root == self.parent

    @property
    def root(self) -> Path:
        """The directory of local shards."""
        return Path(self.parent)


def group_shards(place: ShardPlace) -> list[ShardGroup]:
    """Group shards by their directory, in the order in which directories appear. Raises `UserError` as `expand`."""
    by_parent: dict[str, list[str]] = {}
    for shard in place.expand():
        by_parent.setdefault(shard_parent(shard), []).append(shard)
    whole = {str(Path(part).expanduser().absolute()) for part in place.shards if not is_url(part)}
    return [
        ShardGroup(
            parent,
            tuple(shards),
            _candidates(parent, place, number if len(by_parent) > 1 else None),
            is_whole=parent in whole,
        )
        for number, (parent, shards) in enumerate(by_parent.items())
    ]


def _candidates(parent: str, place: ShardPlace, number: int | None) -> tuple[Path, ...]:
    """In the order in which writing is tried."""
    if place.index_dir is not None:
        return (place.index_dir if number is None else place.index_dir / f"{number:02d}",)
    beside = () if is_url(parent) else (Path(parent),)
    return (*beside, index_in_cache(parent, place.cache_dir))


def open_summary(place: ShardPlace) -> IndexSummary:
    """What the index says of the shards, in their order, each named by its path or URL.

    Raises:
        UserError: a shard does not exist, was not indexed, or holds something else than when it was indexed.
    """
    found: dict[str, ShardEntry] = {}
    for group in group_shards(place):
        _, summary = _fitting(group, place, SizeCheck.COMPARE)
        found |= dict(zip(group.shards, summary.shards, strict=True))
    return IndexSummary(tuple(replace(found[shard], name=shard) for shard in place.expand()), "")


def open_index(place: ShardPlace, size_check: SizeCheck = SizeCheck.COMPARE) -> "ShardIndex":
    """The index of the shards, in their order, each named by its path or URL.

    Raises:
        UserError: as `open_summary`; or an index is damaged.
    """
    from pipeline.data.index import concatenate, read_index  # needs numpy, which a plan is spared

    parts = []
    for group in group_shards(place):
        directory, _ = _fitting(group, place, size_check)
        index = read_index(directory, place.index_command)
        parts.append(index.select(group.names, group.parent).renamed(group.shards))
    return (parts[0] if len(parts) == 1 else concatenate(parts)).select(place.expand(), "")


def _fitting(group: ShardGroup, place: ShardPlace, size_check: SizeCheck) -> tuple[Path, IndexSummary]:
    """The first index that fits the shards; where none does, the error of the first that is there."""

    def fitting(directory: Path) -> tuple[Path, IndexSummary]:
        where = group.parent or str(directory)
        summary = read_summary(directory, place.index_command)
        chosen = summary.select(group.names, where, place.index_command)
        if size_check is SizeCheck.COMPARE:
            _check_complete(group, summary, place.index_command)
            if not group.is_of_these(directory, summary):
                # Made of shards in another place: they may have moved, or be others under the same names.
                chosen = replace(chosen, shards=tuple(replace(shard, mtime_ns=-1) for shard in chosen.shards))
            check_unchanged(chosen, group.root, place.index_command)
        return directory, chosen

    there = [directory for directory in group.candidates if (directory / SUMMARY_FILE).exists()]
    errors: list[UserError] = []
    for directory in there or group.candidates[:1]:
        try:
            return fitting(directory)
        except UserError as error:
            errors.append(error)
    raise errors[0]


def _check_complete(group: ShardGroup, summary: IndexSummary, remedy: str) -> None:
    """Raise `UserError` where a directory lacks a shard that it had when it was indexed."""
    gone = [shard.name for shard in summary.shards if shard.name not in set(group.names)] if group.is_whole else []
    if gone:
        others = f" and {len(gone) - 1} others" if len(gone) > 1 else ""
        raise UserError(
            f"{group.root / gone[0]}{others} is in the index and not on disk; put it back, or run `{remedy}` to go on "
            "without it"
        )


def check_unchanged(summary: IndexSummary, root: Path, remedy: str) -> None:
    """Raise `UserError` unless local shards hold what was indexed.

    Size and time tell. Where a time alone differs, the shard is read again, up to `READ_AGAIN_BYTES` of them: a touched
    or a copied shard is the same shard.
    """
    touched: list[ShardEntry] = []
    changed: list[str] = []
    for shard in summary.shards:
        if is_url(shard.name):
            continue
        path = root / shard.name
        try:
            status = path.stat()
        except OSError as error:
            raise UserError(f"{path} is in the index and cannot be read ({error.strerror}); run `{remedy}`") from error
        if status.st_size != shard.bytes:
            changed.append(shard.name)
        elif shard.mtime_ns not in (0, status.st_mtime_ns):
            touched.append(shard)
    total = sum(shard.bytes for shard in touched)
    if not changed and touched:
        if total > READ_AGAIN_BYTES:
            raise UserError(
                f"{len(touched)} shards of {root}, such as {touched[0].name}, were written or copied since they were "
                f"indexed; run `{remedy}`, which keeps what was trained if they are the same"
            )
        if total > _SAID_FROM_BYTES:
            print(
                f"reading {len(touched)} shards of {root} again, as their times changed; `{remedy}` saves that",
                file=sys.stderr,
            )
        changed = _changed(touched, root)
    if changed:
        others = f" and {len(changed) - 1} others" if len(changed) > 1 else ""
        raise UserError(f"{root / changed[0]}{others} changed since the index was made; run `{remedy}`")


def _changed(shards: Sequence[ShardEntry], root: Path) -> list[str]:
    from pipeline.data.walk import is_the_same  # walking needs numpy, which a plan is spared

    changed = []
    for shard in shards:
        walked = _walked(root / shard.name, (root / shard.name).stat().st_mtime_ns)
        if walked is None or not is_the_same(walked, shard):
            changed.append(shard.name)
    return changed


@cache
def _walked(path: Path, _mtime_ns: int) -> ShardEntry | None:
    """The entry of a shard as it is now, None for what is no tar; read once for each time that it was written."""
    from pipeline.data.walk import walk_shard

    try:
        (entry,) = walk_shard(path, path.name).shards
    except (UserError, OSError):
        return None
    return entry

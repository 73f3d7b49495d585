"""Makes and keeps the indices of shards: all cores, and nothing that was walked is walked again. Imports no torch."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from pipeline.data.index import IMAGE_EXTENSIONS, ShardIndex, concatenate, read_index, write_index
from pipeline.data.location import ShardGroup, group_shards
from pipeline.data.place import ShardPlace
from pipeline.data.pool import in_order, process_pool
from pipeline.data.reasons import EXPLANATIONS
from pipeline.data.remote import forget, is_disk_full, local_shard
from pipeline.data.shards import is_url
from pipeline.data.summary import SUMMARY_FILE, IndexSummary, ShardEntry, read_summary
from pipeline.data.walk import walk_shard
from pipeline.errors import UserError

SAVE_EVERY_S = 30.0
"""What was walked is written down so often, for an indexing that is killed."""

_HANDED_OVER_WITHIN_S = 5.0
"""The longest wait at a stop: a process that ends while it writes its result leaves the pool waiting for the rest."""


@dataclass(frozen=True)
class IndexProgress:
    """How far an indexing is. Shards that were known and have not changed count as done."""

    shards: int
    shards_done: int
    samples: int


Report = Callable[[IndexProgress], None]


@dataclass(frozen=True)
class Indexed:
    """An index that was written: its directory, what it says of the shards, and those that were refused, with why."""

    directory: Path
    index: ShardIndex | None
    refused: tuple[str, ...]


def index_place(
    place: ShardPlace, workers: int, report: Report = lambda _: None, *, again: bool = False
) -> list[Indexed]:
    """Write the index of each directory of the shards, walking only what is new or changed, or all of it `again`.

    An index that is already there keeps the other shards that it describes. What was walked is kept when the work stops
    or a shard is refused. With 0 `workers` all is done in this process.

    Raises:
        UserError: the index can be written nowhere, or no sample of all is complete.
    """
    indexed = [_index_group(group, place, workers, report, again) for group in group_shards(place)]
    if not any(each.refused for each in indexed):
        _require_samples([each.index for each in indexed if each.index is not None])
    return indexed


def index_shards(
    names: Sequence[str], root: Path, processes: int = 1, look: Callable[[], None] = lambda: None
) -> ShardIndex:
    """Index local shards by their names under `root`, and write nothing. Of `look` see `in_order`.

    Raises:
        UserError: a shard is no tar, or no sample in any of them is complete.
    """
    index = concatenate(list(in_order(partial(_walk_below, root), names, min(processes, len(names)), look)))
    _require_samples([index])
    return index


def without_times(index: ShardIndex) -> ShardIndex:
    """The index with no modification times, so that the same shards written again give the same index."""
    return replace(index, shards=tuple(replace(shard, mtime_ns=0) for shard in index.shards))


def _require_samples(indices: Sequence[ShardIndex]) -> None:
    shards = tuple(shard for index in indices for shard in index.shards)
    summary = IndexSummary(shards, "")
    if summary.samples:
        return
    counts = (summary.left_out + summary.skipped).most_common()
    found = "; ".join(f"{count} {reason}: {EXPLANATIONS[reason]}" for reason, count in counts)
    raise UserError(
        f"data.shards: no complete sample in {len(shards)} shard(s), such as {shards[0].name} ({found or 'no files'}); "
        f"a sample needs key.txt beside key.{'|'.join(IMAGE_EXTENSIONS)} (data.caption takes another text)"
    )


def _index_group(group: ShardGroup, place: ShardPlace, workers: int, report: Report, again: bool) -> Indexed:
    work = _Work(group, place, again)
    try:
        work.run(workers, report)
    finally:
        work.save()
    return Indexed(work.directory, work.index_of_group(), tuple(work.refused))


class _Work:
    """The indexing of one directory: what is done of it, and where it is kept."""

    def __init__(self, group: ShardGroup, place: ShardPlace, again: bool) -> None:
        self.directory = group.candidates[0]
        self.refused: list[str] = []
        self._group = group
        self._place = place
        self._again = again
        self._names = frozenset(group.names)
        self._parts: dict[str, ShardIndex] = {}
        self._saved_at = time.monotonic()
        self._is_saved = False
        if not again:
            places: Counter[Path] = Counter()
            known = list(self._known())
            for directory, name, part in known:
                if name in self._names and name not in self._parts:
                    self._parts[name] = part
                    places[directory] += 1
            if self._parts.keys() == self._names and len(places) == 1:
                (self.directory,) = places
                # One that describes shards which are gone is written again without them.
                self._is_saved = len(read_summary(self.directory).shards) == len(known)

    def run(self, workers: int, report: Report) -> None:
        """Walk what is not known, several shards at once."""
        todo = [
            (name, shard)
            for name, shard in zip(self._group.names, self._group.shards, strict=True)
            if name not in self._parts
        ]
        report(self._progress())
        if workers == 0 or not todo:
            for name, shard in todo:
                self._take(name, lambda name=name, shard=shard: _walk(shard, name, self._place, self._again))
                report(self._progress())
            return
        futures: dict[Future[ShardIndex], str] = {}
        try:
            with process_pool(min(workers, len(todo))) as pool:
                for name, shard in todo:
                    futures[pool.submit(_walk, shard, name, self._place, self._again)] = name
                for future in as_completed(futures):
                    self._take(futures[future], future.result)
                    if time.monotonic() - self._saved_at > SAVE_EVERY_S:
                        self.save()
                    report(self._progress())
        except (KeyboardInterrupt, UserError):
            self._take_what_was_walked(futures)
            raise

    def _take_what_was_walked(self, futures: Mapping[Future[ShardIndex], str]) -> None:
        """Take the results that were on their way. The processes have ended: the pool reads all of them, then ends."""
        for future in wait(futures, timeout=_HANDED_OVER_WITHIN_S).done:
            if not future.cancelled() and future.exception() is None:
                self._take(futures[future], future.result)

    def _known(self) -> Iterator[tuple[Path, str, ShardIndex]]:
        """Every shard that an index describes as it is now, with the directory of that index."""
        for directory in self._group.candidates:
            if not (directory / SUMMARY_FILE).exists():
                continue
            with suppress(UserError):  # a damaged index is made anew
                if not self._group.is_of_these(directory, read_summary(directory)):
                    continue
                previous = read_index(directory)
                for number, shard in enumerate(previous.shards):
                    if _is_unchanged(shard, self._group.root):
                        yield directory, shard.name, previous.only(number)

    def _take(self, name: str, result: Callable[[], ShardIndex]) -> None:
        try:
            self._parts[name] = result()
            self._is_saved = False
        except UserError as error:
            self.refused.append(str(error))
        except OSError as error:
            if not is_disk_full(error):
                self.refused.append(f"data.shards: {self._group.parent}/{name} cannot be read ({error.strerror})")
                return
            raise UserError(
                f"no space is left for remote shards in {self._place.cache_dir}; free some, keep fewer with "
                "--cache-gib, or give another --cache DIR"
            ) from error
        except BrokenProcessPool:
            raise UserError(
                "a process that walked shards was killed: for its memory, or since a shard was cut while it was read; "
                f"what was walked is kept: run `{self._place.index_command} --workers 1`"
            ) from None

    def _progress(self) -> IndexProgress:
        return IndexProgress(
            len(self._group.names), len(self._parts) + len(self.refused), sum(map(len, self._parts.values()))
        )

    def index_of_group(self) -> ShardIndex | None:
        """The shards of the group that are indexed, in their order; None for none."""
        parts = [self._parts[name] for name in self._group.names if name in self._parts]
        return concatenate(parts) if parts else None

    def save(self) -> None:
        """Write down what is walked, beside the shards or where that is not possible, in the next place."""
        index = self.index_of_group()
        if index is None or self._is_saved:
            return
        # Read now, as another process may have indexed other shards of the directory meanwhile.
        others = {name: part for _, name, part in self._known() if name not in self._names}
        self.directory = _write(self._group, concatenate([index, *others.values()]))
        self._saved_at, self._is_saved = time.monotonic(), True


def _write(group: ShardGroup, index: ShardIndex) -> Path:
    refusals = []
    for directory in group.candidates:
        try:
            write_index(directory, index, None if directory == group.root else group.parent)
            return directory
        except OSError as error:
            if is_disk_full(error):
                raise UserError(
                    f"no space is left for the index in {directory}; free some, or put it elsewhere with --index DIR "
                    "(and data.index_dir=DIR)"
                ) from error
            refusals.append(f"{directory} ({error.strerror})")
    raise UserError(
        f"the index cannot be written to {' nor to '.join(refusals)}; give another place with --index DIR "
        "(and data.index_dir=DIR)"
    )


def _walk_below(root: Path, name: str) -> ShardIndex:
    return walk_shard(root / name, name)


def _walk(shard: str, name: str, place: ShardPlace, again: bool) -> ShardIndex:
    if again:
        forget(shard, place.cache_dir)
    return walk_shard(local_shard(shard, place.cache_dir, place.cache_bytes), name)


def _is_unchanged(shard: ShardEntry, root: Path) -> bool:
    """A URL tells nothing cheaply: what is indexed of it stands until it is indexed again with --again."""
    if is_url(shard.name):
        return True
    try:
        status = (root / shard.name).stat()
    except OSError:
        return False
    return (status.st_size, status.st_mtime_ns) == (shard.bytes, shard.mtime_ns)

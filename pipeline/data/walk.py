"""Makes the shard index by reading tar headers alone; nothing is extracted."""

import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from enum import StrEnum
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from pipeline.data.index import IMAGE_EXTENSIONS, ShardIndex, SizeCheck, concatenate, read_index, write_index
from pipeline.data.remote import local_shard
from pipeline.data.shards import index_directory, is_url, shard_names
from pipeline.data.summary import SUMMARY_FILE, ShardEntry
from pipeline.errors import UserError


class _Digest(Protocol):
    def update(self, content: bytes, /) -> None: ...


class LeftOut(StrEnum):
    """Why something in a shard is not a sample of the index."""

    MISSING_CAPTION = "missing_caption"
    MISSING_IMAGE = "missing_image"
    DUPLICATE_KEY = "duplicate_key"
    TRUNCATED = "truncated"


def update_index(shards: Sequence[str], cache_dir: Path, cache_bytes: int | None = None) -> tuple[Path, ShardIndex]:
    """Write the index of these shards (as `expand_shards` lists them), walking only what is new or changed.

    Returns:
        The directory of the index, and the part of the index that describes `shards`. An index that is already there
        keeps the other shards that it describes.

    Raises:
        UserError: a shard is no tar, or no sample is complete.
    """
    directory = index_directory(shards, cache_dir)
    names = shard_names(shards, directory)
    previous = _previous(directory)
    index = index_shards(names, directory, cache_dir, previous, cache_bytes)
    others = [] if previous is None else _others(previous, set(names), directory)
    try:
        write_index(directory, concatenate([index, *others]))
    except OSError as error:
        raise UserError(f"the index cannot be written to {directory} ({error}); make the directory writable") from error
    return directory, index


def index_shards(
    names: Sequence[str],
    root: Path,
    cache_dir: Path,
    previous: ShardIndex | None = None,
    cache_bytes: int | None = None,
) -> ShardIndex:
    """Index shards (names relative to `root`, absolute paths, URLs), reusing what `previous` knows of unchanged ones.

    Raises:
        UserError: a shard is no tar, or no sample in any of them is complete.
    """
    known = {} if previous is None else {shard.name: number for number, shard in enumerate(previous.shards)}
    parts = []
    for name in names:
        number = known.get(name)
        if previous is not None and number is not None and _is_unchanged(previous.shards[number], root):
            parts.append(previous.only(number))
        else:
            parts.append(walk_shard(local_shard(name, cache_dir, cache_bytes) if is_url(name) else root / name, name))
    index = concatenate(parts)
    if len(index) == 0:
        left_out = sum((Counter(shard.left_out) for shard in index.shards), Counter())
        found = ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items())) or "no files"
        raise UserError(
            f"data.shards: no complete sample in {len(names)} shard(s), such as {names[0]} ({found}); "
            f"a sample needs key.txt beside key.{'|'.join(IMAGE_EXTENSIONS)}"
        )
    return index


def walk_shard(path: Path, name: str) -> ShardIndex:
    """Index one tar as the shard `name`. Members are grouped into samples as webdataset does.

    Files that follow each other and share all up to the first dot of their base name are one sample. A tar that breaks
    off keeps the samples before the break.

    Raises:
        UserError: the file is no tar, or a compressed one.
    """
    from webdataset.tariterators import group_by_keys  # imports torch: only who walks shards pays for it

    left_out: Counter[str] = Counter()
    digest = sha256()
    rows: list[dict[str, Any]] = []

    def count_repeated_file(_error: Exception) -> bool:
        left_out[LeftOut.DUPLICATE_KEY] += 1
        return True

    keys: set[str] = set()
    members = _members(path, digest, left_out)
    for sample in group_by_keys(members, handler=count_repeated_file):
        key = sample["__key__"]
        extension = next((extension for extension in IMAGE_EXTENSIONS if extension in sample), None)
        if key in keys:
            left_out[LeftOut.DUPLICATE_KEY] += 1
        elif extension is None:
            left_out[LeftOut.MISSING_IMAGE] += 1
        elif "txt" not in sample:
            left_out[LeftOut.MISSING_CAPTION] += 1
        else:
            keys.add(key)
            rows.append({"key": key, "extension": extension, **sample})
    status = path.stat()
    entry = ShardEntry(
        name=name,
        bytes=status.st_size,
        mtime_ns=0 if is_url(name) else status.st_mtime_ns,
        samples=len(rows),
        digest=digest.hexdigest(),
        left_out=dict(sorted(left_out.items())),
    )
    return _index_of(entry, rows)


def _members(path: Path, digest: _Digest, left_out: Counter[str]) -> Iterator[dict[str, Any]]:
    """Yield regular files as `group_by_keys` takes them, with (offset, size) in place of the content."""
    try:
        tar = tarfile.open(path, "r:")  # noqa: SIM115 - closed below; opening fails in its own way
    except tarfile.TarError as error:
        raise UserError(
            f"data.shards: {path} is no uncompressed tar ({error}); give tars as img2dataset writes them"
        ) from None
    end = path.stat().st_size
    with tar:
        while True:
            try:
                member = tar.next()
            except tarfile.TarError:
                left_out[LeftOut.TRUNCATED] += 1
                return
            if member is None:
                return
            cast(Any, tar).members.clear()  # tarfile would keep every header
            if not member.isreg() or member.name.startswith("__"):
                continue
            if member.offset_data + member.size > end:
                left_out[LeftOut.TRUNCATED] += 1
                return
            digest.update(f"{member.name}\0{member.offset_data}\0{member.size}\n".encode(errors="surrogateescape"))
            yield {"fname": member.name, "data": (member.offset_data, member.size), "__url__": None}


def _index_of(entry: ShardEntry, rows: list[dict[str, Any]]) -> ShardIndex:
    keys = [row["key"].encode(errors="replace") for row in rows]
    image = np.array([row[row["extension"]] for row in rows], np.int64).reshape(-1, 2)
    caption = np.array([row["txt"] for row in rows], np.int64).reshape(-1, 2)
    json = np.array([row.get("json", (-1, 0)) for row in rows], np.int64).reshape(-1, 2)
    return ShardIndex(
        shards=(entry,),
        shard=np.zeros(len(rows), np.int32),
        image_offset=image[:, 0].copy(),
        image_size=image[:, 1].copy(),
        image_extension=np.array([IMAGE_EXTENSIONS.index(row["extension"]) for row in rows], np.uint8),
        caption_offset=caption[:, 0].copy(),
        caption_size=caption[:, 1].copy(),
        json_offset=json[:, 0].copy(),
        json_size=json[:, 1].copy(),
        key_bytes=np.frombuffer(b"".join(keys), np.uint8),
        key_offset=np.cumsum([0, *map(len, keys)], dtype=np.int64),
    )


def without_times(index: ShardIndex) -> ShardIndex:
    """The index with no modification times, so that the same shards written again give the same index."""
    return replace(index, shards=tuple(replace(shard, mtime_ns=0) for shard in index.shards))


def _previous(directory: Path) -> ShardIndex | None:
    if not (directory / SUMMARY_FILE).exists():
        return None
    try:
        return read_index(directory, size_check=SizeCheck.SKIP)
    except UserError:
        return None  # a damaged index is made anew


def _others(previous: ShardIndex, names: set[str], root: Path) -> list[ShardIndex]:
    return [
        previous.only(number)
        for number, shard in enumerate(previous.shards)
        if shard.name not in names and _is_unchanged(shard, root)
    ]


def _is_unchanged(shard: ShardEntry, root: Path) -> bool:
    """A URL tells nothing cheaply: what is indexed of it stands until the index is deleted."""
    if is_url(shard.name):
        return True
    try:
        status = (root / shard.name).stat()
    except OSError:
        return False
    return status.st_size == shard.bytes and status.st_mtime_ns == shard.mtime_ns

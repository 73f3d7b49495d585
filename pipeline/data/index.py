"""The shard index: where the picture and the texts of every sample lie inside the tars. Imports no torch.

`index.json` (see `pipeline.data.summary`) and `index.npz`. A row takes 13 bytes, 24 for its picture and for each of
the texts that any sample has (`txt`, `json`, ...), and its key.
"""

import io
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from pipeline.data.summary import (
    ARRAYS_FILE,
    SUMMARY_FILE,
    IndexSummary,
    ShardEntry,
    index_command,
    read_summary,
    summary_text,
)
from pipeline.errors import UserError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "avif", "tif", "tiff", "gif", "bmp")
"""In the order of preference where a sample has several; `image_extension` counts in it."""

ABSENT = -1
"""The offset of a text that a sample lacks."""

_ZIP_LENGTHS_AT = 26
"""Where a member's header in a zip file has the sizes of its name and its extra field."""

_ROW_FIELDS = ("shard", "image_extension")
_MEMBER_FIELDS = ("offset", "size", "digest")
_KEY_FIELDS = ("key_bytes", "key_offset")


@dataclass(frozen=True, eq=False)
class Members:
    """One kind of content of N samples: where it lies in the shard's file, in bytes, and its `member_digest`."""

    offset: NDArray[np.int64]  # [N], ABSENT where a sample has none
    size: NDArray[np.int64]  # [N]
    digest: NDArray[np.uint64]  # [N]

    def __getitem__(self, rows: Any) -> "Members":
        return Members(*(getattr(self, field)[rows] for field in _MEMBER_FIELDS))

    @property
    def is_present(self) -> NDArray[np.bool_]:
        """Which samples have it, bool [N]."""
        return self.offset != ABSENT


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """One row per sample, in the order of the shards and of their members. N rows.

    Keys are UTF-8: row i's is `key_bytes[key_offset[i]:key_offset[i + 1]]`. `texts` are by their extension.
    """

    shards: tuple[ShardEntry, ...]
    shard: NDArray[np.int32]  # [N], counts in `shards`
    image: Members
    image_extension: NDArray[np.uint8]  # [N], counts in IMAGE_EXTENSIONS
    texts: Mapping[str, Members]
    key_bytes: NDArray[np.uint8]  # [sum of key lengths]
    key_offset: NDArray[np.int64]  # [N + 1]

    def __len__(self) -> int:
        return len(self.shard)

    @cached_property
    def first_rows(self) -> NDArray[np.int64]:
        """The first row of each shard, and N: int64 [shards + 1]."""
        return np.searchsorted(self.shard, np.arange(len(self.shards) + 1)).astype(np.int64)

    def key(self, sample: int) -> str:
        """The key of a row."""
        return self.key_bytes[self.key_offset[sample] : self.key_offset[sample + 1]].tobytes().decode()

    def only(self, number: int) -> "ShardIndex":
        """The part of the index that describes shard `number`."""
        first, last = self.first_rows[number : number + 2]
        keys = self.key_offset[first : last + 1]
        return ShardIndex(
            shards=(self.shards[number],),
            shard=np.zeros(last - first, np.int32),
            image=self.image[first:last],
            image_extension=self.image_extension[first:last],
            texts={name: members[first:last] for name, members in self.texts.items()},
            key_bytes=self.key_bytes[keys[0] : keys[-1]],
            key_offset=keys - keys[0],
        )

    def select(self, names: Sequence[str], where: str) -> "ShardIndex":
        """Keep the named shards, in the order named; raises UserError where one was not indexed."""
        if tuple(names) == tuple(shard.name for shard in self.shards):
            return self
        numbers = {shard.name: number for number, shard in enumerate(self.shards)}
        IndexSummary(self.shards, "").select(names, where)
        return concatenate([self.only(numbers[name]) for name in names])

    def keep(self, kept: NDArray[np.bool_], texts: Sequence[str]) -> "ShardIndex":
        """Keep some rows (bool [N]) and some texts. The entries of the shards count the rows that are left."""
        samples = np.bincount(self.shard[kept], minlength=len(self.shards))
        shards = tuple(
            replace(shard, samples=int(count)) for shard, count in zip(self.shards, samples, strict=True)
        )  # fmt: skip
        key_sizes = np.diff(self.key_offset)
        return ShardIndex(
            shards=shards,
            shard=self.shard[kept],
            image=self.image[kept],
            image_extension=self.image_extension[kept],
            texts={name: self.texts[name][kept] for name in texts if name in self.texts},
            key_bytes=self.key_bytes[np.repeat(kept, key_sizes)],
            key_offset=np.concatenate([[0], np.cumsum(key_sizes[kept])]).astype(np.int64),
        )

    def renamed(self, names: Sequence[str]) -> "ShardIndex":
        """The index with other names of its shards, such as the paths where they are now."""
        renamed = (replace(shard, name=name) for shard, name in zip(self.shards, names, strict=True))
        return replace(self, shards=tuple(renamed))


def absent(samples: int) -> Members:
    """What so many samples have of a text that none of them has."""
    return Members(np.full(samples, ABSENT, np.int64), np.zeros(samples, np.int64), np.zeros(samples, np.uint64))


def concatenate(parts: Sequence[ShardIndex]) -> ShardIndex:
    """Join indices (at least one) into one; shards are renumbered, rows keep their order."""
    first_shards = np.cumsum([0, *(len(part.shards) for part in parts)])
    first_bytes = np.cumsum([0, *(len(part.key_bytes) for part in parts)])
    texts = sorted({name for part in parts for name in part.texts})
    return ShardIndex(
        shards=tuple(shard for part in parts for shard in part.shards),
        shard=np.concatenate([part.shard + np.int32(first) for part, first in zip(parts, first_shards, strict=False)]),
        image=_joined([part.image for part in parts]),
        image_extension=np.concatenate([part.image_extension for part in parts]),
        texts={name: _joined([part.texts.get(name) or absent(len(part)) for part in parts]) for name in texts},
        key_bytes=np.concatenate([part.key_bytes for part in parts]),
        key_offset=np.concatenate(
            [part.key_offset[:-1] + first for part, first in zip(parts, first_bytes, strict=False)] + [first_bytes[-1:]]
        ),
    )


def _joined(parts: Sequence[Members]) -> Members:
    return Members(*(np.concatenate([getattr(part, field) for part in parts]) for field in _MEMBER_FIELDS))


def write_index(directory: Path, index: ShardIndex, root: str | None = None) -> None:
    """Write `index.npz`, then `index.json`, each beside its place and renamed. The same index gives the same bytes.

    `root` is the directory of the shards where the index lies elsewhere.
    """
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, **dict(_arrays(index)))
    summary = IndexSummary(index.shards, sha256(content.getbuffer()).hexdigest(), root)
    directory.mkdir(parents=True, exist_ok=True)
    _replace(directory / ARRAYS_FILE, content.getvalue())
    _replace(directory / SUMMARY_FILE, summary_text(summary).encode())


def _arrays(index: ShardIndex) -> Iterator[tuple[str, NDArray[Any]]]:
    for field in (*_ROW_FIELDS, *_KEY_FIELDS):
        yield field, getattr(index, field)
    yield "texts", np.frombuffer("\n".join(index.texts).encode(errors="surrogateescape"), np.uint8)
    for number, members in enumerate([index.image, *index.texts.values()]):
        for field in _MEMBER_FIELDS:
            yield f"{field}_{number}", getattr(members, field)


def read_index(directory: Path, remedy: str | None = None) -> ShardIndex:
    """Open an index.

    Its arrays are mapped from the file: they take no memory that another process could not share or the system take
    back. `remedy` is the command that makes the index anew.

    Raises:
        UserError: there is no index, or it is damaged.
    """
    remedy = remedy or index_command(directory)
    summary = read_summary(directory, remedy)
    path = directory / ARRAYS_FILE
    try:
        with path.open("rb") as file:
            if file_digest(file, "sha256").hexdigest() != summary.arrays_sha256:
                raise ValueError(f"it is not the one that {SUMMARY_FILE} describes")
        index = _index_of(summary.shards, _mapped_arrays(path))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read ({error}); run `{remedy}`") from error
    if len(index) != summary.samples:
        raise UserError(f"{path} has {len(index)} rows and {SUMMARY_FILE} says {summary.samples}; run `{remedy}`")
    return index


def _index_of(shards: tuple[ShardEntry, ...], array: Callable[[str], NDArray[Any]]) -> ShardIndex:
    texts = array("texts").tobytes().decode(errors="surrogateescape").split("\n")

    def members(number: int) -> Members:
        return Members(*(array(f"{field}_{number}") for field in _MEMBER_FIELDS))

    return ShardIndex(
        shards=shards,
        image=members(0),
        texts={name: members(number) for number, name in enumerate(texts, 1) if name},
        **{field: array(field) for field in (*_ROW_FIELDS, *_KEY_FIELDS)},
    )


def _mapped_arrays(path: Path) -> Callable[[str], NDArray[Any]]:
    """The arrays of a file that `np.savez` wrote (each member stored, not compressed), mapped in place."""
    arrays: dict[str, NDArray[Any]] = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for member in archive.infolist():
            with archive.open(member) as content:
                np.lib.format.read_magic(content)
                shape, _, dtype = np.lib.format.read_array_header_1_0(content)
                header_size = content.tell()
            file.seek(member.header_offset + _ZIP_LENGTHS_AT)
            name_size, extra_size = struct.unpack("<HH", file.read(4))
            offset = member.header_offset + _ZIP_LENGTHS_AT + 4 + name_size + extra_size + header_size
            size = int(np.prod(shape))
            name = member.filename.removesuffix(".npy")
            arrays[name] = np.memmap(path, dtype, "r", offset, shape) if size else np.empty(shape, dtype)
    return arrays.__getitem__


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)

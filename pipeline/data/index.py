"""The shard index: where the image, the caption and the JSON of every sample lie inside the tars. Imports no torch.

`index.json` (see `pipeline.data.summary`) and `index.npz` lie beside the shards. A row takes 60 bytes and its key.
"""

import io
import struct
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
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
    check_shard_sizes,
    index_again,
    read_summary,
    summary_text,
)
from pipeline.errors import UserError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
"""In the order of preference where a sample has several; `image_extension` counts in it."""

_ZIP_LENGTHS_AT = 26
"""Where a member's header in a zip file has the sizes of its name and its extra field."""

_ROW_FIELDS = (
    "image_offset",
    "image_size",
    "image_extension",
    "caption_offset",
    "caption_size",
    "json_offset",
    "json_size",
)


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """One row per complete sample, in the order of the shards and of their members. N rows.

    Offsets and sizes are bytes in the shard's file. `json_offset` is -1 (and `json_size` 0) where a sample has no JSON.
    Keys are UTF-8: row i's is `key_bytes[key_offset[i]:key_offset[i + 1]]`.
    """

    shards: tuple[ShardEntry, ...]
    shard: NDArray[np.int32]  # [N], counts in `shards`
    image_offset: NDArray[np.int64]  # [N]
    image_size: NDArray[np.int64]  # [N]
    image_extension: NDArray[np.uint8]  # [N], counts in IMAGE_EXTENSIONS
    caption_offset: NDArray[np.int64]  # [N]
    caption_size: NDArray[np.int64]  # [N]
    json_offset: NDArray[np.int64]  # [N]
    json_size: NDArray[np.int64]  # [N]
    key_bytes: NDArray[np.uint8]  # [sum of key lengths]
    key_offset: NDArray[np.int64]  # [N + 1]

    def __len__(self) -> int:
        return len(self.shard)

    def key(self, sample: int) -> str:
        """The key of a row."""
        return self.key_bytes[self.key_offset[sample] : self.key_offset[sample + 1]].tobytes().decode()

    def extension(self, sample: int) -> str:
        """The extension of a row's image: jpg, jpeg, png or webp."""
        return IMAGE_EXTENSIONS[self.image_extension[sample]]

    def only(self, number: int) -> "ShardIndex":
        """The part of the index that describes shard `number`."""
        first, last = np.searchsorted(self.shard, [number, number + 1])
        keys = self.key_offset[first : last + 1]
        return ShardIndex(
            shards=(self.shards[number],),
            shard=np.zeros(last - first, np.int32),
            key_bytes=self.key_bytes[keys[0] : keys[-1]],
            key_offset=keys - keys[0],
            **{field: getattr(self, field)[first:last] for field in _ROW_FIELDS},
        )

    def select(self, names: Sequence[str], where: str) -> "ShardIndex":
        """Keep the named shards, in the order named; raises UserError where one was not indexed."""
        if tuple(names) == tuple(shard.name for shard in self.shards):
            return self
        numbers = {shard.name: number for number, shard in enumerate(self.shards)}
        IndexSummary(self.shards, "").select(names, where)
        return concatenate([self.only(numbers[name]) for name in names])


def concatenate(parts: Sequence[ShardIndex]) -> ShardIndex:
    """Join indices (at least one) into one; shards are renumbered, rows keep their order."""
    first_shards = np.cumsum([0, *(len(part.shards) for part in parts)])
    first_bytes = np.cumsum([0, *(len(part.key_bytes) for part in parts)])
    return ShardIndex(
        shards=tuple(shard for part in parts for shard in part.shards),
        shard=np.concatenate([part.shard + np.int32(first) for part, first in zip(parts, first_shards, strict=False)]),
        key_bytes=np.concatenate([part.key_bytes for part in parts]),
        key_offset=np.concatenate(
            [part.key_offset[:-1] + first for part, first in zip(parts, first_bytes, strict=False)] + [first_bytes[-1:]]
        ),
        **{field: np.concatenate([getattr(part, field) for part in parts]) for field in _ROW_FIELDS},
    )


def write_index(directory: Path, index: ShardIndex) -> None:
    """Write `index.npz`, then `index.json`, each beside its place and renamed. The same index gives the same bytes."""
    arrays = io.BytesIO()
    np.savez(arrays, allow_pickle=False, **{name: getattr(index, name) for name in _array_names()})
    summary = IndexSummary(shards=index.shards, arrays_sha256=sha256(arrays.getbuffer()).hexdigest())
    directory.mkdir(parents=True, exist_ok=True)
    _replace(directory / ARRAYS_FILE, arrays.getvalue())
    _replace(directory / SUMMARY_FILE, summary_text(summary).encode())


class SizeCheck(Enum):
    """Whether reading an index compares the local shards with it."""

    COMPARE = "compare"
    SKIP = "skip"


def read_index(directory: Path, *, root: Path | None = None, size_check: SizeCheck = SizeCheck.COMPARE) -> ShardIndex:
    """Open an index whose local shards lie under `root` (default: beside the index).

    Its arrays are mapped from the file: they take no memory that another process could not share or the system take
    back.

    Raises:
        UserError: there is no index, it is damaged, or a shard's size is not the one that was indexed.
    """
    summary = read_summary(directory)
    root = directory if root is None else root
    if size_check is SizeCheck.COMPARE:
        check_shard_sizes(summary, root)
    path = directory / ARRAYS_FILE
    try:
        with path.open("rb") as file:
            if file_digest(file, "sha256").hexdigest() != summary.arrays_sha256:
                raise ValueError(f"it is not the one that {SUMMARY_FILE} describes")
        index = ShardIndex(shards=summary.shards, **_mapped_arrays(path))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read ({error}); {index_again(root)}") from error
    if len(index) != summary.samples:
        raise UserError(f"{path} has {len(index)} rows and {SUMMARY_FILE} says {summary.samples}; {index_again(root)}")
    return index


def _mapped_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a file that `np.savez` wrote (each member stored, not compressed), mapped in place."""
    arrays: dict[str, NDArray[Any]] = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for name in _array_names():
            member = archive.getinfo(f"{name}.npy")
            with archive.open(member) as content:
                np.lib.format.read_magic(content)
                shape, _, dtype = np.lib.format.read_array_header_1_0(content)
                header_size = content.tell()
            file.seek(member.header_offset + _ZIP_LENGTHS_AT)
            name_size, extra_size = struct.unpack("<HH", file.read(4))
            offset = member.header_offset + _ZIP_LENGTHS_AT + 4 + name_size + extra_size + header_size
            size = int(np.prod(shape))
            arrays[name] = np.memmap(path, dtype, "r", offset, shape) if size else np.empty(shape, dtype)
    return arrays


def _array_names() -> tuple[str, ...]:
    return ("shard", *_ROW_FIELDS, "key_bytes", "key_offset")


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.{uuid4().hex}")
    partial.write_bytes(content)
    partial.replace(path)

"""Walks one shard: groups its members into samples, and says what is none. Imports no torch."""

import mmap
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from enum import StrEnum
from hashlib import sha256
from pathlib import Path

import numpy as np

from pipeline.data.index import ABSENT, IMAGE_EXTENSIONS, Members, ShardIndex
from pipeline.data.shards import is_url
from pipeline.data.summary import PICTURES, ShardContents, ShardEntry
from pipeline.data.tar import Damage, Member, read_members
from pipeline.errors import UserError


class LeftOut(StrEnum):
    """Why a sample is not in the index. `Damage` and `NotAFile` say what else can be wrong with a shard."""

    MISSING_CAPTION = "missing_caption"
    MISSING_IMAGE = "missing_image"
    DUPLICATE_KEY = "duplicate_key"
    DOTTED_KEY = "dotted_key"


class Skipped(StrEnum):
    """What is no sample, and is not meant to be one."""

    APPLE_DOUBLE = "apple_double"
    METADATA = "metadata"
    NO_KEY = "no_key"
    FURTHER_TEXT = "further_text"


MAX_TEXTS = 64
"""So many kinds of text are indexed of a shard: `txt`, `json` and the most frequent others."""

_USUAL_TEXTS = ("txt", "json")

MAX_TEXT_BYTES = 2**20
"""What is larger is no caption."""

_KEY = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
"""A key and its extension, as webdataset tells them apart: at the first dot of the base name."""

_METADATA = re.compile(r"__[^/]*__($|/)")

_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PK\x03\x04": "zip",
}

_Place = tuple[int, int, int]
"""The offset, the size and the digest of a member."""


@dataclass
class _Sample:
    key: str
    files: dict[str, _Place] = field(default_factory=dict)


def walk_shard(path: Path, name: str) -> ShardIndex:
    """Index one tar as the shard `name`. Members are grouped into samples as webdataset does.

    Files that follow each other and share all up to the first dot of their base name are one sample. What is damaged
    costs itself alone; the shard's entry counts it by reason.

    Raises:
        UserError: the file is no tar, or a compressed one.
    """
    with path.open("rb") as file:
        status = path.stat()
        if status.st_size == 0:
            raise _no_tar(path, "it is empty")
        with closing(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) as content:
            content.madvise(mmap.MADV_SEQUENTIAL)
            with memoryview(content) as archive:
                samples, left_out, skipped = _read_samples(archive, path)
    texts = Counter(extension for sample in samples for extension in sample.files if _is_text(extension))
    ranked = sorted(texts, key=lambda extension: (extension not in _USUAL_TEXTS, -texts[extension]))
    for extension in ranked[MAX_TEXTS:]:
        skipped[Skipped.FURTHER_TEXT] += texts[extension]
        del texts[extension]
    return _index_of(
        samples,
        sorted(texts),
        ShardEntry(
            name=name,
            bytes=status.st_size,
            mtime_ns=0 if is_url(name) else status.st_mtime_ns,
            samples=len(samples),
            contents={},
            left_out=dict(sorted(left_out.items())),
            skipped=dict(sorted(skipped.items())),
        ),
    )


def _read_samples(archive: memoryview, path: Path) -> tuple[list[_Sample], Counter[str], Counter[str]]:
    left_out: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    samples: list[_Sample] = []
    keys: set[str] = set()
    for sample in _grouped(archive, path, left_out, skipped):
        reason = _reason_against(sample, keys)
        if reason is None:
            keys.add(sample.key)
            samples.append(sample)
        else:
            left_out[reason] += _dotted_pictures(sample) if reason is LeftOut.DOTTED_KEY else 1
    return samples, left_out, skipped


def _grouped(archive: memoryview, path: Path, left_out: Counter[str], skipped: Counter[str]) -> Iterator[_Sample]:
    sample: _Sample | None = None
    found_any = False
    for found in read_members(archive):
        if not isinstance(found, Member):
            if isinstance(found, Damage) and not found_any and found in (Damage.DAMAGED_HEADER, Damage.TRUNCATED):
                _refuse_what_is_no_tar(archive, path)
            left_out[found] += 1
            continue
        found_any = True
        reason = _reason_to_skip(found.name)
        match = None if reason else _KEY.match(found.name)
        # What cannot be printed, a line's end among it, can be typed into no config.
        if match is None or not match[2] or not match[2].isprintable():
            skipped[reason or Skipped.NO_KEY] += 1
            continue
        key, extension = match[1], match[2].lower()
        if sample is None or key != sample.key:
            if sample is not None:
                yield sample
            sample = _Sample(key)
        if extension in sample.files:
            left_out[LeftOut.DUPLICATE_KEY] += 1
        elif found.size <= MAX_TEXT_BYTES or not _is_text(extension):
            sample.files[extension] = (found.offset, found.size, found.digest)
    if sample is not None:
        yield sample


def _reason_to_skip(name: str) -> Skipped | None:
    base = name.rpartition("/")[2]
    if base.startswith("._"):
        return Skipped.APPLE_DOUBLE
    if base.startswith("."):
        return Skipped.NO_KEY
    return Skipped.METADATA if _METADATA.match(name) else None


def _reason_against(sample: _Sample, keys: set[str]) -> LeftOut | None:
    if sample.key in keys:
        return LeftOut.DUPLICATE_KEY
    if sample.files.keys().isdisjoint(IMAGE_EXTENSIONS):
        return LeftOut.DOTTED_KEY if _dotted_pictures(sample) else LeftOut.MISSING_IMAGE
    return None if any(map(_is_text, sample.files)) else LeftOut.MISSING_CAPTION


def _dotted_pictures(sample: _Sample) -> int:
    """Split at its first dot, `photo.1.jpg` is the file `1.jpg` of the sample `photo`."""
    return sum(extension not in IMAGE_EXTENSIONS and not _is_text(extension) for extension in sample.files)


def _is_text(extension: str) -> bool:
    return extension.rpartition(".")[2] not in IMAGE_EXTENSIONS


def _refuse_what_is_no_tar(archive: memoryview, path: Path) -> None:
    """Raise `UserError` where an archive begins with no header and has none anywhere."""
    if any(isinstance(found, Member) for found in read_members(archive)):
        return
    beginning = bytes(archive[:8])
    kind = next((name for magic, name in _COMPRESSED.items() if beginning.startswith(magic)), None)
    raise _no_tar(path, f"it is compressed by {kind}" if kind else "no header of a tar is in it")


def _no_tar(path: Path, why: str) -> UserError:
    return UserError(f"data.shards: {path} is no uncompressed tar ({why}); give tars as img2dataset writes them")


def _index_of(samples: Sequence[_Sample], texts: Sequence[str], entry: ShardEntry) -> ShardIndex:
    keys = [sample.key.encode(errors="replace") for sample in samples]
    extensions = [next(each for each in IMAGE_EXTENSIONS if each in sample.files) for sample in samples]
    codes = [IMAGE_EXTENSIONS.index(extension) for extension in extensions]
    pictures = _members([sample.files[extension] for sample, extension in zip(samples, extensions, strict=True)])
    members = {text: _members([sample.files.get(text, (ABSENT, 0, 0)) for sample in samples]) for text in texts}
    key_offset = np.cumsum([0, *map(len, keys)], dtype=np.int64)
    key_bytes = np.frombuffer(b"".join(keys), np.uint8)
    image_extension = np.array(codes, np.uint8)
    contents = {PICTURES: ShardContents(len(samples), _digest(pictures, key_offset, key_bytes, image_extension))}
    contents |= {name: ShardContents(int(each.is_present.sum()), _digest(each)) for name, each in members.items()}
    return ShardIndex(
        shards=(replace(entry, contents=contents),),
        shard=np.zeros(len(samples), np.int32),
        image=pictures,
        image_extension=image_extension,
        texts=members,
        key_bytes=key_bytes,
        key_offset=key_offset,
    )


def _members(places: Sequence[_Place]) -> Members:
    offset, size, digest = zip(*places, strict=True) if places else ((), (), ())
    return Members(np.array(offset, np.int64), np.array(size, np.int64), np.array(digest, np.uint64))


def _digest(members: Members, *more: np.ndarray) -> str:
    """SHA-256 over where a kind of content lies and what it is."""
    digest = sha256()
    for array in (members.offset, members.size, members.digest, *more):
        digest.update(len(array).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).data)
    return digest.hexdigest()


def is_the_same(walked: ShardEntry, indexed: ShardEntry) -> bool:
    """Whether a shard holds what was indexed of it, at the same places; when it was written does not matter."""
    return (walked.bytes, walked.contents, walked.left_out) == (indexed.bytes, indexed.contents, indexed.left_out)

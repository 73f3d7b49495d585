"""Writes shards: the same samples give the same bytes. Imports torch only while it writes (webdataset does)."""

import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tarfile import BLOCKSIZE, RECORDSIZE
from typing import Any


@dataclass(frozen=True)
class SourceSample:
    """A captioned picture as a source gives it; `attributes` become the JSON. A key has no dot and is unique."""

    key: str
    image: bytes
    extension: str
    caption: str
    attributes: Mapping[str, Any]


def pack(sample: SourceSample) -> bytes:
    """A sample as it stands in a shard: the members of a tar, each with its header, without the end of a tar."""
    from webdataset.writer import TarWriter

    tar = io.BytesIO()
    # A fixed time and no owner: the bytes depend on the sample alone.
    with TarWriter(tar, user="", group="", mtime=0, encoder=False) as writer:
        writer.write({
            "__key__": sample.key,
            sample.extension: sample.image,
            "txt": sample.caption.encode(),
            "json": json.dumps(dict(sample.attributes), sort_keys=True).encode(),
        })  # fmt: skip
        size = writer.tarstream.offset
    return tar.getvalue()[:size]


def write_shards(directory: Path, samples: Iterable[SourceSample], shard_samples: int) -> list[Path]:
    """Write `00000.tar`, `00001.tar`, ... of at most `shard_samples` samples each; give their paths."""
    return write_packed(directory, map(pack, samples), shard_samples)


def write_packed(directory: Path, packed: Iterable[bytes], shard_samples: int) -> list[Path]:
    """Write the shards of samples that are packed already."""
    directory.mkdir(parents=True, exist_ok=True)
    remaining = iter(packed)
    paths: list[Path] = []
    while first := next(remaining, None):
        path = directory / f"{len(paths):05d}.tar"
        with path.open("wb") as file:
            file.write(first)
            file.writelines(islice(remaining, shard_samples - 1))
            end = file.tell() + 2 * BLOCKSIZE  # of zeros, which end a tar
            file.write(bytes(-(-end // RECORDSIZE) * RECORDSIZE - file.tell()))
        paths.append(path)
    return paths

"""Writes shards: the same samples give the same bytes. Imports torch only while it writes (webdataset does)."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class SourceSample:
    """A captioned picture as a source gives it; `attributes` become the JSON. A key has no dot and is unique."""

    key: str
    image: bytes
    extension: str
    caption: str
    attributes: Mapping[str, Any]


def write_shards(directory: Path, samples: Iterable[SourceSample], shard_samples: int) -> list[Path]:
    """Write `00000.tar`, `00001.tar`, ... of at most `shard_samples` samples each; give their paths."""
    from webdataset.writer import TarWriter

    directory.mkdir(parents=True, exist_ok=True)
    remaining = iter(samples)
    paths: list[Path] = []
    while chunk := list(islice(remaining, shard_samples)):
        path = directory / f"{len(paths):05d}.tar"
        # A fixed time and no owner: the bytes depend on the samples alone.
        with path.open("wb") as file, TarWriter(file, user="", group="", mtime=0, encoder=False) as writer:
            for sample in chunk:
                writer.write({
                    "__key__": sample.key,
                    sample.extension: sample.image,
                    "txt": sample.caption.encode(),
                    "json": json.dumps(dict(sample.attributes), sort_keys=True).encode(),
                })  # fmt: skip
        paths.append(path)
    return paths

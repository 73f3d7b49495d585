"""The data artifact: an index, each sample's split, and where the shards are. Imports no torch.

`shards_root` in `prepared.json` is relative to the artifact where the shards are in it (the artifact can be moved), and
absolute where they are the user's own.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.index import ShardIndex, read_index, write_index
from pipeline.data.reader import SampleReader
from pipeline.data.splits import Split
from pipeline.errors import UserError

SCHEMA_VERSION = 1
_LAYOUT_FILE = "prepared.json"
_SPLITS_FILE = "splits.npy"


@dataclass(frozen=True, eq=False)
class PreparedData:
    """Indexed samples with their splits; N samples."""

    index: ShardIndex
    split_of_sample: NDArray[np.uint8]  # [N], codes of Split
    reader: SampleReader

    def samples_in(self, split: Split | None) -> NDArray[np.int64]:
        """The rows of a split in the order of the index, int64; of every split where None."""
        if split is None:
            return np.arange(len(self.index), dtype=np.int64)
        return np.flatnonzero(self.split_of_sample == split.code).astype(np.int64)

    def split(self, sample: int) -> Split:
        """The split of a row."""
        return next(split for split in Split if split.code == self.split_of_sample[sample])

    def caption(self, sample: int) -> str:
        """The caption of a row."""
        return self.reader.caption(sample)

    def attributes(self, sample: int) -> dict[str, Any]:
        """The JSON's fields of a row; empty where it has none."""
        return self.reader.attributes(sample) or {}


def write_prepared(
    directory: Path,
    *,
    index: ShardIndex,
    splits: NDArray[np.uint8],
    shards_root: Path,
    cache_dir: Path | None = None,
    cache_bytes: int | None = None,
) -> None:
    """Write the artifact's files.

    `cache_dir` is where remote shards are kept (default: `cache` in the artifact), at most `cache_bytes` of them.

    Raises:
        UserError: no sample is in the training split.
    """
    if len(splits) != len(index):
        raise ValueError(f"{len(splits)} splits for {len(index)} samples")
    if not (splits == Split.TRAIN.code).any():
        raise UserError(
            f"data.validation_fraction leaves none of {len(splits)} samples to train on; make it smaller or add samples"
        )
    write_index(directory, index)
    np.save(directory / _SPLITS_FILE, splits.astype(np.uint8), allow_pickle=False)
    layout = {
        "schema_version": SCHEMA_VERSION,
        "shards_root": _relative(shards_root, directory),
        "cache_dir": "cache" if cache_dir is None else _relative(cache_dir, directory),
        "cache_bytes": cache_bytes,
        "samples": {split.value: int((splits == split.code).sum()) for split in Split},
    }
    (directory / _LAYOUT_FILE).write_text(json.dumps(layout, indent=1) + "\n", encoding="utf-8")


def read_prepared(directory: Path) -> PreparedData:
    """Open a data artifact.

    Raises:
        UserError: a file of it is missing or damaged, or a shard changed since.
    """
    try:
        layout = json.loads((directory / _LAYOUT_FILE).read_text(encoding="utf-8"))
        if layout["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema {layout['schema_version']}, this version reads {SCHEMA_VERSION}")
        root, cache_dir = directory / layout["shards_root"], directory / layout["cache_dir"]
        cache_bytes = layout.get("cache_bytes")
        splits = np.load(directory / _SPLITS_FILE, allow_pickle=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{directory} is no data artifact ({error}); delete it and run `prepare` again") from error
    index = read_index(directory, root=root)
    if splits.shape != (len(index),):
        raise UserError(
            f"{directory}: {len(splits)} splits for {len(index)} samples; delete it and run `prepare` again"
        )
    return PreparedData(index=index, split_of_sample=splits, reader=SampleReader(index, root, cache_dir, cache_bytes))


def _relative(path: Path, directory: Path) -> str:
    path, directory = path.absolute(), directory.absolute()
    return str(path.relative_to(directory)) if path.is_relative_to(directory) else str(path)

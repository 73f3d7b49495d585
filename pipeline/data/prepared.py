"""The data artifact: an index, each sample's split, and where captions are read. Imports no torch.

Shards that were made lie in the artifact. The user's own do not: each run says where it finds them (`ShardPlace`), and
the artifact names no place, so that data can move and others can use the artifact.
"""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.captions import MAIN_CAPTION, TEXT, CaptionSources, parse_sources
from pipeline.data.index import ShardIndex, read_index, write_index
from pipeline.data.mixture import Mixture
from pipeline.data.place import ShardPlace
from pipeline.data.reader import SampleReader
from pipeline.data.splits import Split
from pipeline.data.summary import IndexSummary, check_shard_sizes
from pipeline.errors import UserError

SCHEMA_VERSION = 2
SHARDS = "shards"
"""The directory of shards that were made."""

_LAYOUT_FILE = "prepared.json"
_SPLITS_FILE = "splits.npy"


@dataclass(frozen=True, eq=False)
class PreparedData:
    """Indexed samples with their splits; N samples. `mixture` says how often an epoch shows those of each source."""

    index: ShardIndex
    split_of_sample: NDArray[np.uint8]  # [N], codes of Split
    reader: SampleReader
    mixture: Mixture

    def samples_in(self, split: Split | None) -> NDArray[np.int64]:
        """The rows of a split in the order of the index, int64; of every split where None."""
        if split is None:
            return np.arange(len(self.index), dtype=np.int64)
        return np.flatnonzero(self.split_of_sample == split.code).astype(np.int64)

    def split(self, sample: int) -> Split:
        """The split of a row."""
        return next(split for split in Split if split.code == self.split_of_sample[sample])

    def caption(self, sample: int, draw: float = MAIN_CAPTION) -> str:
        """The caption of a row: of several, the one that a draw in [0, 1) chooses."""
        return self.reader.caption(sample, draw)

    def attributes(self, sample: int) -> dict[str, Any]:
        """The JSON's fields of a row; empty where it has none."""
        return self.reader.attributes(sample) or {}


def write_prepared(
    directory: Path,
    *,
    index: ShardIndex,
    splits: NDArray[np.uint8],
    captions: CaptionSources = TEXT,
    mixture: Mixture | None = None,
) -> None:
    """Write the artifact's files. The shards are in `shards` beside them, or wherever a run says.

    Raises:
        UserError: no sample is in the training split.
    """
    if len(splits) != len(index):
        raise ValueError(f"{len(splits)} splits for {len(index)} samples")
    file_names = [PurePosixPath(shard.name.partition("?")[0]).name for shard in index.shards]
    write_index(directory, index.renamed(file_names))
    np.save(directory / _SPLITS_FILE, splits.astype(np.uint8), allow_pickle=False)
    layout = {
        "schema_version": SCHEMA_VERSION,
        "samples": {split.value: int((splits == split.code).sum()) for split in Split},
        "captions": captions.weights(),
        "mixture": (mixture or Mixture.even(len(index.shards))).as_json(),
    }
    (directory / _LAYOUT_FILE).write_text(json.dumps(layout, indent=1) + "\n", encoding="utf-8")


def read_prepared(directory: Path, place: ShardPlace | None = None) -> PreparedData:
    """Open a data artifact whose shards are at a place, or in it.

    Raises:
        UserError: a file of it is missing or damaged, or a shard changed since.
    """
    try:
        layout = json.loads((directory / _LAYOUT_FILE).read_text(encoding="utf-8"))
        if layout["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema {layout['schema_version']}, this version reads {SCHEMA_VERSION}")
        captions = parse_sources(layout["captions"])
        mixture = Mixture.of_json(layout["mixture"])
        splits = np.load(directory / _SPLITS_FILE, allow_pickle=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{directory} is no data artifact ({error}); delete it and run `prepare` again") from error
    index = read_index(directory)
    if splits.shape != (len(index),):
        raise UserError(
            f"{directory}: {len(splits)} splits for {len(index)} samples; delete it and run `prepare` again"
        )
    if place is None:
        root = directory / SHARDS
        # What was made is made again, and indexed by nobody.
        remedy = shlex.join(["rm", "-r", str(directory)])
        reader = SampleReader(index, root, directory / "cache", captions=captions, remedy=remedy)
    else:
        index = index.renamed(_places(index, place))
        reader = SampleReader(
            index, Path("/"), place.cache_dir, place.cache_bytes, captions, remedy=f"{place.index_command} --again"
        )
    check_shard_sizes(IndexSummary(index.shards, ""), reader.root, reader.remedy)
    return PreparedData(index, splits, reader, mixture)


def _places(index: ShardIndex, place: ShardPlace) -> Sequence[str]:
    shards = place.expand()
    if len(shards) != len(index.shards):
        raise UserError(
            f"data.shards names {len(shards)} shards now, and {len(index.shards)} when this run was planned; put them "
            "back, or run the same command again"
        )
    return shards
